"""The part of a photo that an attack may change: a rectangle, or a mask image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlperturb.errors import ImageError, UsageError
from mlperturb.photos.images import read_photo


@dataclass(frozen=True)
class Region:
    """A rectangle (left, top, width, height) in pixels of the upright photo, or a mask of the photo's own size."""

    rectangle: tuple[int, int, int, int] | None = None
    mask: npt.NDArray[np.bool_] | None = None

    def inside(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """Return which pixels of a photo may change, boolean, (height, width).

        Raises:
            ImageError: if the rectangle lies outside the photo, or the mask has another size.
        """
        if self.mask is not None:
            if self.mask.shape != (height, width):
                mine = f"{self.mask.shape[1]} x {self.mask.shape[0]}"
                raise ImageError(f"the mask of the region is {mine} pixels, expected the photo's {width} x {height}")
            return self.mask
        assert self.rectangle is not None
        left, top, wide, high = self.rectangle
        allowed = np.zeros((height, width), dtype=np.bool_)
        allowed[top : top + high, left : left + wide] = True
        if not allowed.any():
            raise ImageError(f"the region at {left},{top} lies outside the photo of {width} x {height} pixels")
        return allowed


def name_region(region: object) -> str | None:
    """Return a region, None, a rectangle or the path of a mask, as the text that `parse_region` reads.

    Raises:
        UsageError: if it is of another type.
    """
    if region is None or isinstance(region, str):
        return region
    if isinstance(region, tuple | list):
        return ",".join(map(str, region))
    if isinstance(region, Path):
        return str(region)
    raise UsageError(
        f"expected (left, top, width, height) or the path of a mask for `region`, got {type(region).__name__}"
    )


def parse_region(text: str) -> Region:
    """Read `x,y,w,h`, or a mask image's path; pixels neither black nor transparent in the mask may change.

    Raises:
        UsageError: if the text is neither, or no pixel may change.
    """
    numbers = re.fullmatch(r"(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})", text.replace(" ", ""))
    if numbers:
        left, top, wide, high = map(int, numbers.groups())
        if not wide or not high:
            raise UsageError(f"expected a `region` of at least one pixel, got {text}")
        return Region(rectangle=(left, top, wide, high))
    if re.fullmatch(r"[-+\d.,; ]*", text) or len(text) > 4000:
        raise UsageError(f"expected `region` x,y,w,h in pixels or a mask image, got {text[:100]!r}")
    if not Path(text).is_file():
        what = "the `region` mask is not a file" if Path(text).exists() else "no such `region` mask"
        raise UsageError(f"{what}: {text[:100]!r}; expected x,y,w,h in pixels or a mask image")
    try:
        image = read_photo(Path(text))
        mask = image.rgb.max(axis=2) > 0
        if image.alpha is not None:
            mask &= image.alpha > 0
    except ImageError as error:
        raise UsageError(f"cannot read the `region` mask: {error}") from error
    if not mask.any():
        raise UsageError(f"expected a `region` mask that is not all black, got {text}")
    return Region(mask=mask)
