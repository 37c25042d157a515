"""The kinds of files that adversarial photos are written in, and the ends of their names; without NumPy and Pillow."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlperturb.errors import UsageError

ADVERSARIAL = (".adv.png", ".adv.webp", ".adv.jpg")  # the ends of the names of adversarial photos
CHOICES = ("png", "webp", "jpeg", "jpeg:Q", "same")
QUALITY = 95  # of a JPEG that is made of another file
_SAME = {".webp": ".webp", ".jpg": ".jpg", ".jpeg": ".jpg"}


@dataclass(frozen=True)
class FileFormat:
    """The format of the adversarial photos.

    Attributes:
        kind: `png`; `webp`, without loss; `jpeg`, whose coefficients are those that the attack found; or `same`: JPEG
            for photos named `.jpg` or `.jpeg`, WebP for `.webp`, PNG for the others.
        quality: of a JPEG that is made of a photo in another format, 1 to 100.
    """

    kind: str = "png"
    quality: int = QUALITY

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.kind if self.quality == QUALITY else f"{self.kind}:{self.quality}"

    def suffix(self, source: Path) -> str:
        """Return the end of the name of the file that is made of a photo, such as `.png`."""
        if self.kind == "same":
            return _SAME.get(source.suffix.lower(), ".png")
        return ".jpg" if self.kind == "jpeg" else f".{self.kind}"


def parse_format(name: str) -> FileFormat:
    """Read the name of a format.

    Raises:
        UsageError: if the format is unknown.
    """
    kind, colon, text = name.partition(":")
    if kind not in CHOICES or (colon and kind != "jpeg"):
        raise UsageError(f"unknown `format` {name!r}: expected {', '.join(CHOICES)}")
    if not colon:
        return FileFormat(kind)
    if not re.fullmatch(r"\d{1,3}", text) or not 1 <= int(text) <= 100:
        raise UsageError(f"expected `format` jpeg:Q with a quality of 1 to 100, got {name!r}")
    return FileFormat(kind, int(text))


def strip_ending(name: str) -> str:
    """Return the name of an adversarial photo without its ending, such as `.adv.png`."""
    return re.sub("|".join(f"{re.escape(end)}$" for end in ADVERSARIAL), "", name, flags=re.IGNORECASE)


def is_adversarial(path: Path) -> bool:
    """Say whether a file name is that of an adversarial photo."""
    return strip_ending(path.name) != path.name
