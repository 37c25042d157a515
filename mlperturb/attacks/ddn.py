"""ML-DDN: decoupled direction and norm (DDN, Rony et al. 2019) with a multiplier for each of many constraints.

Names of the loop: x is the clean photo; `latent` is the perturbation r before any rounding, in the lattice's
coordinates; `radius` is the length ||r||_2 that step 5 sets; `met` says that every constraint of an image holds; K is
the number of iterations that an image can afford, and `decay` is 1 - k / K in iteration k, see `_progress` for several
views. v_j is the violation of constraint j, positive while the constraint is violated; w_j is the weight of v_j in the
loss of step 2, mu_j or after a restart 0 or 1; g is the gradient of this loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.diversity import Diversity
from mlperturb.attacks.geometry import norms, spread
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.lattice import lattice_scale
from mlperturb.attacks.pace import SEARCH, TINY, Pace, lift, linearised_loss, next_radius, spare_share, step_length
from mlperturb.attacks.panel import LATE, Panel, verify, verify_waiting
from mlperturb.attacks.problem import Problem, each_view
from mlperturb.attacks.strongest import climb
from mlperturb.attacks.walk import Seen, Walk
from mlperturb.model.linear import strips, to_pixels
from mlperturb.targets import Space

Rounding = Literal["inside", "after"]
Aim = Literal["least", "strongest"]

# The constants of the rules below. Those of step 7 were measured at half and at twice their value
# (`tests/benchmarks/constants.py`, docs/ml-ddn.md); those of step 8 were chosen on a few photos of Extreme.
_RISE, _FALL = 0.4, -0.1  # step 7: change of log mu_j while v_j > 0, and while v_j <= 0; times `decay`
_SMALLEST = 1e-3  # step 7: the least multiplier; the largest multiplier of an image is 1
_RESTART_AFTER = 4  # step 8: an image that has not met its goal by iteration K / 4 restarts
_ENOUGH = 40  # step 8: the least K for a restart
_NEAR = 0.1  # step 8: a restart multiplies r by this
_NEXT, _LAST = 2, 0.3  # step 8: violated constraints pushed after a restart; only 1 while decay <= 0.3, at the end


def ml_ddn(
    problem: Problem,
    *,
    space: Space = "logit",
    rounding: Rounding = "inside",
    aim: Aim = "least",
    diversity: Diversity = "none",
    iterations: int = 48,
) -> Outcome:
    """Min ||r||_2 so that every constraint holds: DDN with a multiplier for each constraint, on the 8-bit lattice.

    1. r = 0, every multiplier mu_j = 1.
    2. g = gradient of sum_j mu_j softplus(v_j) at round(x + r): a forward and a backward pass.
    3. In the first iteration, r = -s g. ||r|| is the linearised distance to the constraints, with 1.3 in place of the
       slope of the softplus, and then as much longer as rounding needs.
    4. In later iterations, r moves along -g by a share of ||r||, larger once the goal was met, which decays to zero.
    5. ||r|| is set: shorter than before if all constraints hold, by a share of ||r|| or by the slack of the linearised
       loss, whichever is more, up to 30 %; else longer, by a share of ||r|| or of the linearised distance, whichever is
       more, but not beyond 1.1 times the least ||r|| with which they all held, nor beyond a cap on the distortion.
       While they do not all hold, round(r) is not 0.
    6. x + r is clipped to the pixel range, and to the bound on ||r||_infinity if the problem has a bound.
    7. mu_j grows while v_j > 0 and shrinks while v_j <= 0; then all are divided by the largest, and none is less than
       0.001.
    8. An image with K >= 40 that has not met its goal after K / 4 iterations restarts near the photo: r is multiplied
       by 0.1, and from there step 5 lengthens ||r|| by the share 5 / K, which decays to zero. The constraints that hold
       and the two nearest to holding (at the end, the nearest) then have the weight 1 in place of mu_j, and the other
       constraints the weight 0.
    9. If the problem has several views of each photo (`mlperturb.model.views`), step 2 computes one view. The logits of
       the other views are expected to differ from it by a running mean of the differences seen (`attacks.panel`), and
       v_j is the largest of all views. An iterate that may be the first to hold in every view, or late on the way the
       best so far, is computed in every view, unless too many passes went to such checks; then it waits for the end.
    10. Steps 2 to 9 are repeated `iterations` times, and a last look follows. Of the points with the most
        constraints met in every view, the nearest is kept.

    Sources: separate direction and norm, Rony et al. 2019 (DDN), which rounds its iterates to 8 bits too
    (`levels=256`); multipliers that follow the violations, as in an augmented Lagrangian, Rony et al. 2021 (ALMA, there
    for one constraint); steps of the linearised distance, Pintor et al. 2021 (FMN). New here: r stays in floats, only
    the point that the model sees is rounded, and the gradient passes straight through the rounding; the first step is
    as long as the lattice needs; and each of many constraints has a multiplier. In DDN the step length falls from 1 to
    0.01 by a cosine, and ||r|| shrinks and grows by a constant gamma; here the step length, the least shrinking and the
    least growth are shares of ||r|| that fall linearly to zero.

    Args:
        problem: the batch.
        space: the violations are measured on the logits or the probabilities, see `ClassificationGoal`.
        rounding: `inside` the loop, so that the result is a lattice point; or `after` the loop, by `quantise`, as for
            the other attacks. `after` gives a float result nearer to the photo, but a file further from it.
        aim: `strongest` first seeks the largest margin within the limits (`attacks.strongest`); the steps above are for
            the images with which that fails.
        diversity: of `strongest`, see `attacks.diversity`.
        iterations: the number of iterations: a backward and a forward pass each, after a first forward pass, and the
            passes of step 9.
    """
    problem, inside = problem.aim(ClassificationGoal(problem.targets, space)), rounding == "inside"
    part = problem.in_span() if inside and aim == "least" else problem
    best = Best(part, files=inside)
    if aim == "strongest":
        part = climb(problem, best, iterations, space=space, diversity=diversity)
    if part.clean is None and part.views > 1:  # a panel begins with a look at the clean photos in every view
        part = part.select(part.affordable(part.views).nonzero().flatten())
    if len(part):
        descend(part, best, iterations, lattice=inside)
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
        problem: the batch; an image that cannot afford another iteration leaves the batch.
        best: keeps the best iterates.
        iterations: the number of iterations, a backward and a forward pass each, after a first forward pass. K, after
            which `decay` is 0, is smaller for an image whose limit on passes allows fewer.
        start: the perturbation r to begin with, before any rounding, (n, 3, H, W); None to begin at the photos.
        lattice: evaluate the model at round(x + r) in place of x + r.
        pace: the step sizes.
        panel: the known differences between views; by default a new panel, if the problem has several views.
    """
    panel = panel or Panel.of(problem)
    walk = Walk.begin(problem, start, iterations)  # step 1
    for step in range(iterations + 1):
        problem, walk = _dismiss(problem, walk, best, panel, lattice=lattice, all_=step == iterations)
        if not len(problem):
            return
        decay = 1 - (step / walk.allowed if panel is None else _progress(problem, walk, step / iterations))
        view = None if panel is None else panel.choose(problem, step, 1 - decay >= LATE)
        seen = _look(problem, walk, best, panel, view, decay, lattice=lattice)  # steps 2, 9
        met = best.update(problem, seen.images, seen.logits, seen.computed)  # step 10
        walk = replace(walk, least=_least(walk, met))  # for steps 5 and 8
        losses = (seen.weights * functional.softplus(seen.violations, beta=pace.sharpness)).sum(1)  # step 2
        gradient = problem.lattice.pull(problem.gradient(losses, seen.leaf, seen.rows), seen.images)  # step 2
        seen = replace(seen, violations=seen.violations.detach())  # frees the graph
        gradient_norm = norms(gradient).clamp(min=TINY)
        distance = linearised_loss(walk, seen, pace) / gradient_norm
        slack = spare_share(problem, walk, seen, met, gradient, pace)  # step 5
        latent = _step(walk.latent, gradient, step_length(walk, decay, pace) / gradient_norm)  # steps 3, 4
        radius = next_radius(problem, walk, met, distance, slack, decay, pace)  # step 5
        latent.mul_(spread(radius / norms(latent).clamp(min=TINY)))  # step 5
        if lattice and walk.fresh:  # step 3, as much longer as rounding needs
            scale = lattice_scale(problem.lattice, latent, gradient, distance * gradient_norm)
            latent, radius = _stretch(latent, radius, scale)
        if lattice:
            latent, radius = _stretch(latent, radius, lift(problem, latent, met))  # step 5, round(r) is not 0
        walk = replace(
            walk,
            latent=problem.lattice.clip(latent, problem.images, *problem.pixel_range),  # step 6
            radius=radius,
            multipliers=_multipliers(walk, seen, decay),  # step 7
            done=met & (walk.radius == 0),  # the clean photo meets the goal
            fresh=False,
        )
        if pace.restarts:
            walk = _restart(walk, step)  # step 8
        del seen, gradient, latent  # photos of their size, before the next look makes others


def _dismiss(
    problem: Problem, walk: Walk, best: Best, panel: Panel | None, *, lattice: bool, all_: bool
) -> tuple[Problem, Walk]:
    """Step 10: look a last time, without a gradient, at images that cannot afford another iteration; return the others.

    Another iteration is a forward pass, a backward pass, and a look at the iterate that they lead to, in every view if
    the goal was met before. Clean photos that meet the goal leave without a look.

    Args:
        problem: the images.
        walk: their state.
        best: keeps the best iterates.
        panel: the known differences between views.
        lattice: see `descend`.
        all_: dismiss all images.
    """
    forward = 0 if walk.fresh and problem.opening is not None else 1  # the opening is a forward pass made already
    leaving = bool(walk.done.any()) and not walk.fresh
    if not (all_ or leaving or problem.runs_short(forward + 1 + problem.views)):
        return problem, walk
    # The meter still owes the looks at the file, in every view, of an image that has not met its goal: one is enough.
    looks = torch.where(best.met[best.places(problem)], problem.views, 1)
    on = ~walk.done & problem.affordable(forward + 1 + looks.cpu())
    on = torch.zeros_like(on) if all_ else on
    last = (~on & ~walk.done & problem.affordable(forward)).nonzero().flatten()
    if len(last):
        part, state = problem.select(last), walk.select(last)
        end = torch.zeros_like(state.radius)
        with torch.no_grad():
            view = None if panel is None else panel.choose(part, 0, torch.full_like(state.done, not state.fresh))
            seen = _look(part, state, best, panel, view, end, lattice=lattice, last=True)
        met = best.update(part, seen.images, seen.logits, seen.computed)
        if panel is not None:
            verify_waiting(part, best, panel)
            best.hope(part, seen.images, met)
    rows = on.nonzero().flatten()
    return problem.select(rows), walk.select(rows)


def _look(
    problem: Problem,
    walk: Walk,
    best: Best,
    panel: Panel | None,
    view: Tensor | None,
    decay: Tensor,
    *,
    lattice: bool,
    last: bool = False,
) -> Seen:
    """Step 2: v_j at round(x + r), and w_j = mu_j; step 8: after a restart w_j is 0 or 1.

    Step 9: in several views, one view of each image is computed, and v_j is the largest of all views. An image has v_j
    = -inf for a constraint that it does not have; this becomes 0.

    Args:
        problem: the images.
        walk: their state.
        best: the best iterates so far.
        panel: the known differences between views; None in a single view.
        view: the view to compute of each image, (n,); None in a single view.
        decay: see the first lines of this file, (n,).
        lattice: see `descend`.
        last: this is the last look at the images; otherwise it leaves the passes that `_dismiss` asks for.
    """
    rows = None
    if walk.fresh and (problem.opening is not None or view is None):
        opening = problem.open()
        images, leaf, rows = problem.images, problem.leaf_of(opening), opening.rows
        logits = opening.logits[rows]
    else:
        images = _perturbed(problem, walk, lattice=lattice)
        leaf, logits = problem.trace(images, view)
        images = images.detach()
    violations = problem.goal.violations(logits)
    present = violations.detach().abs() < torch.inf
    violations = violations.masked_fill(~present, 0.0)
    known, computed = logits.detach(), None
    if panel is not None and view is not None:
        standing = walk.radius == 0  # at the clean photos, with which the panel began
        way = torch.where(standing, -1.0, 1 - decay)  # a clean photo is not verified
        known, computed = verify(problem, best, panel, images, known, view, way, last=last)
        computed = computed | standing
        largest = each_view(problem.goal.violations, known).amax(1).masked_fill(~present, 0.0)
        violations = violations + (largest - violations.detach())  # with the gradient of the view computed
    counted = count_first(violations.detach(), torch.where(decay > _LAST, _NEXT, 1))  # step 8
    weights = torch.where(walk.restarted.unsqueeze(1), counted & present, walk.multipliers * present)
    return Seen(images, leaf, rows, known, computed, violations, present, weights)


def _perturbed(problem: Problem, walk: Walk, *, lattice: bool) -> Tensor:
    """Return the photos in the first iteration, then x + r, or its point on the lattice, (n, 3, H, W).

    Of a lattice whose points are 8-bit pixels, they are 8-bit pixels.
    """
    if walk.fresh:
        return to_pixels(problem.images) if problem.lattice.small else problem.images.clone()
    return problem.lattice.points(problem.images, walk.latent) if lattice else problem.images + walk.latent


def _progress(problem: Problem, walk: Walk, share: float) -> Tensor:
    """Return 1 - `decay` for several views: the share of the iterations or of the passes, whichever is larger, (n,).

    Views that are verified cost passes, so that fewer iterations may be left than the K that step 1 counted.

    Args:
        problem: the images.
        walk: their state.
        share: the share of the iterations.
    """
    shares = torch.full((len(problem),), share)
    if problem.limit is not None:
        shares = shares.maximum((problem.spent - walk.begun) / (problem.limit - walk.begun).clamp(min=1))
    return shares.to(problem.images)


def _least(walk: Walk, met: Tensor) -> Tensor:
    """Return the least ||r|| with which the goal was met so far, (n,); clean photos do not count."""
    return torch.where(met & (walk.radius > 0), walk.least.minimum(walk.radius), walk.least)


def _step(latent: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
    """Steps 3 and 4: return r - scale g, with a scale for each image, (n,); r in place, in strips that fit a cache."""
    for rows in strips(latent):
        latent[:, :, rows].sub_(spread(scale) * gradient[:, :, rows])
    return latent


def _stretch(latent: Tensor, radius: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and ||r||, both multiplied by a scale for each image, (n,); r in place."""
    return latent.mul_(spread(scale)), scale * radius


def _multipliers(walk: Walk, seen: Seen, decay: Tensor) -> Tensor:
    """Step 7: the new mu, (n, J), 0.001 to 1: mu_j grows while v_j > 0 and shrinks while v_j <= 0; the largest is 1."""
    change = torch.exp(torch.where(seen.violations > 0, _RISE, _FALL) * decay.unsqueeze(1))
    multipliers = walk.multipliers * seen.present * change
    largest = multipliers.amax(1, keepdim=True).clamp(min=TINY)
    return (multipliers / largest).clamp(min=_SMALLEST) * seen.present


def _restart(walk: Walk, step: int) -> Walk:
    """Step 8: move images that have not met their goal by iteration K / 4 back near the photo."""
    restart = walk.least.isinf() & (walk.allowed >= _ENOUGH) & (step == walk.allowed // _RESTART_AFTER)
    latent, radius = _stretch(walk.latent, walk.radius, torch.where(restart, _NEAR, torch.ones_like(walk.radius)))
    return replace(walk, latent=latent, radius=radius, restarted=walk.restarted | restart)


def count_first(violations: Tensor, following: Tensor) -> Tensor:
    """Step 8: return the constraints that hold and the `following` nearest to holding, boolean, (n, J).

    Where not all constraints can hold together, pushing all of them stops just short of their thresholds. Pushing a
    few lets the set of constraints that hold grow by and by.

    Args:
        violations: v, (n, J).
        following: the number of violated constraints to push, 1 to `_NEXT`, (n,).
    """
    violated = torch.where(violations > 0, violations, torch.inf)  # a NaN is not pushed
    nearest = violated.topk(min(_NEXT, violated.shape[1]), dim=1, largest=False).values
    last = nearest.gather(1, (following - 1).clamp(max=nearest.shape[1] - 1).unsqueeze(1))
    return violations <= last
