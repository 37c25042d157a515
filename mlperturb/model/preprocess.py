"""Resize, crop and normalise as one differentiable linear map, for photos of mixed sizes in one batch.

Antialiased resizing is linear and separable: out = R_h X R_w^T. The matrices are made by sending unit images through
`torch.nn.functional.interpolate`, the kernel that torchvision's reference transform calls, so the results agree to
float rounding. A crop keeps some rows of R_h and R_w. A batch of mixed sizes is padded with zeros to its largest
photo; the padding meets only zero columns of the matrices, so it does not affect the result and gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.errors import CheckpointError, ImageError, UsageError
from mlperturb.model.linear import Banded, Dense, Pair, bind_map, resize
from mlperturb.model.readers import DEFAULT_READERS, parse_readers

Size = tuple[int, int]

MAX_SIDE = 4096  # pixels of the resized photo
MAX_WORK = 2**29  # side * max(side, resized side): a side of 23,000 pixels, some seconds
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

    def __post_init__(self) -> None:
        resize = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if self.interpolation not in ("bilinear", "bicubic"):
            raise CheckpointError(f"expected interpolation bilinear or bicubic, got {self.interpolation!r}")
        if min(resize) < 1 or (self.crop and (min(self.crop) < 1 or any(map(int.__gt__, self.crop, resize)))):
            raise CheckpointError(f"expected a crop within the resized photo, got {self.crop} of {self.resize}")
        try:
            parse_readers(self.readers)
        except UsageError as error:
            raise CheckpointError(f"expected names of readers, got {self.readers!r:.200}: {error}") from error
        if max(resize) > MAX_SIDE:
            raise CheckpointError(f"expected to resize to at most {MAX_SIDE} pixels a side, got {self.resize}")
        numbers = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not numbers or min(self.std) <= 0:
            raise CheckpointError(f"expected 3 means and 3 positive stds, got {self.mean} and {self.std}")

    @property
    def output_size(self) -> Size:
        """The (height, width) of the network input."""
        if self.crop:
            return self.crop
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def matrices(self, size: Size) -> tuple[Tensor, Tensor]:
        """Return R_h, (h, H), and R_w, (w, W), for photos of `size` (H, W), in float32 on the CPU."""
        self.check(size)
        (height, width), resized = size, self.resized(size)
        crop = self.crop or resized
        return (
            _resize_matrix(height, resized[0], crop[0], self.interpolation),
            _resize_matrix(width, resized[1], crop[1], self.interpolation),
        )

    def check(self, size: Size) -> None:
        """Refuse a photo that would take too long to resize: side * max(side, resized side) above `MAX_WORK`.

        Raises:
            ImageError: if the (height, width) is such.
        """
        for side, resized in zip(size, self.resized(size), strict=True):
            if side * max(side, resized) > MAX_WORK:
                raise ImageError(
                    f"expected a photo that can be resized to {self.resize}, got {size[1]} x {size[0]} pixels"
                )

    def resized(self, size: Size) -> Size:
        """Return the (height, width) before the crop."""
        if not isinstance(self.resize, int):
            return self.resize
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
        return Resizer(bind_map(pairs, device, dtype), mean, std)

    def reference(self) -> Any:
        """Return the torchvision v2 transform of 8-bit tensors that this module equals."""
        from torchvision.transforms import InterpolationMode, v2

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
        """Return JSON values, for the metadata of a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> Preprocess:
        """Read the values of `to_dict`.

        Raises:
            CheckpointError: if a field is missing, unknown or out of range.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or set(values) | {"readers"} != names:  # checkpoints of 0.1.0 name no readers
            raise CheckpointError(f"expected preprocessing with the fields {sorted(names)}, got {values!r:.200}")
        try:
            resize, crop = values["resize"], values["crop"]
            return cls(
                resize=resize if isinstance(resize, int) else _two(resize),
                crop=None if crop is None else _two(crop),
                mean=_three(values["mean"]),
                std=_three(values["std"]),
                interpolation=str(values["interpolation"]),
                readers=_names(values.get("readers", DEFAULT_READERS)),
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
    """

    linear: Dense | Banded
    mean: Tensor
    std: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to network input, (N, 3, h, w)."""
        return self.normalise(resize(images, self.linear))

    def read(self, images: Tensor) -> Tensor:
        """Return the resized photos, (N, 3, h, w), in [0, 1], without a gradient."""
        return self.linear.down(images.detach())

    def normalise(self, resized: Tensor) -> Tensor:
        """Subtract the mean and divide by the std, (N, 3, h, w)."""
        return (resized - self.mean) / self.std

    def select(self, rows: Tensor) -> Resizer:
        """Return the map for some photos of the batch."""
        return Resizer(self.linear.select(rows), self.mean, self.std)


def to_tensor(rgb: np.ndarray, device: torch.device) -> Tensor:
    """Return 8-bit pixels, (H, W, 3), as an image in [0, 1], (3, H, W)."""
    return torch.from_numpy(rgb).to(device).permute(2, 0, 1).float() / 255


def pad_batch(images: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
    """Pad photos (3, H_i, W_i) with zeros at the bottom and right to one batch; return it and the sizes."""
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
        batch[number, :, : size[0], : size[1]] = image
    return batch, sizes


@lru_cache(maxsize=256)
def _resize_matrix(source: int, target: int, crop: int, interpolation: str) -> Tensor:
    """Return the (crop, source) matrix that resizes a line of `source` pixels to `target` and crops its centre."""
    parts = []
    strip = max(1, min(1024, _STRIP // max(source, target)))
    for start in range(0, source, strip):  # in strips, so that a long side takes little memory
        count = min(strip, source - start)
        units = torch.zeros(1, 1, source, count)
        units[0, 0, range(start, start + count), range(count)] = 1
        resized = functional.interpolate(units, size=(target, count), mode=interpolation, antialias=True)
        parts.append(resized[0, 0])
    top = round((target - crop) / 2)
    return torch.cat(parts, 1)[top : top + crop].clone()


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list | tuple) or not values or not all(isinstance(name, str) for name in values):
        raise TypeError("expected a list of names")
    return tuple(values)


def _two(values: Sequence[int]) -> Size:
    first, second = values
    if not isinstance(first, int) or not isinstance(second, int):
        raise TypeError("expected two integers")
    return first, second


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third
