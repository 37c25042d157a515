"""The quantised DCT coefficients of a JPEG file: read, changed and written again, nothing else of the file touched.

`jpeglib` (the extra `jpeg`) reads and writes coefficients through libjpeg. The pixels of new coefficients are those
that Pillow decodes from the file as it would be written.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mlperturb.errors import UsageError
from mlperturb.photos.images import Pixels

Plane = npt.NDArray[np.int16]  # coefficients of one component in natural order, (rows, columns, 8, 8) of blocks

_NAMES = ("Y", "Cb", "Cr")  # jpeglib's attributes, whatever the components are
_APP0, _APP1, _APP2, _APP14, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_START_OF_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # that ends the bits of a scan
_ORIENTATION = 0x0112  # the tag of EXIF
_LOCK = Lock()  # jpeglib keeps the segments of the file that it reads in global arrays
_MEMORY = Path("/dev/shm")  # temporary files that never reach a disk, where there is such a folder


@dataclass(frozen=True)
class Jpeg:
    """A JPEG file of grey, or of Y, Cb and Cr.

    Attributes:
        data: the file.
        planes: the coefficients of each component.
        tables: the quantisation table of each component, (8, 8).
        sampling: the sampling factors of each component, (vertical, horizontal).
        size: (height, width) of the pixels as they are stored, before the orientation is applied.
        orientation: the EXIF orientation, 1 to 8.
    """

    data: bytes
    planes: tuple[Plane, ...]
    tables: tuple[npt.NDArray[np.uint16], ...]
    sampling: tuple[tuple[int, int], ...]
    size: tuple[int, int]
    orientation: int

    def encode(self, planes: Sequence[Plane]) -> bytes:
        """Return the file with other coefficients and new Huffman tables, without metadata and colour profile."""
        with _LOCK, _temporary(strip(self.data)) as source, _temporary() as target:
            file = load_jpeglib().read_dct(source.name)
            file.markers = []
            for name, plane in zip(_NAMES, planes, strict=False):
                setattr(file, name, plane)
            file.write_dct(target.name, flags=["+OPTIMIZE_CODING"])
            return Path(target.name).read_bytes()

    def decode(self, planes: Sequence[Plane]) -> Pixels:
        """Return the upright pixels, (H, W, 3), that Pillow decodes from the file with other coefficients."""
        with Image.open(io.BytesIO(self.encode(planes)), formats=("JPEG",)) as image:
            return turn_upright(np.array(image.convert("RGB")), self.orientation)

    def finish(self, planes: Sequence[Plane], *, metadata: bool = False) -> bytes:
        """Return the file to write: other coefficients, the source's colour profile and orientation.

        Args:
            planes: the coefficients.
            metadata: whether to keep EXIF data, GPS included, XMP and comments.
        """
        data = self.encode(planes)
        kept = b"".join(_kept_segments(self.data, metadata=metadata))
        if not metadata and self.orientation != 1:
            kept = _exif_segment(self.orientation) + kept
        end = 2 + _length(data, 2) if data[3] in (_APP0, _APP14) else 2  # JFIF's own segment comes first
        return data[:end] + kept + data[end:]


def load_jpeglib() -> Any:
    """Return the module `jpeglib`.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import jpeglib
    except ImportError as error:
        raise UsageError("expected jpeglib for `format` jpeg: pip install 'mlperturb[jpeg]'") from error
    return jpeglib


def read_jpeg(data: bytes) -> Jpeg | None:
    """Return the coefficients of a JPEG file that Pillow can decode; None if it is neither grey nor Y, Cb and Cr.

    Raises:
        UsageError: if jpeglib is not installed.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        if image.mode not in ("L", "RGB"):
            return None
    with _LOCK, _temporary(strip(data)) as source:
        file = load_jpeglib().read_dct(source.name)
        if not str(file.jpeg_color_space).endswith(("YCbCr", "GRAYSCALE")):
            return None
        file.load()
    count = int(file.num_components)
    return Jpeg(
        data,
        tuple(np.array(getattr(file, name)) for name in _NAMES[:count]),
        tuple(np.array(file.qt[file.quant_tbl_no[number]]) for number in range(count)),
        tuple((int(row[0]), int(row[1])) for row in file.samp_factor),
        (int(file.height), int(file.width)),
        orientation_of(data),
    )


def make_jpeg(rgb: Pixels, quality: int, *, grey: bool = False, profile: bytes | None = None) -> bytes:
    """Return pixels, (H, W, 3), as a JPEG file by Pillow, with 4:2:0 as cameras write it."""
    stream = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(rgb[..., 0]) if grey else rgb)
    image.save(stream, "JPEG", quality=quality, subsampling="4:2:0", optimize=True, icc_profile=profile)
    return stream.getvalue()


def orientation_of(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG file, 1 to 8; 1 if it has none."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        try:
            orientation = int(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # Pillow's reader raises almost anything on damaged EXIF data
            return 1
    return orientation if 1 <= orientation <= 8 else 1


def turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return stored pixels, (H, W, 3), upright."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _temporary(data: bytes = b"") -> Any:
    file = tempfile.NamedTemporaryFile(suffix=".jpg", dir=_MEMORY if _MEMORY.is_dir() else None)  # noqa: SIM115
    file.write(data)
    file.flush()
    return file


def _length(data: bytes, start: int) -> int:
    """Return the bytes of the segment that starts at a place, its marker included."""
    return 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def strip(data: bytes) -> bytes:
    """Return a JPEG file without comments, metadata and what follows its end; jpeglib has room for few segments.

    Raises:
        ValueError: if the file is not a sequence of segments.
    """
    parts, seen, start = [data[:2]], set(), 2
    while start + 4 <= len(data) and data[start + 1] != _END:
        marker = data[start + 1]
        if data[start] != 0xFF:
            raise ValueError(f"expected a segment at byte {start}")
        if marker == 0xFF:  # a byte that fills
            start += 1
            continue
        end = start + _length(data, start)
        if marker == _START_OF_SCAN:
            found = _MARKER.search(data, end)
            end = len(data) if found is None else found.start()
        extra = _APP0 <= marker <= 0xEF or marker == _COMMENT
        if not extra or (marker in (_APP0, _APP14) and marker not in seen):
            parts.append(data[start:end])
        seen.add(marker)
        start = end
    return b"".join(parts) + bytes([0xFF, _END])


def _segments(data: bytes) -> Iterator[bytes]:
    """Yield the segments of a JPEG file before its first scan."""
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != 0xDA:
        if data[start + 1] == 0xFF:  # a byte that fills
            start += 1
            continue
        end = start + _length(data, start)
        yield data[start:end]
        start = end


def _kept_segments(data: bytes, *, metadata: bool) -> Iterator[bytes]:
    for segment in _segments(data):
        marker, body = segment[1], segment[4:]
        if (marker == _APP2 and body.startswith(b"ICC_PROFILE\0")) or (
            metadata and (marker == _COMMENT or _APP1 <= marker < _APP14) and not body.startswith(b"MPF\0")
        ):
            yield segment


def _exif_segment(orientation: int) -> bytes:
    """Return a segment of EXIF data that has the orientation alone."""
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    body = exif.tobytes()
    return bytes([0xFF, _APP1]) + (2 + len(body)).to_bytes(2, "big") + body
