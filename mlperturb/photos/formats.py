"""How a file of pixels is written and read back: PNG, and WebP without loss."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlperturb.errors import OutputError, UsageError
from mlperturb.photos.images import ADVERSARIAL, Beside, Pixels, read_photo
from mlperturb.system.files import write_file

CHOICES = ("png", "webp", "same")
_COMPRESSION = 1  # zlib's level: a third of the time of 6 for 4% more bytes (tests/benchmarks/encoding.py)
_EFFORT = 50  # of 100, WebP's search for a small file
_LONGEST_WEBP = 16383  # pixels of a side


@dataclass(frozen=True)
class FileFormat:
    """The format of the adversarial photos.

    Attributes:
        kind: `png`; `webp`, without loss; or `same`: WebP for photos named `.webp`, PNG for the others.
    """

    kind: str = "png"

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.kind

    def suffix(self, source: Path) -> str:
        """Return the end of the name of the file that is made of a photo, such as `.png`."""
        if self.kind == "same":
            return ".webp" if source.suffix.lower() == ".webp" else ".png"
        return f".{self.kind}"


def parse_format(name: str) -> FileFormat:
    """Read the name of a format.

    Raises:
        UsageError: if the format is unknown.
    """
    if name not in CHOICES:
        raise UsageError(f"unknown `format` {name!r}: expected {', '.join(CHOICES)}")
    return FileFormat(name)


def strip_ending(name: str) -> str:
    """Return the name of an adversarial photo without its ending, such as `.adv.png`."""
    return re.sub("|".join(f"{re.escape(end)}$" for end in ADVERSARIAL), "", name, flags=re.IGNORECASE)


def is_adversarial(path: Path) -> bool:
    """Say whether a file name is that of an adversarial photo."""
    return strip_ending(path.name) != path.name


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
