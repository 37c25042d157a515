"""The metadata of a checkpoint: what is known of a classifier beside its weights.

The header of a safetensors file is JSON and is read here without torch, so that label names can be checked and shown at
once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlperturb.errors import CheckpointError
from mlperturb.labels import Categories

FORMAT = "mlperturb.checkpoint/1"
ACTIVATIONS = ("sigmoid", "softmax")
_MAX_HEADER = 100_000_000  # bytes; safetensors' own limit
_MAX_LABELS = 100_000
_MAX_DEPTH = 50  # levels of nested metadata; the JSON writer has a limit too


@dataclass(frozen=True)
class Metadata:
    """The metadata of a checkpoint.

    Attributes:
        architecture: the name of a torchvision classification model; or `timm/` and the name of a timm model; or
            `transformers/` and the kind of a transformers model; `torch.export` or `onnx` of a program.
        labels: L names.
        thresholds: L decision thresholds on the probabilities, inside (0, 1).
        preprocess: the fields of `preprocess.Preprocess`.
        provenance: command, data, initial weights and their licence.
        metrics: the metrics of Table III, by data set and by label.
        categories: of the labels, if they have any.
        activation: what makes probabilities of the network's scores: `sigmoid`, or `softmax`, see
            `mlperturb.model.softmax`.
        prompts: of a model of images and texts, texts with `{}` in place of the label; empty for all others.
    """

    architecture: str
    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    preprocess: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    categories: Categories = Categories()
    activation: str = "sigmoid"
    prompts: tuple[str, ...] = ()

    @property
    def origin(self) -> dict[str, str]:
        """The file, field or option that the labels, thresholds and so on come from, as far as it is known."""
        found = self.provenance.get("origin")
        return found if isinstance(found, dict) else {}


def read_metadata(path: Path) -> Metadata:
    """Read the metadata of a checkpoint of ours, without torch.

    Raises:
        CheckpointError: if the file is missing, is not a safetensors file, or has no metadata of ours.
    """
    header = _read_header(path)
    values = header.get("__metadata__")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has no mlperturb metadata: expected format {FORMAT}; "
            "for plain weights give `architecture` and `labels`"
        )
    try:
        labels = tuple(_list(parse_json(values["labels"])))
        thresholds = tuple(float(value) for value in _list(parse_json(values["thresholds"])))
        rest = {name: parse_json(values[name]) for name in ("preprocess", "provenance", "metrics")}
        architecture, activation = str(values["architecture"]), values.get("activation", "sigmoid")
        categories = _read_categories(parse_json(values["categories"])) if "categories" in values else Categories()
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} has damaged metadata: {type(error).__name__}: {error}") from error
    check_names(labels, path)
    if len(thresholds) != len(labels) or not all(0 < threshold < 1 for threshold in thresholds):
        raise CheckpointError(f"{path} has damaged metadata: expected {len(labels)} thresholds inside (0, 1)")
    if not is_shallow(rest):
        raise CheckpointError(f"{path} has damaged metadata: nested more than {_MAX_DEPTH} deep")
    if not all(isinstance(value, dict) for value in rest.values()):
        raise CheckpointError(f"{path} has damaged metadata: expected objects, got {rest!r:.200}")
    if len(categories.of) not in (0, len(labels)):
        raise CheckpointError(f"{path} has damaged metadata: expected {len(labels)} categories")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{path} has damaged metadata: expected activation {' or '.join(ACTIVATIONS)}")
    return Metadata(architecture, labels, thresholds, **rest, categories=categories, activation=activation)


def _read_categories(value: object) -> Categories:
    """Return categories as `save_checkpoint` writes them."""
    if not isinstance(value, dict):
        raise TypeError(f"expected categories, got {value!r:.80}")
    names = value["names"]
    if not isinstance(names, dict):
        raise TypeError(f"expected names of categories, got {names!r:.80}")
    return Categories(tuple(map(str, _list(value["of"]))), {str(key): str(name) for key, name in names.items()})


def check_names(labels: Sequence[object], path: Path) -> None:
    """Refuse what a file has for label names, unless they are distinct names.

    Raises:
        CheckpointError: if they are not, or too many.
    """
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise CheckpointError(f"{path} has damaged metadata: expected distinct label names")
    if len(labels) > _MAX_LABELS:
        raise CheckpointError(f"{path} names {len(labels)} labels, expected at most {_MAX_LABELS}")


def _read_header(path: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file."""
    try:
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
                raise CheckpointError(f"{path} is not a safetensors file: its header length is wrong")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header


def parse_json(text: str) -> Any:
    """Parse JSON; numbers that are not finite, which strict JSON does not have, become null."""

    def number(digits: str) -> float | None:
        return float(digits) if math.isfinite(float(digits)) else None

    return json.loads(text, parse_float=number, parse_constant=lambda _: None)


def is_shallow(value: object, levels: int = _MAX_DEPTH) -> bool:
    """Say whether a value nests at most `levels` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(is_shallow(one, levels - 1) for one in inner)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r:.80}")
    return value
