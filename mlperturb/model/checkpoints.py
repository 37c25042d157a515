"""Read checkpoints of several formats, write checkpoints of ours, and find the bundled checkpoint.

Our format is a safetensors file whose metadata describes the tensors, see `mlperturb.model.metadata`. A plain PyTorch
`state_dict` is read with `weights_only=True`; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.errors import CheckpointError
from mlperturb.labels import Categories
from mlperturb.model.architectures import TIMM
from mlperturb.model.architectures import build_network as build_network
from mlperturb.model.architectures import check_architecture as check_architecture
from mlperturb.model.architectures import default_preprocess as default_preprocess
from mlperturb.model.bases import KEY, describe_base, differing, read_with_base
from mlperturb.model.beside import describe_program, is_program
from mlperturb.model.given import DEFAULT_THRESHOLD, Given
from mlperturb.model.metadata import FORMAT as FORMAT
from mlperturb.model.metadata import Metadata as Metadata
from mlperturb.model.metadata import read_metadata as read_metadata
from mlperturb.model.prompts import read_prompts, refuse_prompts
from mlperturb.system.files import write_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mlperturb.model.classifier import Classifier
    from mlperturb.model.preprocess import Preprocess

BUNDLED = {  # the files of weights/ by the names that stand for them; the first is the default
    "efficientnet-lite2": "voc-efficientnet-lite2.safetensors",
    "mobilenet-v2": "voc-mobilenet-v2.safetensors",
    "robust": "voc-mobilenet-v2-robust.safetensors",
    "paper": "voc-paper.safetensors",
}
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception v3 and GoogLeNet that only training uses


def bundled_checkpoint(name: str = "efficientnet-lite2") -> Path:
    """Return the path of a checkpoint that comes with mlperturb, in a wheel or an editable install.

    Args:
        name: a key of `BUNDLED`.

    Raises:
        CheckpointError: if the file is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / BUNDLED[name]).is_file():
            return folder / BUNDLED[name]
    raise CheckpointError(f"the bundled checkpoint {BUNDLED[name]} is missing from this installation")


def find_checkpoint(checkpoint: str | Path | None) -> Path:
    """Return the path of a checkpoint: the bundled one by default, or by its name, unless a file has that name.

    Raises:
        CheckpointError: if there is no such file or folder.
    """
    if checkpoint is None:
        return bundled_checkpoint()
    path = Path(checkpoint)
    if path.is_file() or path.is_dir():  # not a pipe, which would block
        return path
    if str(checkpoint) in BUNDLED:
        return bundled_checkpoint(str(checkpoint))
    known = "" if path.suffix or path.name != str(checkpoint) else f"; bundled are {', '.join(BUNDLED)}"
    raise CheckpointError(f"no such checkpoint: {path}{known}")


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Metadata, *, base: Path | None = None) -> None:
    """Write a checkpoint atomically; with a `base`, only the tensors that differ from it, see `model.bases`.

    Raises:
        OutputError: if the file cannot be written.
        CheckpointError: if `base` is not a whole checkpoint of the same architecture.
    """
    from safetensors.torch import save

    described = {
        "format": FORMAT,
        "architecture": metadata.architecture,
        **{
            name: json.dumps(getattr(metadata, name))
            for name in ("labels", "thresholds", "preprocess", "provenance", "metrics")
        },
    }
    if base is not None:
        tensors, described[KEY] = differing(tensors, base), describe_base(base)
    if metadata.activation != "sigmoid":
        described["activation"] = metadata.activation
    if metadata.categories.of:
        described["categories"] = json.dumps(asdict(metadata.categories))
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, described)
    write_file(path, data)


def load_checkpoint(
    path: Path,
    *,
    architecture: str | None = None,
    labels: Sequence[str] | Path | None = None,
    thresholds: object = None,
    preprocess: Preprocess | Mapping[str, Any] | Path | None = None,
    activation: str | None = None,
    prompt: str | Sequence[str] | None = None,
    device: str = "cpu",
) -> tuple[Classifier, Metadata]:
    """Load a classifier, from our format, a plain state dict, the folder of a timm or transformers model, or a program.

    Args:
        path: `.safetensors`, `.pt` or `.pth`; a folder with a config.json; or `.pt2` or `.onnx` with a JSON file beside
            it, see `mlperturb.model.beside`.
        architecture: a torchvision classification model, or `timm/NAME`, for plain weights only.
        labels: the label names, for plain weights, and for a folder that has none; a list, or a file.
        thresholds: in place of what the checkpoint says, see `given.read_thresholds`.
        preprocess: how a photo becomes network input, in place of what the checkpoint says; some of the fields, as a
            mapping or in a JSON file, replace those fields alone.
        activation: what makes probabilities of the network's scores, `sigmoid` or `softmax`, in place of what the
            checkpoint says.
        prompt: of a model of images and texts, see `mlperturb.model.prompts`.
        device: where to put the classifier.

    Raises:
        CheckpointError: if the file is not a checkpoint, or does not fit the architecture and labels.
        UsageError: if `labels`, `thresholds` or `preprocess` cannot be read.
    """
    from mlperturb.model.classifier import Classifier, fold_batch_norm
    from mlperturb.model.preprocess import Preprocess
    from mlperturb.model.softmax import apply_activation

    given = Given.of(labels, thresholds, preprocess, activation, prompt)
    if is_program(path):
        from mlperturb.model.programs import load_program

        classifier, metadata = load_program(path, _understand_program(path, architecture, given))
        return classifier.to(device), metadata
    metadata, build = _understand(path, architecture, given)
    read = Preprocess.from_dict(metadata.preprocess)
    network = apply_activation(fold_batch_norm(build()), metadata.activation, len(metadata.labels))
    classifier = Classifier(network, metadata.labels, metadata.thresholds, read, metadata.categories)
    if path.is_dir():
        from mlperturb.model.trial import look_once

        look_once(classifier, path)
    classifier.tried = True  # the network's code is a library's: attacks are known to work on it
    return classifier.to(device), metadata


def describe_checkpoint(
    path: Path,
    *,
    architecture: str | None = None,
    labels: Sequence[str] | Path | None = None,
    thresholds: object = None,
    preprocess: Preprocess | Mapping[str, Any] | Path | None = None,
    activation: str | None = None,
    prompt: str | Sequence[str] | None = None,
) -> Metadata:
    """Return what `load_checkpoint` understands of a checkpoint; `Metadata.origin` says where each thing comes from.

    Raises:
        CheckpointError: if it is not a checkpoint, names no labels, or has preprocessing that we cannot express.
        UsageError: if `labels`, `thresholds` or `preprocess` cannot be read.
    """
    given = Given.of(labels, thresholds, preprocess, activation, prompt)
    if is_program(path):
        return _understand_program(path, architecture, given)
    return _understand(path, architecture, given)[0]


def _understand_program(path: Path, architecture: str | None, given: Given) -> Metadata:
    """Return what is known of a program."""
    if architecture is not None:
        raise CheckpointError(f"expected no `architecture` for a program: {path}")
    refuse_prompts(given.prompts, path)
    return describe_program(path, given)


def _understand(path: Path, architecture: str | None, given: Given) -> tuple[Metadata, Callable[[], nn.Module]]:
    """Return what is known of a checkpoint, and the function that builds its network and fills it."""
    if path.is_dir():
        if architecture is not None:
            raise CheckpointError(f"expected no `architecture` for a folder, whose config.json names it: {path}")
        return _understand_folder(path, given)
    refuse_prompts(given.prompts, path)
    if architecture is None and given.labels is None:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not .safetensors: for plain weights give `architecture` and `labels`")
        metadata = given.complete(read_metadata(path))
    elif architecture is None or given.labels is None:
        raise CheckpointError("expected both `architecture` and `labels` for plain weights")
    else:
        check_architecture(architecture)
        metadata = _describe_plain(path, architecture, given.labels, given)
    build = partial(build_network, metadata.architecture, len(metadata.labels))
    return metadata, partial(_build_filled, build, path, len(metadata.labels))


def _describe_plain(path: Path, architecture: str, labels: tuple[str, ...], given: Given) -> Metadata:
    """Return what is known of plain weights."""
    thresholds = (DEFAULT_THRESHOLD,) * len(labels)
    read, source = given.merge(lambda: default_preprocess(architecture), f"the architecture {architecture}")
    origin = {"weights": path.name, "labels": "given", "preprocess": source, "readers": given.readers}
    origin["thresholds"] = f"{DEFAULT_THRESHOLD}: plain weights record none"
    metadata = Metadata(
        architecture,
        labels,
        thresholds,
        read.to_dict(),
        {"origin": origin},
        categories=given.categories or Categories(),
    )
    return replace(given, preprocess=None).complete(metadata)


def _understand_folder(folder: Path, given: Given) -> tuple[Metadata, Callable[[], nn.Module]]:
    """Return what is known of the folder of a timm or a transformers model, and the function that builds it, filled."""
    from mlperturb.model import folders

    config = folders.read_config(folder)
    names = folders.read_names(folder, config, given.labels, given.thresholds, given.categories)
    prompts, prompts_source = read_prompts(folder, config, given.prompts, names.labels)
    weights, outputs = folders.find_weights(folder), len(names.labels)
    if folders.is_transformers(config):
        from mlperturb.model.transformers_folders import TRANSFORMERS, build_transformers, transformers_preprocess

        architecture = TRANSFORMERS + config["model_type"]
        readers = given.readers if given.readers == "given" else "the two backends of transformers, and float"
        read, source = given.merge(lambda: transformers_preprocess(folder), "the image processor of the folder")
        build: Callable[[], nn.Module] = partial(build_transformers, config, names.labels, weights)
        if prompts:
            from mlperturb.model.towers import build_prompted

            build = partial(build_prompted, config, names.labels, prompts, weights)
    else:
        architecture, readers = TIMM + config["architecture"], given.readers
        read, source = given.merge(lambda: folders.timm_preprocess(config), "config.json")
        build = partial(_build_filled, partial(folders.build_timm, config, outputs), weights, outputs)
    activation, activation_source = folders.read_activation(config)
    origin = {"weights": weights.name, **names.origin, **prompts_source, "preprocess": source, "readers": readers}
    if given.activation is not None or activation != "sigmoid":
        origin["activation"] = activation_source if given.activation is None else "given"
    metadata = Metadata(
        architecture, names.labels, names.thresholds, read.to_dict(), {"origin": origin},
        categories=names.categories, activation=given.activation or activation, prompts=prompts,
    )  # fmt: skip
    return metadata, build


def _build_filled(build: Callable[..., nn.Module], path: Path, outputs: int) -> nn.Module:
    """Return the network that `build` makes, with the weights of a file.

    Raises:
        CheckpointError: if the file does not fit the network.
    """
    network = build(meta=True)
    _fill(network, read_tensors(path), path, outputs)
    if any(buffer.is_meta for buffer in network.buffers()):  # some timm models have buffers that are not saved
        filled = network.state_dict()
        network = build()
        network.load_state_dict(filled)
    return network


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors`, `.pt` or `.pth` file, without executing anything in it.

    Raises:
        CheckpointError: if the file is missing or damaged, or has anything but named tensors.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            return read_with_base(path)
        _refuse_bomb(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle protocol; the content is checked below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch's weights-only reader may raise anything at damaged or unsafe data
        hint = "expected a file of tensors alone, as torch.save(model.state_dict(), FILE) writes it"
        raise CheckpointError(f"{path} is not a plain state dict (weights only): {hint}") from error
    for inner in ("state_dict", "averaged"):  # wrappers of training scripts, and of our own .resume.pt
        if isinstance(loaded, dict) and isinstance(loaded.get(inner), dict):
            loaded = loaded[inner]
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(value, torch.Tensor) for value in loaded.values())
    ):
        raise CheckpointError(f"{path} is not a state dict: expected named tensors, got {type(loaded).__name__}")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def _refuse_bomb(path: Path) -> None:
    """Refuse a file of `torch.save` that would take more memory than it has bytes.

    Raises:
        CheckpointError: if its archive is compressed, or its pickle makes arrays of zeros.
    """
    import io
    import pickletools
    import zipfile

    with path.open("rb") as stream:
        pickles: list[Any] = [stream]
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
                if sum(member.file_size for member in members) > path.stat().st_size:
                    raise CheckpointError(f"{path} is compressed: expected an archive as torch.save writes it")
                pickles = [
                    io.BytesIO(archive.read(member)) for member in members if member.filename.lower().endswith(".pkl")
                ]
        else:
            stream.seek(0)
        for source in pickles:
            try:
                for _ in range(4 if source is stream else 1):  # the old format has three pickles before the tensors'
                    for opcode, argument, _ in pickletools.genops(source):
                        if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                            raise CheckpointError(f"{path} is not a state dict: expected named tensors, got bytearray")
            except ValueError:  # torch reports the damage
                continue


def _fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, outputs: int) -> None:
    """Put a file's tensors into a network built on the meta device.

    Raises:
        CheckpointError: if a name is missing or unexpected, or a shape differs; the message names them.
    """
    import torch

    wanted = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(_AUXILIARY)}
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(given) - optional)
    unexpected = sorted(set(given) - set(wanted))
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not fit the architecture: missing {_some(missing)}, unexpected {_some(unexpected)}"
        )
    wrong = [name for name, tensor in given.items() if tensor.shape != wanted[name].shape]
    if wrong:
        name = wrong[-1]
        got, expected = tuple(given[name].shape), tuple(wanted[name].shape)
        if len(wrong) <= 2 and got and got[1:] == expected[1:] and expected[0] == outputs:
            raise CheckpointError(f"expected a head of {outputs} outputs, one for each label, got {got[0]} in {path}")
        raise CheckpointError(f"{path} does not fit the architecture: expected {name} of shape {expected}, got {got}")
    full = {name: torch.zeros((), dtype=torch.long) for name in optional}
    for name, tensor in given.items():
        numbers = _cast(tensor, wanted[name].dtype)
        if numbers is None:
            kind = "a meta tensor" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}".replace("torch.", "")
            raise CheckpointError(f"{path}: expected plain real numbers in {name}, got {kind}")
        full[name] = numbers
    network.load_state_dict(full, assign=True)


def plain_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors of plain real numbers, floats as float32.

    Raises:
        CheckpointError: if one is of another kind; the message names it and the file.
    """
    import torch

    found = {}
    for name, tensor in tensors.items():
        numbers = _cast(tensor, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if numbers is None:
            raise CheckpointError(f"{path}: expected plain real numbers in {name}, got {tensor.layout}, {tensor.dtype}")
        found[name] = numbers
    return found


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a tensor in this dtype; None unless it holds plain real numbers."""
    import torch

    if tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
        return None
    try:
        return tensor.to(dtype)
    except RuntimeError:  # packed bits raise it, or its subclass NotImplementedError
        return None


def _some(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
