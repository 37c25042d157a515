"""Read checkpoints of several formats, write checkpoints of ours, and find the bundled checkpoint.

Our format is a safetensors file whose metadata describes the tensors, see `mlperturb.model.metadata`. A plain PyTorch
`state_dict` is read with `weights_only=True`; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.errors import CheckpointError
from mlperturb.labels import check_labels
from mlperturb.model.architectures import TIMM
from mlperturb.model.architectures import build_network as build_network
from mlperturb.model.architectures import check_architecture as check_architecture
from mlperturb.model.architectures import default_preprocess as default_preprocess
from mlperturb.model.bases import KEY, describe_base, differing, read_with_base
from mlperturb.model.metadata import FORMAT as FORMAT
from mlperturb.model.metadata import Metadata as Metadata
from mlperturb.model.metadata import read_metadata as read_metadata
from mlperturb.system.files import write_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mlperturb.model.classifier import Classifier
    from mlperturb.model.preprocess import Preprocess

BUNDLED = "voc-mobilenet-v2.safetensors"
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception v3 and GoogLeNet that only training uses


def bundled_checkpoint() -> Path:
    """Return the path of the checkpoint that comes with mlperturb, in a wheel or an editable install.

    Raises:
        CheckpointError: if the file is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "weights", package.parent / "weights"):
        if (folder / BUNDLED).is_file():
            return folder / BUNDLED
    raise CheckpointError(f"the bundled checkpoint {BUNDLED} is missing from this installation")


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
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, described)
    write_file(path, data)


def load_checkpoint(
    path: Path,
    *,
    architecture: str | None = None,
    labels: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    device: str = "cpu",
) -> tuple[Classifier, Metadata]:
    """Load a classifier, from our format, a plain state dict, or the folder of a timm model.

    Args:
        path: `.safetensors`, `.pt` or `.pth`, or a folder with a config.json.
        architecture: a torchvision classification model, or `timm/NAME`, for plain weights only.
        labels: the label names, for plain weights, and for a folder that has none.
        preprocess: how a photo becomes network input, in place of what the checkpoint says.
        device: where to put the classifier.

    Raises:
        CheckpointError: if the file is not a checkpoint, or does not fit the architecture and labels.
        UsageError: if `labels` is not a list of names.
    """
    from mlperturb.model.classifier import Classifier, fold_batch_norm
    from mlperturb.model.preprocess import Preprocess

    if path.is_dir():
        if architecture is not None:
            raise CheckpointError(f"expected no `architecture` for a folder, whose config.json names it: {path}")
        network, metadata = _load_folder(path, labels, preprocess)
        read = Preprocess.from_dict(metadata.preprocess)
        classifier = Classifier(fold_batch_norm(network), metadata.labels, metadata.thresholds, read)
        return classifier.to(device), metadata
    if architecture is None and labels is None:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not .safetensors: for plain weights give `architecture` and `labels`")
        metadata = read_metadata(path)
    elif architecture is None or labels is None:
        raise CheckpointError("expected both `architecture` and `labels` for plain weights")
    else:
        check_architecture(architecture)
        names = check_labels(labels)
        thresholds = (0.5,) * len(names)
        metadata = Metadata(architecture, names, thresholds, default_preprocess(architecture).to_dict())
    if preprocess is not None:
        metadata = replace(metadata, preprocess=preprocess.to_dict())
    build = partial(build_network, metadata.architecture, len(metadata.labels))
    network = _build_filled(build, path, len(metadata.labels))
    read = Preprocess.from_dict(metadata.preprocess)
    return Classifier(fold_batch_norm(network), metadata.labels, metadata.thresholds, read).to(device), metadata


def describe_folder(
    folder: Path, labels: Sequence[str] | None = None, preprocess: Preprocess | None = None
) -> Metadata:
    """Return what is known of the folder of a timm model; `provenance` says where each thing comes from.

    Args:
        folder: with a config.json.
        labels: the names, where the folder has none.
        preprocess: in place of what config.json says.

    Raises:
        CheckpointError: if it is not such a folder, names no labels, or has preprocessing that we cannot express.
    """
    from mlperturb.model.folders import read_config

    return _describe(folder, read_config(folder), labels, preprocess)


def _describe(
    folder: Path, config: Mapping[str, Any], labels: Sequence[str] | None, preprocess: Preprocess | None
) -> Metadata:
    """Return what is known of the folder of a timm model with this config.json."""
    from mlperturb.model.folders import find_weights, read_names, timm_preprocess

    names, weights = read_names(folder, config, labels), find_weights(folder)
    source = "config.json" if preprocess is None else "given"
    read = timm_preprocess(config) if preprocess is None else preprocess
    origin = {"weights": weights.name, **names.origin, "preprocess": source}
    architecture = TIMM + config["architecture"]
    return Metadata(architecture, names.labels, names.thresholds, read.to_dict(), {"origin": origin})


def _load_folder(
    folder: Path, labels: Sequence[str] | None, preprocess: Preprocess | None
) -> tuple[nn.Module, Metadata]:
    """Return the network of the folder of a timm model, and what is known of it."""
    from mlperturb.model.folders import build_timm, find_weights, read_config

    config = read_config(folder)
    metadata = _describe(folder, config, labels, preprocess)
    outputs = len(metadata.labels)
    return _build_filled(partial(build_timm, config, outputs), find_weights(folder), outputs), metadata


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
