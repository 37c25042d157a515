"""The best iterate of each image of a batch, and what an attack returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.attacks.goals import Goal
from mlperturb.attacks.lattice import PIXELS
from mlperturb.attacks.problem import Problem, each_view, norms, spread


class Best:
    """The best iterate of each image of a problem: the highest score, then the least L2 distortion, within the cap.

    Args:
        problem: the problem of the images; a part of it, made by `Problem.select`, updates only its own images.

    Attributes:
        images: the best iterates, (N, 3, H, W); at first the clean photos.
        score: their `Goal.score`, (N,).
        norm: ||x* - x||_2 in [0, 1] units, (N,).
        met: whether the goal is met, (N,).
        latent: their coordinates on the problem's lattice, (N, 3, H', W'); None on the lattice of pixels.
    """

    def __init__(self, problem: Problem) -> None:
        images = problem.images
        count = len(images)
        self.images = images.clone()
        self.score = images.new_full((count,), -torch.inf)
        self.norm = images.new_full((count,), torch.inf)
        self.met = torch.zeros(count, dtype=torch.bool, device=images.device)
        self.latent = None if problem.lattice is PIXELS else problem.lattice.zeros(images)
        self._place = torch.full((len(problem.meter),), -1)  # from a row of the whole batch to a row here, on the CPU
        self._place[problem.rows] = torch.arange(count)

    @torch.no_grad()
    def update(
        self,
        problem: Problem,
        images: Tensor,
        logits: Tensor,
        computed: Tensor | None = None,
        latent: Tensor | None = None,
    ) -> Tensor:
        """Keep the iterates that are better than the best so far; return which iterates meet the goal, (n,).

        Args:
            problem: the part of the batch that the iterates belong to.
            images: the iterates, (n, 3, H, W).
            logits: the logits of the iterates, (n, L), or of each of their views, (n, V, L): the worst view counts.
            computed: the images of which the logits of every view are computed, boolean, (n,); None for all. The other
                images have expected logits, and an expected success is not kept.
            latent: the coordinates of the iterates, needed on another lattice than that of pixels.
        """
        goal = problem.goal
        rows = self.places(problem)
        views = logits.unsqueeze(1) if logits.dim() == 2 else logits
        score, met = each_view(goal.score, views).amin(1), each_view(goal.met, views).all(1)
        norm = norms(images - problem.images)
        held_score, held_norm = self.score[rows], self.norm[rows]
        better = (score > held_score) | ((score == held_score) & (norm < held_norm))
        if computed is not None:
            better &= computed | ~met
        if problem.cap is not None:
            better &= norm <= problem.cap
        self.score[rows] = torch.where(better, score, held_score)
        self.norm[rows] = torch.where(better, norm, held_norm)
        self.met[rows] = torch.where(better, met, self.met[rows])
        self.images[rows] = torch.where(spread(better), images, self.images[rows])
        if self.latent is not None and latent is not None:
            self.latent[rows] = torch.where(spread(better), latent, self.latent[rows])
        return met

    def places(self, problem: Problem) -> Tensor:
        """Return where the images of a part of the batch are held here, (n,)."""
        return self._place[problem.rows].to(self.norm.device)

    def outcome(self, goal: Goal, *, on_lattice: bool = False) -> Outcome:
        """Return the best iterates as the result of an attack with this goal."""
        return Outcome(self.images, self.met, goal, on_lattice, self.latent)


@dataclass(frozen=True)
class Outcome:
    """The result of an attack.

    Attributes:
        images: the best iterates x*, float, in [0, 1], (N, 3, H, W).
        met: whether the goal is met, (N,).
        goal: the goal of the attack; the search for an 8-bit photo has the same goal.
        on_lattice: whether the images are 8-bit already, found with the rounding inside the attack.
        latent: the images' coordinates on the problem's lattice, (N, 3, H', W'); None on the lattice of pixels.
    """

    images: Tensor
    met: Tensor
    goal: Goal
    on_lattice: bool = False
    latent: Tensor | None = None
