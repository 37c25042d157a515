"""Search near a float result for a point of the 8-bit lattice that still meets the goal.

Good perturbations are smaller than the rounding step, so plain rounding erases them. The search has two stages:

1. Find the least scale s for which round(x + s * r) meets the goal, by forward passes alone. Where a single constraint
   binds and the model is nearly linear, the best lattice point has this form.
2. Run the loop of ML-DDN (`attacks.ddn`) from there: the forward pass sees the *rounded* photo, and the gradient passes
   straight through the rounding. The best lattice point is kept.

An attack that knows one view leaves a photo as it is where that view is as asked. If another view is not, the loop runs
from the photo itself.

A result that is on the lattice already, such as the result of ML-DDN, is returned unchanged.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.ddn import descend
from mlperturb.attacks.geometry import distances, spread
from mlperturb.attacks.lattice import STEP, to_lattice
from mlperturb.attacks.pace import GENTLE
from mlperturb.attacks.panel import Panel, verify
from mlperturb.attacks.problem import Problem


def quantise(problem: Problem, outcome: Outcome, *, scales: int = 8, iterations: int = 40) -> Outcome:
    """Find the lattice point of the best score, then of the least distortion, near an attack's result.

    Args:
        problem: the batch; its meter counts on.
        outcome: the attack's result.
        scales: scales tried in the first stage, a forward pass each.
        iterations: iterations of the second stage, a forward and a backward pass each.
    """
    if outcome.on_lattice:
        return outcome
    problem = replace(problem.aim(outcome.goal), opening=None)
    best = Best(problem, files=True)
    difference = problem.within_region(outcome.images - problem.images)
    if problem.clean is None and not bool(problem.affordable(problem.views).all()):
        return best.outcome(outcome.goal, on_lattice=True)
    clean = problem.look_at_clean()
    best.update(problem, problem.images, clean)
    panel = Panel.of(replace(problem, clean=clean))
    largest = difference.flatten(1).abs().amax(1)
    moved = largest > 0
    least = (STEP / 2 / largest.clamp(min=1e-30) * 1.1).clamp(min=1.0)  # a smaller scale rounds to the clean photo
    scale = _search_scale(problem, difference, moved, best, panel, least, scales)
    if bool(moved.any()) and iterations:
        latent, rows = difference * spread(torch.minimum(scale, 1.3 * least)), moved.nonzero().flatten()
        descend(problem.select(rows), best, iterations, start=latent[rows], pace=GENTLE, panel=panel)
    stuck = (~moved & outcome.met & ~best.met).nonzero().flatten()
    if len(stuck) and iterations:
        descend(problem.select(stuck), best, iterations, panel=panel)
    return best.outcome(outcome.goal, on_lattice=True)


@torch.no_grad()
def _search_scale(
    problem: Problem, difference: Tensor, active: Tensor, best: Best, panel: Panel | None, start: Tensor, tries: int
) -> Tensor:
    """Bracket and bisect, from `start`, the least scale that meets the goal; return the least scale found, (N,)."""
    scale = start.clone()
    low, high = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    for _ in range(tries):
        active = active & problem.affordable(1)
        if not bool(active.any()):
            break
        rows = active.nonzero().flatten()
        part = problem.select(rows)
        images = to_lattice(part.clip(part.images + spread(scale[rows]) * difference[rows]))
        logits, computed = part.logits(images), None
        if panel is not None:
            first, end = torch.zeros_like(rows), torch.ones_like(best.norm[rows])
            logits, computed = verify(part, best, panel, images, logits, first, end, last=True)
        met = best.update(part, images, logits, computed)
        met = met if computed is None else met & (computed | (best.norm[rows] < distances(images, part.images)))
        high[rows] = torch.where(met, scale[rows], high[rows])
        low[rows] = torch.where(met, low[rows], scale[rows])
        scale = torch.where(high.isinf(), low * 1.25, torch.where(low > 0, (low + high) / 2, high * 0.8))
        scale = torch.where(scale > 0, scale, start)
    return torch.where(high.isinf(), torch.maximum(low, start), high)
