"""The photos that `mlperturb train` trains on, validates on and measures on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlperturb.photos.datasets import Dataset


def read_voc_splits(
    voc: Path, year: list[str], train_split: str, val_split: str | None, test_split: str | None
) -> tuple[Dataset, Dataset | None, dict[str, Dataset]]:
    """Read the photos of a VOCdevkit to train, to validate and to measure on."""
    from mlperturb.photos.datasets import join, read_splits

    years = [name for value in year for name in value.split(",")]
    training = join(read_splits(voc, years, train_split).values())
    validation = join(read_splits(voc, years, val_split).values()) if val_split else None
    return training, validation, read_splits(voc, years, test_split) if test_split else {}


def read_tables(
    photos: Path, csv: Path | None, coco: Path | None, test_csv: Path | None
) -> tuple[Dataset, None, dict[str, Dataset]]:
    """Read a folder of photos and its tables, to train and to measure on."""
    from mlperturb.photos.datasets import join, read_coco, read_csv

    training = join([read(photos, table) for read, table in ((read_csv, csv), (read_coco, coco)) if table is not None])
    return training, None, {test_csv.name: read_csv(photos, test_csv)} if test_csv else {}


def hold_out(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Split a data set into nine tenths and a random tenth."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(dataset))
    cut = max(1, len(dataset) // 10)
    return dataset.subset(np.sort(order[cut:])), dataset.subset(np.sort(order[:cut]))
