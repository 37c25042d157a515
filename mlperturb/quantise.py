"""From a float result to a point of the 8-bit lattice on which every constraint still holds.

The perturbations this is about are smaller than the rounding step, so plain rounding erases them. Two stages:

1. The least scale s for which round(x + s * r) meets the goal: where one constraint binds and the model is nearly
   linear, the best lattice point is of that form. Forward passes alone.
2. Descent with the *rounded* photo in the forward pass and the gradient passed straight through to a latent
   perturbation of fixed norm (the decoupled direction and norm of DDN, Rony et al. 2019). Each constraint has its own
   weight, which grows while it is violated and decays while it is slack; the norm shrinks while the goal is met and
   grows while it is not. The best lattice point is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.attacks.common import Best, Goal, Outcome, Problem, norms, spread

_STEP = 1 / 255


@dataclass(frozen=True)
class Lattice:
    """What was found on the 8-bit lattice.

    Attributes:
        images: multiples of 1/255, (N, 3, H, W).
        met: whether the goal is met, (N,).
    """

    images: Tensor
    met: Tensor


def to_lattice(images: Tensor) -> Tensor:
    """Round images in [0, 1] to multiples of 1/255."""
    return (images * 255).round().clamp(0, 255) / 255


def quantise(problem: Problem, outcome: Outcome, *, scales: int = 8, iterations: int = 40) -> Lattice:
    """Find the lattice point of the best score, then of the least distortion, near an attack's result.

    Args:
        problem: the batch; its passes are counted on.
        outcome: the attack's result.
        scales: scales tried in the first stage, a forward pass each.
        iterations: of the second stage, a forward and a backward pass each.
    """
    best = Best(problem.images)
    goal = outcome.goal
    difference = outcome.images - problem.images
    if not bool(problem.affordable(1).all()):
        return Lattice(best.images, best.met)
    best.update(problem, goal, problem.images, problem.logits(problem.images).detach())
    largest = difference.flatten(1).abs().amax(1)
    moved = largest > 0
    least = (_STEP / 2 / largest.clamp(min=1e-30) * 1.1).clamp(min=1.0)  # below it everything rounds to the clean photo
    scale = _search_scale(problem, goal, difference, moved, best, least, scales)
    latent = difference * spread(torch.minimum(scale, 1.3 * least))
    _descend(problem, goal, latent, moved, best, iterations)
    return Lattice(best.images, best.met)


@torch.no_grad()
def _search_scale(
    problem: Problem, goal: Goal, difference: Tensor, active: Tensor, best: Best, start: Tensor, tries: int
) -> Tensor:
    """Bracket and bisect, from `start`, the least scale that meets the goal; return the best one known, (N,)."""
    scale = start.clone()
    low, high = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for _ in range(tries):
        active = active & problem.affordable(1)
        if not bool(active.any()):
            break
        part, rows = problem.select(active), active.nonzero().flatten()
        images = to_lattice(part.images + spread(scale[rows]) * difference[rows])
        met = best.update(part, goal.select(rows), images, part.logits(images))
        high[rows] = torch.where(met, scale[rows], high[rows])
        low[rows] = torch.where(met, low[rows], scale[rows])
        scale = torch.where(high.isinf(), low * 1.25, torch.where(low > 0, (low + high) / 2, high * 0.8))
        scale = torch.where(scale > 0, scale, start)
    return torch.where(high.isinf(), torch.maximum(low, start), high)


def _descend(problem: Problem, goal: Goal, latent: Tensor, active: Tensor, best: Best, iterations: int) -> None:
    """Run the second stage for the active images."""
    if not bool(active.any()) or not iterations:
        return
    rows = active.nonzero().flatten()
    problem, goal, latent = problem.select(active), goal.select(rows), latent[rows]
    radius = norms(latent)  # of the latent perturbation, (n,)
    weights: Tensor | None = None
    for step in range(iterations):
        keep = problem.affordable(2)
        if problem.meter.limit is not None and not bool(keep.all()):
            if not bool(keep.any()):
                return
            problem, goal = problem.select(keep), goal.select(keep.nonzero().flatten())
            latent, radius = latent[keep], radius[keep]
            weights = None if weights is None else weights[keep]
        images = to_lattice(problem.images + latent).requires_grad_()
        logits = problem.logits(images)
        violations = goal.violations(logits)
        if weights is None:
            weights = violations.isfinite().to(latent.dtype)
        present = violations.isfinite()
        # softplus keeps pulling a little on constraints that hold but are near their edge
        losses = (weights * torch.nn.functional.softplus(violations.masked_fill(~present, 0.0), beta=4)).sum(1)
        gradient = problem.gradient(losses, images)
        met = best.update(problem, goal, images.detach(), logits.detach())
        decay = 1 - step / iterations
        weights = weights * torch.exp(0.4 * torch.where(violations.detach() > 0, 1.0, -0.25) * decay * present)
        weights = (weights / weights.amax(1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-3) * present
        pull = 0.3 * decay * radius / norms(gradient).clamp(min=1e-30)
        latent = latent - spread(pull) * gradient
        radius = radius * torch.where(met, 1 - 0.05 * decay, 1 + 0.05 * decay)
        if problem.cap is not None:
            radius = radius.minimum(problem.cap)
        latent = latent * spread(radius / norms(latent).clamp(min=1e-30))
        latent = (problem.images + latent).clamp(0, 1) - problem.images
