"""The best iterate of each image of a batch, and what an attack returns."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.attacks.geometry import distances, to_floats
from mlperturb.attacks.goals import Goal
from mlperturb.attacks.problem import Problem, each_view
from mlperturb.model.linear import to_pixels


class Best:
    """The best iterate of each image of a problem: the highest score, then the least L2 distortion, within the cap.

    Args:
        problem: the problem of the images; a part of it, made by `Problem.select`, updates only its own images.
        files: the iterates are lattice points, so that the logits of an iterate are those of its file.

    Attributes:
        images: the best iterates, (N, 3, H, W), in [0, 1], or 8-bit pixels if the lattice's points are such; at first
            the clean photos.
        score: their `Goal.score`, (N,).
        norm: ||x* - x||_2 in [0, 1] units, (N,).
        met: whether the goal is met, (N,).
        logits: of `files`, their logits in each of V views where the goal is met, (N, V, L), else NaN; None before the
            first update, or if the iterates are not files.
    """

    def __init__(self, problem: Problem, *, files: bool = False) -> None:
        images = problem.images
        count = len(images)
        self.images = to_pixels(images) if problem.lattice.small else images.clone()
        self.score = images.new_full((count,), -torch.inf)
        self.norm = images.new_full((count,), torch.inf)
        self.met = torch.zeros(count, dtype=torch.bool, device=images.device)
        self.logits: Tensor | None = None
        self._files = files
        self._measured: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._place = torch.full((len(problem.meter),), -1)  # from a row of the whole batch to a row here, on the CPU
        self._place[problem.rows] = torch.arange(count)

    @torch.no_grad()
    def update(self, problem: Problem, images: Tensor, logits: Tensor, computed: Tensor | None = None) -> Tensor:
        """Keep the iterates that are better than the best so far; return which iterates meet the goal, (n,).

        Args:
            problem: the part of the batch that the iterates belong to.
            images: the iterates, (n, 3, H, W), in [0, 1] or 8-bit pixels.
            logits: the logits of the iterates, (n, L), or of each of their views, (n, V, L): the worst view counts.
            computed: the images of which the logits of every view are computed, boolean, (n,); None for all. The other
                images have expected logits, and an expected success is not kept.
        """
        goal = problem.goal
        rows = self.places(problem)
        views = logits.unsqueeze(1) if logits.dim() == 2 else logits
        score, met = each_view(goal.score, views).amin(1), each_view(goal.met, views).all(1)
        held_score, held_norm = self.score[rows], self.norm[rows]
        better = score >= held_score
        asked = bool(better.any())  # how far iterates are that score less is not needed
        norm = self.measure(problem, images) if asked else torch.full_like(held_norm, torch.inf)
        better &= (score > held_score) | (norm < held_norm)
        if computed is not None:
            better &= computed | ~met
        if problem.cap is not None:
            better &= norm <= problem.cap
        if self._files:
            self._take_in(problem, rows, views, better & met)
        self.score[rows] = torch.where(better, score, held_score)
        self.norm[rows] = torch.where(better, norm, held_norm)
        self.met[rows] = torch.where(better, met, self.met[rows])
        self._keep(rows, images, better)
        return met

    def measure(self, problem: Problem, images: Tensor) -> Tensor:
        """Return ||x* - x||_2 of iterates, (n,); of the same tensor as the last time, what was found then."""
        if self._measured is None or self._measured[0]() is not images:
            self._measured = weakref.ref(images), distances(images, problem.images)
        return self._measured[1]

    def hope(self, problem: Problem, images: Tensor, expected: Tensor) -> None:
        """Keep iterates that are `expected` to meet the goal, (n,), where none was seen to meet it.

        `met` and `score` stay: the decision on the file will say whether the iterate does.
        """
        rows = self.places(problem)
        chosen = expected & ~self.met[rows]
        self._keep(rows, images, chosen)

    def _keep(self, rows: Tensor, images: Tensor, chosen: Tensor) -> None:
        """Keep the iterates that are `chosen`, boolean, (n,), at these places, (n,)."""
        if not bool(chosen.any()):
            return
        images = to_pixels(images) if self.images.dtype == torch.uint8 else images
        if len(images) == 1:
            self.images[int(rows)] = images[0]  # an index that is a tensor copies a large photo twice
        else:
            self.images[rows[chosen]] = images[chosen]

    def _take_in(self, problem: Problem, rows: Tensor, views: Tensor, found: Tensor) -> None:
        """Keep the logits of files that were found to meet the goal in every view; no look at them is owed then."""
        if self.logits is None:
            self.logits = views.new_full((len(self.met), *views.shape[1:]), torch.nan)
        self.logits[rows[found]] = views[found]
        problem.settle(found & ~self.met[rows])

    def places(self, problem: Problem) -> Tensor:
        """Return where the images of a part of the batch are held here, (n,)."""
        return self._place[problem.rows].to(self.norm.device)

    def outcome(self, goal: Goal, *, on_lattice: bool = False) -> Outcome:
        """Return the best iterates as the result of an attack with this goal."""
        return Outcome(self.images, self.met, goal, on_lattice, self.logits)


@dataclass(frozen=True)
class Outcome:
    """The result of an attack.

    Attributes:
        kept: the best iterates x*, (N, 3, H, W), float, in [0, 1]; of large photos, see `model.span`, 8-bit pixels.
        met: whether the goal is met, (N,).
        goal: the goal of the attack; the search for an 8-bit photo has the same goal.
        on_lattice: whether the images are 8-bit already, found with the rounding inside the attack.
        logits: of 8-bit images, their logits in each of V views where the goal is met, (N, V, L), else NaN; None if
            they are unknown.
    """

    kept: Tensor
    met: Tensor
    goal: Goal
    on_lattice: bool = False
    logits: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """x*, float, in [0, 1], (N, 3, H, W)."""
        return to_floats(self.kept)
