"""The strongest file within a limit: the largest margin, where ML-DDN itself seeks the least distortion.

    max over r of min_j m_j(x + r)    so that    ||r||_2 <= R,  ||r||_infinity <= B  and  x + r in [0, 1]

m_j = -v_j is the margin of constraint j: by how much its logit clears the threshold, on the side that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlperturb.attacks.best import Best
from mlperturb.attacks.diversity import PLAIN, Diversity, diversify
from mlperturb.attacks.geometry import norms, spread
from mlperturb.attacks.goals import LargestMargin
from mlperturb.attacks.problem import Problem, sizes_of
from mlperturb.errors import UsageError
from mlperturb.targets import Space

_SHARPNESS = 2.0  # beta: how sharply the smooth maximum of step 2 picks the worst constraint
_MOMENTUM = 0.9  # of the gradients' directions (MI-FGSM has 1.0)
_RATE = 0.3  # the length of the first step, as a share of R; it falls linearly to 0
_WIDEST, _HALVINGS = 3.0, 9  # step 5: log2 s lies within +-3, and is found to 6 / 2^9
_TINY = 1e-30  # in place of a length of 0, against division by 0


def climb(
    problem: Problem, best: Best, iterations: int, *, space: Space = "logit", diversity: Diversity = "none"
) -> Problem:
    """Max over ||r|| <= R of the least margin, by projected gradient with momentum, on the 8-bit lattice.

    1. r = 0, momentum p = 0.
    2. g = gradient of log sum_j exp(beta v_j) / beta, the smooth maximum of the violations, at a copy of round(x + s r)
       (`attacks.diversity`): a forward and a backward pass, in the first view.
    3. p <- 0.9 p + g / ||g||_2.
    4. r <- P(r - a R p / ||p||_2), where P projects onto the ball ||r||_2 <= R and the box, and a falls to 0. Without
       R, r <- P(r - a B sign(p)).
    5. s is the largest scale with which ||round(x + s r) - x||_2 <= R: rounding stays within the limit.
    6. Steps 2 to 5 are repeated. Where passes are limited, images whose iterates have not met their goal at half way
       are given up, for their passes serve the gentler search better.
    7. The iterate of the largest margin in the first view is computed in all, and kept if it holds there.

    Sources: momentum, Dong et al. 2018 (MI-FGSM); copies, Xie et al. 2019 (DI-FGSM). There one loss is raised under a
    limit on ||r||_infinity; here the least of many margins is, under a limit on ||r||_2 too.

    Args:
        problem: the batch, with a cap or a bound.
        best: keeps the files.
        iterations: a forward and a backward pass each, then a forward pass, and one in every view.
        space: measure margins on the logits or the probabilities.
        diversity: which copies the gradient is taken at.

    Returns:
        The images that do not meet their goal in every view yet: for a search that is gentler than this.

    Raises:
        UsageError: if the problem has neither a cap nor a bound.
    """
    if problem.cap is None and problem.bound is None:
        raise UsageError("expected `rmsd` or `linf` for the strongest file: without a limit there is none")
    whole, part = problem, problem.aim(LargestMargin(problem.targets, space))
    if problem.limit is not None:  # room for a clean look, an iteration and step 7
        part = part.select(part.affordable(2 + part.views).nonzero().flatten())
    seen, path = Best(part), _Path.begin(part, iterations)  # step 1; what was seen in the first view
    ready: list[Tensor] = []  # the images that came to their end, as the meter counts them
    for step in range(iterations + 1):
        part, path = _leave(part, path, seen, step, ready)
        if not len(part):
            break
        points, logits, leaf, rows = _look(part, path, step, diversity)  # step 2
        if diversity == "none" or step % PLAIN == 0:
            path = replace(path, met=path.met | seen.update(part, points, logits.detach()))
        loss = torch.logsumexp(_SHARPNESS * part.goal.violations(logits), dim=1) / _SHARPNESS
        gradient = part.lattice.pull(part.gradient(loss, leaf, rows), points)
        momentum = _MOMENTUM * path.momentum + gradient / spread(norms(gradient).clamp(min=_TINY))  # step 3
        latent = _step(part, path, momentum, step)  # step 4
        path = replace(path, latent=latent, momentum=momentum, scale=_scale(part, latent))  # step 5
    _judge(whole, best, seen, ready)  # step 7
    return replace(whole, opening=None).select((~best.met[best.places(whole)]).nonzero().flatten())


@dataclass(frozen=True)
class _Path:
    """The state of the loop, for each of n images.

    Attributes:
        latent: r before any rounding, in the lattice's coordinates, (n, 3, H', W').
        momentum: p, of the same shape.
        scale: s, (n,).
        allowed: K, the iterations that the image can afford, (n,).
        met: whether an iterate met the goal in the first view, (n,).
    """

    latent: Tensor
    momentum: Tensor
    scale: Tensor
    allowed: Tensor
    met: Tensor

    @classmethod
    def begin(cls, problem: Problem, iterations: int) -> _Path:
        """Step 1: r = 0, p = 0; K leaves the passes of the last looks."""
        latent = problem.lattice.zeros(problem.images)
        looks = 0 if problem.limit is None else (problem.views + 3) // 2
        allowed = (problem.iterations_left(iterations + looks) - looks).clamp(1, max(iterations, 1))
        no = torch.zeros_like(allowed, dtype=torch.bool)
        return cls(latent, torch.zeros_like(latent), torch.ones_like(allowed), allowed, no)

    def select(self, rows: Tensor) -> _Path:
        """Return the state of some images."""
        return _Path(*(values[rows] for values in vars(self).values()))

    def points(self, problem: Problem) -> Tensor:
        """Return round(x + s r), in the pixel range, (n, 3, H, W)."""
        return _points(problem, self.latent, self.scale)


def _leave(problem: Problem, path: _Path, seen: Best, step: int, ready: list[Tensor]) -> tuple[Problem, _Path]:
    """Step 6: look a last time at the images that came to their end; return the images that go on.

    Args:
        problem: the images.
        path: their state.
        seen: keeps the iterates in the first view.
        step: the number of the iteration.
        ready: gets the rows of the images that are to be computed in every view.
    """
    ended, half = step >= path.allowed, step == (path.allowed / 2).ceil()
    doubted = half & ~ended & ~path.met if problem.limit is not None else torch.zeros_like(ended)
    last = (ended | doubted).nonzero().flatten()
    if not len(last):
        return problem, path
    part, state = problem.select(last), path.select(last)
    points, met = state.points(part), path.met.clone()
    with torch.no_grad():
        met[last] |= seen.update(part, points, part.logits(points))
    ready.append(problem.rows[(ended & met).cpu()])
    rows = (~ended & (met | ~doubted)).nonzero().flatten()
    return problem.select(rows), replace(path, met=met).select(rows)


def _look(
    problem: Problem, path: _Path, step: int, diversity: Diversity
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Step 2: return the points, their logits in the first view, the leaf of the graph, and the rows in it."""
    if step == 0 and problem.opening is not None:
        opening = problem.open()
        return problem.images, opening.logits[opening.rows], opening.images, opening.rows
    points = path.points(problem)
    leaf = points.clone().requires_grad_()
    copies = diversify(leaf, sizes_of(problem.model, points), diversity, step)
    return points, problem.logits(copies), leaf, None


def _step(problem: Problem, path: _Path, momentum: Tensor, step: int) -> Tensor:
    """Step 4: return the new r, (n, 3, H', W')."""
    rate = _RATE * (1 - step / path.allowed)
    if problem.cap is None:
        assert problem.bound is not None
        latent = path.latent - spread(rate * problem.bound) * momentum.sign()
        return problem.lattice.clip(latent, problem.images, *problem.pixel_range)
    latent = path.latent - spread(rate * problem.cap / norms(momentum).clamp(min=_TINY)) * momentum
    latent = problem.lattice.clip(latent, problem.images, *problem.pixel_range)
    return latent * spread((problem.cap / norms(latent).clamp(min=_TINY)).clamp(max=1))


def _scale(problem: Problem, latent: Tensor) -> Tensor:
    """Step 5: return s, (n,): the largest scale with which the rounded image is within R, by bisection; no pass."""
    if problem.cap is None:
        return latent.new_ones(len(latent))
    low, high = latent.new_full((len(latent),), -_WIDEST), latent.new_full((len(latent),), _WIDEST)  # of log2 s
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        within = norms(_points(problem, latent, torch.exp2(middle)) - problem.images) <= problem.cap
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return torch.exp2(low)


def _points(problem: Problem, latent: Tensor, scale: Tensor) -> Tensor:
    """Return round(x + s r), in the pixel range, (n, 3, H, W)."""
    moved = problem.lattice.clip(spread(scale) * latent, problem.images, *problem.pixel_range)
    return problem.lattice.points(problem.images, moved)


@torch.no_grad()
def _judge(problem: Problem, best: Best, seen: Best, ready: list[Tensor]) -> None:
    """Step 7: compute the chosen iterates in every view, and keep them as files."""
    places = {row: place for place, row in enumerate(problem.rows.tolist())}
    rows = torch.tensor([places[row] for rows in ready for row in rows.tolist()], dtype=torch.long)
    if not len(rows):
        return
    part = problem.select(rows.to(problem.images.device))
    images = seen.images[seen.places(part)]
    logits = torch.stack([part.logits(images, view) for view in range(part.views)], dim=1)
    best.update(part, images, logits)
