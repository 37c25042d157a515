"""ML-DDN: the least perturbation by decoupled direction and norm (DDN, Rony et al. 2019), with multipliers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.lattice import lattice_scale, to_lattice
from mlperturb.attacks.panel import LATE, Panel, verify
from mlperturb.attacks.problem import Problem, each_view, norms, spread
from mlperturb.targets import Space

Rounding = Literal["inside", "after"]

# The constants of the rules below. `python tests/benchmarks/constants.py` measures each at half and at twice its value.
_OVERSHOOT = 1.3  # of the first step: logits curve away from their linearisation
_LEAST = 0.55 / 255  # the largest change of a pixel, at least, before rounding: what is below half a level vanishes
_RISE, _FALL = 0.4, -0.1  # of log mu_j in an iteration, while constraint j is violated, and while it is slack
_SMALLEST = 1e-3  # multiplier, the largest of an image being 1
_RESTART_AFTER = 4  # an image that never met its goal in 1 / 4 of the iterations begins again
_ENOUGH = 40  # iterations that leave time to begin again
_NEAR = 0.1  # share of r that is left then
_GROWTH = 5.0  # of the radius from there: how often it may grow by its own length, on the whole way
_NEXT, _LAST = 2, 0.3  # violated constraints pushed there; a single one in the last 30 % of the iterations
_TINY = 1e-30  # in place of a length of 0


@dataclass(frozen=True)
class Pace:
    """How boldly `descend` moves; each share is that of the first iteration, and a schedule lets it decay to zero.

    Attributes:
        rate: the length of a step along -g, as a share of ||r||.
        shrink: by which share ||r|| shrinks where all constraints hold.
        grow: by which share it grows elsewhere.
        need: and it grows by at least this share of the linearised distance to the violated constraints.
        sharpness: of the softplus, which still pulls a little on constraints that hold but are near their edge.
        restarts: let images that never meet the goal begin again, and count constraints first.
    """

    rate: float = 0.6
    shrink: float = 0.2
    grow: float = 0.1
    need: float = 0.3
    sharpness: float = 1.5
    restarts: bool = True


SEARCH = Pace()  # from the clean photo
GENTLE = Pace(rate=0.3, shrink=0.05, grow=0.05, need=0.0, sharpness=4.0, restarts=False)  # a good start is at hand


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
       constraints first: those that hold and the next two (at the end, the next) are pushed alike; the others wait.
    9. Of several views of the photo (`mlperturb.model.views`), step 2 computes a single view; the others are expected
       to differ from it as they last did (`attacks.panel`), and the violation of a constraint is the largest of all
       views. On the second half of the way, an iterate that may be the best so far is computed in the others too.
    10. From 2, `iterations` times. Of the lattice points that hold the most constraints in every view, the nearest is
        kept.

    Sources: direction and norm apart, Rony et al. 2019 (DDN), which rounds its iterates to 8 bits too (`levels=256`);
    multipliers that follow the violations, as in an augmented Lagrangian, Rony et al. 2021 (ALMA, there for one
    constraint); steps of the linearised distance, Pintor et al. 2021 (FMN). What is new here: r stays in floats, only
    the point that is looked at is rounded, and the gradient passes straight through the rounding; the first step is as
    long as the lattice needs; and there are many constraints, each with a multiplier.

    Args:
        problem: the batch.
        space: where the violations are measured, see `ClassificationGoal`.
        rounding: `inside` the loop, so that the result is a file and not a point that rounding would erase; or `after`
            it, by `quantise`, as for the other attacks: the float result is then nearer to the photo, the file further.
        iterations: a forward and a backward pass each, and forward passes through further views.
    """
    problem, inside = problem.aim(ClassificationGoal(problem.targets, space)), rounding == "inside"
    best = Best(problem)
    descend(problem, best, iterations, lattice=inside)
    return best.outcome(problem.goal, on_lattice=inside)


def descend(
    problem: Problem,
    best: Best,
    iterations: int,
    *,
    start: Tensor | None = None,
    lattice: bool = True,
    pace: Pace = SEARCH,
    panel: Panel | None = None,
) -> None:
    """Run the loop of `ml_ddn`, and keep the best iterates in `best`.

    Args:
        problem: the batch; an image that cannot afford another iteration stands still.
        best: takes the iterates.
        iterations: a forward and a backward pass each; the schedule is of as many as the limit on passes allows.
        start: the perturbation r to begin with, before any rounding, (n, 3, H, W); None to begin at the photos.
        lattice: look at round(x + r) in place of x + r.
        pace: how boldly to move.
        panel: what is known of the views; begun here where there are several.
    """
    panel = panel or Panel.of(problem)
    walk = _Walk.begin(problem, start, iterations)  # step 1
    for step in range(iterations):
        if (step == 1 and bool(walk.done.any())) or problem.runs_short(2):
            rows = (problem.affordable(2) & ~walk.done).nonzero().flatten()
            if not len(rows):
                return
            problem, walk = problem.select(rows), walk.select(rows)
        decay = 1 - (step / walk.allowed if panel is None else _progress(problem, walk, step / max(iterations, 1)))
        seen = _look(problem, walk, best, panel, step, decay, lattice=lattice, sharpness=pace.sharpness)  # steps 2, 9
        met = best.update(problem, seen.images, seen.logits, seen.computed)
        length = norms(seen.gradient).clamp(min=_TINY)
        distance = _linearised_loss(walk, seen, pace) / length
        latent = walk.latent - spread(_step_length(walk, decay, pace) / length) * seen.gradient  # steps 3, 4
        radius = _radius(problem, walk, met, distance, decay, pace)  # step 5
        latent = latent * spread(radius / norms(latent).clamp(min=_TINY))
        if lattice and walk.fresh:  # step 3
            latent, radius = _stretch(latent, radius, lattice_scale(latent, seen.gradient, distance * length))
        if lattice:
            latent, radius = _stretch(latent, radius, _lift(latent, met))
        walk = replace(
            walk,
            latent=problem.clip(problem.images + latent) - problem.images,  # step 6
            radius=radius,
            multipliers=_multipliers(walk, seen, decay),  # step 7
            done=met & (walk.radius == 0),
            ever=walk.ever | met,
            fresh=False,
        )
        if pace.restarts:
            walk = _restart(walk, step)  # step 8


@dataclass(frozen=True)
class _Walk:
    """Where each image is on its way.

    Attributes:
        latent: r before any rounding, (n, 3, H, W).
        radius: ||r||_2 as it was set, before x + r was clipped, (n,).
        multipliers: mu, (n, K), or (n, 1) before the first look.
        allowed: iterations, (n,).
        begun: passes spent before the first iteration, (n,), on the CPU.
        done: the clean photo meets the goal, (n,).
        ever: the goal was met at some time, (n,).
        hard: constraints are counted first (step 8), (n,).
        fresh: the images are clean photos.
    """

    latent: Tensor
    radius: Tensor
    multipliers: Tensor
    allowed: Tensor
    begun: Tensor
    done: Tensor
    ever: Tensor
    hard: Tensor
    fresh: bool

    @classmethod
    def begin(cls, problem: Problem, start: Tensor | None, iterations: int) -> _Walk:
        """Step 1: r = 0 (or `start`), every multiplier 1."""
        latent = torch.zeros_like(problem.images)
        if start is not None:
            latent = problem.clip(problem.images + start) - problem.images
        radius = norms(latent)
        no = torch.zeros_like(radius, dtype=torch.bool)
        ones = torch.ones_like(radius).unsqueeze(1)
        left = problem.iterations_left(iterations)
        return cls(latent, radius, ones, left, problem.spent, no, no, no, start is None)

    def select(self, rows: Tensor) -> _Walk:
        """Return the way of some images."""
        names = ("latent", "radius", "multipliers", "allowed", "done", "ever", "hard")
        return replace(self, begun=self.begun[rows.cpu()], **{name: getattr(self, name)[rows] for name in names})


class _Seen(NamedTuple):
    """What a forward and a backward pass show, detached.

    Attributes:
        images: x + r, rounded if the attack is on the lattice, (n, 3, H, W).
        logits: (n, L), or of every view, computed or expected, (n, V, L).
        computed: of which images every view is computed, (n,); None for all.
        violations: the largest of all views, (n, K), 0 where a constraint is absent.
        present: which constraints there are, (n, K).
        weights: w_j of the loss, (n, K).
        gradient: g, (n, 3, H, W).
    """

    images: Tensor
    logits: Tensor
    computed: Tensor | None
    violations: Tensor
    present: Tensor
    weights: Tensor
    gradient: Tensor


def _look(
    problem: Problem,
    walk: _Walk,
    best: Best,
    panel: Panel | None,
    step: int,
    decay: Tensor,
    *,
    lattice: bool,
    sharpness: float,
) -> _Seen:
    """Step 2: g = gradient of sum_j w_j softplus(violation_j), w_j = mu_j, at round(x + r); step 9 in several views."""
    perturbed = problem.images + walk.latent
    if lattice and not walk.fresh:
        perturbed = to_lattice(perturbed)
    images = perturbed.requires_grad_()
    late = 1 - decay >= LATE
    view = None if panel is None else panel.choose(problem, step, late)
    logits = problem.logits(images) if view is None else problem.look(images, view)
    violations = problem.goal.violations(logits)
    present = violations.isfinite()
    violations = violations.masked_fill(~present, 0.0)
    known, computed = logits.detach(), None
    if panel is not None and view is not None:
        standing = walk.radius == 0  # at the clean photos, with which the panel began
        known, computed = verify(problem, best, panel, images.detach(), known, view, late & ~standing)
        computed = computed | standing
        largest = each_view(problem.goal.violations, known).amax(1).masked_fill(~present, 0.0)
        violations = violations + (largest - violations.detach())  # with the gradient of the view computed
    counted = count_first(violations.detach(), torch.where(decay > _LAST, _NEXT, 1))
    weights = torch.where(walk.hard.unsqueeze(1), counted & present, walk.multipliers * present)
    losses = (weights * functional.softplus(violations, beta=sharpness)).sum(1)
    gradient = problem.gradient(losses, images)
    return _Seen(images.detach(), known, computed, violations.detach(), present, weights, gradient)


def _progress(problem: Problem, walk: _Walk, share: float) -> Tensor:
    """Return how far each image is on its way: its share of the iterations or of its passes, whichever is larger, (n,).

    Views that are verified cost passes, so that fewer iterations may be left than step 1 counted.
    """
    shares = torch.full((len(problem),), share)
    if problem.limit is not None:
        shares = shares.maximum((problem.spent - walk.begun) / (problem.limit - walk.begun).clamp(min=1))
    return shares.to(problem.images)


def _linearised_loss(walk: _Walk, seen: _Seen, pace: Pace) -> Tensor:
    """Return by how much the linearised loss is to fall for the violated constraints to hold, (n,).

    g = sum_j w_j s_j grad v_j is the weighted sum of the constraints' gradients, s_j = sigmoid(sharpness v_j) the slope
    of the softplus. To bring every v_j > 0 to 0, sum_j w_j s_j v_j must fall by sum_j w_j s_j max(v_j, 0); a step
    along -g does it with a length of this over ||g||, the linearised distance. The first step aims at all of it and
    more, without s_j; later steps at the share `need`.
    """
    slope = pace.need * torch.sigmoid(pace.sharpness * seen.violations)
    share = torch.where((walk.radius == 0).unsqueeze(1), _OVERSHOOT, slope)
    return (share * seen.weights * seen.violations.clamp(min=0)).sum(1)


def _step_length(walk: _Walk, decay: Tensor, pace: Pace) -> Tensor:
    """Steps 3 and 4: a share of ||r|| along -g; from the photo itself any length, which step 5 then sets, (n,)."""
    return torch.where(walk.radius == 0, 1.0, pace.rate * decay * walk.radius)


def _radius(problem: Problem, walk: _Walk, met: Tensor, distance: Tensor, decay: Tensor, pace: Pace) -> Tensor:
    """Step 5: return the new ||r||, less if all constraints hold, else more by at least `distance`; (n,)."""
    growth = torch.where(walk.hard, _GROWTH / walk.allowed, pace.grow) * decay
    larger = torch.maximum(walk.radius * (1 + growth), walk.radius + distance)
    widest = walk.latent[0].numel() ** 0.5  # no perturbation of pixels in [0, 1] is longer
    radius = torch.where(met, walk.radius * (1 - pace.shrink * decay), larger).clamp(max=widest)
    return radius if problem.cap is None else radius.minimum(problem.cap)


def _lift(latent: Tensor, met: Tensor) -> Tensor:
    """Return how much longer r must be for some pixel to change at all where the goal is not met, (n,)."""
    largest = latent.flatten(1).abs().amax(1).clamp(min=_TINY)
    return torch.where(met, 1.0, _LEAST / largest).clamp(min=1.0)


def _stretch(latent: Tensor, radius: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and ||r||, each image's times its scale, (n,)."""
    return spread(scale) * latent, scale * radius


def _multipliers(walk: _Walk, seen: _Seen, decay: Tensor) -> Tensor:
    """Step 7: mu_j grows while constraint j is violated, and decays while it is slack; the largest is 1; (n, K)."""
    change = torch.exp(torch.where(seen.violations > 0, _RISE, _FALL) * decay.unsqueeze(1))
    multipliers = walk.multipliers * seen.present * change
    largest = multipliers.amax(1, keepdim=True).clamp(min=_TINY)
    return (multipliers / largest).clamp(min=_SMALLEST) * seen.present


def _restart(walk: _Walk, step: int) -> _Walk:
    """Step 8: take images that never met their goal back to near the photo, from where they count constraints."""
    restart = ~walk.ever & (walk.allowed >= _ENOUGH) & (step == walk.allowed // _RESTART_AFTER)
    latent, radius = _stretch(walk.latent, walk.radius, torch.where(restart, _NEAR, torch.ones_like(walk.radius)))
    return replace(walk, latent=latent, radius=radius, hard=walk.hard | restart)


def count_first(violations: Tensor, following: Tensor) -> Tensor:
    """Return which constraints to push where not all can hold, boolean, (n, K): those that hold and the nearest others.

    So the set grows. Constraints that exclude each other, pushed all at once, stop just short of their edges.

    Args:
        violations: (n, K).
        following: how many others, (n,).
    """
    held = (violations <= 0).sum(1)
    return violations.argsort(1).argsort(1) < (held + following).unsqueeze(1)
