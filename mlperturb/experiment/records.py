"""The records of an evaluation in its journal: batches, failures, names of images."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mlperturb.run.record import NOT_FINITE
from mlperturb.system.journal import Journal, find_journal
from mlperturb.system.text import counted

T = TypeVar("T")


def batches(journal: Journal) -> Iterator[dict[str, Any]]:
    """Yield the finished batches: `case`, `method`, and for each photo its row of the data set and its record.

    The form of the entries is not checked here; `Ledger` checks it.

    Raises:
        StorageError: if the journal cannot be read.
    """
    return (entry for entry in journal.entries() if "records" in entry)


def gather(
    journal: Journal, wanted: Mapping[str, Container[int]], find: Callable[[dict[str, Any]], T]
) -> dict[tuple[str, str], list[T]]:
    """Return what `find` finds in each photo's record, by case and method, in the order of the data set.

    Args:
        journal: of the evaluation.
        wanted: the rows of the data set that count, by case: an earlier start may have attacked more photos.
        find: called with each record; of two attempts at a photo the later counts.

    Raises:
        StorageError: if the journal cannot be read.
    """
    found: dict[tuple[str, str], dict[int, T]] = {}
    for entry in batches(journal):
        rows = found.setdefault((entry["case"], entry["method"]), {})
        for row, record in zip(entry["rows"], entry["records"], strict=True):
            if row in wanted.get(entry["case"], ()):
                rows[row] = find(record)
    return {key: [value for _, value in sorted(rows.items())] for key, rows in found.items() if rows}


def failures(journal: Journal) -> list[str]:
    """Return a line for each photo whose latest attempt could not be read or attacked; equal lines are one."""
    latest: dict[tuple[str, str, int], str | None] = {}
    lines: list[str] = []
    for entry in journal.entries():
        lines += [f"{name}: could not be read, and is left out" for name in entry.get("unreadable", ())]
        if unclear := entry.get("unclear"):
            lines.append(f"{NOT_FINITE.message} on {counted(len(unclear), 'photo')}, left out, such as {unclear[0]}")
    for entry in batches(journal):
        for row, record in zip(entry["rows"], entry["records"], strict=True):
            error = record.get("error")
            message = f"{entry['case']}, {entry['method']}: {error['message']}" if error else None
            latest[entry["case"], entry["method"], row] = message
    counts = Counter(message for message in latest.values() if message)  # an error of the network has no photo's name
    return lines + [message if count == 1 else f"{message} ({count} photos)" for message, count in counts.items()]


def kept_images(path: Path) -> set[str]:
    """Return the image files named by the records of a journal, relative to the journal's folder."""
    names: set[str] = set()
    for entry in _glance(path):
        folder = f"images/{slug(entry['case'])}/{slug(entry['method'])}"
        try:
            files = [name for record in entry["records"] for name in record["files"].values() if name]
        except (KeyError, TypeError, AttributeError):
            continue  # the line is damaged
        names |= {f"{folder}/{name}" for name in files if Path(name).name == name}
    return names


def kept_cases(path: Path) -> set[str]:
    """Return the names of the cases that a journal has records of."""
    return {entry["case"] for entry in _glance(path)}


def _glance(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the batches of a journal that nobody has open; a damaged line is left out."""
    for file in find_journal(path):
        for line in file.read_text("utf-8", "replace").splitlines():
            try:
                entry = json.loads(line)
                if all(isinstance(entry[name], str) for name in ("case", "method")):
                    yield entry
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # the line is not a batch, or is damaged


def slug(name: str) -> str:
    """Return the name of the folder for a case or method."""
    return re.sub(r"[^\w.=-]", "_", name)
