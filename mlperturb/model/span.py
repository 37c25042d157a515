"""The 8-bit points near large photos, in coordinates of the size of the network's input.

A gradient of a photo is R_h^T G R_w, for the gradient G of the network's input and the resize R_h X R_w^T of the photo
(`mlperturb.model.linear`). So every perturbation that ML-DDN makes before it clips lies in the span of the rows of the
resize. With the square roots of A = R_h R_h^T and B = R_w R_w^T,

    r = Q_h^T C Q_w,  Q_h = A^(-1/2) R_h,  Q_w = B^(-1/2) R_w,  ||r||_2 = ||C||_2,

because the rows of Q_h and Q_w are orthonormal. C has the size of the network's input, of which a 12-megapixel photo
has 240 times as many pixels. An iteration then makes one thing of the photo's size: round(x + r) in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlperturb.model.linear import Banded, Dense

Size = tuple[int, int]

_LARGE = 16  # a photo is large if it has this many times as many pixels as the network's input
_FLATTEST = 1e-3  # the least eigenvalue of A, of the largest; below it, C would not say much of r
_SAMPLE = 300  # rows, and columns, of a photo that `SpanLattice.fall` looks at


@dataclass(frozen=True)
class Roots:
    """The roots of one axis of one photo.

    Attributes:
        root: A^(1/2), (h, h).
        inverse: A^(-1/2), (h, h).
        length: H.
        sample: random columns of R, (h, at most 300).
        peaks: A^(-1/2) times the two columns of R with the largest entries in each row, (h, at most 2 h).
    """

    root: Tensor
    inverse: Tensor
    length: int
    sample: Tensor
    peaks: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Roots | None:
        """Return the roots of R, (h, H); None if its rows are nearly dependent."""
        exact = matrix.double()
        values, vectors = torch.linalg.eigh(exact @ exact.T)
        if float(values.min()) < _FLATTEST * float(values.max()):
            return None
        root = vectors * values.sqrt() @ vectors.T
        inverse = vectors * values.rsqrt() @ vectors.T
        chosen = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(0))[:_SAMPLE]
        peaks = torch.unique(matrix.topk(2, dim=1).indices)
        found = (inverse @ exact[:, peaks]).to(matrix)
        return cls(root.to(matrix), inverse.to(matrix), matrix.shape[1], matrix[:, chosen], found)


@dataclass(frozen=True)
class SpanLattice:
    """The lattice of 8-bit pixels, with C in place of r; its points are 8-bit pixels, not floats.

    Attributes:
        linear: the resize of each photo.
        axes: the roots of the height and of the width of each photo.
    """

    linear: Banded
    axes: tuple[tuple[Roots, Roots], ...]
    small: ClassVar[bool] = True

    def zeros(self, images: Tensor) -> Tensor:
        """Return C = 0, (n, 3, h, w)."""
        rows, columns = self.axes[0]
        return images.new_zeros(len(images), 3, len(rows.root), len(columns.root))

    def points(self, images: Tensor, latent: Tensor) -> Tensor:
        """Return round(x + r), 8-bit pixels, (n, 3, H, W)."""
        points = torch.empty_like(images, dtype=torch.uint8)
        for number, lines in enumerate(self._lines(latent)):
            for strip in self.linear.bands[number][0].strips:
                photo = images[number, :, strip.rows, : lines.shape[2]]
                moved = torch.baddbmm(photo, strip.weights.expand(3, -1, -1), lines[:, strip.lines])
                whole = moved.mul_(255).round_().clamp_(0, 255).int()  # faster than straight to bytes
                points[number, :, strip.rows, : lines.shape[2]] = whole
                points[number, :, strip.rows, lines.shape[2] :] = 0
            points[number, :, self.axes[number][0].length :] = 0
        return points

    def fall(self, scale: Tensor, latent: Tensor, gradient: Tensor) -> Tensor:
        """Return -<round(a r), g>, (n,), from a sample of the rows and columns of each photo; g in coordinates too."""
        total = latent.new_zeros(len(latent))
        both = zip(self._multiply(latent, "inverse"), self._multiply(gradient, "inverse"), strict=True)
        for number, values in enumerate(both):
            rows, columns = (axis.sample for axis in self.axes[number])
            moved, slope = (rows.T @ value @ columns for value in values)
            share = rows.shape[1] * columns.shape[1] / math.prod(axis.length for axis in self.axes[number])
            rounded = (moved * (255 * scale[number])).round_().div_(255)
            total[number] = -rounded.mul_(slope).sum() / share
        return total

    def pull(self, gradient: Tensor, points: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gradient in coordinates, A^(1/2) G B^(1/2), of that of the network's input, G, (n, 3, h, w)."""
        return self._multiply(gradient, "root")

    def clip(self, latent: Tensor, images: Tensor, low: Tensor, high: Tensor) -> Tensor:  # noqa: ARG002
        """Return C itself: `points` clips x + r to the range of pixels, and r stays as long as it is."""
        return latent

    def largest(self, latent: Tensor) -> Tensor:
        """Return max |r| over the pixels nearest to the middle of what a pixel of the network's input sums."""
        peaks = zip(latent, self.axes, strict=True)
        return torch.stack([(rows.peaks.T @ values @ columns.peaks).abs().amax() for values, (rows, columns) in peaks])

    def select(self, rows: Tensor) -> SpanLattice:
        """Return the lattice of some images."""
        return SpanLattice(self.linear.select(rows), tuple(self.axes[row] for row in rows.tolist()))

    def _lines(self, latent: Tensor) -> list[Tensor]:
        """Return A^(-1/2) C Q_w of each photo, (3, h, W): R_h^T of it is r."""
        found = []
        for values, (_, band) in zip(self._multiply(latent, "inverse"), self.linear.bands, strict=True):
            lines = values.new_empty(*values.shape[:2], band.shape[1])
            for strip in band.strips:
                lines[:, :, strip.rows] = values[:, :, strip.lines] @ strip.weights.T
            found.append(lines)
        return found

    def _multiply(self, values: Tensor, name: str) -> Tensor:
        """Return the roots or inverse roots of the height and of the width, times (n, 3, h, w) between."""
        rows, columns = (torch.stack([getattr(axes[axis], name) for axes in self.axes]) for axis in (0, 1))
        return rows.unsqueeze(1) @ values @ columns.unsqueeze(1)


def span_of(maps: Sequence[Dense | Banded], sizes: Sequence[Size], images: Tensor) -> SpanLattice | None:
    """Return the lattice of a padded batch, (N, 3, H, W), whose readers have these linear maps.

    None if a photo is not large, the maps differ or are not `Banded`, or coordinates would not say all of a photo.

    Args:
        maps: of each reader.
        sizes: (height, width) of the photos.
        images: the batch.
    """
    linear = maps[0]
    if not isinstance(linear, Banded) or images.dtype != torch.float32:
        return None
    if min(map(math.prod, sizes)) < _LARGE * math.prod(linear.target):
        return None  # before the maps are compared, which takes longer
    if not all(one.equals(linear) for one in maps[1:]):
        return None
    axes = []
    for bands in linear.bands:
        rows, columns = (Roots.of(band.dense()) for band in bands)
        if rows is None or columns is None:
            return None
        axes.append((rows, columns))
    return SpanLattice(linear, tuple(axes))
