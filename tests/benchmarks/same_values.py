"""The first difference between the outputs that `same_bytes.py` compares."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MAY_DIFFER = (
    "version",
    "key.version",  # of a journal
    "settings.cwd",
    "classifier.checkpoint",  # where the bundled one lies
    "summary.seconds",
    "images.*.cost.seconds",
    "records.*.cost.seconds",  # of a journal
    "crc",  # of a line of a journal, which has seconds
)
UNSEEN = ".stderr"  # files of this ending are kept for messages and not compared


@dataclass(frozen=True)
class Comparison:
    """Finds differences but at paths of JSON that may differ."""

    allowed: Sequence[str]

    def folders(self, old: Path, new: Path, *, killed: bool = False) -> Iterator[str]:
        """Yield the first difference of each file, by name; `killed`: the runs were killed, as in a folder `killed`."""
        trees = [
            {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file() and not _unseen(path)}
            for root in (old, new)
        ]
        for name in sorted(trees[0].keys() | trees[1].keys()):
            if self._allows(name, ""):
                continue
            if not all(name in tree for tree in trees):
                yield f"{name}: only the {'old' if name in trees[0] else 'new'} version writes it"
                continue
            contents = [tree[name].read_bytes() for tree in trees]
            found = self.file(name, *contents, killed=killed or Path(name).parts[0] == "killed")
            if found:
                yield f"{name}: {found}"

    def file(self, name: str, old: bytes, new: bytes, *, killed: bool) -> str | None:
        """Return the first difference of two files of that name."""
        if old == new:
            return None
        suffix = Path(name).suffix
        try:
            if suffix == ".json":
                return self._json(name, old, new)
            if suffix == ".jsonl":
                if killed:
                    return self.values(name, "", *(_latest(text) for text in (old, new)))
                return self._json_lines(name, old, new)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{_text(old, new)} ({error!r:.80})"
        return _pixels(old, new) if suffix == ".png" else _text(old, new)

    def values(self, name: str, path: str, old: Any, new: Any) -> str | None:
        """Return the first difference of two values of JSON: where it is, and both."""
        if self._allows(name, path):
            return None
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [[key for key in value if not self._allows(name, _join(path, key))] for value in (old, new)]
            if keys[0] != keys[1]:
                odd = sorted(set(keys[0]) ^ set(keys[1]))
                if not odd:
                    return f"{path or '(top)'}: keys in another order: {', '.join(keys[0])} -> {', '.join(keys[1])}"
                return f"{_join(path, odd[0])}: only in the {'old' if odd[0] in old else 'new'}"
            pairs = [(key, old[key], new[key]) for key in keys[0]]
        elif isinstance(old, list) and isinstance(new, list):
            if len(old) != len(new):
                return f"{path or '(top)'}: {len(old)} -> {len(new)} items: {old!r:.100} -> {new!r:.100}"
            pairs = [(str(number), *pair) for number, pair in enumerate(zip(old, new, strict=True))]
        else:
            return None if repr(old) == repr(new) else f"{path or '(top)'}: {old!r:.200} -> {new!r:.200}"
        return next(filter(None, (self.values(name, _join(path, key), *pair) for key, *pair in pairs)), None)

    def _allows(self, name: str, path: str) -> bool:
        """Say whether a value, or with an empty path a file, may differ."""
        for pattern in self.allowed:
            file, colon, inside = pattern.rpartition(":")
            if fnmatchcase(path, inside) and (not colon or fnmatchcase(Path(name).name, file)) and (path or not inside):
                return True
        return False

    def _json(self, name: str, old: bytes, new: bytes) -> str | None:
        values = [json.loads(text) for text in (old, new)]
        found = self.values(name, "", *values)
        if found:
            return found
        layouts = [_layout(text, value) for text, value in zip((old, new), values, strict=True)]
        return None if layouts[0] == layouts[1] != "unknown" else f"the same values in another layout: {layouts}"

    def _json_lines(self, name: str, old: bytes, new: bytes) -> str | None:
        lines = [text.splitlines(keepends=True) for text in (old, new)]
        for number, pair in enumerate(zip(*lines, strict=False), 1):
            found = self._json(name, *pair)
            if found:
                return f"line {number}: {found}"
        return None if len(lines[0]) == len(lines[1]) else f"{len(lines[0])} -> {len(lines[1])} lines"


def _unseen(path: Path) -> bool:
    """Say whether a file is not compared: exit codes are, but apart."""
    return path.suffix == UNSEEN or path.name.endswith(".exit.txt")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _layout(text: bytes, value: Any) -> str:
    """Return how JSON is laid out."""
    for indent in (None, 2):
        for end in ("", "\n"):
            if (json.dumps(value, indent=indent) + end).encode() == text:
                return f"indent {indent}, end {end!r}"
    return "unknown"


def _latest(text: bytes) -> dict[str, Any]:
    """Return what a journal says in the end, whatever was done twice: its lines but the batches, and the records."""
    lines: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for line in map(json.loads, text.splitlines()):
        for record in line.get("records", ()):
            records[f"{line.get('case')}/{line.get('method')}/{record['source']}"] = record
        if not line.keys() & {"records", "turn"}:
            lines |= line
    return {**lines, "records": {name: records[name] for name in sorted(records)}}


def _pixels(old: bytes, new: bytes) -> str:
    pixels = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (old, new)]
    if pixels[0].shape != pixels[1].shape:
        return f"{pixels[0].shape} -> {pixels[1].shape} pixels"
    change = np.abs(pixels[1] - pixels[0])
    if not change.any():
        return f"the same pixels in other bytes, {len(old)} -> {len(new)}"
    place = tuple(int(number) for number in np.argwhere(change)[0])
    values = f"{pixels[0][place]} -> {pixels[1][place]}"
    return f"{(change > 0).mean():.2%} of the values differ, by {change.max()} at most, the first at {place}: {values}"


def _text(old: bytes, new: bytes) -> str:
    lines = [data.splitlines() for data in (old, new)]
    for number, (one, other) in enumerate(zip(*lines, strict=False), 1):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            first = next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
            start = max(0, first - 40)
            return f"line {number}: {one[start : start + 120]!r} -> {other[start : start + 120]!r}"
    return f"{len(old)} -> {len(new)} bytes"
