"""Input diversity: the gradient is taken at resized and shifted copies of the photo (DI-FGSM, Xie et al. 2019).

A perturbation that needs every pixel in its place fools its own classifier and few others. The copies of one iteration
are drawn by the number of the iteration alone, from a sequence that fills its range evenly: so the result of a photo
does not depend on the photos beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Diversity = Literal["none", "resize", "shift", "both"]

PLAIN = 4  # every fourth iteration, from the first on, sees the photo itself
_SMALLEST = 0.8  # the least side of a resized copy, as a share of the photo's
_FURTHEST = 0.06  # the largest shift, as a share of the photo's side
_BASES = (2, 3, 5, 7, 11)  # of the sequences: of the side, the place down and across, the shift down and across
_GREY = 0.5  # the pixels around a copy


def diversify(images: Tensor, sizes: Sequence[tuple[int, int]], diversity: Diversity, step: int) -> Tensor:
    """Return a copy of each photo within its own frame, (N, 3, H, W), grey around it; differentiable.

    Args:
        images: padded photos in [0, 1], (N, 3, H, W).
        sizes: (height, width) of each photo.
        diversity: `resize` to a share of the sides, at any place in the frame; `shift` across its edge; `both`; or
            `none`.
        step: the number of the iteration; those that `PLAIN` divides return the photos themselves.
    """
    if diversity == "none" or step % PLAIN == 0:
        return images
    share, down, across, fall, drift = (_halton(step, base) for base in _BASES)
    scale = 1 - (1 - _SMALLEST) * share if diversity in ("resize", "both") else 1.0
    shift = _FURTHEST if diversity in ("shift", "both") else 0.0
    places = [(1 - scale) * down + shift * (2 * fall - 1), (1 - scale) * across + shift * (2 * drift - 1)]
    canvas = int(images.shape[2]), int(images.shape[3])
    theta = images.new_zeros(len(images), 2, 3)
    inside = torch.zeros_like(images[:, :1])
    for row, size in enumerate(sizes):
        inside[row, :, : size[0], : size[1]] = 1
        for axis, (side, whole, place) in enumerate(zip(size, canvas, places, strict=True)):
            theta[row, 1 - axis, 1 - axis] = 1 / scale  # of normalised coordinates, x before y
            theta[row, 1 - axis, 2] = (1 - 2 * place * side / whole) / scale - 1
    grid = functional.affine_grid(theta, [len(images), 3, *canvas], align_corners=False)
    copies = functional.grid_sample((images - _GREY) * inside, grid, mode="bilinear", align_corners=False)
    return copies + _GREY


def _halton(number: int, base: int) -> float:
    """Return a term of the Halton sequence, in [0, 1)."""
    value, share = 0.0, 1.0
    while number:
        share /= base
        value += share * (number % base)
        number //= base
    return value
