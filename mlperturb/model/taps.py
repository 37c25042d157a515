"""The integer weights of Pillow's and torch's resize of 8-bit pixels, and their products on any device.

Both libraries resize the width, then the height; Pillow from version 13 on resizes the height first where it loses
more than twice as many pixels as the width (https://github.com/python-pillow/Pillow/pull/9549). A pixel of the result
is

    clip((sum_k w_k p_k + 2^(b - 1)) >> b),  w_k = weight_k 2^b rounded half away from zero,

with b = 22 bits in Pillow (`Resample.c`, PRECISION_BITS) and the most bits that keep the largest weight of the axis
below 2^15 in torch (`UpSampleKernel.cpp`, int16 weights). The sums stay below 2^31, so 32-bit integers hold them
exactly. An axis that keeps its length, which the libraries skip, has the weight 1 and is unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

Axis = tuple[int, int, int, int]  # of a side: its length, its length resized, where the crop begins, its length
Taps = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], int]  # places, weights, bits of one axis

_PILLOW_BITS, _INT16 = 22, 2**15
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


@dataclass(frozen=True)
class Products:
    """The integer weights of a batch, for rows and columns.

    Attributes:
        row_places: the rows of the photo that each row of the result sums, (N, h, K).
        row_weights: their weights, 32-bit integers, (N, h, K); 0 where a row sums fewer than K.
        row_bits: b, (N, 1, 1, 1).
        column_places: (N, w, K').
        column_weights: (N, w, K').
        column_bits: (N, 1, 1, 1).
        rows_first: whether a photo's height is resized before its width, boolean, (N,), on the CPU.
    """

    row_places: Tensor
    row_weights: Tensor
    row_bits: Tensor
    column_places: Tensor
    column_weights: Tensor
    column_bits: Tensor
    rows_first: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        """Resize padded 8-bit photos, (N, 3, H, W), to (N, 3, h, w), bit for bit as the library does."""
        if bool(self.rows_first.any()) and not bool(self.rows_first.all()):
            result = pixels.new_empty(len(pixels), 3, self.row_places.shape[1], self.column_places.shape[1])
            for part in (self.rows_first, ~self.rows_first):
                rows = part.nonzero().flatten()
                result[rows.to(result.device)] = self.select(rows)(pixels[rows.to(pixels.device)])
            return result
        for axis in (2, 3) if bool(self.rows_first.all()) else (3, 2):
            pixels = self._resize(pixels, axis)
        return pixels

    def _resize(self, pixels: Tensor, axis: int) -> Tensor:
        """Resize one axis, 2 or 3, of (N, 3, H, W)."""
        if axis == 3:
            return _along(pixels, 3, self.column_places, self.column_weights, self.column_bits)
        return _along(pixels, 2, self.row_places, self.row_weights, self.row_bits)

    def select(self, rows: Tensor) -> Products:
        """Return the weights of some photos of the batch."""
        return Products(*(values[rows.to(values.device)] for values in vars(self).values()))


def bind_products(engine: str, kernel: str, axes: Sequence[tuple[Axis, Axis]], device: torch.device | str) -> Products:
    """Return the weights for a batch.

    Args:
        engine: `pillow`, `pillow-12` or `torchvision`.
        kernel: `bilinear` or `bicubic`.
        axes: what becomes of the height and of the width of each photo, see `Axis`.
        device: the device of the photos.
    """
    heights, widths = (
        _stack([_integer_taps(engine, kernel, *photo[axis]) for photo in axes], device) for axis in (0, 1)
    )
    rows_first = [engine == "pillow" and begins_with_rows(photo) for photo in axes]
    return Products(
        row_places=heights[0],
        row_weights=heights[1],
        row_bits=heights[2],
        column_places=widths[0],
        column_weights=widths[1],
        column_bits=widths[2],
        rows_first=torch.tensor(rows_first),
    )


def _stack(found: Sequence[Taps], device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places and weights of one axis of several photos, (N, n, K), and the bits, (N, 1, 1, 1)."""
    longest = max(places.shape[1] for places, _, _ in found)
    places, weights = (
        np.stack([np.pad(values, ((0, 0), (0, longest - values.shape[1]))) for values in parts])
        for parts in zip(*(taps[:2] for taps in found), strict=True)
    )
    bits = torch.tensor([taps[2] for taps in found], dtype=torch.int32).view(-1, 1, 1, 1)
    return torch.from_numpy(places).to(device), torch.from_numpy(weights).to(device), bits.to(device)


def begins_with_rows(axes: tuple[Axis, Axis]) -> bool:
    """Say whether the Pillow that is installed resizes the height of a photo before its width."""
    (height, tall, *_), (width, wide, *_) = axes
    return tall < height and height - tall > 2 * (width - wide) and _newer_pillow()


@lru_cache
def _newer_pillow() -> bool:
    """Find out, by a trial, whether the Pillow that is installed ever resizes the height first."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 8, 3), dtype=np.uint8))
    kernel = Image.Resampling.BICUBIC
    whole = np.array(photo.resize((40, 32), kernel))
    columns_first = np.array(photo.resize((40, 64), kernel).resize((40, 32), kernel))
    return not np.array_equal(whole, columns_first)


def _along(pixels: Tensor, axis: int, places: Tensor, weights: Tensor, bits: Tensor) -> Tensor:
    """Resize one axis, 2 or 3, of (N, 3, H, W)."""
    shape = list(pixels.shape)
    shape[axis] = places.shape[1]
    total = torch.ones_like(bits).bitwise_left_shift(bits - 1).expand(shape).contiguous()
    view = (-1, 1, 1, places.shape[1]) if axis == 3 else (-1, 1, places.shape[1], 1)
    for tap in range(places.shape[2]):
        place = places[:, :, tap].reshape(view).expand(shape)
        total.addcmul_(pixels.gather(axis, place).int(), weights[:, :, tap].reshape(view))
    return total.bitwise_right_shift_(bits).clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=256)
def _integer_taps(engine: str, kernel: str, source: int, target: int, start: int, crop: int) -> Taps:
    """Return places (crop, K), weights (crop, K) and bits of one axis."""
    places, weights = _taps(source, target, kernel)
    bits = _PILLOW_BITS
    if engine == "torchvision":
        largest = weights.max()
        bits = next(bits for bits in range(23) if bits == 22 or int(0.5 + largest * 2 ** (bits + 1)) >= _INT16)
    scaled = weights * 2**bits
    integers = np.trunc(np.where(scaled < 0, scaled - 0.5, scaled + 0.5)).astype(np.int32)
    kept = slice(start, start + crop)
    return places[kept], integers[kept], bits


def _taps(source: int, target: int, kernel: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the pixels of a line that each pixel of the resized line sums, and their weights, (target, K)."""
    if source == target:
        line = np.arange(source, dtype=np.int64)[:, None]
        return line, np.ones(line.shape)
    scale = source / target
    wide = max(scale, 1.0)
    support = _SUPPORT[kernel] * wide
    centre = (np.arange(target, dtype=np.float64) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)  # truncates, as a cast in C does
    last = np.minimum((centre + support + 0.5).astype(np.int64), source)
    steps = np.arange(int((last - first).max()), dtype=np.int64)
    places = first[:, None] + steps
    weights = _FUNCTIONS[kernel]((places - centre[:, None] + 0.5) * (1.0 / wide))
    weights[places >= last[:, None]] = 0.0
    total = np.cumsum(weights, axis=1)[:, -1:]  # adds from the left, as the libraries do
    return np.minimum(places, source - 1), np.divide(weights, total, out=weights, where=total != 0)


def _bilinear(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(places), 0.0)


def _bicubic(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return Keys' cubic with a = -1/2."""
    x = np.abs(places)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FUNCTIONS = {"bilinear": _bilinear, "bicubic": _bicubic}
