"""An append-only journal of JSON lines: the settings and the results of a long run, each line durable."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from zlib import crc32

from mlperturb.errors import StorageError, UsageError
from mlperturb.system.files import is_remote, list_names, open_regular, read_regular, remove_file, write_file

_CHECKSUM = re.compile(rb', "crc": "([0-9a-f]{8})"\}\n')
_CHECKED = 21  # bytes of a checksum at the end of a line

Place = tuple[Path, int]  # a file of the journal, and the byte offset of a line


class Journal:
    """The journal of one run, new or continued.

    Each process of a run writes its own file and reads the files of all: `journal.jsonl` of rank 0,
    `journal.rank-1.jsonl` and so on. The first line of a file is the key: every setting that affects the results. A
    journal with another key is refused. Each line has a checksum. An incomplete or damaged last line, as a killed
    process or a power cut leaves it, is dropped. A file is locked while its process has it open. A store at a URL
    cannot append: there each line is an object of its own, in the folder `journal`, and nothing is locked.

    Args:
        path: the file of rank 0.
        key: the settings that affect the results, JSON values.
        rank: the rank of this process.
        size: the number of processes.

    Attributes:
        path: the file of rank 0.
        resumed: whether the journal existed already.
        torn: whether an incomplete or damaged last line of this process's file was dropped.

    Raises:
        UsageError: if a file is not a journal or has another key, or another run has it open.
        StorageError: if a file cannot be read or written.
    """

    def __init__(self, path: Path, key: dict[str, Any], *, rank: int = 0, size: int = 1) -> None:
        self.path = path
        kind = _Objects if is_remote(path) else _Files
        try:
            self._lines: _Objects | _Files = kind(path, key, rank, size)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror or error}") from error
        self.resumed, self.torn = self._lines.resumed, self._lines.torn

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close and unlock the file."""
        self._lines.close()

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and flush it to the disk.

        Raises:
            StorageError: if the file cannot be written, or was replaced.
        """
        self._lines.append(_line(entry))

    def entries(self) -> Iterator[dict[str, Any]]:
        """Read the lines of all processes, one at a time; lines of a later opening come later.

        Raises:
            StorageError: if a line cannot be read.
        """
        for place in self.places():
            yield self.read(place)

    def places(self) -> Iterator[Place]:
        """Yield the places of the lines that `entries` reads.

        Raises:
            StorageError: if a file cannot be read.
        """
        try:
            yield from self._lines.places()
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror or error}") from error

    def read(self, place: Place) -> dict[str, Any]:
        """Read the line at a place.

        Raises:
            StorageError: if the line cannot be read, or is not a JSON object.
        """
        path, offset = place
        try:
            with open_regular(path) as stream:
                stream.seek(offset)
                line = stream.readline()
                try:
                    return _parse(line, str(path))
                except StorageError:
                    stream.seek(0)
                    number = stream.read(offset).count(b"\n") + 1
                    return _parse(line, f"{path}, line {number}")
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def find_journal(path: Path) -> list[Path]:
    """Return the files of a journal, of every rank; at a URL, its objects in the order of their lines."""
    if is_remote(path):
        folder = path.with_suffix("")
        named = re.compile(r"[0-9]{6}-[0-9]{5}-[0-9]{8}\.json")
        return [folder / name for name in sorted(list_names(folder)) if named.fullmatch(name)]
    ranked = re.compile(rf"{re.escape(path.stem)}(\.rank-[0-9]+)?{re.escape(path.suffix)}")
    found = [path.with_name(name) for name in list_names(path.parent) if ranked.fullmatch(name)]
    return sorted(found, key=_rank)


def glance(path: Path, key: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a journal that begin with `photos` or `finished`; nothing is locked, nothing is changed.

    Of a journal at a URL only the objects are read that have the place of such entries.

    Raises:
        UsageError: if the journal has another key.
        StorageError: if such an entry is damaged.
    """
    files = find_journal(path)
    for file in files:
        if not is_remote(file) or _is_first(file):
            _check_key(file, read_regular(file, 0) if is_remote(file) else _first_line(file), key)
    if is_remote(path):
        files = [file for file in files if file.name.endswith("-00000001.json")] + files[-1:]
    for file in files:
        for _, line in _whole_lines(file):
            if line.startswith((b'{"photos":', b'{"finished":')):
                yield _parse(line, str(file))


def remove_journal(path: Path) -> None:
    """Delete the journal files of every rank.

    Raises:
        UsageError: if a run has it open.
        StorageError: if a file cannot be deleted.
    """
    _refuse_open(path)
    for file in find_journal(path):
        remove_file(file)


def move_journal(path: Path, new: Path) -> None:
    """Rename the journal files of every rank; a journal at the new name is replaced.

    Raises:
        UsageError: if a run has it open.
        StorageError: if a file cannot be renamed.
    """
    _refuse_open(path)
    try:
        remove_journal(new)
        for file in find_journal(path):
            if is_remote(file):
                write_file(new.with_suffix("") / file.name, read_regular(file, 0))
                remove_file(file)
            else:
                file.rename(file.with_name(file.name.replace(path.stem, new.stem, 1)))
    except OSError as error:
        raise StorageError(f"cannot rename {path}: {error.strerror or error}") from error


def _refuse_open(path: Path) -> None:
    for file in find_journal(path):
        if not is_remote(file) and file.is_file() and not file.is_symlink():
            with file.open("rb") as stream:
                _lock(stream, file)


class _Files:
    """A file of lines for each rank; after the nth opening of the journal, a line `{"turn": n}` precedes new lines."""

    def __init__(self, path: Path, key: dict[str, Any], rank: int, size: int) -> None:
        self._path, self.torn = path, False
        self._own = path.with_name(f"{path.stem}.rank-{rank}{path.suffix}") if rank else path
        before = find_journal(path)
        self.resumed = bool(before)
        for file in before:
            _check_key(file, _first_line(file), key)
        turn = 1 + max((turn for turn, _ in self._scan()), default=0) if before else 0
        self._turn = _line({"turn": turn}) if turn else b""  # written before the first line appended
        if self._own not in before:
            write_file(self._own, _line({"key": key}))
        self._stream: IO[bytes] = self._own.open("r+b", buffering=0)  # unbuffered: nothing is left to write at the end
        try:
            _lock(self._stream, self._own)
            for file in before if rank == 0 else []:
                if _rank(file) >= size:  # of a run with more processes, which may still be running
                    with file.open("rb") as other:
                        _lock(other, file)
            self._cut()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stream.close()

    def append(self, line: bytes) -> None:
        try:
            if not os.path.samestat(self._own.stat(), os.fstat(self._stream.fileno())):
                raise StorageError(f"{self._own} was replaced while the run was going on")
            end, text = self._stream.seek(0, os.SEEK_END), self._turn + line
            try:
                while text:
                    text = text[self._stream.write(text) :]
                os.fsync(self._stream.fileno())
            except OSError:
                with suppress(OSError):
                    self._stream.truncate(end)  # remove an incomplete line
                raise
            self._turn = b""
        except OSError as error:
            raise StorageError(f"cannot write {self._own}: {error.strerror or error}") from error

    def places(self) -> Iterator[Place]:
        return (place for _, place in sorted(self._scan(), key=lambda found: found[0]))

    def _scan(self) -> Iterator[tuple[int, Place]]:
        """Yield the turn and the place of each appended line, file by file."""
        for file in find_journal(self._path):
            turn = 0
            for offset, line in _whole_lines(file):
                if line.startswith(b'{"turn":'):
                    turn = int(_parse(line, str(file)).get("turn", 0))
                elif offset:  # the first line is the key
                    yield turn, (file, offset)

    def _cut(self) -> None:
        """Drop what follows the last sound line."""
        whole = 0
        for offset, line in _whole_lines(self._own):
            whole = offset + len(line)
        if whole < self._stream.seek(0, os.SEEK_END):
            self.torn = True
            self._stream.truncate(whole)


class _Objects:
    """An object for each line, named by turn, rank and number; the first of a turn and rank is the key."""

    torn = False

    def __init__(self, path: Path, key: dict[str, Any], rank: int, _size: int) -> None:
        self._path, self._number = path, 0
        before = find_journal(path)
        self.resumed = bool(before)
        for file in before:
            if _is_first(file):
                _check_key(path, read_regular(file, 0), key)
        turn = 1 + max((int(file.name.partition("-")[0]) for file in before), default=0)
        self._name = f"{turn:06d}-{rank:05d}"
        self.append(_line({"key": key}))

    def close(self) -> None:
        pass

    def append(self, line: bytes) -> None:
        write_file(self._path.with_suffix("") / f"{self._name}-{self._number:08d}.json", line)
        self._number += 1

    def places(self) -> Iterator[Place]:
        return ((file, 0) for file in find_journal(self._path) if not _is_first(file))


def _is_first(file: Path) -> bool:
    return file.name.endswith("-00000000.json")


def _first_line(file: Path) -> bytes:
    if file.is_symlink() or not file.is_file():  # a link may lead out of the folder, a pipe may block for ever
        return b""
    with open_regular(file) as stream:
        return stream.readline()


def _whole_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the text of each complete line; not of damaged lines at the end, as a power cut leaves."""
    begin, doubtful = 0, list[tuple[int, bytes]]()
    with open_regular(file) as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            doubtful.append((begin, line))
            begin += len(line)
            if _is_sound(line):
                yield from doubtful
                doubtful.clear()


def _rank(file: Path) -> int:
    found = re.search(r"\.rank-([0-9]+)$", file.stem)
    return int(found[1]) if found else 0


def _lock(stream: IO[bytes], path: Path) -> None:
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another run is writing {path}: give another `out`") from error


def _check_key(path: Path, line: bytes, key: dict[str, Any]) -> None:
    try:
        found = _parse(line if line.endswith(b"\n") else b"", str(path))["key"]
    except (StorageError, KeyError) as error:
        raise UsageError(f"{path} is not the journal of a run: give another `out`") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not the journal of a run: give another `out`")
    changed = sorted(name for name in key.keys() | found.keys() if key.get(name) != found.get(name))
    if changed:
        raise UsageError(
            f"{path} was written with another {', '.join(changed)}: expected the same to continue; "
            "give another `out`, or `overwrite` to start again"
        )


def _line(entry: dict[str, Any]) -> bytes:
    """Return an entry, which has a key or more, as a line with a checksum."""
    text = json.dumps(entry, allow_nan=False, ensure_ascii=True).encode()[:-1]
    return text + b', "crc": "%08x"}\n' % crc32(text)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        if _checksum(line) is False:
            raise ValueError
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        advice = "without this line its photos are attacked again; `overwrite` starts again"
        raise StorageError(f"{where}: damaged: expected JSON with its checksum; {advice}") from error
    if not isinstance(entry, dict):
        raise StorageError(f"{where}: damaged: expected a JSON object; `overwrite` starts again")
    entry.pop("crc", None)
    return entry


def _is_sound(line: bytes) -> bool:
    """Say whether a line is as it was written; if it has no checksum, as earlier versions wrote it, if it is JSON."""
    holds = _checksum(line)
    try:
        return isinstance(json.loads(line), dict) if holds is None else holds
    except (ValueError, RecursionError):
        return False


def _checksum(line: bytes) -> bool | None:
    """Say whether the checksum of a line holds; None if it has no checksum."""
    found = _CHECKSUM.fullmatch(line[-_CHECKED:])
    return None if found is None else crc32(line[:-_CHECKED]) == int(found[1], 16)
