"""Atomic writes to this machine or a URL, paths and URLs, and SHA-256 fingerprints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote

from mlperturb.errors import MlperturbError, OutputError, StorageError, UsageError

MOST = 1 << 30  # bytes of a photo's file
_OURS = (None, "file", "local")  # schemes of paths of this machine
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory")  # elsewhere a host follows the scheme
_THIS_NAME_ALONE = {errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL, errno.EILSEQ}


def parse_path(text: str | Path) -> Path:
    """Return the path that a text names: a local path, or a URL that fsspec knows (`s3://`, `gs://`, `memory://`).

    A URL becomes a `upath.UPath`, which has the methods of a Path; `file://` becomes an ordinary path.

    Raises:
        UsageError: if the URL's scheme is unknown, or the package for it is not installed.
    """
    if isinstance(text, Path):  # a default value
        return text
    scheme, rest = _split(text)
    if scheme in _OURS:
        return parse_local(text)
    from upath import UPath

    try:
        with warnings.catch_warnings(action="ignore"):  # upath warns of schemes that it does not know itself
            path = UPath(f"{scheme}://{rest}")
            path.fs  # noqa: B018  # loads the package
    except (ValueError, ImportError) as error:
        hint = " (pip install 'mlperturb[s3]')" if scheme in ("s3", "s3a") else ""
        raise UsageError(f"cannot open {scheme}:// URLs: {error!s:.200}{hint}") from error
    except Exception as error:  # a store's own package may raise anything: no credentials, no network
        raise UsageError(f"cannot reach {text}: {str(error) or type(error).__name__:.200}") from error
    return cast(Path, path)


def parse_local(text: str | Path) -> Path:
    """Return the path of this machine that a text names; it may be a `file://` URL.

    Raises:
        UsageError: if it is a URL of another scheme.
    """
    if isinstance(text, Path):  # a default value
        return text
    scheme, rest = _split(text)
    if scheme not in _OURS:
        raise UsageError(f"expected a path of this machine, got {text}")
    return Path(text) if scheme is None else Path(unquote(rest.removeprefix("localhost")))


def _split(text: str) -> tuple[str | None, str]:
    """Return the scheme of a URL, in lower case, and the text after it; for a plain path, None and the text."""
    scheme, found, rest = text.partition("://")
    return (scheme.lower(), rest) if found else (None, text)


def same_store(text: str, path: Path) -> bool:
    """Say whether a URL leads to the store of a remote path; nothing is opened. A bucket is not a store of its own."""
    if not is_remote(path):
        return False
    (scheme, rest), (own, beside) = _split(text), _split(str(path))
    return scheme == own and (scheme in _BUCKETS or rest.partition("/")[0] == beside.partition("/")[0])


def is_remote(path: Path) -> bool:
    """Say whether a path is a URL of a store, not a path of this machine."""
    return not isinstance(path, Path)


@contextlib.contextmanager
def reaching(path: Path, doing: str = "reach", *, missing: bool = False) -> Iterator[None]:
    """Turn any error of a store's own package, at a remote path, into a `StorageError` of one line.

    Args:
        path: what is reached.
        doing: the word for the message.
        missing: whether the error of a file that does not exist stays as it is.

    Raises:
        StorageError: with the reason.
    """
    try:
        yield
    except (MlperturbError, KeyboardInterrupt):
        raise
    except Exception as error:
        if not is_remote(path) or (missing and isinstance(error, FileNotFoundError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"cannot {doing} {path}: {reason:.200}") from error


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to read; refuse, before opening it, a pipe, a device, or a file such as those of Linux's `/proc`.

    Those may block for ever, never end, or do something when they are opened. A file of `/proc` says of itself that it
    is a regular file of 0 bytes; so no byte is read of a file of that size.

    Raises:
        FileNotFoundError: if there is no such file; nothing else says so.
        OSError: if the path is not a regular file, or cannot be opened.
        StorageError: if a store does not give the file, whole.
    """
    if is_remote(path):
        with reaching(path, "read", missing=True), path.open("rb") as stream:
            yield stream
        return
    _refuse_irregular(path.stat(), path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        _refuse_irregular(status, path)  # it may have been replaced meanwhile
        yield stream if status.st_size else io.BytesIO()


def _refuse_irregular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a file, see `open_regular`.

    Raises:
        OSError: if it has more than `most` bytes, which are not counted at a URL, or cannot be read.
        StorageError: if a store does not give the file, whole.
    """
    with open_regular(path) as stream:
        if is_remote(path):
            data = stream.read()
            _refuse_short(path, stream, len(data))
            return data
        size = os.fstat(stream.fileno()).st_size if hasattr(stream, "raw") else 0
        if size > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
        return stream.read(size)


def _refuse_short(path: Path, stream: IO[bytes], got: int) -> None:
    """Refuse the file of a store that sent fewer bytes than it said."""
    size = getattr(stream, "size", None)
    if isinstance(size, int) and got < size:
        raise StorageError(f"cannot read {path}: the store sent {got} of {size} bytes")


def file_sha256(path: Path, most: int | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal; on this machine, of its first `most` bytes, where they are given.

    Raises:
        OSError: if it is not a regular file, or cannot be read.
        StorageError: if a store does not give the file, whole.
    """
    digest, got = hashlib.sha256(), 0
    left = None if is_remote(path) else most
    with open_regular(path) as stream:
        while part := stream.read(1 << 20 if left is None else min(1 << 20, left - got)):
            digest.update(part)
            got += len(part)
        if is_remote(path):
            _refuse_short(path, stream, got)
    return digest.hexdigest()


def is_file_of(path: Path, digest: str | None, most: int | None = MOST) -> bool:
    """Say whether the path is a regular file of this SHA-256; of a file of over `most` bytes, say False.

    Raises:
        StorageError: if there is a file that cannot be read: it may be the file.
    """
    try:
        if digest is None or not (is_remote(path) or path.is_file()):
            return False
        return file_sha256(path, most) == digest
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a path that no file can have
        return False
    except OSError as error:
        if error.errno in _THIS_NAME_ALONE | {errno.ELOOP}:
            return False
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def list_names(folder: Path) -> set[str]:
    """Return the names of a folder's entries; the empty set if the folder does not exist."""
    if is_remote(folder):
        with reaching(folder):
            return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def remove_file(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        StorageError: if it cannot be deleted.
    """
    try:
        with reaching(path, "delete"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot delete {path}: {error.strerror or error}") from error


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files of killed processes from a folder; no other process may be writing to it."""
    if not is_remote(folder):
        for name in list_names(folder):
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole, see `writing`."""
    with writing(path) as target:
        target.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Give a stream to write; at the end the file is whole and durable. After an error the file is unchanged.

    On this machine the file is written under a temporary name in the same folder, flushed to the disk and renamed, and
    the folder is flushed. A store gets the file in one piece, and decides how durable it is.

    Raises:
        OutputError: if a file of this name cannot be written.
        StorageError: if the disk is full, read-only or gone, or the store fails.
    """
    if is_remote(path):
        with tempfile.TemporaryFile() as stream:
            yield stream
            stream.seek(0)
            with reaching(path, "write"), path.open("wb") as target:
                shutil.copyfileobj(stream, target)
        return
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # random: process ids repeat on other machines
    try:
        with temporary.open("wb") as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        kind = OutputError if error.errno in _THIS_NAME_ALONE else StorageError
        raise kind(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # it is gone if the rename succeeded


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: a renamed file has its new name after a power cut too.

    Raises:
        OSError: if the disk fails or is full; that a file system cannot flush folders is not an error.
    """
    with contextlib.suppress(PermissionError):
        opened = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
        finally:
            os.close(opened)
