"""Folders of timm models, as timm's `save_for_hf` writes them: config.json beside model.safetensors.

config.json of transformers models is read here too; see `mlperturb.model.transformers_folders` for the rest of those.

The labels stand in `selected_tags.csv` (taggers) or in config.json. Names and thresholds are read without torch. What a
folder does not record is asked for; where a default is taken, `Metadata.provenance` says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.labels import Categories, check_labels
from mlperturb.model.architectures import create_timm
from mlperturb.model.given import DEFAULT_THRESHOLD, Thresholds, read_table, read_threshold_table
from mlperturb.model.prompts import ACTIVATION, is_prompted, need_labels
from mlperturb.model.untrusted import bounded, check_values, read_json

if TYPE_CHECKING:
    from torch import nn

    from mlperturb.model.preprocess import Preprocess

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Names:
    """The labels of a folder.

    Attributes:
        labels: L names.
        thresholds: L decision thresholds on the probabilities, inside (0, 1).
        origin: the file or field that each comes from, for `Metadata.provenance`.
        categories: of the labels, if a table has them.
        assumed: whether the thresholds are the default, because nothing records any.
    """

    labels: tuple[str, ...]
    thresholds: tuple[float, ...]
    origin: dict[str, str]
    categories: Categories = Categories()
    assumed: bool = False


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder of a timm or a transformers model.

    Raises:
        CheckpointError: if it is missing or damaged, names code of its own, or describes no such model.
    """
    path = folder / "config.json"
    config = read_json(path)
    kinds = [config.get("architecture"), config.get("model_type")]
    if not any(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(
            f"expected `architecture`, the name of a timm model, or `model_type`, of a transformers model, in {path}"
        )
    check_values(config, path)
    return config


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Say whether config.json describes a model of transformers, not of timm."""
    return not isinstance(config.get("architecture"), str)


def read_activation(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return what makes probabilities of the scores, `sigmoid` or `softmax`, and where that comes from.

    Transformers records the kind of a problem, and takes a softmax where nothing is recorded. timm records nothing. Of
    models of images and texts, CLIP was trained with a softmax, SigLIP with sigmoids.
    """
    if not is_transformers(config):
        return "sigmoid", "sigmoid: timm records none"
    if is_prompted(config):
        return ACTIVATION[config["model_type"]], f"model_type {config['model_type']} of config.json"
    kind = config.get("problem_type")
    activation = "sigmoid" if kind == "multi_label_classification" else "softmax"
    return activation, f"problem_type {kind!s:.60} of config.json"


def read_names(
    folder: Path,
    config: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
    categories: Categories | None = None,
) -> Names:
    """Return the labels, categories and thresholds of a folder.

    Thresholds stand in the column `best_threshold` of selected_tags.csv, or in thresholds.csv, by category or label.

    Args:
        folder: of a timm model.
        config: its config.json.
        labels: the names, in place of the folder's.
        thresholds: in place of the folder's.
        categories: of the names given.

    Raises:
        CheckpointError: if the folder names no labels and none are given, or their number or thresholds are wrong.
        UsageError: if the thresholds given do not fit the labels.
    """
    path = folder / "selected_tags.csv"
    rows: list[dict[str, str]] = []
    if is_prompted(config):
        need_labels(folder, config, labels)
    if labels is not None:
        names, origin = check_labels(labels), "given"
    elif path.is_file():
        rows = _read_tags(path)
        names, origin = tuple(row.get("name") or "" for row in rows), path.name
    else:
        names, origin = _config_names(config), "config.json"
    count = _outputs(config) if not is_transformers(config) else None
    if not names:
        raise CheckpointError(f"{folder} names no labels: give `labels`, {count or 'one for each output'} names")
    if not all(names) or len(set(names)) != len(names):
        raise CheckpointError(f"expected distinct label names in {origin} of {folder}")
    if count is not None and count != len(names):
        raise CheckpointError(f"expected {count} labels, one for each output of {folder}, got {len(names)} ({origin})")
    known = categories or _categories(folder, rows)
    if thresholds is not None:
        return Names(names, thresholds.of(names, known), {"labels": origin, "thresholds": thresholds.source}, known)
    values, source = _thresholds(folder, names, rows, known)
    if values is None:
        values = (DEFAULT_THRESHOLD,) * len(names)
        return Names(names, values, {"labels": origin, "thresholds": source}, known, assumed=True)
    return Names(names, values, {"labels": origin, "thresholds": source}, known)


def _categories(folder: Path, rows: Sequence[Mapping[str, str]]) -> Categories:
    """Return the categories of selected_tags.csv; their names, where thresholds.csv or categories.json has them."""
    if not rows or "category" not in rows[0]:
        return Categories()
    names: dict[str, str] = {}
    with suppress(UsageError):  # of a table that is damaged; it is reported when thresholds are taken from it
        if (folder / "thresholds.csv").is_file():
            names |= read_threshold_table(folder / "thresholds.csv").names
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        for one in json.loads((folder / "categories.json").read_text(encoding="utf-8-sig")):
            names[str(one["category"])] = str(one["name"])
    return Categories(tuple(row["category"] or "" for row in rows), names)


def _thresholds(
    folder: Path, labels: tuple[str, ...], rows: Sequence[Mapping[str, str]], categories: Categories
) -> tuple[tuple[float, ...] | None, str]:
    """Return the thresholds that a folder records, if any, and where they come from.

    Raises:
        CheckpointError: if they are damaged, or a label lacks its threshold.
    """
    table = folder / "thresholds.csv"
    if rows and "best_threshold" in rows[0]:
        path = folder / "selected_tags.csv"
        try:
            values = tuple(float(row["best_threshold"] or "") for row in rows)
        except ValueError as error:
            raise CheckpointError(f"expected numbers in `best_threshold` of {path}") from error
        if not all(0 < value < 1 for value in values):
            raise CheckpointError(f"expected `best_threshold` inside (0, 1) in {path}")
        return values, f"best_threshold of {path.name}"
    if table.is_file():
        try:
            found = read_threshold_table(table)
            return found.of(labels, categories), found.source
        except UsageError as error:
            raise CheckpointError(f"{error}; of {folder}") from error
    return None, f"{DEFAULT_THRESHOLD}: the folder records none"


def timm_preprocess(config: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of `timm.data.create_transform` for this config.json.

    Raises:
        CheckpointError: if timm cannot read it, or `Preprocess` cannot express it.
    """
    from math import floor

    from timm.data.config import resolve_data_config

    named = config.get("pretrained_cfg", config)
    try:
        data = resolve_data_config({}, pretrained_cfg=dict(named))  # type: ignore[no-untyped-call]
        (_, height, width), share, mode = data["input_size"], float(data["crop_pct"]), data["crop_mode"]
        size = (floor(height / share), floor(width / share))
        square = mode == "center" and size[0] == size[1]
        fits = {"squash": "stretch", "border": "contain"}
        mean = tuple(float(value) for value in data["mean"])
        fields = {
            "resize": size[0] if square else size,
            "crop": (height, width),
            "mean": mean,
            "std": tuple(data["std"]),
            "interpolation": data["interpolation"],
            "fit": "stretch" if square else fits.get(mode, "cover"),
            "fill": tuple(round(255 * value) for value in mean) if mode == "border" else (255, 255, 255),
        }
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"timm cannot read this preprocessing: {named!r:.200}") from error
    from mlperturb.model.preprocess import Preprocess

    return Preprocess.from_dict(fields)


def build_timm(config: Mapping[str, Any], outputs: int, *, meta: bool = False) -> nn.Module:
    """Return the network of config.json, with random weights or, under `meta`, unallocated ones.

    Raises:
        CheckpointError: if timm does not know the architecture, or cannot build it.
    """
    import timm
    import torch

    name, options = config["architecture"], config.get("model_args") or {}
    if name not in timm.list_models():
        raise CheckpointError(f"timm {timm.__version__} has no architecture {name!r:.80}")
    if not isinstance(options, dict):
        raise CheckpointError(f"expected an object for model_args, got {options!r:.80}")
    unsafe = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    options = {option: value for option, value in options.items() if option not in unsafe}
    with torch.device("meta" if meta else "cpu"), bounded():
        return create_timm(name, outputs, **options)


def find_weights(folder: Path) -> Path:
    """Return the file of the weights in a folder.

    Raises:
        CheckpointError: if there is none.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"expected {' or '.join(_WEIGHTS)} in {folder}")


def _read_tags(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that has a column `name`."""
    try:
        rows = read_table(path)
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    if "name" not in rows[0]:
        raise CheckpointError(f"expected a table with a column `name` in {path}")
    return rows


def _config_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `label_names` of config.json, a list or an object by number; empty if there are none."""
    inner = config.get("pretrained_cfg")
    if is_transformers(config):
        return _number_repeated(_listed(config.get("id2label")))
    found = config.get("label_names") or (inner.get("label_names") if isinstance(inner, dict) else None)
    return _listed(found)


def _listed(found: object) -> tuple[str, ...]:
    """Return names, a list or an object by number; empty if they are not such."""
    if isinstance(found, dict):
        found = [found.get(str(number)) for number in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return ()
    return tuple(found)


def _number_repeated(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names, with the output's number after names that several outputs have: ImageNet has two cranes."""
    counted = Counter(names)
    return tuple(f"{name} #{number}" if counted[name] > 1 else name for number, name in enumerate(names))


def _outputs(config: Mapping[str, Any]) -> int | None:
    """Return the number of outputs that config.json names."""
    inner = config.get("pretrained_cfg")
    count = config.get("num_classes", inner.get("num_classes") if isinstance(inner, dict) else None)
    return count if isinstance(count, int) and not isinstance(count, bool) else None
