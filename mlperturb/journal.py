"""An append-only file of JSON lines: what a long run has done, durable line by line, and under which settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlperturb.errors import StorageError, UsageError
from mlperturb.files import write_file


class Journal:
    """The journal of one run, made or gone on with.

    The first line is the key: everything that decides what the results are. A journal under another key is never
    gone on with. A last line without its end, as a killed process leaves it, is dropped.

    Attributes:
        path: the file.
        resumed: whether it was there already.
        torn: whether its last line was dropped.

    Raises:
        UsageError: if the file is no journal, or was written under another key.
        StorageError: if it cannot be read or written.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.torn = path, False
        self.resumed = path.exists()
        if not self.resumed:
            write_file(path, _line({"key": key}))
            return
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
        whole = data.rfind(b"\n") + 1
        try:
            found = json.loads(data[:whole].partition(b"\n")[0])["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no journal of a run: give another --out") from error
        changed = sorted(name for name in key.keys() | found.keys() if key.get(name) != found.get(name))
        if changed:
            raise UsageError(
                f"{path} was written with another {', '.join(changed)}: expected the same to go on; "
                "give another --out, or --overwrite to start again"
            )
        if whole < len(data):
            self.torn = True
            write_file(path, data[:whole])

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and flush it to the disk.

        Raises:
            StorageError: if it cannot be written.
        """
        try:
            with self.path.open("ab") as stream:
                stream.write(_line(entry))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}") from error

    def entries(self) -> Iterator[dict[str, Any]]:
        """Read the lines after the key, one at a time.

        Raises:
            StorageError: if one cannot be read.
        """
        try:
            with self.path.open("rb") as stream:
                next(stream)
                for line in stream:
                    yield json.loads(line)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self.path}: {error}") from error


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False, ensure_ascii=True).encode() + b"\n"
