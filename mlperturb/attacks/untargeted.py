"""The non-targeted adversarial example (Section II): any label of y changes."""

from __future__ import annotations

import torch
from torch import Tensor

from mlperturb.attacks.problem import Problem
from mlperturb.model.linear import to_pixels

MAX_COMPARED = 20  # labels whose gradients are compared


def nearest_label(problem: Problem, candidates: Tensor, *, compared: int = MAX_COMPARED) -> Tensor:
    """Return, for a non-targeted attack (Section II), the label nearest to its threshold, one-hot boolean, (N, L).

    The distance is the linearised distance |z_j - logit(t_j)| / ||grad z_j||, as in DeepFool.

    Args:
        problem: the batch.
        candidates: labels that may be flipped, boolean, (N, L).
        compared: how many candidates, by least |z_j - logit(t_j)|, are compared: a backward pass each.
    """
    problem = problem.in_span()
    points = to_pixels(problem.images) if problem.lattice.small else problem.images.detach()
    leaf, logits = problem.trace(points, None)
    margins = (logits.detach() - problem.targets.boundary).abs().masked_fill(~candidates, torch.inf)
    least = margins.argsort(1).argsort(1) < max(compared, 1)
    gradients = problem.gradient_norms(logits, leaf, candidates & least)
    nearest = (margins / gradients.clamp(min=1e-12)).masked_fill(~(candidates & least), torch.inf).argmin(1)
    chosen = torch.zeros_like(candidates)
    chosen[torch.arange(len(chosen), device=chosen.device), nearest] = True
    return chosen & candidates
