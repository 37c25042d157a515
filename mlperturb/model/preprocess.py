"""Resize, crop and normalise as one differentiable linear map, for photos of mixed sizes in one batch.

Antialiased resizing is linear and separable: out = R_h X R_w^T. The matrices are made by sending unit images through
`torch.nn.functional.interpolate`, the kernel that torchvision's reference transform calls, so the results agree to
float rounding. A crop keeps some rows of R_h and R_w. A batch of mixed sizes is padded with zeros to its largest
photo; the padding meets only zero columns of the matrices, so it does not affect the result and gets no gradient.
A border that the preprocessing itself puts around a photo has no columns either: what it adds to the result is
constant, `Resizer.offset`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.errors import CheckpointError, ImageError, UsageError
from mlperturb.model.given import DEFAULT_FIELDS
from mlperturb.model.linear import Banded, Dense, Pair, bind_map, crop_rows, resize, take_inside
from mlperturb.model.readers import DEFAULT_READERS, parse_readers

Size = tuple[int, int]
Axis = tuple[int, int, int, int]  # of a side: its length, its length resized, where the crop begins, its length

MAX_SIDE = 4096  # pixels of the resized photo
MAX_WORK = 2**29  # side * max(side, resized side): a side of 23,000 pixels, some seconds
FITS = ("stretch", "cover", "contain")
CHANNELS = ("rgb", "bgr", "grey")
LUMA = (0.299, 0.587, 0.114)  # the shares of R, G, B in the grey of ITU-R 601, which Pillow, OpenCV and JPEG use
_REQUIRED = {"resize", "crop", "mean", "std", "interpolation"}  # checkpoints of 0.1.0 name no readers
CORNERS = ("even", "down")
_STRIP = 2**24  # numbers in a strip of unit images


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing of a checkpoint: resize, crop, subtract the mean, divide by std.

    Attributes:
        resize: (height, width) to stretch to, or a number for the shorter side; at most `MAX_SIDE`.
        crop: (height, width) of the centre crop after resizing, or None.
        mean: subtracted per channel, in [0, 1] units, after resizing.
        std: divided by per channel.
        interpolation: `bilinear` or `bicubic`, both antialiased.
        fit: what (height, width) in `resize` means: `stretch`; `cover`, to keep the aspect and fill the frame;
            `contain`, to keep the aspect and lie inside the frame. After `contain` a crop may be larger than the
            photo: a border fills it.
        square: whether a border makes the photo square before it is resized.
        fill: the 8-bit R, G, B of a border.
        channels: the network's channels, `rgb`, `bgr` or `grey`: a single channel, `LUMA` of the resized photo, for
            which the means must be equal, and the stds too. `mean`, `std` and `fill` are in RGB order always.
        alpha: the 8-bit R, G, B that a transparent photo is laid over before all else; None if the network's programs
            ignore transparency, and see the colours under it.
        corner: where a crop begins whose margins cannot be equal: `even`, as torchvision and timm round half a pixel to
            the even number, or `down`, as transformers does.
        readers: names of the readers of the checkpoint's users, see `mlperturb.model.readers`.

    Raises:
        CheckpointError: if a value is out of its range.
    """

    resize: int | Size = (224, 224)
    crop: Size | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"
    readers: tuple[str, ...] = DEFAULT_READERS
    fit: str = "stretch"
    square: bool = False
    fill: tuple[int, int, int] = (255, 255, 255)
    channels: str = "rgb"
    alpha: tuple[int, int, int] | None = None
    corner: str = "even"

    def __post_init__(self) -> None:
        resize = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if self.interpolation not in ("bilinear", "bicubic"):
            raise CheckpointError(f"expected interpolation bilinear or bicubic, got {self.interpolation!r}")
        self._check_border()
        bounded = self.fit != "contain"
        if min(resize) < 1 or (
            self.crop and (min(self.crop) < 1 or (bounded and any(map(int.__gt__, self.crop, resize))))
        ):
            raise CheckpointError(f"expected a crop within the resized photo, got {self.crop} of {self.resize}")
        try:
            parse_readers(self.readers)
        except UsageError as error:
            raise CheckpointError(f"expected names of readers, got {self.readers!r:.200}: {error}") from error
        if max(*resize, *(self.crop or resize)) > MAX_SIDE:
            got = self.resize if max(resize) > MAX_SIDE else f"a crop of {self.crop}"
            raise CheckpointError(f"expected to resize to at most {MAX_SIDE} pixels a side, got {got}")
        numbers = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not numbers or min(self.std) <= 0:
            raise CheckpointError(f"expected 3 means and 3 positive stds, got {self.mean} and {self.std}")

    def _check_border(self) -> None:
        """Refuse fields of the border and the channels that are out of their range."""
        if self.fit not in FITS:
            raise CheckpointError(f"expected fit {', '.join(FITS)}, got {self.fit!r:.60}")
        if self.fit != "stretch" and (isinstance(self.resize, int) or self.crop is None):
            raise CheckpointError(f"expected a height and width to resize to, and a crop, with fit {self.fit}")
        if self.channels not in CHANNELS:
            raise CheckpointError(f"expected channels {', '.join(CHANNELS)}, got {self.channels!r:.60}")
        if self.channels == "grey" and (len({*self.mean}) > 1 or len({*self.std}) > 1):
            raise CheckpointError(
                f"expected one mean and one std, three times, of one channel, got {self.mean}, {self.std}"
            )
        for name, colour in (("fill", self.fill), ("alpha", self.alpha or (0, 0, 0))):
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise CheckpointError(f"expected 3 values from 0 to 255 for {name}, got {colour}")
        if self.corner not in CORNERS:
            raise CheckpointError(f"expected corner even or down, got {self.corner!r:.60}")

    @property
    def output_size(self) -> Size:
        """The (height, width) of the network input."""
        if self.crop:
            return self.crop
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def matrices(self, size: Size) -> tuple[Tensor, Tensor]:
        """Return R_h, (h, H), and R_w, (w, W), for photos of `size` (H, W), in float32 on the CPU."""
        self.check(size)
        rows, columns = (
            take_inside(_resize_matrix(*axis, self.interpolation), side)
            for axis, side in zip(self.axes(size), size, strict=True)
        )
        return rows, columns

    def axes(self, size: Size) -> tuple[Axis, Axis]:
        """Return what becomes of the height, and of the width, of photos of `size`."""
        target = self.resized(size)
        both = zip(self.framed(size), target, self.crop or target, strict=True)
        rows, columns = ((source, long, self._start(long - kept), kept) for source, long, kept in both)
        return rows, columns

    def _start(self, margin: int) -> int:
        """Return where a crop begins that leaves `margin` pixels out; below 0 where a border adds pixels."""
        if margin < 0:
            return -(-margin // 2)
        return margin // 2 if self.corner == "down" else round(margin / 2)

    @property
    def bordered(self) -> bool:
        """Whether a border may be put around a photo."""
        return self.square or self.fit == "contain"

    def framed(self, size: Size) -> Size:
        """Return the (height, width) before resizing: of the photo, or of the square around it."""
        return (max(size), max(size)) if self.square else size

    def check(self, size: Size) -> None:
        """Refuse a photo that would take too long to resize: side * max(side, resized side) above `MAX_WORK`.

        Raises:
            ImageError: if the (height, width) is such.
        """
        for side, resized in zip(self.framed(size), self.resized(size), strict=True):
            if side * max(side, resized) > MAX_WORK:
                raise ImageError(
                    f"expected a photo that can be resized to {self.resize}, got {size[1]} x {size[0]} pixels"
                )

    def resized(self, size: Size) -> Size:
        """Return the (height, width) before the crop."""
        size = self.framed(size)
        if not isinstance(self.resize, int):
            if self.fit == "stretch":
                return self.resize
            ratios = [side / wanted for side, wanted in zip(size, self.resize, strict=True)]
            ratio = max(ratios) if self.fit == "contain" else min(ratios)  # timm's ResizeKeepRatio
            return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
        short, long = sorted(size)  # torchvision's rule: the longer side is truncated to an integer
        longer = int(self.resize * long / short)
        return (self.resize, longer) if size[0] <= size[1] else (longer, self.resize)

    def bind(self, sizes: Sequence[Size], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Resizer:
        """Return the map for a batch of photos of these (height, width), padded to the largest of them."""
        return self.bind_matrices([self.matrices(size) for size in sizes], device, dtype)

    def bind_matrices(self, pairs: Sequence[Pair], device: torch.device | str, dtype: torch.dtype) -> Resizer:
        """Return the map with other R_h and R_w, one pair for each photo, and this mean and std."""
        mean = torch.tensor(self.mean, device=device, dtype=dtype).view(3, 1, 1)
        std = torch.tensor(self.std, device=device, dtype=dtype).view(3, 1, 1)
        return Resizer(bind_map(pairs, device, dtype), mean, std, self.offset(pairs, device, dtype))

    def offset(
        self, pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device | str, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what the border adds to the resized photos, (N, 3, h, w), from the R_h and R_w of each.

        A row of a whole matrix sums to 1; what the columns of the photo leave of it is the border's share.
        """
        if not self.bordered:
            return None
        fill = torch.tensor(self.fill, dtype=torch.float64).view(3, 1, 1) / 255
        shares = [1 - torch.outer(rows.double().sum(1), columns.double().sum(1)) for rows, columns in pairs]
        return (torch.stack(shares).unsqueeze(1) * fill).to(device, dtype)

    def reference(self) -> Any:
        """Return the torchvision v2 transform of 8-bit tensors that this module equals."""
        from torchvision.transforms import InterpolationMode, v2

        if self.fit != "stretch" or self.square or self.channels != "rgb" or self.corner != "even":
            raise UsageError(f"expected preprocessing that torchvision has a transform for, got {self}")
        steps: list[Any] = [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(
                [self.resize] if isinstance(self.resize, int) else list(self.resize),
                interpolation=InterpolationMode(self.interpolation),
                antialias=True,
            ),
        ]
        if self.crop:
            steps.append(v2.CenterCrop(list(self.crop)))
        return v2.Compose([*steps, v2.Normalize(list(self.mean), list(self.std))])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, for the metadata of a checkpoint; fields of 0.2.0 only where they say something."""
        values = asdict(self)
        return {
            name: value for name, value in values.items() if name not in DEFAULT_FIELDS or value != DEFAULT_FIELDS[name]
        }

    @classmethod
    def _named(cls) -> str:
        return ", ".join(sorted(cls.__dataclass_fields__))

    @classmethod
    def check_fields(cls, values: Mapping[str, object]) -> None:
        """Refuse fields that there are not.

        Raises:
            CheckpointError: if there is one; the message names it and all that there are.
        """
        unknown = sorted(map(str, set(values) - set(cls.__dataclass_fields__)))
        if unknown:
            shown = ", ".join(unknown)
            raise CheckpointError(f"unknown fields of `preprocess`: {shown:.200}: expected some of {cls._named()}")

    @staticmethod
    def is_complete(values: Mapping[str, object]) -> bool:
        """Say whether all fields without a default are there."""
        return values.keys() >= _REQUIRED

    @classmethod
    def from_dict(cls, values: object) -> Preprocess:
        """Read the values of `to_dict`.

        Raises:
            CheckpointError: if a field is missing, unknown or out of range.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"expected preprocessing with the fields {cls._named()}, got {values!r:.200}")
        cls.check_fields(values)
        if not cls.is_complete(values):
            missing = sorted(_REQUIRED - values.keys())
            raise CheckpointError(
                f"expected preprocessing with the fields {', '.join(missing)} too, got {values!r:.200}"
            )
        try:
            resize, crop = values["resize"], values["crop"]
            return cls(
                resize=resize if isinstance(resize, int) else _two(resize),
                crop=None if crop is None else _two(crop),
                mean=_three(values["mean"]),
                std=_three(values["std"]),
                interpolation=str(values["interpolation"]),
                readers=_names(values.get("readers", DEFAULT_READERS)),
                fit=str(values.get("fit", "stretch")),
                square=_truth(values.get("square", False)),
                fill=_colour(values.get("fill", (255, 255, 255))),
                channels=str(values.get("channels", "rgb")),
                alpha=None if values.get("alpha") is None else _colour(values["alpha"]),
                corner=str(values.get("corner", "even")),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"expected preprocessing fields of the right types, got {values!r:.200}") from error


@dataclass(frozen=True)
class Resizer:
    """`Preprocess` bound to the sizes of one batch.

    Attributes:
        linear: R_h and R_w of each photo.
        mean: (3, 1, 1).
        std: (3, 1, 1).
        offset: what a border adds to the resized photos, (N, 3, h, w); None without a border.
    """

    linear: Dense | Banded
    mean: Tensor
    std: Tensor
    offset: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to network input, (N, 3, h, w)."""
        return self.normalise(self.resize(images))

    def resize(self, images: Tensor) -> Tensor:
        """Return the resized photos, (N, 3, h, w), in [0, 1], differentiable."""
        return self._add_border(resize(images, self.linear))

    def read(self, images: Tensor) -> Tensor:
        """Return the resized photos, (N, 3, h, w), in [0, 1], without a gradient."""
        return self._add_border(self.linear.down(images.detach()))

    def _add_border(self, resized: Tensor) -> Tensor:
        return resized if self.offset is None else resized + self.offset

    def normalise(self, resized: Tensor) -> Tensor:
        """Subtract the mean and divide by the std, (N, 3, h, w)."""
        return (resized - self.mean) / self.std

    def select(self, rows: Tensor) -> Resizer:
        """Return the map for some photos of the batch."""
        offset = None if self.offset is None else self.offset[rows]
        return Resizer(self.linear.select(rows), self.mean, self.std, offset)


def to_tensor(rgb: np.ndarray, device: torch.device) -> Tensor:
    """Return 8-bit pixels, (H, W, 3), as an image in [0, 1], (3, H, W)."""
    pixels = torch.from_numpy(rgb).to(device).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def pad_batch(images: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """Pad photos (3, H_i, W_i) with zeros at the bottom and right to one batch (one photo: a view); and sizes."""
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    if len(images) == 1:
        return images[0].unsqueeze(0), sizes
    batch = images[0].new_zeros(len(images), 3, height, width)
    for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
        batch[number, :, : size[0], : size[1]] = image
    return batch, sizes


@lru_cache(maxsize=256)
def _resize_matrix(source: int, target: int, first: int, crop: int, interpolation: str) -> Tensor:
    """Return the (crop, source) matrix that resizes a line of `source` pixels to `target` and crops it."""
    parts = []
    strip = max(1, min(1024, _STRIP // max(source, target)))
    for start in range(0, source, strip):  # in strips, so that a long side takes little memory
        count = min(strip, source - start)
        units = torch.zeros(1, 1, source, count)
        units[0, 0, range(start, start + count), range(count)] = 1
        resized = functional.interpolate(units, size=(target, count), mode=interpolation, antialias=True)
        parts.append(resized[0, 0])
    return crop_rows(torch.cat(parts, 1), first, crop).clone()


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not values or not all(isinstance(name, str) for name in values):
        raise TypeError("expected a list of names")
    return tuple(values)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("expected true or false")
    return value


def _colour(values: Sequence[int]) -> tuple[int, int, int]:
    red, green, blue = values
    if not all(isinstance(value, int) for value in (red, green, blue)):
        raise TypeError("expected three integers")
    return red, green, blue


def _two(values: Sequence[int]) -> Size:
    first, second = values
    if not isinstance(first, int) or not isinstance(second, int):
        raise TypeError("expected two integers")
    return first, second


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
