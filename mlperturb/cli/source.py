"""A checkpoint named on the command line, or by a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.labels import Categories, split_names
from mlperturb.model.beside import is_program, read_beside
from mlperturb.model.given import DEFAULT_THRESHOLD
from mlperturb.model.hub import Fetched, fetch, is_hub
from mlperturb.model.readers import DEFAULT_READERS, TRANSFORMERS_READERS
from mlperturb.system.files import parse_local

if TYPE_CHECKING:
    from mlperturb.model.classifier import Classifier


@dataclass(frozen=True)
class Source:
    """A checkpoint named on the command line; its labels are known before torch is loaded.

    Attributes:
        path: of the file or folder.
        architecture: of plain weights.
        names: the label names that the user gives, or their file.
        labels: the L label names.
        readers: the names of the readers that the checkpoint or --preprocess names.
        categories: of the labels, if they have any.
        thresholds: as the user gives them, see `given.read_thresholds`.
        preprocess: the fields that the user gives.
        notes: what is assumed for want of a record, a line each.
        activation: what makes probabilities of the scores, as the user gives it.
        prompt: texts with `{}` in place of a label, as the user gives them.
        fetched: the folder of the hub that `path` is, if it is.
    """

    path: Path
    architecture: str | None
    names: tuple[str, ...] | Path | None
    labels: tuple[str, ...]
    readers: tuple[str, ...] = DEFAULT_READERS
    categories: Categories = Categories()
    thresholds: object = None
    preprocess: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    activation: str | None = None
    prompt: tuple[str, ...] | None = None
    fetched: Fetched | None = None

    @property
    def name(self) -> str:
        """The name of the checkpoint, of the hub with its commit."""
        return str(self.path) if self.fetched is None else self.fetched.name

    @property
    def origin(self) -> dict[str, str]:
        """What a report's settings say of the checkpoint: the commit of the hub."""
        return {} if self.fetched is None else {"commit": self.fetched.commit}

    @property
    def said(self) -> dict[str, Any]:
        """What the user says of the checkpoint, as `load_checkpoint` and `describe_checkpoint` take it."""
        return {
            "architecture": self.architecture,
            "labels": self.names,
            "thresholds": self.thresholds,
            "preprocess": self.preprocess,
            "activation": self.activation,
            "prompt": self.prompt,
        }

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file of the weights."""
        from mlperturb.system.files import file_sha256

        return file_sha256(_weights(self.path))

    def load(self, device: str) -> tuple[Classifier, dict[str, Any]]:
        """Load the classifier; return it with its description for a report."""
        from mlperturb.model.checkpoints import load_checkpoint

        classifier, metadata = load_checkpoint(self.path, device=device, **self.said)
        return classifier, {
            "checkpoint": self.name,
            "sha256": self.sha256,
            "architecture": metadata.architecture,
            "labels": list(metadata.labels),
            "thresholds": list(metadata.thresholds),
            "preprocess": metadata.preprocess,
            "origin": metadata.origin,
            "activation": metadata.activation,
            **({"prompts": list(metadata.prompts)} if metadata.prompts else {}),
        }


def _weights(checkpoint: Path) -> Path:
    """Return the file of the weights of a checkpoint, a file or a folder."""
    from mlperturb.model.folders import find_weights

    return find_weights(checkpoint) if checkpoint.is_dir() else checkpoint


def _readers_of(preprocess: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a checkpoint's readers; what is wrong with them is said when it is loaded."""
    names = preprocess.get("readers")
    known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return tuple(names) if known and names else DEFAULT_READERS


_NEEDLESS = "; a .safetensors checkpoint that `mlperturb train` wrote needs neither"


def find_source(
    checkpoint: Path | None,
    arch: str | None = None,
    labels: str | Path | None = None,
    thresholds: str | None = None,
    preprocess: Path | None = None,
    activation: str | None = None,
    prompt: Sequence[str] | None = None,
) -> Source:
    """Find the checkpoint, the bundled one by default, and read its label names and what the user says of it.

    Raises:
        CheckpointError: if the file is missing or is not a checkpoint.
        UsageError: if only one of --arch and --labels is given, or a file or a value cannot be read.
    """
    from mlperturb.model.given import check_activation, read_preprocess
    from mlperturb.model.prompts import check_prompts, refuse_prompts

    chosen = None if activation is None else check_activation(activation)
    fetched = fetch(str(checkpoint)) if is_hub(checkpoint) else None
    checkpoint = checkpoint if fetched is None else fetched.folder
    if takes_names(checkpoint):
        assert checkpoint is not None
        prompts = check_prompts(prompt) if prompt else None
        source = _find_prompted(checkpoint, arch, _read_names(labels), thresholds, chosen, prompts)
    else:
        source = _find_named(checkpoint, arch, _label_file(labels), thresholds, chosen)
        refuse_prompts(prompt or None, source.path)
    source = replace(source, fetched=fetched)
    if preprocess is not None:
        fields = read_preprocess(preprocess)
        readers = _readers_of(fields) if "readers" in fields else source.readers
        source = replace(source, preprocess=fields, readers=readers)
    return source


def takes_names(checkpoint: Path | None) -> bool:
    """Say whether a checkpoint is the folder of a model of images and texts, whose labels a user names.

    Raises:
        CheckpointError: if it is a folder without a config.json that we know.
    """
    from mlperturb.model.folders import read_config
    from mlperturb.model.prompts import is_prompted

    return checkpoint is not None and checkpoint.is_dir() and is_prompted(read_config(checkpoint))


def _read_names(labels: str | Path | None) -> Path | tuple[str, ...] | None:
    """Return the file of label names, or the names themselves, separated by commas.

    Raises:
        UsageError: if there is no such file, and the text does not look like names.
    """
    if labels is None or isinstance(labels, Path) or _is_file(parse_local(labels)):
        return None if labels is None else parse_local(labels)
    names = tuple(split_names([labels]))
    if not names or len(set(names)) != len(names):
        raise UsageError(f"expected a file or distinct names for --labels, got {labels!r:.80}")
    if len(names) == 1 and Path(names[0]).suffix.lower() in (".txt", ".csv", ".tsv"):
        raise UsageError(f"no such file: {labels}")
    return names


def _label_file(labels: str | Path | None) -> Path | None:
    """Return the file of label names.

    Raises:
        UsageError: if the value is names instead.
    """
    if labels is None or isinstance(labels, Path):
        return labels
    path = parse_local(labels)
    if "," in labels and not _is_file(path):
        raise UsageError(
            f"no such file: {labels:.120}; names in place of a file are for a model of images and texts, CLIP or SigLIP"
        )
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text too long for the name of a file
        return False


def _find_prompted(
    folder: Path,
    arch: str | None,
    names: Path | tuple[str, ...] | None,
    thresholds: str | None,
    activation: str | None,
    prompts: tuple[str, ...] | None,
) -> Source:
    """Return the folder of a model of images and texts, with the labels that the user names.

    Raises:
        CheckpointError: if the model cannot be a classifier, or nothing is named.
        UsageError: if --arch is given, or the names, prompts or thresholds are wrong.
    """
    from mlperturb.model.folders import read_config
    from mlperturb.model.prompts import DEFAULT_PROMPT, read_prompts

    source = _find_folder(folder, arch, names, thresholds, activation)
    read_prompts(folder, read_config(folder), prompts, source.labels)
    notes = source.notes
    if prompts is None:
        notes += (f"the text for each label is {DEFAULT_PROMPT!r}; --prompt sets another",)
    return replace(source, prompt=prompts, notes=notes)


def _find_named(
    checkpoint: Path | None, arch: str | None, labels: Path | None, thresholds: str | None, activation: str | None
) -> Source:
    """Find the checkpoint, and read its label names and thresholds."""
    from mlperturb.model.checkpoints import find_checkpoint, read_metadata
    from mlperturb.model.given import read_label_file, read_thresholds

    if checkpoint is not None and checkpoint.is_dir():
        return _find_folder(checkpoint, arch, labels, thresholds, activation)
    if checkpoint is not None and is_program(checkpoint):
        return _find_program(checkpoint, arch, labels, thresholds, activation)
    given = {"--arch": arch, "--labels": labels, "--checkpoint": checkpoint}
    missing = [option for option, value in given.items() if value is None]
    if missing and (arch is not None or labels is not None):
        needless = "" if checkpoint is None or checkpoint.suffix != ".safetensors" else _NEEDLESS
        raise UsageError(
            "expected --checkpoint, --arch and --labels together for plain weights, "
            f"got no {' and no '.join(missing)}{needless}"
        )
    path = find_checkpoint(checkpoint)
    if labels is None:
        if path.suffix != ".safetensors":
            raise UsageError(
                f"expected a .safetensors checkpoint, got {path}: for plain weights give --arch and --labels"
            )
        metadata = read_metadata(path)
        names, categories, readers = metadata.labels, metadata.categories, _readers_of(metadata.preprocess)
        notes = _notes(path, activation or metadata.activation)
        source = Source(path, None, None, names, readers, categories, thresholds, notes=notes, activation=activation)
    else:
        names, categories = read_label_file(labels)
        notes = _notes(path, activation or "sigmoid", assumed=thresholds is None)
        source = Source(
            path, arch, labels, names, DEFAULT_READERS, categories, thresholds, notes=notes, activation=activation
        )
    if thresholds is not None:
        read_thresholds(thresholds).of(source.labels, source.categories)  # a wrong value is reported at once
    return source


def _find_folder(
    folder: Path,
    arch: str | None,
    labels: Path | tuple[str, ...] | None,
    thresholds: str | None,
    activation: str | None,
) -> Source:
    """Return the folder of a timm or a transformers model, with its label names or those of a file.

    Raises:
        CheckpointError: if it is not such a folder, or names no labels.
        UsageError: if --arch is given, or the file of label names or the thresholds cannot be read.
    """
    from mlperturb.model.folders import is_transformers, read_activation, read_config, read_names
    from mlperturb.model.given import Given

    if arch is not None:
        raise UsageError(f"expected no --arch for a folder, whose config.json names it: {folder}")
    given = Given.of(labels, thresholds, None)
    config = read_config(folder)
    found = read_names(folder, config, given.labels, given.thresholds, given.categories)
    notes = _notes(folder, activation or read_activation(config)[0], assumed=found.assumed)
    readers = TRANSFORMERS_READERS if is_transformers(config) else DEFAULT_READERS
    return Source(
        folder, None, labels, found.labels, readers, found.categories, thresholds, notes=notes, activation=activation
    )


def _find_program(
    path: Path, arch: str | None, labels: Path | None, thresholds: str | None, activation: str | None
) -> Source:
    """Return a program, with the label names of the JSON file beside it or those of a file.

    Raises:
        CheckpointError: if the program or its JSON file is missing or damaged.
        UsageError: if --arch is given, or the file of label names or the thresholds cannot be read.
    """
    from mlperturb.model.checkpoints import find_checkpoint
    from mlperturb.model.given import Given

    if arch is not None:
        raise UsageError(f"expected no --arch for a program: {path}")
    given = Given.of(labels, thresholds, None)
    found = given.complete(read_beside(find_checkpoint(path), given))
    readers = _readers_of(found.preprocess)
    assumed = found.origin["thresholds"].startswith(f"{DEFAULT_THRESHOLD}:")
    notes = _notes(path, activation or found.activation, assumed=assumed)
    return Source(
        path, None, labels, found.labels, readers, found.categories, thresholds, notes=notes, activation=activation
    )


def _notes(path: Path, activation: str, *, assumed: bool = False) -> tuple[str, ...]:
    """Return a line on a softmax network, or on thresholds that are `assumed` for want of a record."""
    if activation != "sigmoid":
        return (
            f"{path} is a softmax network: the probabilities of its labels sum to 1, and at a threshold of 0.5 a photo "
            "has at most one label",
        )
    if assumed:
        return (f"{path} records no thresholds: {DEFAULT_THRESHOLD} is used for every label; --thresholds sets others",)
    return ()


def classifier_key(described: dict[str, Any]) -> dict[str, Any]:
    """Return what decides results beside the weights, of a classifier's description, for the key of a journal."""
    from mlperturb.run.outputs import fingerprint

    values = {name: fingerprint([str(one) for one in described[name]]) for name in ("labels", "thresholds")}
    softmax = {"activation": "softmax"} if described.get("activation") == "softmax" else {}
    prompts = {"prompts": described["prompts"]} if described.get("prompts") else {}
    return {**values, "preprocess": described["preprocess"], **softmax, **prompts}


def named_source(described: dict[str, Any]) -> Source:
    """Find the checkpoint that a report describes; only a file with the recorded SHA-256 is opened, nothing is fetched.

    Raises:
        UsageError: if the checkpoint is not found, or is another.
    """
    from mlperturb.model.checkpoints import BUNDLED, bundled_checkpoint, read_metadata
    from mlperturb.system.files import is_file_of

    names, named = tuple(described["labels"]), described["checkpoint"]
    fetched = fetch(named, fetched_before=True) if is_hub(named) else None
    path = Path(named) if fetched is None else fetched.folder
    if not path.exists():
        found = [path for path in map(bundled_checkpoint, BUNDLED) if is_file_of(path, described["sha256"], None)]
        path = found[0] if found else path
        if not found:
            raise UsageError(f"the report's checkpoint {described['checkpoint']} does not exist: give --checkpoint")
    check_attacked(path, described["sha256"])
    said = {"thresholds": described["thresholds"], "preprocess": described.get("preprocess")}
    said["activation"] = described.get("activation")
    if path.is_dir() or is_program(path):
        prompt = tuple(described["prompts"]) if described.get("prompts") else None
        return Source(path, None, names, names, **said, prompt=prompt, fetched=fetched)
    try:
        metadata = read_metadata(path)
        recorded = {**metadata.__dict__, "thresholds": list(metadata.thresholds)}
        said = {name: None if value == recorded[name] else value for name, value in said.items()}
        return Source(path, None, None, metadata.labels, _readers_of(metadata.preprocess), metadata.categories, **said)
    except CheckpointError:  # plain weights
        return Source(path, described["architecture"], names, names, **said)


def check_attacked(checkpoint: Path, digest: object) -> None:
    """Refuse a checkpoint that is not the one of a report, which has this SHA-256.

    Raises:
        UsageError: if it is another.
    """
    from mlperturb.system.files import is_file_of

    if not (isinstance(digest, str) and is_file_of(_weights(checkpoint), digest, None)):
        raise UsageError(f"{checkpoint} is not the checkpoint that was attacked ({digest!s:.12}...)")
