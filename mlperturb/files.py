"""Files that are there whole or not at all, and their fingerprints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path

from mlperturb.errors import OutputError, StorageError

_THIS_NAME_ALONE = {errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL, errno.EILSEQ}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_file_of(path: Path, digest: str | None) -> bool:
    """Say whether there is a regular file of this SHA-256; not if it cannot be read."""
    try:
        return path.is_file() and file_sha256(path) == digest
    except (OSError, ValueError):  # a path that no file can have
        return False


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, flush to the disk, then rename.

    Raises:
        OutputError: if a file of this name cannot be written.
        StorageError: if nothing can be written there.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # a shard on another machine may have our process id
    try:
        with temporary.open("wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kind = OutputError if error.errno in _THIS_NAME_ALONE else StorageError
        raise kind(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # gone already if the rename came off
