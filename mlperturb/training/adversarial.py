"""Adversarial training: the worst photos near those of a batch, by projected gradient ascent on the training loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.errors import UsageError
from mlperturb.model.preprocess import Preprocess

_STRIDE = 2.5  # radii that all steps together can go (Madry et al., 2018)
_SINGLE = 1.25  # radii of a step that is alone (Wong, Rice and Kolter, 2020)


@dataclass(frozen=True)
class Threat:
    """The perturbations of network input that training prepares for.

    Attributes:
        norm: `linf` or `l2`.
        radius: on the 0-255 scale; of `linf` the greatest change of a number, of `l2` the RMSD: sqrt(mean(r^2)).
    """

    norm: str
    radius: float

    @classmethod
    def parse(cls, text: str) -> Threat:
        """Read `linf:RADIUS` or `l2:RMSD`.

        Raises:
            UsageError: if the text is neither, or the radius is not above 0 and at most 255.
        """
        norm, _, digits = text.partition(":")
        try:
            radius = float(digits)
        except ValueError:
            radius = math.nan
        if norm not in ("linf", "l2") or not 0 < radius <= 255:
            raise UsageError(f"expected linf:RADIUS or l2:RMSD, above 0 and at most 255, got {text!r:.80}")
        return cls(norm, radius)

    def project(self, change: Tensor) -> Tensor:
        """Return the nearest change within the radius, of changes on the 0-255 scale, (N, 3, h, w)."""
        if self.norm == "linf":
            return change.clamp(-self.radius, self.radius)
        return change * (self.radius / _rmsd(change).clamp(min=self.radius))

    def draw(self, like: Tensor) -> Tensor:
        """Return a random change, (N, 3, h, w): uniform for `linf`; for `l2` white noise of a uniform RMSD."""
        if self.norm == "linf":
            return torch.empty_like(like).uniform_(-self.radius, self.radius)
        noise = torch.randn_like(like)
        return noise * (self.radius * torch.rand_like(noise[:, :1, :1, :1]) / _rmsd(noise))

    def ascend(self, gradient: Tensor, length: float) -> Tensor:
        """Return the step of this length, on the 0-255 scale, along which the loss rises most, (N, 3, h, w)."""
        if self.norm == "linf":
            return length * gradient.sign()
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)  # squares must not vanish
        return gradient * (length / _rmsd(gradient).clamp(min=1e-12))


def perturb(
    loss: Callable[[Tensor], Tensor], inputs: Tensor, threat: Threat, preprocess: Preprocess, steps: int
) -> Tensor:
    """Return network input near `inputs` at which the loss is high, (N, 3, h, w); its pixels stay within 0 and 255.

    Projected gradient ascent from a random start. The photo's pixels are those of the network input, after resizing.

    Args:
        loss: of network input, (N, 3, h, w) -> ().
        inputs: (N, 3, h, w), normalised.
        threat: how far the input may move.
        preprocess: by whose mean and standard deviation the input is normalised.
        steps: of the ascent, at least 1.
    """
    mean, std = (torch.tensor(value).to(inputs).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
    pixels = 255 * (inputs * std + mean)
    length = threat.radius * (_SINGLE if steps == 1 else _STRIDE / steps)
    change = threat.draw(pixels)
    for _ in range(steps):
        change = _keep_in_range(pixels, change).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(((pixels + change) / 255 - mean) / std), change)
        with torch.no_grad():
            change = threat.project(change + threat.ascend(gradient.float(), length))
    return ((pixels + _keep_in_range(pixels, change)) / 255 - mean) / std


def _keep_in_range(pixels: Tensor, change: Tensor) -> Tensor:
    return ((pixels + change).clamp(0, 255) - pixels).detach()


def _rmsd(change: Tensor) -> Tensor:
    """Return sqrt(mean(r^2)) of each image, (N, 1, 1, 1)."""
    return change.square().mean((1, 2, 3), keepdim=True).sqrt()
