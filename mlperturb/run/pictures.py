"""Find the files that a report names. A report is untrusted: it may come from a stranger.

A file counts as the report's if its SHA-256 is the recorded SHA-256, wherever it lies: who wrote that hash knew the
file. Without a recorded hash, only a file beside the report counts. No connection is opened to a host that a report
names.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Any

from mlperturb.errors import ImageError, StorageError
from mlperturb.system.files import is_file_of, is_remote, parse_path, reaching, same_store
from mlperturb.system.text import printable


def find_folder(report: Path, settings: dict[str, Any]) -> Path:
    """Return the folder of the files of a report, from the report's path and settings.

    Raises:
        ValueError: if the settings name a folder that cannot exist, or a folder at a URL.
    """
    out = settings.get("out", ".")
    if not _can_exist(out):
        raise ValueError(f"{printable(out)!r:.100} is not the path of a folder")
    return report.parent if out == "." else report.parent / out


def find_output(image: dict[str, Any], kind: str, folder: Path, settings: dict[str, Any]) -> Path | None:
    """Return an image's `adversarial` file or `map` in its folder; None if there is no such file.

    Raises:
        ImageError: if the file is not the report's: its name leads out of the folder, its content is not what the
            report recorded, or it lies elsewhere than the report, which recorded no content.
    """
    name: str | None = image["files"][kind]
    if name is None:
        return None
    if not _stays_inside(name):
        raise ImageError(f"{printable(name)!r:.100} is not the name of a file beside its report")
    path, digest = folder / name, image.get("hashes", {}).get(kind)
    if digest is None and not _is_beside(path, folder, settings):
        raise ImageError(f"{path} does not lie beside its report, which does not record its content")
    if digest is not None and _exists(path) and not _is(path, digest):
        raise ImageError(f"{path} has changed since its report was written")
    return path


def _stays_inside(name: str) -> bool:
    """Say whether a name is that of a file in a folder or below."""
    path = Path(name)
    out = path.is_absolute() or path.drive or ".." in path.parts or not path.name
    return not out and _can_exist(name)


def _can_exist(name: str) -> bool:
    """Say whether a name can be that of a file or folder on this machine."""
    try:
        return b"\0" not in os.fsencode(name) and "://" not in name
    except UnicodeEncodeError:  # half of a character, as JSON may have it
        return False


def _is_beside(path: Path, folder: Path, settings: dict[str, Any]) -> bool:
    """Say whether a file, links followed, lies in the folder of the report or below."""
    out = PurePath(settings.get("out", "."))
    if out.is_absolute() or ".." in out.parts:
        return False
    if is_remote(path):
        return True
    beside = folder.parents[len(out.parts) - 1] if out.parts else folder
    return path.resolve().is_relative_to(beside.resolve())


def find_photo(
    image: dict[str, Any], folder: Path, settings: dict[str, Any], photos: Path | None = None
) -> Path | None:
    """Return the path of the photo that an image was made of; None if it is not found.

    The places searched are `photos` (in the subfolder of the image's files, then in no subfolder), the path in the
    report, that path from the folder in which the attack was started, and the folder of the report. Only a file with
    the same SHA-256 is the photo. A photo at a URL is found only if the report lies in the same store.
    """
    source = image["source"]
    name = source.rpartition("/")[2] if "://" in source else Path(source).name
    if "://" not in source:
        places = [Path(source), Path(settings.get("cwd", ".")) / source, folder / source, folder / name]
    else:
        places = [parse_path(source)] if same_store(source, folder) else []
    if photos is not None:
        output = image["files"]["adversarial"]
        folders = [(photos / output).parent] if output and _stays_inside(output) else []
        places = [*(place / name for place in (*folders, photos)), *places]
    return next((place for place in places if _is_near(place, folder) and _is(place, image["sha256"])), None)


def _exists(path: Path) -> bool:
    with reaching(path):
        return path.exists()


def _is(path: Path, digest: str) -> bool:
    """Say whether a file has this content; False if it may not be read here.

    Raises:
        StorageError: if a store fails.
    """
    try:
        return is_file_of(path, digest)
    except StorageError:
        if is_remote(path):
            raise
        return False


def _is_near(place: Path, folder: Path) -> bool:
    r"""Say whether a place is on this machine or with the report: Windows connects to the host of `\\host\share`."""
    return is_remote(place) or not place.drive.startswith("\\\\") or place.drive == folder.drive
