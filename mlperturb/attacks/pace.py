"""How far ML-DDN goes: the lengths of its steps and of the perturbation (steps 3 to 5 of `mlperturb.attacks.ddn`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.attacks.geometry import products
from mlperturb.attacks.lattice import STEP
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.walk import Seen, Walk

# `_OVERSHOOT`, `_LEAST` and `SEARCH` were measured at half and at twice their value (`tests/benchmarks/constants.py`,
# docs/ml-ddn.md); `_REACH`, `_GROWTH` and `GENTLE` were not.
_OVERSHOOT = 1.3  # step 3: in place of the slope of the softplus, 0.5 to 1, because logits curve away from linear
_LEAST = 0.55 / 255  # step 5: the least max|r|, a little over half a step of the lattice, below which r rounds to 0
_REACH = 1.1  # step 5: ||r|| is at most this times the least ||r|| with which the goal was met
_GROWTH = 5.0  # step 8: after a restart, the share by which a failure lengthens r is this / K, times `decay`
TINY = 1e-30  # in place of a length of 0, against division by 0


@dataclass(frozen=True)
class Pace:
    """The step sizes of `descend`; `rate`, `later`, `shrink` and `grow` are multiplied by `decay`.

    Attributes:
        rate: the length of a step along -g, as a share of ||r||, until the goal was met once (step 4).
        later: the same from then on.
        shrink: the share by which ||r|| shrinks at least, where all constraints hold (step 5).
        spare: the largest share by which ||r|| shrinks where the linearised loss has so much slack (step 5).
        grow: the share by which ||r|| grows elsewhere (step 5).
        need: the share of the linearised distance by which ||r|| grows at least, elsewhere (step 5).
        sharpness: beta of softplus(v) = log(1 + exp(beta v)) / beta. The softplus still pushes a little on constraints
            that hold but are near their threshold (step 2).
        restarts: restart images that have not met the goal (step 8).
    """

    rate: float = 0.6
    later: float = 0.9
    shrink: float = 0.2
    spare: float = 0.3
    grow: float = 0.05
    need: float = 0.6
    sharpness: float = 1.5
    restarts: bool = True


SEARCH = Pace()  # for a start at the clean photo
GENTLE = Pace(0.3, 0.3, shrink=0.05, spare=0.0, need=0.0, sharpness=4.0, restarts=False)  # for a start near the goal


def linearised_loss(walk: Walk, seen: Seen, pace: Pace) -> Tensor:
    """Return d ||g||: the wanted fall of the linearised loss, where d is the distance to go (steps 3 and 5), (n,).

    By the chain rule g = sum_j w_j c_j grad v_j, where c_j = sigmoid(sharpness v_j) is the slope of the softplus. To
    first order, a step of length d along -g lowers sum_j w_j c_j v_j by d ||g||. To bring every v_j > 0 to 0, that sum
    must fall by sum_j w_j c_j max(v_j, 0), so d = sum_j w_j c_j max(v_j, 0) / ||g||, the linearised distance. A step
    from the clean photo has 1.3 in place of c_j, which lies between 0.5 and 1; later steps have `need` c_j.
    """
    later = pace.need * torch.sigmoid(pace.sharpness * seen.violations)
    slope = torch.where((walk.radius == 0).unsqueeze(1), _OVERSHOOT, later)
    return (slope * seen.weights * seen.violations.clamp(min=0)).sum(1)


def spare_share(problem: Problem, walk: Walk, seen: Seen, met: Tensor, gradient: Tensor, pace: Pace) -> Tensor:
    """Step 5: the share of r that the linearised loss can spare, 0 to `pace.spare`, (n,); where the goal is met.

    With g and c_j as in `linearised_loss`: to shorten r by the share t raises sum_j w_j c_j v_j by t <-g, r>, to first
    order; to bring every v_j < 0 to 0, that sum may rise by sum_j w_j c_j max(-v_j, 0). The largest |r| stays a grey
    level at least, since a smaller r loses more to the rounding than the share says.
    """
    if walk.fresh or not pace.spare or not bool(met.any()):
        return torch.zeros_like(walk.radius)
    slope = torch.sigmoid(pace.sharpness * seen.violations)
    room = (slope * seen.weights * (-seen.violations).clamp(min=0)).sum(1)
    rise = -products(gradient, walk.latent)
    share = torch.where(rise > 0, room / rise.clamp(min=TINY), 0.0).clamp(max=pace.spare)
    level = STEP / problem.lattice.largest(walk.latent).clamp(min=TINY)
    return share.minimum((1 - level).clamp(min=0))


def step_length(walk: Walk, decay: Tensor, pace: Pace) -> Tensor:
    """Steps 3 and 4: the length of the step along -g, (n,): a share of ||r||; 1 from r = 0, where step 5 sets ||r||."""
    rate = torch.where(walk.least.isfinite(), pace.later, pace.rate)
    return torch.where(walk.radius == 0, 1.0, rate * decay * walk.radius)


def next_radius(
    problem: Problem, walk: Walk, met: Tensor, distance: Tensor, slack: Tensor, decay: Tensor, pace: Pace
) -> Tensor:
    """Step 5: the new ||r||, (n,): shorter if all constraints hold, by at least the share `slack`; else longer; capped.

    After a restart it grows as step 8 says. Without the cap at 1.1 times the least ||r|| that sufficed, ||r|| may grow
    without end where the steps, which are shares of ||r||, move past one constraint after another.
    """
    growth = torch.where(walk.restarted, _GROWTH / walk.allowed, pace.grow) * decay
    larger = torch.maximum(walk.radius * (1 + growth), walk.radius + distance)
    widest = problem.images[0].numel() ** 0.5  # sqrt(3 H W): a perturbation of pixels in [0, 1] is not longer
    shorter = walk.radius * (1 - slack.maximum(pace.shrink * decay))
    radius = torch.where(met, shorter, larger).clamp(max=widest)
    radius = radius.minimum(_REACH * walk.least)
    return radius if problem.cap is None else radius.minimum(problem.cap)


def lift(problem: Problem, latent: Tensor, met: Tensor) -> Tensor:
    """Step 5, on the lattice: the scale >= 1 with which round(r) is not 0; 1 where the goal is met; (n,)."""
    if bool(met.all()):
        return torch.ones_like(met, dtype=latent.dtype)
    largest = problem.lattice.largest(latent).clamp(min=TINY)
    return torch.where(met, 1.0, _LEAST / largest).clamp(min=1.0)
