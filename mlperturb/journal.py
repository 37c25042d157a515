"""An append-only file of JSON lines: what a long run has done, durable line by line, and under which settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mlperturb.errors import StorageError, UsageError
from mlperturb.files import write_file


class Journal:
    """The journal of one run, made or gone on with, and locked against a second run while it is open.

    The first line is the key: everything that decides what the results are. A journal under another key is never
    gone on with. A last line without its end, as a killed process leaves it, is dropped.

    Attributes:
        path: the file.
        resumed: whether it was there already.
        torn: whether its last line was dropped.

    Raises:
        UsageError: if the file is no journal, was written under another key, or another run has it open.
        StorageError: if it cannot be read or written.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.torn = path, False
        self.resumed = path.exists()
        try:
            if not self.resumed:
                write_file(path, _line({"key": key}))
            self._stream = path.open("r+b")
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
        try:
            self._lock()
            self._check(key)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another run have it."""
        self._stream.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and flush it to the disk.

        Raises:
            StorageError: if it cannot be written, or is there no more.
        """
        try:
            if not os.path.samestat(os.stat(self.path), os.fstat(self._stream.fileno())):
                raise StorageError(f"{self.path} was replaced while the run was going on")
            self._stream.seek(0, os.SEEK_END)
            self._stream.write(_line(entry))
            self._stream.flush()
            os.fsync(self._stream.fileno())
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
                for number, line in enumerate(stream, start=2):
                    yield _parse(line, f"{self.path}, line {number}")
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _lock(self) -> None:
        with suppress(ImportError):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(f"another run is writing {self.path}: give another --out") from error

    def _check(self, key: dict[str, Any]) -> None:
        data = self._stream.read()
        whole = data.rfind(b"\n") + 1
        try:
            found = _parse(data[:whole].partition(b"\n")[0], str(self.path))["key"]
        except (StorageError, KeyError) as error:
            raise UsageError(f"{self.path} is no journal of a run: give another --out") from error
        if not isinstance(found, dict):
            raise UsageError(f"{self.path} is no journal of a run: give another --out")
        changed = sorted(name for name in key.keys() | found.keys() if key.get(name) != found.get(name))
        if changed:
            raise UsageError(
                f"{self.path} was written with another {', '.join(changed)}: expected the same to go on; "
                "give another --out, or --overwrite to start again"
            )
        if whole < len(data):
            self.torn = True
            self._stream.truncate(whole)


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False, ensure_ascii=True).encode() + b"\n"


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise StorageError(f"{where}: damaged, not JSON; --overwrite starts again") from error
    if not isinstance(entry, dict):
        raise StorageError(f"{where}: damaged, expected a JSON object; --overwrite starts again")
    return entry
