"""The optimiser of ML-CW, Rank I and Rank II: min ||r|| + lambda * sum of hinges, lambda searched for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.geometry import spread
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.schedule import Schedule

_SPAN = 1.05  # stretch of tanh, see `minimise_penalty`
_CHECK = 25  # iterations, at least, between two checks for images that are done: each check waits for the device


def minimise_penalty(problem: Problem, schedule: Schedule) -> Outcome:
    """Minimise ||r||_2 + lambda * sum_k max(0, violation_k) over x + r = (tanh(w) + 1) / 2 with Adam.

    Under a bound on ||r||_infinity, tanh spans the range that the bound leaves to each pixel.

    Each image has its own lambda: ten times more after each failure until the first success, then bisection between
    the largest lambda that failed (at first 0) and the smallest that succeeded. Of all iterates, the iterate of the
    highest score is kept, then of the least distortion.

    Deviation: tanh is stretched by 5% and clipped to the pixel range. The slope of a plain tanh is 0 at black and
    white pixels, so that they could never move.

    Args:
        problem: the batch, with its goal.
        schedule: how long to search.
    """
    best = Best(problem)
    clean = problem.logits(problem.images).detach() if problem.clean is None else problem.clean[:, 0]
    clean_met = best.update(problem, problem.images, clean)
    weight = torch.full_like(best.norm, schedule.initial_weight)
    low, high = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
    last = problem.images.clone()  # where each image's latest descent ended
    open_ = ~clean_met  # images to search for; not where the clean photo already meets the goal
    for _ in range(schedule.searches):
        open_ &= problem.affordable(2)
        if not bool(open_.any()):
            break
        rows = open_.nonzero().flatten()
        part = problem.select(rows)
        start = part.images
        if schedule.warm:
            start = torch.where(spread(best.met[rows]), best.images[rows], last[rows])
        reached, last[rows] = _descend(part, start, weight[rows], best, schedule)
        high[rows] = torch.where(reached, weight[rows].minimum(high[rows]), high[rows])
        low[rows] = torch.where(reached, low[rows], weight[rows])
        weight = torch.where(high.isinf(), weight * 10, (low + high) / 2)
        open_ &= high.isinf() | (high - low > schedule.precision * high)
    return best.outcome(problem.goal)


def _descend(problem: Problem, start: Tensor, weight: Tensor, best: Best, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Run Adam with each image's lambda; return which images met the goal, (n,), and the last iterates.

    A warm start may meet the goal whatever lambda is, so then only the second half of the iterations counts.
    """
    reached = torch.zeros(len(problem), dtype=torch.bool, device=start.device)
    place = torch.arange(len(problem), device=start.device)  # of the images still in the batch
    last = start.clone()
    pace = 1.0 if problem.bound is None else max(1.0, 0.5 / problem.bound)  # same step in pixels as unbounded
    middle, reach = _tanh_range(problem)
    w = torch.atanh((start - middle) / reach * (1 - 1e-6))  # just inside: outside the clip has no gradient
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    previous = torch.full_like(weight, torch.inf)
    interval = max(schedule.iterations // 10, _CHECK)
    for step in range(schedule.iterations):
        w.requires_grad_()
        images = problem.within_cap(problem.clip(middle + reach * torch.tanh(w)))
        logits = problem.logits(images)
        hinges = problem.goal.violations(logits).clamp(min=0).sum(1)
        # The norm has no gradient at r = 0; with a tiny constant under the root, the gradient there is 0.
        losses = ((images - problem.images).square().flatten(1).sum(1) + 1e-12).sqrt() + weight * hinges  # (n,)
        gradient = problem.gradient(losses, w)
        w = w.detach()
        met = best.update(problem, images.detach(), logits.detach())
        if step >= schedule.iterations // 2 or not schedule.warm:
            reached[place] |= met
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.001)
        rate = pace * schedule.rate(step) / (1 - 0.9 ** (step + 1))
        w = w.addcdiv(mean, (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8), value=-rate)
        last[place] = images.detach()
        keep = problem.affordable(2) if problem.runs_short(2) else None
        if (step + 1) % interval == 0:
            improving = losses.detach() < previous * (1 - schedule.patience)
            previous = losses.detach()
            keep = improving if keep is None else keep & improving
        if keep is not None and not bool(keep.all()):
            if not bool(keep.any()):
                break
            rows = keep.nonzero().flatten()
            problem, place = problem.select(rows), place[rows]
            middle, reach = _tanh_range(problem)
            w, mean, square, weight, previous = (t[rows] for t in (w, mean, square, weight, previous))
    return reached, last


def _tanh_range(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the centre and the half-width of the stretched tanh, which broadcast to (n, 3, H, W)."""
    low, high = problem.pixel_range
    return (low + high) / 2, _SPAN * (high - low) / 2
