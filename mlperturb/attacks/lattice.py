"""The points that a file can hold: an attack searches among them, with a gradient that passes straight through.

A lattice has coordinates r, floats in which an attack moves; `points` rounds them to images that a file can hold. For
the lattice of 8-bit pixels, multiples of 1/255, r is the perturbation itself. Other lattices
(`mlperturb.model.coefficients`) have other coordinates, of the same scale: to first order, ||r||_2 is the length of the
perturbation in [0, 1] units.
"""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from mlperturb.model.linear import strips

STEP = 1 / 255  # one grey level
_WIDEST = 8.0  # log2 of the largest scale that `lattice_scale` tries: it moves any photo by whole grey levels
_HALVINGS = 8  # steps of the bisection: the scale is found to a factor of 2^(1 / 32); not tuned


class Lattice(Protocol):
    """The points near each image of a batch that its file can hold."""

    @property
    def small(self) -> bool:
        """Whether points are 8-bit pixels, and `pull` gets the gradient of the network's input; else of images."""
        ...

    def zeros(self, images: Tensor) -> Tensor:
        """Return the coordinates of the images themselves, (n, 3, H', W')."""
        ...

    def points(self, images: Tensor, latent: Tensor) -> Tensor:
        """Return the images, (n, 3, H, W), of rounded coordinates, (n, 3, H', W')."""
        ...

    def fall(self, scale: Tensor, latent: Tensor, gradient: Tensor) -> Tensor:
        """Return -<round(a r), g>, the fall of the linearised loss, (n,), of rounded coordinates; a is (n,)."""
        ...

    def pull(self, gradient: Tensor, points: Tensor) -> Tensor:
        """Return the gradient with respect to the coordinates, (n, 3, H', W'), of that of images, (n, 3, H, W)."""
        ...

    def clip(self, latent: Tensor, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return coordinates whose images lie within a range of pixels; may change `latent` in place."""
        ...

    def largest(self, latent: Tensor) -> Tensor:
        """Return the largest coordinate of each image, (n,), where a step of the rounding is 1/255."""
        ...

    def select(self, rows: Tensor) -> Self:
        """Return the lattice of some images."""
        ...


class PixelLattice:
    """The lattice of 8-bit pixels."""

    small = False

    def zeros(self, images: Tensor) -> Tensor:
        """Return r = 0."""
        return torch.zeros_like(images)

    def points(self, images: Tensor, latent: Tensor) -> Tensor:
        """Return round(x + r)."""
        points = torch.empty_like(images)
        for rows in strips(images):
            _round_(torch.add(images[:, :, rows], latent[:, :, rows], out=points[:, :, rows]))
        return points

    def fall(self, scale: Tensor, latent: Tensor, gradient: Tensor) -> Tensor:
        """Return -<round(a r), g>, (n,), with a r rounded to multiples of 1/255."""
        scale, total = scale.view(-1, 1, 1, 1), latent.new_zeros(len(latent))
        for rows in strips(latent):
            rounded = (scale * latent[:, :, rows]).mul_(255).round_().div_(255)
            total -= rounded.mul_(gradient[:, :, rows]).flatten(1).sum(1)
        return total

    def pull(self, gradient: Tensor, points: Tensor) -> Tensor:  # noqa: ARG002
        """Return the gradient itself."""
        return gradient

    def clip(self, latent: Tensor, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return r such that x + r lies within a range of pixels; in place."""
        for rows in strips(images):
            photos, part = images[:, :, rows], latent[:, :, rows]
            limits = (bound if bound.dim() == 0 else bound[:, :, rows] for bound in (low, high))
            torch.sub(part.add_(photos).clamp_(*limits), photos, out=part)
        return latent

    def largest(self, latent: Tensor) -> Tensor:
        """Return max |r|."""
        flat = latent.flatten(1)
        return torch.maximum(flat.amax(1), -flat.amin(1))

    def select(self, rows: Tensor) -> PixelLattice:  # noqa: ARG002
        """Return the same lattice."""
        return self


PIXELS = PixelLattice()


def to_lattice(images: Tensor) -> Tensor:
    """Round images in [0, 1] to multiples of 1/255."""
    return _round_(images.clone())


def _round_(images: Tensor) -> Tensor:
    """Round images in place."""
    return images.mul_(255).round_().clamp_(0, 255).div_(255)


def lattice_scale(lattice: Lattice, latent: Tensor, gradient: Tensor, needed: Tensor) -> Tensor:
    """Return the least scale a >= 1 with -<round(a r), g> >= needed: the fall of the linearised loss; (n,).

    Rounding erases changes below half a step, so that a small r loses most of its effect. The scale is found by
    bisection, without a pass of the model; it is at most 2^8.

    Args:
        lattice: rounds r.
        latent: r = -s g, (n, 3, H', W').
        gradient: g, of the same shape.
        needed: the fall of the loss that is wanted, (n,).
    """
    low, high = torch.zeros_like(needed), torch.full_like(needed, _WIDEST)  # of log2 of the scale
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = lattice.fall(torch.exp2(middle), latent, gradient) >= needed
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.exp2(high)
