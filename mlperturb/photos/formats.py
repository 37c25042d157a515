"""How a file is written and read back: pixels as PNG or WebP without loss, coefficients as JPEG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlperturb.errors import ImageError, OutputError
from mlperturb.photos.images import Beside, Colour, Photo, Pixels, read_photo
from mlperturb.photos.jpeg import Plane, make_jpeg, orientation_of, read_jpeg, turn_upright
from mlperturb.photos.kinds import FileFormat
from mlperturb.system.files import write_file

_COMPRESSION = 1  # zlib's level: a third of the time of 6 for 4% more bytes (tests/benchmarks/encoding.py)
_EFFORT = 50  # of 100, WebP's search for a small file
_LONGEST_WEBP = 16383  # pixels of a side


def open_photo(
    source: Path,
    name: str,
    form: FileFormat,
    over: Colour | None = None,
    room: Callable[[int], None] = lambda _: None,
) -> Photo:
    """Decode a photo for the file that is to be made of it; with its coefficients if that is a JPEG file.

    Args:
        source: the photo.
        name: the name of the file to be made.
        form: its `quality` is that of a JPEG made of a photo in another format, or whose coefficients cannot be
            written again.
        over: see `read_photo`.
        room: see `read_photo`.

    Raises:
        ImageError: if the photo cannot be read.
        UsageError: if a JPEG is to be written and jpeglib is not installed.
    """
    if not name.endswith(".jpg"):
        return read_photo(source, over=over, room=room)
    photo = read_photo(source, whole=True, over=over, room=room)
    data, photo = photo.data or b"", replace(photo, data=None)
    try:
        jpeg = read_jpeg(data) if data.startswith(b"\xff\xd8") else None
        if jpeg is not None and np.array_equal(jpeg.decode(jpeg.planes), photo.rgb):
            return replace(photo, jpeg=jpeg)
        jpeg = read_jpeg(make_jpeg(photo.rgb, form.quality, grey=photo.grey, profile=photo.beside.profile))
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"cannot read the coefficients of {source}: {error!s:.100}") from error
    if jpeg is None:
        raise ImageError(f"cannot encode {source} as a JPEG")
    notes = [f"encoded as a JPEG of quality {form.quality} before the attack"]
    if photo.alpha is not None:
        notes.append("alpha is dropped: a JPEG has none")
    return replace(photo, jpeg=jpeg, encoded=jpeg.decode(jpeg.planes), notes=(*photo.notes, *notes))


def write_jpeg(path: Path, photo: Photo, planes: Sequence[Plane], *, metadata: bool = False) -> None:
    """Write a JPEG of new coefficients under a temporary name; flush it, then rename it.

    Args:
        path: ends in `.jpg`.
        photo: has the file whose coefficients were changed.
        planes: the coefficients.
        metadata: see `Jpeg.finish`.

    Raises:
        OutputError: if the file cannot be written.
    """
    assert photo.jpeg is not None
    write_file(path, photo.jpeg.finish(planes, metadata=metadata))


def decode_elsewhere(path: Path) -> dict[str, Pixels]:
    """Return the upright pixels of a JPEG as torchvision, and OpenCV where it is installed, decode it.

    A decoder that cannot decode the file is left out.
    """
    data = path.read_bytes()
    orientation = orientation_of(data)
    found: dict[str, Pixels] = {}
    with suppress(RuntimeError, ImportError), warnings.catch_warnings(action="ignore"):  # deprecated, and much in use
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        decoded = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        found["torchvision"] = turn_upright(decoded.permute(1, 2, 0).contiguous().numpy(), orientation)
    with suppress(ImportError):
        import cv2

        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is not None:
            found["opencv"] = turn_upright(np.ascontiguousarray(pixels[..., ::-1]), orientation)
    return found


def to_image(rgb: Pixels, alpha: Pixels | None = None, *, grey: bool = False) -> Image.Image:
    """Return pixels, (H, W, 3), and alpha, (H, W), as a PIL image; of a single channel of colour if `grey`."""
    colours = rgb[..., :1] if grey else rgb
    pixels = colours if alpha is None else np.dstack([colours, alpha])
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def write_pixels(
    path: Path, rgb: Pixels, alpha: Pixels | None = None, *, grey: bool = False, beside: Beside | None = None
) -> None:
    """Write a file without loss, in the format of its suffix, under a temporary name; flush it, then rename it.

    Args:
        path: ends in `.png` or `.webp`.
        rgb: (H, W, 3), 8 bits.
        alpha: (H, W), 8 bits, or None.
        grey: write a single channel of colour; WebP has none, and gets three that are equal.
        beside: the profile and metadata to write.

    Raises:
        OutputError: if the file cannot be written, or the format cannot hold so many pixels.
    """
    beside, stream = beside or Beside(), io.BytesIO()
    image = to_image(rgb, alpha, grey=grey)
    if path.suffix == ".webp":
        if max(image.size) > _LONGEST_WEBP:
            raise OutputError(f"cannot write {path}: WebP holds at most {_LONGEST_WEBP} pixels a side")
        metadata = {name: value for name in ("exif", "xmp") if (value := getattr(beside, name)) is not None}
        profile = None if grey else beside.profile  # a grey profile does not fit WebP's three channels
        image.save(stream, "WEBP", lossless=True, exact=True, quality=_EFFORT, icc_profile=profile, **metadata)
    else:
        image.save(stream, "PNG", compress_level=_COMPRESSION, icc_profile=beside.profile, **_png_metadata(beside))
    write_file(path, stream.getvalue())


def _png_metadata(beside: Beside) -> dict[str, Any]:
    chunks = PngInfo()
    for key, value in beside.text:
        chunks.add_itxt(key.encode("latin-1", "replace")[:79].decode("latin-1") or "Comment", value)
    if beside.xmp is not None:
        chunks.add_itxt("XML:com.adobe.xmp", beside.xmp.decode("utf-8", "replace"))
    return {"pnginfo": chunks, **({} if beside.exif is None else {"exif": beside.exif})}


def read_pixels(path: Path) -> Pixels:
    """Read back a file that `write_pixels` wrote: (H, W, 3)."""
    return read_photo(path).rgb
