"""Read data sets, paths and labels: the VOCdevkit layout, or a folder of photos with a CSV of labels or COCO's JSON."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlperturb.errors import DatasetError, UsageError

VOC_LABELS = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


@dataclass(frozen=True)
class Dataset:
    """Photos and their annotations.

    Attributes:
        paths: N files.
        labels: L names.
        truth: (N, L), +1 present, -1 absent, 0 difficult (left out of every metric and loss).
    """

    paths: tuple[Path, ...]
    labels: tuple[str, ...]
    truth: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes of the photos' files, the labels and the annotations."""
        names = "\n".join([*(f"{path.name} {path.stat().st_size}" for path in self.paths), "", *self.labels])
        return hashlib.sha256(names.encode("utf-8", "surrogateescape") + self.truth.tobytes()).hexdigest()

    def subset(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Dataset:
        """Return the data set of these rows."""
        return Dataset(tuple(self.paths[row] for row in rows), self.labels, self.truth[list(rows)])

    def __add__(self, other: Dataset) -> Dataset:
        if self.labels != other.labels:
            raise DatasetError(f"expected data sets of the same labels, got {self.labels} and {other.labels}")
        return Dataset(self.paths + other.paths, self.labels, np.concatenate([self.truth, other.truth]))


def read_voc(root: Path, year: str, split: str) -> Dataset:
    """Read one split of one year of a VOCdevkit.

    Args:
        root: the folder that holds `VOC2007`, `VOC2012`, ..., or a folder that holds `VOCdevkit`.
        year: such as `2007`.
        split: such as `trainval`.

    Raises:
        DatasetError: if a file is missing, or a line is not a name and a number.
    """
    if not root.is_dir():
        raise DatasetError(f"no such folder of a VOCdevkit: {root}")
    base = next((place for place in (root, root / "VOCdevkit") if (place / f"VOC{year}").is_dir()), None)
    if base is None:
        raise DatasetError(f"{root} is not a VOCdevkit of {year}: expected a folder VOC{year} in it")
    folder = base / f"VOC{year}"
    sets = folder / "ImageSets" / "Main"
    if not (sets / f"{split}.txt").exists() and (known := _splits_in(sets)):
        raise DatasetError(f"cannot read {sets / split}.txt: expected a split of VOC{year}: {', '.join(known)}")
    names = _read_lines(sets / f"{split}.txt")
    names = [line.split()[0] for line in names]
    labels = sorted(path.name.removesuffix(f"_{split}.txt") for path in sets.glob(f"*_{split}.txt"))
    if not labels:
        raise DatasetError(f"expected files LABEL_{split}.txt in {sets}, got none")
    row = {name: number for number, name in enumerate(names)}
    truth = np.zeros((len(names), len(labels)), dtype=np.int8)
    for column, label in enumerate(labels):
        path = sets / f"{label}_{split}.txt"
        for line in _read_lines(path):
            fields = line.split()
            if len(fields) != 2 or fields[0] not in row or fields[1] not in ("-1", "0", "1"):
                raise DatasetError(f"{path}: expected a name of {split}.txt and -1, 0 or 1, got {line!r:.80}")
            truth[row[fields[0]], column] = int(fields[1])
    paths = tuple(folder / "JPEGImages" / f"{name}.jpg" for name in names)
    return _checked(Dataset(paths, tuple(labels), truth), sets / f"{split}.txt")


def _splits_in(sets: Path) -> list[str]:
    """Return the names of the splits in a folder of VOC; files of a label are called LABEL_SPLIT.txt."""
    return sorted(path.stem for path in sets.glob("*.txt") if "_" not in path.stem)


def read_splits(root: Path, years: Sequence[str], splits: str) -> dict[str, Dataset]:
    """Read `SPLIT` of every year, or `YEAR:SPLIT,...`; return data sets by name, such as `VOC2007 test`.

    Raises:
        UsageError: if a split names a year that is not in `years`.
        DatasetError: as for `read_voc`.
    """
    pairs = []
    for part in splits.split(","):
        first, colon, second = part.strip().partition(":")
        pairs += [(first, second)] if colon else [(name, first) for name in years]
    unknown = sorted({name for name, _ in pairs} - set(years))
    if unknown:
        raise UsageError(f"split {splits!r} names the year {unknown[0]}, expected one of `years` {','.join(years)}")
    return {f"VOC{name} {split}": read_voc(root, name, split) for name, split in pairs}


def join(datasets: Iterable[Dataset]) -> Dataset:
    """Return a single data set of all the photos."""
    first, *others = datasets
    for other in others:
        first = first + other
    return first


def read_csv(root: Path, table: Path) -> Dataset:
    """Read a folder of photos and a CSV: a header `image,LABEL,...`, then lines of a file name and L values.

    1 is present, 0 absent and -1 difficult.

    Raises:
        DatasetError: if a file is missing, or a line does not fit the header.
    """
    lines = _read_lines(table)
    try:
        header, *body = csv.reader(lines)
    except csv.Error as error:
        raise DatasetError(f"{table} is not a table of comma-separated values: {error}") from error
    labels = tuple(name.strip() for name in header[1:])
    if not labels or len(set(labels)) != len(labels):
        raise DatasetError(f"{table}: expected a header `image,LABEL,...` of distinct labels, got {lines[0]!r:.80}")
    meaning = {"1": 1, "0": -1, "-1": 0}
    truth = np.zeros((len(body), len(labels)), dtype=np.int8)
    for row, fields in enumerate(body):
        if len(fields) != len(labels) + 1 or not all(value.strip() in meaning for value in fields[1:]):
            raise DatasetError(f"{table}: expected a file name and {len(labels)} values 1, 0 or -1, got {fields!r:.80}")
        truth[row] = [meaning[value.strip()] for value in fields[1:]]
    paths = tuple(root / fields[0] for fields in body)
    return _checked(Dataset(paths, labels, truth), table)


def read_coco(root: Path, instances: Path) -> Dataset:
    """Read a folder of photos and COCO's `instances_*.json`; the labels are the names of its categories.

    A label is present if the photo has an annotation of the category, be it a crowd; a photo without annotations has
    no label. No label is difficult.

    Raises:
        DatasetError: if a photo is missing or lies outside the folder, or the file is not as COCO has it.
    """
    try:
        content = json.loads(instances.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"cannot read {instances}: {getattr(error, 'strerror', None) or error}") from error
    categories = _read_pairs(content, "categories", {"id": int, "name": str}, instances)
    images = _read_pairs(content, "images", {"id": int, "file_name": str}, instances)
    labels = tuple(name for _, name in sorted(categories))
    if not labels or len(set(labels)) != len(labels):
        raise DatasetError(f"{instances}: expected distinct names in `categories`, got {len(categories)}")
    column = {number: place for place, (number, _) in enumerate(sorted(categories))}
    row = {number: place for place, (number, _) in enumerate(images)}
    if len(column) < len(categories) or len(row) < len(images):
        raise DatasetError(f"{instances}: expected each `id` once in `categories` and in `images`")
    outside = next((name for _, name in images if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if outside is not None:
        raise DatasetError(f"{instances}: expected `file_name` relative to {root}, without '..', got {outside!r:.80}")
    truth = np.full((len(images), len(labels)), -1, dtype=np.int8)
    for image, category in _read_pairs(content, "annotations", {"image_id": int, "category_id": int}, instances):
        if image not in row or category not in column:
            pair = f"photo {image!s:.40} and category {category!s:.40}"
            raise DatasetError(f"{instances}: an annotation is of {pair}, not both known")
        truth[row[image], column[category]] = 1
    return _checked(Dataset(tuple(root / name for _, name in images), labels, truth), instances)


def _read_pairs(content: Any, part: str, fields: dict[str, type], source: Path) -> list[tuple[Any, Any]]:
    """Return two fields of every entry of a list in COCO's JSON.

    Raises:
        DatasetError: if the list is missing, or an entry does not have the fields.
    """
    entries = content.get(part) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DatasetError(f"{source}: expected an object with a list `{part}`, as COCO's instances_*.json has it")
    pairs = []
    for number, entry in enumerate(entries):
        values = [entry.get(name) if isinstance(entry, dict) else None for name in fields]
        if [type(value) for value in values] != list(fields.values()):
            wanted = " and ".join(f"`{name}` ({kind.__name__})" for name, kind in fields.items())
            raise DatasetError(f"{source}: expected {wanted} in entry {number} of `{part}`")
        pairs.append((values[0], values[1]))
    return pairs


def _checked(dataset: Dataset, source: Path) -> Dataset:
    if not dataset.paths:
        raise DatasetError(f"{source} names no photo")
    if len(set(dataset.paths)) < len(dataset):
        twice = next(path for path in dataset.paths if dataset.paths.count(path) > 1)
        raise DatasetError(f"{source} names {twice.name} twice")
    missing = [path for path in dataset.paths if not path.is_file()]
    if missing:
        raise DatasetError(f"{source} names {len(missing)} missing photos, the first {missing[0]}")
    return dataset


def _read_lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise DatasetError(f"{path} is empty")
    return lines
