"""Files that are there whole or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mlperturb.errors import OutputError


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, flush to the disk, then rename.

    Raises:
        OutputError: if it cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as target:
            target.write(data)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
