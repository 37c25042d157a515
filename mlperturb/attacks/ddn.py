"""ML-DDN: the least perturbation by decoupled direction and norm (DDN, Rony et al. 2019), with multipliers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.attacks.common import Best, ClassificationGoal, Goal, Outcome, Problem, norms, spread, to_lattice
from mlperturb.targets import Space

Rounding = Literal["inside", "after"]

_NEXT, _LAST = 2, 0.3  # constraints, beside those that hold, pushed where not all can hold; one in the last iterations
_GROWTH = 5.0  # of the radius there: how often it may grow by its own length, on the way
_ENOUGH = 40  # iterations that leave time to begin again
_LEAST = 0.55 / 255  # the largest change of a pixel, at least, before rounding
_OVERSHOOT = 1.3  # of the first step: logits curve away from their linearisation
_WIDEST, _HALVINGS = 8.0, 8  # of the search for the length of the first step: up to 2^8 times, to 2^(1 / 32)


def ml_ddn(problem: Problem, *, space: Space = "logit", rounding: Rounding = "inside", iterations: int = 48) -> Outcome:
    """Min ||r||_2 so that every constraint holds: DDN with a multiplier for each constraint, on the 8-bit lattice.

    1. r = 0, every multiplier mu_j = 1.
    2. g = gradient of sum_j mu_j softplus(violation_j) at round(x + r): a forward and a backward pass.
    3. First time: r = -s g, with s so large that the linearised constraints hold at round(x + r), and a little more.
    4. Later: r moves along -g by a share of ||r||, which a schedule lets decay to zero.
    5. ||r|| is set: less than before if all constraints hold; else more, by a share of the linearised distance.
    6. x + r is clipped to the pixel range, and to the bound on ||r||_infinity if there is one.
    7. mu_j grows while constraint j is violated, and decays while it is slack.
    8. An image that never met its goal in a quarter of the iterations begins again near the photo, and counts
       constraints first: those that hold and the next two (at the end, one) are pushed alike; the others wait.
    9. From 2, `iterations` times. Of the lattice points that hold the most constraints, the nearest is kept.

    Sources: direction and norm apart, Rony et al. 2019 (DDN); multipliers that follow the violations, as in an
    augmented Lagrangian, Rony et al. 2021 (ALMA, there for one constraint); steps of the linearised distance, Pintor
    et al. 2021 (FMN). Rounding inside the loop is ours: the result is a file, not a point that rounding would erase.

    Args:
        problem: the batch.
        space: where the violations are measured, see `ClassificationGoal`.
        rounding: `inside` the loop, with the gradient passed straight through; or `after` it, by `quantise`, as for the
            other attacks: the float result is then nearer to the photo, the file further from it.
        iterations: a forward and a backward pass each.
    """
    goal, best = ClassificationGoal(problem.targets, space), Best(problem.images)
    inside = rounding == "inside"
    descend(problem, goal, best, None, iterations, lattice=inside)
    return Outcome(best.images, best.met, goal, on_lattice=inside)


def descend(
    problem: Problem,
    goal: Goal,
    best: Best,
    latent: Tensor | None,
    iterations: int,
    *,
    lattice: bool,
    rate: float = 0.6,
    shrink: float = 0.2,
    grow: float = 0.1,
    need: float = 0.3,
    sharpness: float = 1.5,
    restarts: bool = True,
) -> None:
    """Run DDN with multipliers, and keep the best iterates in `best`.

    Args:
        problem: the batch; an image that cannot afford another iteration stands still.
        goal: whose violations are to be brought to zero.
        best: takes the iterates.
        latent: the perturbation r to begin with, before any rounding, (n, 3, H, W); None to begin at the photos.
        iterations: a forward and a backward pass each; the schedule is of as many as the limit on passes allows.
        lattice: round x + r to 8 bits before the forward pass; the gradient passes straight through.
        rate: the first share of ||r|| that a step along -g has.
        shrink: the first share by which ||r|| shrinks where all constraints hold.
        grow: the first share by which it grows elsewhere.
        need: and it grows by at least this share of the linearised distance to the violated constraints.
        restarts: let images that never meet the goal begin again, counting constraints first.
        sharpness: of the softplus, which still pulls a little on constraints that hold but are near their edge.
    """
    fresh = latent is None
    latent = (
        torch.zeros_like(problem.images) if latent is None else problem.clip(problem.images + latent) - problem.images
    )
    radius = norms(latent)  # (n,)
    widest = latent[0].numel() ** 0.5  # no perturbation of pixels in [0, 1] is longer
    allowed = problem.iterations_left(iterations)
    multipliers: Tensor | None = None  # (n, K)
    done = torch.zeros_like(radius, dtype=torch.bool)  # clean photos that meet the goal
    ever, hard = done, done  # images that met the goal at some time; those that count constraints first
    for step in range(iterations):
        if (step == 1 and bool(done.any())) or problem.runs_short(2):
            keep = problem.affordable(2) & ~done
            if not bool(keep.any()):
                return
            problem, goal = problem.select(keep), goal.select(keep.nonzero().flatten())
            latent, radius, allowed = latent[keep], radius[keep], allowed[keep]
            done, ever, hard = done[keep], ever[keep], hard[keep]
            multipliers = None if multipliers is None else multipliers[keep]
        decay = 1 - step / allowed  # (n,)
        perturbed = problem.images + latent
        if lattice and not (fresh and step == 0):
            perturbed = to_lattice(perturbed)
        images = perturbed.requires_grad_()
        logits = problem.logits(images)
        violations = goal.violations(logits)  # (n, K)
        present = violations.isfinite()
        violations = violations.masked_fill(~present, 0.0)
        multipliers = present.to(latent.dtype) if multipliers is None else multipliers
        pushed = count_first(violations.detach(), torch.where(decay > _LAST, _NEXT, 1))
        weights = torch.where(hard.unsqueeze(1), pushed & present, multipliers)
        losses = (weights * functional.softplus(violations, beta=sharpness)).sum(1)
        gradient = problem.gradient(losses, images)
        met = best.update(problem, goal, images.detach(), logits.detach())
        violations, length = violations.detach(), norms(gradient).clamp(min=1e-30)

        first = radius == 0
        done = met & first
        latent = latent - spread(torch.where(first, 1.0, rate * decay * radius) / length) * gradient
        near = torch.where(first.unsqueeze(1), _OVERSHOOT, need * torch.sigmoid(sharpness * violations))
        distance = (near * weights * violations.clamp(min=0)).sum(1) / length
        growth = torch.where(hard, _GROWTH / allowed, grow) * decay
        larger = torch.maximum(radius * (1 + growth), radius + distance)
        radius = torch.where(met, radius * (1 - shrink * decay), larger).clamp(max=widest)
        if problem.cap is not None:
            radius = radius.minimum(problem.cap)
        latent = latent * spread(radius / norms(latent).clamp(min=1e-30))
        if lattice and fresh and step == 0:
            wider = lattice_scale(latent, gradient, distance * length)
            latent, radius = spread(wider) * latent, wider * radius
        if lattice:  # below half a grey level nothing would change
            lift = torch.where(met, 1.0, _LEAST / latent.flatten(1).abs().amax(1).clamp(min=1e-30)).clamp(min=1.0)
            latent, radius = spread(lift) * latent, lift * radius
        latent = problem.clip(problem.images + latent) - problem.images

        multipliers = multipliers * torch.exp(torch.where(violations > 0, 0.4, -0.1) * decay.unsqueeze(1))
        multipliers = (multipliers / multipliers.amax(1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-3) * present

        ever = ever | met
        restart = ~ever & restarts & (allowed >= _ENOUGH) & (step == allowed // 4)
        hard = hard | restart
        latent = torch.where(spread(restart), 0.1 * latent, latent)
        radius = torch.where(restart, 0.1 * radius, radius)


def lattice_scale(latent: Tensor, gradient: Tensor, needed: Tensor) -> Tensor:
    """Return how much longer r must be for round(r) to lower the linearised loss as r itself should, (n,).

    Rounding takes what is smaller than half a grey level, so that a small r loses most of its effect.

    Args:
        latent: r = -s g, (n, 3, H, W).
        gradient: g, of that shape.
        needed: by how much the loss is to fall, (n,).
    """
    low, high = torch.zeros_like(needed), torch.full_like(needed, _WIDEST)  # of log2 of the scale
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rounded = (spread(torch.exp2(middle)) * latent * 255).round() / 255
        enough = -(rounded * gradient).flatten(1).sum(1) >= needed
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.exp2(high)


def count_first(violations: Tensor, following: Tensor) -> Tensor:
    """Return which constraints to push where not all can hold, boolean, (n, K): those that hold and the nearest others.

    So the set grows. Constraints that exclude each other, pushed all at once, stop just short of their edges.

    Args:
        violations: (n, K).
        following: how many others, (n,).
    """
    held = (violations <= 0).sum(1)
    return violations.argsort(1).argsort(1) < (held + following).unsqueeze(1)
