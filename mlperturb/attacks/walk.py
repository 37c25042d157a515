"""The state of the loop of ML-DDN, see `mlperturb.attacks.ddn`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlperturb.attacks.geometry import is_all, norms
from mlperturb.attacks.problem import Problem


@dataclass(frozen=True)
class Walk:
    """The state of the loop, for each of n images with J constraints.

    Attributes:
        latent: r before any rounding, in the lattice's coordinates, (n, 3, H', W').
        radius: ||r||_2 as step 5 set it, before the clip of step 6, (n,); 0 at the clean photo.
        multipliers: mu, (n, J), or (n, 1) before the first forward pass.
        allowed: K, the iterations that the image can afford, (n,).
        begun: passes spent before the first iteration, (n,), on the CPU.
        done: whether the clean photo meets the goal, so that the image leaves the batch, (n,).
        least: the least ||r||_2 with which an iterate met the goal, in the views not computed as expected, (n,);
            infinite before.
        restarted: whether the image has restarted (step 8), (n,).
        fresh: whether this is the first iteration, from clean photos; one value for all images.
    """

    latent: Tensor
    radius: Tensor
    multipliers: Tensor
    allowed: Tensor
    begun: Tensor
    done: Tensor
    least: Tensor
    restarted: Tensor
    fresh: bool

    @classmethod
    def begin(cls, problem: Problem, start: Tensor | None, iterations: int) -> Walk:
        """Step 1: r = 0 (or `start`), every multiplier 1."""
        latent = problem.lattice.zeros(problem.images)
        if start is not None:
            latent = problem.lattice.clip(start.clone(), problem.images, *problem.pixel_range)
        radius = norms(latent)
        no, never = torch.zeros_like(radius, dtype=torch.bool), torch.full_like(radius, torch.inf)
        ones = torch.ones_like(radius).unsqueeze(1)
        left = problem.iterations_left(iterations)
        return cls(latent, radius, ones, left, problem.spent, no, never, no, start is None)

    def select(self, rows: Tensor) -> Walk:
        """Return the state of some images."""
        if is_all(rows, len(self.radius)):
            return self
        names = ("latent", "radius", "multipliers", "allowed", "done", "least", "restarted")
        return replace(self, begun=self.begun[rows.cpu()], **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True)
class Seen:
    """The results of a forward pass (steps 2 and 9), of n images with J constraints.

    Attributes:
        images: x + r, rounded if the attack is on the lattice, (n, 3, H, W).
        leaf: the images at which the gradient is taken, (N, 3, H, W).
        rows: the places of the n images in `leaf`, (n,); None if they are the same.
        logits: z, (n, L), or of every view, computed or expected, (n, V, L); without a graph.
        computed: whether every view of the image is computed, boolean, (n,); None in a single view.
        violations: v, the largest of all views, (n, J), 0 where the image does not have a constraint; with the graph of
            the view computed.
        present: which constraints the image has, boolean, (n, J).
        weights: w_j of the loss: mu_j, or after a restart 0 or 1, (n, J).
    """

    images: Tensor
    leaf: Tensor
    rows: Tensor | None
    logits: Tensor
    computed: Tensor | None
    violations: Tensor
    present: Tensor
    weights: Tensor
