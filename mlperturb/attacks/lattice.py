"""The lattice of 8-bit pixels, multiples of 1/255: rounding, and the length that a perturbation needs to survive it."""

from __future__ import annotations

import torch
from torch import Tensor

from mlperturb.attacks.problem import spread

STEP = 1 / 255  # one grey level
_WIDEST = 8.0  # log2 of the largest scale that `lattice_scale` tries: it moves any photo by whole grey levels
_HALVINGS = 8  # steps of the bisection: the scale is found to a factor of 2^(1 / 32); not tuned


def to_lattice(images: Tensor) -> Tensor:
    """Round images in [0, 1] to multiples of 1/255."""
    return (images * 255).round().clamp(0, 255) / 255


def lattice_scale(latent: Tensor, gradient: Tensor, needed: Tensor) -> Tensor:
    """Return the least scale a >= 1 with -<round(a r), g> >= needed: the fall of the linearised loss; (n,).

    Rounding erases changes below half a grey level, so that a small r loses most of its effect. The scale is found by
    bisection, without a pass of the model; it is at most 2^8.

    Args:
        latent: r = -s g, (n, 3, H, W).
        gradient: g, of the same shape.
        needed: the fall of the loss that is wanted, (n,).
    """
    low, high = torch.zeros_like(needed), torch.full_like(needed, _WIDEST)  # of log2 of the scale
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rounded = (spread(torch.exp2(middle)) * latent * 255).round() / 255
        enough = -(rounded * gradient).flatten(1).sum(1) >= needed
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.exp2(high)
