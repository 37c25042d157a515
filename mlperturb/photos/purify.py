"""Purifications, as of a defender or a web site: JPEG, WebP, median filter, fewer bits, resizing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from mlperturb.errors import UsageError
from mlperturb.labels import split_names
from mlperturb.photos.images import Pixels

QUALITIES = (30, 50, 70, 80, 90, 95)
SUBSAMPLING = ("4:4:4", "4:2:2", "4:2:0")


@dataclass(frozen=True)
class Purification:
    """A way to purify a photo.

    Attributes:
        kind: a key of `KINDS`.
        setting: the quality, filter width, number of bits, or percentage of the size.
        subsampling: the chroma subsampling of JPEG; cameras and web sites use 4:2:0.
    """

    kind: str
    setting: int
    subsampling: str = "4:2:0"

    @property
    def name(self) -> str:
        """The name on the command line, such as `jpeg:75`."""
        return f"{self.kind}:{self.setting}"

    def apply(self, rgb: Pixels) -> tuple[Pixels, int | None]:
        """Return the purified 8-bit pixels, (H, W, 3), and the bytes of the compressed file, or None without a file."""
        data = self.encode(rgb)
        image = Image.fromarray(rgb)
        if data is not None:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        elif self.kind == "median":
            image = image.filter(ImageFilter.MedianFilter(self.setting))
        elif self.kind == "bits":
            image = ImageOps.posterize(image, self.setting)
        else:
            size = image.size
            smaller = [max(1, round(side * self.setting / 100)) for side in size]
            image = image.resize((smaller[0], smaller[1]), Image.Resampling.BICUBIC)
            image = image.resize(size, Image.Resampling.BICUBIC)
        return np.array(image), None if data is None else len(data)

    def encode(self, rgb: Pixels) -> bytes | None:
        """Return the compressed file of 8-bit pixels (H, W, 3); None if the kind is not a file format."""
        if self.kind not in ("jpeg", "webp"):
            return None
        stream = io.BytesIO()
        if self.kind == "jpeg":
            Image.fromarray(rgb).save(stream, "JPEG", quality=self.setting, subsampling=self.subsampling)
        else:
            Image.fromarray(rgb).save(stream, "WEBP", quality=self.setting)
        return stream.getvalue()


def _odd(value: int) -> bool:
    return 3 <= value <= 15 and value % 2 == 1


KINDS: dict[str, tuple[tuple[int, ...], Callable[[int], bool], str]] = {  # usual, allowed, in words
    "jpeg": (QUALITIES, lambda value: 1 <= value <= 100, "a quality of 1 to 100"),
    "webp": (QUALITIES, lambda value: 0 <= value <= 100, "a quality of 0 to 100"),
    "median": ((3, 5), _odd, "an odd width of 3 to 15 pixels"),
    "bits": ((6, 5, 4, 3), lambda value: 1 <= value <= 8, "1 to 8 bits"),
    "resize": ((75, 50, 25), lambda value: 1 <= value <= 99, "1 to 99 percent"),
}


def parse_purifications(
    names: Iterable[str], qualities: Sequence[int] = QUALITIES, subsampling: str = "4:2:0"
) -> tuple[Purification, ...]:
    """Read names such as `jpeg`, for all its usual settings, or `median:3`, for a single setting.

    Args:
        names: of purifications, comma-separated or one each.
        qualities: the qualities of a plain `jpeg` or `webp`.
        subsampling: the chroma subsampling of JPEG, one of `SUBSAMPLING`.

    Raises:
        UsageError: if a name is unknown, a setting is out of its range, or `names` is empty.
    """
    if subsampling not in SUBSAMPLING:
        raise UsageError(f"expected `subsampling` {', '.join(SUBSAMPLING)}, got {subsampling!r}")
    found: list[Purification] = []
    for name in split_names(names):
        kind, colon, text = name.partition(":")
        if kind not in KINDS:
            raise UsageError(f"unknown defence {name!r}: expected {', '.join(KINDS)}, with or without :SETTING")
        usual, allowed, words = KINDS[kind]
        settings = qualities if kind in ("jpeg", "webp") else usual
        if colon:
            settings = (int(text),) if re.fullmatch(r"\d{1,3}", text) else (-1,)
        for setting in settings:
            if not allowed(setting):
                raise UsageError(f"expected {words} for {kind}, got {text if colon else setting!r}")
            found.append(Purification(kind, setting, subsampling))
    if not found:
        raise UsageError(f"expected at least one defence of {', '.join(KINDS)}")
    return tuple(dict.fromkeys(found))


def parse_qualities(values: Iterable[str]) -> tuple[int, ...]:
    """Read qualities, such as `30,50,95`.

    Raises:
        UsageError: if a value is not a number from 1 to 100.
    """
    names = split_names(values)
    if not names or not all(re.fullmatch(r"\d{1,3}", name) and 1 <= int(name) <= 100 for name in names):
        raise UsageError(f"expected `qualities` of 1 to 100, comma-separated, got {', '.join(names)!r}")
    return tuple(dict.fromkeys(map(int, names)))


def parse_survival(values: Iterable[str]) -> tuple[tuple[Purification, ...], tuple[Purification, ...]]:
    """Read the purifications that an attack is to survive: `jpeg:75`, `jpeg:60-95`, `webp:80`, `resize:50`, `median:3`.

    Returns:
        The purifications that the attack sees, at most four of a range, and all purifications at which the result is
        checked.

    Raises:
        UsageError: if a value is not KIND:SETTING or KIND:LOW-HIGH, or a setting is out of the range of its kind.
    """
    seen: dict[Purification, None] = {}
    checked: dict[Purification, None] = {}
    for name in split_names(values):
        match = re.fullmatch(r"([a-z]+):(\d{1,3})(?:-(\d{1,3}))?", name)
        if match is None or match[1] not in KINDS:
            kinds = ", ".join(KINDS)
            raise UsageError(f"expected `survive` KIND:SETTING or KIND:LOW-HIGH of {kinds}, got {name!r}")
        kind, low, high = match[1], int(match[2]), int(match[3] or match[2])
        _, allowed, words = KINDS[kind]
        if low > high:
            raise UsageError(f"expected the lower setting first for `survive`, {kind}:{high}-{low}, got {name!r}")
        settings = [setting for setting in range(low, high + 1) if allowed(setting)]
        if not settings or not allowed(low) or not allowed(high):
            raise UsageError(f"expected {words} for `survive` {kind}, got {name!r}")
        steps = min(4, len(settings))
        for number in range(steps):
            place = round((len(settings) - 1) * number / max(steps - 1, 1))
            seen.setdefault(Purification(kind, settings[place]))
        checked |= dict.fromkeys(Purification(kind, setting) for setting in settings)
    return tuple(seen), tuple(checked)
