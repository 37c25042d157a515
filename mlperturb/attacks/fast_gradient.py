"""FGS and FG, the one-step attacks (Section IV-C)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.geometry import norms, spread
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem

MAX_EPSILON = 10.0  # the largest epsilon, on the 0-255 scale


def fgs(problem: Problem, *, grid: int = 20, refinements: int = 5) -> Outcome:
    """x* = clip(x - epsilon * sgn(grad loss(y*, f(x)))), the sigmoid cross-entropy over A and B.

    Each image has its own epsilon in (0, 10] on the 0-255 scale: the smallest epsilon among those that meet the most
    constraints.

    Args:
        problem: the batch.
        grid: evenly spaced values of epsilon that are tried.
        refinements: bisections below the best of them.
    """
    return _one_step(problem, torch.sign, grid, refinements)


def fg(problem: Problem, *, grid: int = 20, refinements: int = 5) -> Outcome:
    """x* = clip(x - epsilon * grad / ||grad||_2): `fgs` along the gradient itself.

    Deviation: the gradient is normalised to a root mean square of 1, so that epsilon is the RMSD on the 0-255 scale.
    Under a plain L2 norm, epsilon <= 10 would be an RMSD of at most 0.02, but the paper reports 5.9 to 8.3.

    Args:
        problem: the batch.
        grid: evenly spaced values of epsilon that are tried.
        refinements: bisections below the best of them.
    """

    def normalise(gradient: Tensor) -> Tensor:
        touched = (gradient != 0).flatten(1).sum(1).clamp(min=1)  # padding and cropped pixels have no gradient
        return gradient * spread(touched.sqrt() / norms(gradient).clamp(min=1e-30))

    return _one_step(problem, normalise, grid, refinements)


def _one_step(problem: Problem, normalise: Callable[[Tensor], Tensor], grid: int, refinements: int) -> Outcome:
    problem = problem.aim(ClassificationGoal(problem.targets))
    targets, best = problem.targets, Best(problem)
    opening = problem.open()
    logits = opening.logits[opening.rows]
    wanted = (targets.desired > 0).to(logits.dtype)
    losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    losses = (losses * targets.constrained).sum(1)
    direction = normalise(problem.gradient(losses, opening.images, opening.rows))  # (N, 3, H, W)
    best.update(problem, problem.images, logits.detach())
    chosen = torch.zeros_like(best.norm)  # epsilon of the best iterate, (N,); 0 for the clean photo

    def try_(epsilon: Tensor) -> Tensor:
        """Try an epsilon for each image; return where it gives a better iterate, (N,)."""
        active = problem.affordable(1)
        if not bool(active.any()):
            return torch.zeros_like(active)
        rows = active.nonzero().flatten()
        part = problem.select(rows)
        moved = part.within_cap(part.clip(part.images - spread(epsilon[rows] / 255) * direction[rows]))
        before = best.score[rows], best.norm[rows]
        with torch.no_grad():
            best.update(part, moved, part.logits(moved))
        improved = torch.zeros_like(active)
        improved[rows] = (best.score[rows] > before[0]) | (best.norm[rows] < before[1])
        chosen[improved] = epsilon[improved]
        return improved

    step = MAX_EPSILON / grid
    for number in range(1, grid + 1):
        try_(torch.full_like(chosen, number * step))
    low = (chosen - step).clamp(min=0)
    for _ in range(refinements):
        middle = (low + chosen) / 2
        low = torch.where(try_(middle), low, middle)
    return best.outcome(problem.goal)
