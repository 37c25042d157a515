"""The engines of the readers: each library's own resize of 8-bit pixels, and the linear map behind it.

The forward pass is the library's own code, bit for bit; the backward pass is its linear map R_h X R_w^T, as if nothing
were rounded (the straight-through gradient). See `mlperturb.model.readers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mlperturb.model.linear import crop_rows, stand_in, take_inside, to_pixels
from mlperturb.model.preprocess import Axis, Preprocess, Resizer, Size
from mlperturb.model.readers import Reader, load_opencv
from mlperturb.model.taps import Products, bind_products

_STRIP = 512  # unit images at a time


def bind_reader(
    reader: Reader,
    preprocess: Preprocess,
    sizes: Sequence[Size],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Resizer | BoundReader:
    """Return the map for a batch of photos of these (height, width), padded to the largest of them.

    Args:
        reader: how the program reads.
        preprocess: of the checkpoint: the size to resize to, the crop, mean, std, and the filter where the reader
            has none of its own.
        sizes: (height, width) of each photo.
        device: where the batch and the network are.
        dtype: of the network's input; float32 if None.

    Raises:
        ImageError: if a photo is too long to be resized, see `Preprocess.check`.
        UsageError: if the library is not installed.
    """
    kernel, dtype = reader.filter_for(preprocess), dtype or torch.float32
    if reader.engine == "opencv":
        load_opencv()
    if reader.antialias and kernel in ("bilinear", "bicubic"):
        resizer = replace(preprocess, interpolation=kernel).bind(sizes, device, dtype)
    else:
        resizer = _bind_plain(reader, preprocess, sizes, device, dtype)
    if reader.engine == "float":
        return resizer
    plans = [Plan(size, preprocess.axes(size)) for size in sizes]
    products = None
    if torch.device(device).type != "cpu" and _has_products(reader, kernel) and not preprocess.bordered:
        products = bind_products(reader.engine, kernel, [plan.axes for plan in plans], device)
    return BoundReader(reader.engine, kernel, reader.antialias, resizer, tuple(plans), products, preprocess.fill)


def _has_products(reader: Reader, kernel: str) -> bool:
    """Say whether `mlperturb.model.taps` has the integer weights of this reader."""
    return (
        reader.engine in ("pillow", "pillow-12", "torchvision")
        and reader.antialias
        and kernel in ("bilinear", "bicubic")
    )


def _bind_plain(
    reader: Reader, preprocess: Preprocess, sizes: Sequence[Size], device: torch.device | str, dtype: torch.dtype
) -> Resizer:
    """Return the linear map of a filter that `Preprocess` does not have."""
    kernel = reader.filter_for(preprocess)
    pairs = []
    for size in sizes:
        preprocess.check(size)
        rows, columns = (_matrix(reader.engine, kernel, *axis) for axis in preprocess.axes(size))
        pairs.append((take_inside(rows, size[0]), take_inside(columns, size[1])))
    return preprocess.bind_matrices(pairs, device, dtype)


@dataclass(frozen=True)
class Plan:
    """The sizes that one photo passes through, each (height, width).

    Attributes:
        source: of the photo.
        axes: what becomes of its height, and of its width, see `Preprocess.axes`.
    """

    source: Size
    axes: tuple[Axis, Axis]

    @property
    def framed(self) -> Size:
        """The size of the photo, or of the square around it."""
        return self._part(0)

    @property
    def target(self) -> Size:
        """The size after resizing."""
        return self._part(1)

    @property
    def corner(self) -> tuple[int, int]:
        """The (row, column) at which the crop begins; below 0 where a border fills what is missing."""
        return self._part(2)

    @property
    def crop(self) -> Size:
        """The size that is kept."""
        return self._part(3)

    def _part(self, number: int) -> tuple[int, int]:
        return self.axes[0][number], self.axes[1][number]


@dataclass(frozen=True)
class BoundReader:
    """A reader of 8-bit pixels, bound to the sizes of one batch; to be called as a `Resizer` is.

    Attributes:
        engine: a key of `FILTERS`, not `float`.
        filter: one of the engine's.
        antialias: see `Reader`.
        resizer: the linear map, whose gradient the backward pass takes, and the mean and std.
        plans: of each photo.
        products: the integer weights, on a device; None where the library itself runs.
        fill: the 8-bit R, G, B of a border.
    """

    engine: str
    filter: str
    antialias: bool
    resizer: Resizer
    plans: tuple[Plan, ...]
    products: Products | None = None
    fill: tuple[int, int, int] = (255, 255, 255)

    def __call__(self, images: Tensor) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to network input, (N, 3, h, w); rounds to 8 bits first."""
        return self.resizer.normalise(self.resize(images))

    def resize(self, images: Tensor) -> Tensor:
        """Return what `read` gives, with the gradient of the linear map."""
        return stand_in(images, self.read(images.detach()), self.resizer.linear)

    def read(self, images: Tensor) -> Tensor:
        """Return the resized photos, (N, 3, h, w), in [0, 1], without a gradient."""
        return self.resized(to_pixels(images)).to(self.resizer.mean.dtype) / 255

    def resized(self, pixels: Tensor) -> Tensor:
        """Return the 8-bit pixels that the program sees, (N, 3, h, w), of padded 8-bit photos, (N, 3, H, W)."""
        if self.products is not None:
            return self.products(pixels)
        resize = _ENGINES[self.engine]
        result = pixels.new_empty(len(pixels), 3, *self.plans[0].crop)
        for row, plan in enumerate(self.plans):
            height, width = plan.source
            framed = _frame_pixels(pixels[row, :, :height, :width], plan.framed, self.fill)
            whole = resize(framed, plan.target, self.filter, self.antialias)
            result[row] = _crop_pixels(whole, plan.corner, plan.crop, self.fill)
        return result

    def select(self, rows: Tensor) -> BoundReader:
        """Return the reader of some photos of the batch."""
        plans = tuple(self.plans[row] for row in rows.tolist())
        products = None if self.products is None else self.products.select(rows)
        return replace(self, resizer=self.resizer.select(rows), plans=plans, products=products)


def _frame_pixels(pixels: Tensor, size: Size, fill: Sequence[int]) -> Tensor:
    """Return 8-bit pixels, (3, H, W), in the middle of a canvas at least as large, of this (height, width)."""
    height, width = pixels.shape[1:]
    if (height, width) == size:
        return pixels
    canvas = pixels.new_tensor(fill).view(3, 1, 1).repeat(1, *size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[:, top : top + height, left : left + width] = pixels
    return canvas


def _crop_pixels(pixels: Tensor, corner: tuple[int, int], crop: Size, fill: Sequence[int]) -> Tensor:
    """Return a part of 8-bit pixels, (3, H, W); a border fills what they lack."""
    height, width = pixels.shape[1:]
    framed = _frame_pixels(pixels, (max(height, crop[0]), max(width, crop[1])), fill)
    top, left = max(corner[0], 0), max(corner[1], 0)
    return framed[:, top : top + crop[0], left : left + crop[1]]


def _pillow(pixels: Tensor, target: Size, kernel: str, _antialias: bool) -> Tensor:
    planes = pixels.cpu().contiguous().numpy()  # each by itself, which gives the same and spares the copy to RGB
    size, filter_ = (target[1], target[0]), Image.Resampling[kernel.upper()]
    resized = np.stack([np.asarray(Image.fromarray(plane).resize(size, filter_)) for plane in planes])
    return torch.from_numpy(resized).to(pixels.device)


def _pillow_12(pixels: Tensor, target: Size, kernel: str, antialias: bool) -> Tensor:
    wide = _pillow(pixels, (int(pixels.shape[1]), target[1]), kernel, antialias)
    return _pillow(wide, target, kernel, antialias)


def _torchvision(pixels: Tensor, target: Size, kernel: str, antialias: bool) -> Tensor:
    if tuple(pixels.shape[1:]) == tuple(target):
        return pixels
    photo = pixels[None].cpu().contiguous()
    resized = functional.interpolate(photo, size=target, mode=kernel, align_corners=False, antialias=antialias)
    return resized[0].to(pixels.device)


def _torchvision_cuda(pixels: Tensor, target: Size, kernel: str, antialias: bool) -> Tensor:
    if tuple(pixels.shape[1:]) == tuple(target):
        return pixels
    photo = pixels[None].float()
    resized = functional.interpolate(photo, size=target, mode=kernel, align_corners=False, antialias=antialias)
    return resized[0].clamp_(0, 255).round_().to(torch.uint8)


def _opencv(pixels: Tensor, target: Size, kernel: str, _antialias: bool) -> Tensor:
    cv2 = load_opencv()
    photo = pixels.permute(1, 2, 0).contiguous().cpu().numpy()
    resized = cv2.resize(photo, (target[1], target[0]), interpolation=getattr(cv2, f"INTER_{kernel.upper()}"))
    return torch.from_numpy(resized).permute(2, 0, 1).to(pixels.device)


_ENGINES: dict[str, Callable[[Tensor, Size, str, bool], Tensor]] = {
    "pillow": _pillow,
    "pillow-12": _pillow_12,
    "torchvision": _torchvision,
    "torchvision-cuda": _torchvision_cuda,
    "opencv": _opencv,
}


@lru_cache(maxsize=256)
def _matrix(engine: str, kernel: str, source: int, target: int, first: int, crop: int) -> Tensor:
    """Return the (crop, source) matrix of a library's filter without rounding, made from unit images in floats.

    OpenCV's `area` interpolates both axes of a photo if it makes one of them longer; the matrix of each axis here is
    that of the axis alone, which changes gradients of such photos a little and nothing else.
    """
    parts = []
    for start in range(0, source, _STRIP):
        count = min(_STRIP, source - start)
        units = np.zeros((source, count), dtype=np.float32)
        units[range(start, start + count), range(count)] = 1
        if engine.startswith("pillow"):
            lines = np.array(Image.fromarray(units).resize((count, target), Image.Resampling[kernel.upper()]))
        elif engine == "opencv":
            cv2 = load_opencv()
            lines = cv2.resize(units, (count, target), interpolation=getattr(cv2, f"INTER_{kernel.upper()}"))
        else:
            photo = torch.from_numpy(units)[None, None]
            lines = functional.interpolate(photo, size=(target, count), mode=kernel, align_corners=False)[0, 0].numpy()
        parts.append(torch.from_numpy(lines))
    return crop_rows(torch.cat(parts, 1), first, crop).clone()
