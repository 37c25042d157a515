"""What a file may cost: files that a decoder would spend minutes or gigabytes on are refused, from their headers.

A file of some kilobytes can do that, and no decoder can be interrupted. The bounds are far from every real photo: a
progressive JPEG has about 10 scans, and the tiles of a TIFF are at least 16 pixels wide and high.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from mlperturb.errors import ImageError

MAX_PIXELS = 100_000_000
MAX_SCANS = 100  # of a JPEG
MAX_WORK = 2_000_000_000  # pixels of a JPEG times its scans: a scan takes up to 3 ns for a pixel
MAX_PIECES = 500_000  # strips or tiles of a TIFF: each takes 10 us
MAX_TEXT = 50_000_000  # bytes of a PPM, PGM or PBM file in which the samples are text: a byte takes 0.4 us

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a segment: the others stand alone, inside a scan
_END, _SCAN = 0xD9, 0xDA
_TILE_SIDES, _PIECES = (322, 323), (273, 324)  # tags of TIFF: TileWidth, TileLength; StripOffsets, TileOffsets


def check_cost(path: Path, data: bytes) -> None:
    """Refuse a file by its head and markers, before a decoder opens it.

    Raises:
        ImageError: if it has more scans, pieces or text than a photo has.
    """
    if data.startswith(b"\xff\xd8") and count_scans(data) > MAX_SCANS:
        raise ImageError(f"{path} has too many scans: expected a JPEG of at most {MAX_SCANS}")
    if data[:2] in (b"P1", b"P2", b"P3") and len(data) > MAX_TEXT:
        raise ImageError(f"{path} has {len(data)} bytes of samples as text, expected at most {MAX_TEXT}")
    if data[:2] in (b"II", b"MM"):
        _check_tiff(path, data)


def check_size(path: Path, data: bytes, width: int, height: int) -> None:
    """Refuse a picture of this size, once its header is read and before its pixels are decoded.

    Raises:
        ImageError: if it has more than `MAX_PIXELS`, or is a JPEG of many pixels and many scans.
    """
    if width * height > MAX_PIXELS:
        raise ImageError(f"{path} has {width} x {height} pixels, expected at most {MAX_PIXELS}")
    if data.startswith(b"\xff\xd8") and width * height * (scans := count_scans(data)) > MAX_WORK:
        raise ImageError(
            f"{path} has {scans} scans, expected at most {MAX_WORK // (width * height)} of {width} x {height} pixels"
        )


def count_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG; it counts no further than `MAX_SCANS` + 1."""
    count, place = 0, 2
    while count <= MAX_SCANS and (found := _MARKER.search(data, place)) is not None:
        place, marker = found.end(), data[found.end() - 1]
        if marker == _END:
            break
        count += marker == _SCAN
        place += int.from_bytes(data[place : place + 2], "big")
    return count


def _check_tiff(path: Path, data: bytes) -> None:
    pieces, sides = 0, [1, 1]
    forms = {b"+\0": (True,), b"\0+": (False, True)}.get(
        data[2:4], (False,)
    )  # Pillow 13 takes MM, 0, 43 for the old form
    for tag, count, value in (found for big in forms for found in _tiff_tags(data, big=big)):
        if tag in _PIECES:
            pieces = max(pieces, count)
        elif tag in _TILE_SIDES:
            sides[_TILE_SIDES.index(tag)] = value
    if pieces > MAX_PIECES:
        raise ImageError(f"{path} has {pieces} strips or tiles, expected at most {MAX_PIECES}")
    if sides[0] * sides[1] > MAX_PIXELS:
        raise ImageError(f"{path} has tiles of {sides[0]} x {sides[1]} pixels, expected at most {MAX_PIXELS}")


def _tiff_tags(data: bytes, *, big: bool) -> Iterator[tuple[int, int, int]]:
    """Yield the tags of a TIFF's first image: the tag, the number of its values, and its value where that is one."""
    order = "<" if data[:1] == b"I" else ">"
    entry, start = f"{order}HHQ" if big else f"{order}HHI", 8 if big else 4
    try:
        (place,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, start)
        (many,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, place)
        place += 8 if big else 2
        for _ in range(min(many, 65535)):
            tag, kind, count = struct.unpack_from(entry, data, place)
            size = {3: "H", 16: "Q"}.get(kind, "I")
            (value,) = struct.unpack_from(f"{order}{size}", data, place + struct.calcsize(entry))
            yield tag, count, value
            place += 20 if big else 12
    except (struct.error, OverflowError):
        return  # the file is cut short: the decoder says so
