"""The JSON file beside a program: NAME.json says of NAME.pt2 or NAME.onnx what a program does not record.

    {"labels": ["cat", "dog"], "thresholds": 0.35, "preprocess": {"resize": [448, 448], ...}, "activation": "sigmoid"}

`thresholds` is a number, or a list of one for each label; 0.5 by default. `preprocess` has the fields of `Preprocess`.
`activation` makes probabilities of scores: `sigmoid`, the default, or `softmax`. The file is read without torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlperturb.errors import CheckpointError
from mlperturb.labels import Categories
from mlperturb.model.given import DEFAULT_THRESHOLD, Given
from mlperturb.model.metadata import ACTIVATIONS, Metadata, check_names, is_shallow, parse_json

SUFFIXES = {".pt2": "torch.export", ".onnx": "onnx"}  # with the name that a report has for the architecture
_FIELDS = ("labels", "thresholds", "preprocess", "activation")
_MAX_BYTES = 100_000_000
_EXAMPLE = '{"labels": ["cat", "dog"], "preprocess": {...}}'


def is_program(path: Path) -> bool:
    """Say whether a path has the suffix of a program."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_beside(path: Path, given: Given) -> Metadata:
    """Return what the JSON file beside a program says, without torch; `provenance` says where each thing comes from.

    Args:
        path: of the program.
        given: the label names and categories of the user, in place of those of the file, which may then be missing.

    Raises:
        CheckpointError: if the file is missing, damaged or has unknown fields, or names no labels.
    """
    beside = path.with_suffix(".json")
    values = {} if given.labels is not None and not beside.exists() else _read(beside, path)
    origin = dict.fromkeys(("labels", "thresholds", "preprocess", "readers"), beside.name)
    if given.labels is not None:
        names, origin["labels"] = given.labels, "given"
    elif isinstance(values.get("labels"), list):
        names = tuple(values["labels"])
    else:
        raise CheckpointError(f"expected a list of names as labels in {beside}, got {values.get('labels')!r:.80}")
    check_names(names, beside)
    activation = values.get("activation", "sigmoid")
    if activation not in ACTIVATIONS:
        expected = " or ".join(ACTIVATIONS)
        raise CheckpointError(f"expected {expected} as activation in {beside}, got {activation!r:.40}")
    fields = values.get("preprocess", {})
    if not isinstance(fields, dict):
        raise CheckpointError(f"expected the fields of Preprocess as preprocess in {beside}, got {fields!r:.80}")
    if "thresholds" not in values:
        origin["thresholds"] = f"{DEFAULT_THRESHOLD}: the file records none"
    thresholds = _thresholds(values.get("thresholds", DEFAULT_THRESHOLD), len(names), beside)
    return Metadata(
        SUFFIXES[path.suffix.lower()], names, thresholds, fields, {"origin": origin},
        categories=given.categories or Categories(), activation=activation,
    )  # fmt: skip


def describe_program(path: Path, given: Given) -> Metadata:
    """Return what is known of a program: what the file beside it says, with what the user gives.

    Raises:
        CheckpointError: see `read_beside`; or if neither names the preprocessing.
        UsageError: if the thresholds do not fit the labels.
    """
    metadata = read_beside(path, given)
    if not metadata.preprocess and given.preprocess is None:
        beside = path.with_suffix(".json")
        raise CheckpointError(f"expected the fields of Preprocess as preprocess in {beside}, got none")
    return given.complete(metadata)


def note_logits(metadata: Metadata, activation: str | None, path: Path) -> Metadata:
    """Return the metadata with where the logits come from, of a program that ended in this activation.

    Raises:
        CheckpointError: if the program ended in another activation than its JSON says.
    """
    if activation is None:
        return metadata
    if activation != metadata.activation:
        raise CheckpointError(
            f"{path} ends in a {activation}: expected `activation` {activation}, got {metadata.activation}"
        )
    origin = {**metadata.provenance["origin"], "logits": f"the input of the {activation} in which the program ends"}
    return replace(metadata, provenance={**metadata.provenance, "origin": origin})


def _read(beside: Path, path: Path) -> dict[str, Any]:
    """Return the JSON object of the file."""
    try:
        if not beside.is_file():
            raise CheckpointError(f"expected {beside.name} beside {path}, such as {_EXAMPLE}: no such file")
        if beside.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{beside} has {beside.stat().st_size} bytes, expected at most {_MAX_BYTES}")
        values = parse_json(beside.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"cannot read {beside}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{beside} is not JSON") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"expected a JSON object in {beside}, got {type(values).__name__}")
    if not is_shallow(values):
        raise CheckpointError(f"{beside} is nested too deep")
    unknown = sorted(values.keys() - set(_FIELDS))
    if unknown:
        raise CheckpointError(f"expected the fields {', '.join(_FIELDS)} in {beside}, got {unknown[0]!r:.80}")
    return values


def _thresholds(value: object, count: int, beside: Path) -> tuple[float, ...]:
    """Return L thresholds: one for all, or a list."""
    values = value if isinstance(value, list) else [value] * count
    numbers = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(values) != count or len(numbers) != count or not all(0 < one < 1 for one in numbers):
        raise CheckpointError(
            f"expected a number inside (0, 1), or {count}, as thresholds in {beside}, got {value!r:.80}"
        )
    return tuple(map(float, numbers))
