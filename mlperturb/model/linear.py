"""The linear map of a resize, out = R_h X R_w^T, and its transpose, for a batch of photos of mixed sizes.

A pixel of the result sums few pixels of the photo, so that almost all entries of R_h and R_w are 0. On the CPU the map
is a product with sparse matrices, `Banded`; on a device, and in types that the CPU's sparse product does not know, it
is a product with dense matrices, `Dense`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_STRIP = 2**18  # numbers in a strip of rows, see `strips`
_ROWS = 32  # of a photo, in a strip of `Band`

Pair = tuple[Tensor, Tensor]  # R_h, (h, H), and R_w, (w, W), of one photo


def bind_map(pairs: Sequence[Pair], device: torch.device | str, dtype: torch.dtype) -> Dense | Banded:
    """Return the map of a batch, padded to its largest photo, from the R_h, (h, H_i), and R_w, (w, W_i), of each."""
    if torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64):
        height, width = (max(pair[axis].shape[1] for pair in pairs) for axis in (0, 1))
        bands = tuple((Band.of(rows.to(dtype)), Band.of(columns.to(dtype))) for rows, columns in pairs)
        return Banded(bands, height, width)
    rows, columns = (stack_matrices([pair[axis] for pair in pairs]).to(device, dtype) for axis in (0, 1))
    return Dense(rows, columns)


def mix(maps: Sequence[Dense | Banded], chosen: Tensor) -> Dense | Banded:
    """Return the map of a batch in which each photo has a map of its own, the number of which is `chosen`, (N,)."""
    banded = [one for one in maps if isinstance(one, Banded)]
    if banded:
        bands = tuple(banded[number].bands[row] for row, number in enumerate(chosen.tolist()))
        return Banded(bands, banded[0].height, banded[0].width)
    dense = [one for one in maps if isinstance(one, Dense)]
    places = (chosen, torch.arange(len(chosen), device=chosen.device))
    return Dense(torch.stack([one.rows for one in dense])[places], torch.stack([one.columns for one in dense])[places])


def resize(images: Tensor, linear: Dense | Banded) -> Tensor:
    """Return R_h X R_w^T, (N, 3, h, w), of padded photos X, (N, 3, H, W); differentiable."""
    result: Tensor = _Down.apply(images, linear)
    return result


def stand_in(images: Tensor, resized: Tensor, linear: Dense | Banded) -> Tensor:
    """Return photos as a library resized them, (N, 3, h, w), with the gradient of the linear map R_h X R_w^T.

    Args:
        images: (N, 3, H, W).
        resized: the result of the library, (N, 3, h, w).
        linear: the map.
    """
    result: Tensor = _StraightThrough.apply(images, resized, linear)
    return result


def resize_back(gradients: Tensor, linear: Dense | Banded) -> Tensor:
    """Return R_h^T G R_w, (N, 3, H, W), of gradients G, (N, 3, h, w); 0 in the padding; differentiable."""
    result: Tensor = _Up.apply(gradients, linear)
    return result


@dataclass(frozen=True)
class Dense:
    """The map as products with dense matrices.

    Attributes:
        rows: R_h of each photo, padded with zeros, (N, h, H).
        columns: R_w of each photo, padded with zeros, (N, w, W).
    """

    rows: Tensor
    columns: Tensor

    def down(self, images: Tensor) -> Tensor:
        """Return R_h X R_w^T."""
        return self.rows.unsqueeze(1) @ images @ self.columns.unsqueeze(1).transpose(2, 3)

    def up(self, gradients: Tensor) -> Tensor:
        """Return R_h^T G R_w."""
        return self.rows.unsqueeze(1).transpose(2, 3) @ gradients @ self.columns.unsqueeze(1)

    def equals(self, other: Dense | Banded) -> bool:
        """Say whether another map is the same."""
        return isinstance(other, Dense) and all(map(torch.equal, vars(self).values(), vars(other).values()))

    def select(self, rows: Tensor) -> Dense:
        """Return the map of some photos of the batch."""
        return Dense(self.rows[rows], self.columns[rows])


@dataclass(frozen=True)
class Band:
    """The entries of a matrix that are not 0, row by row.

    Attributes:
        counts: how many each row has, (rows,).
        places: their columns, (entries,).
        values: (entries,).
        transposed: the entries of the transposed matrix; None in those themselves.
    """

    counts: Tensor
    places: Tensor
    values: Tensor
    transposed: Band | None = None

    @classmethod
    def of(cls, matrix: Tensor) -> Band:
        """Return the entries of a matrix and of its transpose."""
        return cls(*_entries(matrix), cls(*_entries(matrix.T)))

    @property
    def shape(self) -> tuple[int, int]:
        """The (rows, columns) of the matrix."""
        return len(self.counts), len(_transpose(self).counts)

    def dense(self) -> Tensor:
        """Return the matrix, (rows, columns)."""
        matrix = self.values.new_zeros(self.shape)
        matrix[torch.arange(len(self.counts)).repeat_interleave(self.counts), self.places] = self.values
        return matrix

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        """The matrix, (h, H), in strips of columns that fit a cache beside what they are multiplied by."""
        matrix, found = self.dense().T, []
        for start in range(0, len(matrix), _ROWS):
            part = matrix[start : start + _ROWS]
            used = part.any(0).nonzero().flatten().tolist() or [0]
            lines = slice(used[0], used[-1] + 1)
            found.append(Strip(slice(start, start + len(part)), lines, part[:, lines].contiguous()))
        return tuple(found)


@dataclass(frozen=True)
class Strip:
    """Some rows of a photo, and the lines of the resized photo that they are summed into.

    Attributes:
        rows: of the photo.
        lines: of the resized photo.
        weights: the part of R_h^T, (rows, lines); the rest of these rows of R_h^T is 0.
    """

    rows: slice
    lines: slice
    weights: Tensor


def _entries(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, places = matrix.nonzero(as_tuple=True)
    return torch.bincount(rows, minlength=len(matrix)), places, matrix[rows, places]


@dataclass(frozen=True)
class Banded:
    """The map as products with sparse matrices on the CPU.

    The matrices of all photos are the blocks of one sparse matrix, and one product serves the batch.

    Attributes:
        bands: R_h and R_w of each photo.
        height: H, of the padded batch.
        width: W.
    """

    bands: tuple[tuple[Band, Band], ...]
    height: int
    width: int

    def down(self, images: Tensor) -> Tensor:
        """Return R_h X R_w^T; of 8-bit pixels, X is what they are in [0, 1]."""
        count, (tall, wide) = len(images), self.target
        lines = (
            self._sum_rows(images) if images.dtype == torch.uint8 else self._down_rows @ images.reshape(-1, self.width)
        )
        lines = self._down_columns @ _columns_first(lines.view(count, 3, tall, self.width))
        return lines.view(count, wide, 3, tall).permute(0, 2, 3, 1)

    def _sum_rows(self, pixels: Tensor) -> Tensor:
        """Return R_h X, (3 N h, W), of 8-bit pixels, (N, 3, H, W), a strip of whose rows is in floats at a time."""
        lines = self.bands[0][0].values.new_zeros(len(pixels), 3, self.target[0], self.width)
        for photo, sums, (band, _) in zip(pixels, lines, self.bands, strict=True):
            for strip in band.strips:
                sums[:, strip.lines] += strip.weights.T @ (photo[:, strip.rows].to(sums.dtype) / 255)
        return lines.view(-1, self.width)

    def up(self, gradients: Tensor) -> Tensor:
        """Return R_h^T G R_w."""
        count, tall = len(gradients), self.target[0]
        lines = self._up_columns @ _columns_first(gradients)
        lines = lines.view(count, self.width, 3, tall).permute(0, 2, 3, 1).reshape(-1, self.width)
        result = gradients.new_empty(count * 3 * self.height, self.width)
        torch.addmm(result, self._up_rows, lines, beta=0, out=result)  # writes once; a plain product writes twice
        return result.view(count, 3, self.height, self.width)

    def equals(self, other: Dense | Banded) -> bool:
        """Say whether another map is the same."""
        if not isinstance(other, Banded) or len(self.bands) != len(other.bands):
            return False
        pairs = zip(chain(*self.bands), chain(*other.bands), strict=True)
        return all(
            one.shape == two.shape and torch.equal(one.places, two.places) and torch.equal(one.values, two.values)
            for one, two in pairs
        )

    def select(self, rows: Tensor) -> Banded:
        """Return the map of some photos of the batch."""
        return Banded(tuple(self.bands[row] for row in rows.tolist()), self.height, self.width)

    @property
    def target(self) -> tuple[int, int]:
        """The (height, width) of the result."""
        rows, columns = self.bands[0]
        return len(rows.counts), len(columns.counts)

    @cached_property
    def _down_rows(self) -> Tensor:
        """R_h of each channel of each photo, (3 N h, 3 N H)."""
        return _blocks([pair[0] for pair in self.bands for _ in range(3)], self.target[0], self.height)

    @cached_property
    def _down_columns(self) -> Tensor:
        """R_w of each photo, (N w, N W)."""
        return _blocks([pair[1] for pair in self.bands], self.target[1], self.width)

    @cached_property
    def _up_rows(self) -> Tensor:
        """R_h^T of each channel of each photo, (3 N H, 3 N h)."""
        return _blocks([_transpose(pair[0]) for pair in self.bands for _ in range(3)], self.height, self.target[0])

    @cached_property
    def _up_columns(self) -> Tensor:
        """R_w^T of each photo, (N W, N w)."""
        return _blocks([_transpose(pair[1]) for pair in self.bands], self.width, self.target[1])


def _transpose(band: Band) -> Band:
    assert band.transposed is not None
    return band.transposed


def _columns_first(lines: Tensor) -> Tensor:
    """Return (N, 3, h, W) as (N W, 3 h), whose rows a product with matrices of the width sums."""
    count, channels, tall, wide = lines.shape
    return lines.permute(0, 3, 1, 2).reshape(count * wide, channels * tall)


def _blocks(bands: Sequence[Band], height: int, width: int) -> Tensor:
    """Return matrices, each padded with zeros to (height, width), as the diagonal blocks of a sparse matrix."""
    counts = torch.cat([functional.pad(band.counts, (0, height - len(band.counts))) for band in bands])
    starts = functional.pad(counts.cumsum(0), (1, 0)).int()
    places = torch.cat([band.places + number * width for number, band in enumerate(bands)]).int()
    values, size = torch.cat([band.values for band in bands]), (len(bands) * height, len(bands) * width)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")  # said once
        return torch.sparse_csr_tensor(starts, places, values, size, check_invariants=False)


class _Down(torch.autograd.Function):
    """R_h X R_w^T."""

    @staticmethod
    def forward(images: Tensor, linear: Dense | Banded) -> Tensor:
        """Return (N, 3, h, w)."""
        return linear.down(images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Dense | Banded], output: Tensor) -> None:  # noqa: ARG004
        """Keep the map."""
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return R_h^T G R_w."""
        return _Up.apply(gradients[0], ctx.linear), None


class _Up(torch.autograd.Function):
    """R_h^T G R_w."""

    @staticmethod
    def forward(gradients: Tensor, linear: Dense | Banded) -> Tensor:
        """Return (N, 3, H, W)."""
        return linear.up(gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Dense | Banded], output: Tensor) -> None:  # noqa: ARG004
        """Keep the map."""
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, *images: Tensor) -> tuple[Tensor, None]:
        """Return R_h X R_w^T."""
        return _Down.apply(images[0], ctx.linear), None


class _StraightThrough(torch.autograd.Function):
    """A result forward, the linear map's gradient backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(_images: Tensor, resized: Tensor, _linear: Dense | Banded) -> Tensor:
        """Return `resized`, (N, 3, h, w), as the image of photos (N, 3, H, W)."""
        return resized.view_as(resized)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Dense | Banded], output: Tensor) -> None:  # noqa: ARG004
        """Keep the map."""
        ctx.linear = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return R_h^T G R_w."""
        return _Up.apply(gradients[0], ctx.linear), None, None


def strips(images: Tensor) -> list[slice]:
    """Return the rows of images, (n, C, H, W), in strips: several steps on a strip find it in the CPU's cache.

    A device, on which a step costs more to start, gets a single strip.
    """
    height = images.shape[2]
    size = max(1, _STRIP * height // max(images.numel(), 1)) if images.device.type == "cpu" else height
    return [slice(start, min(start + size, height)) for start in range(0, height, size)]


def crop_rows(matrix: Tensor, start: int, crop: int) -> Tensor:
    """Return `crop` rows of a matrix from row `start`; rows of zeros around all of it if it has fewer."""
    if crop > len(matrix):
        return functional.pad(matrix, (0, 0, -start, crop - len(matrix) + start))
    return matrix[start : start + crop]


def take_inside(matrix: Tensor, side: int) -> Tensor:
    """Return the columns of a photo of `side` pixels in the middle of a bordered side."""
    start = (matrix.shape[1] - side) // 2
    return matrix[:, start : start + side]


def to_pixels(images: Tensor) -> Tensor:
    """Return images in [0, 1], (N, C, H, W), as 8-bit pixels of the same shape; 8-bit pixels as they are."""
    if images.dtype == torch.uint8:
        return images
    pixels = torch.empty_like(images, dtype=torch.uint8)
    for rows in strips(images):
        pixels[:, :, rows] = (images[:, :, rows] * 255).round_().clamp_(0, 255).int()  # faster than straight to bytes
    return pixels


def stack_matrices(matrices: Sequence[Tensor]) -> Tensor:
    """Stack matrices (h, w_i), padded with zero columns to the widest, to (N, h, w)."""
    width = max(matrix.shape[1] for matrix in matrices)
    return torch.stack([functional.pad(matrix, (0, width - matrix.shape[1])) for matrix in matrices])
