"""What an attack knows of the views of a photo that it did not compute: they differ from the computed view by little.

Two readers of one photo differ by the rounding of the resized pixels. The effect on a logit changes slowly from one
iterate to the next, so a difference seen once stands for the next iterates (`Panel`). Where an iterate is expected to
hold everywhere and would be the best so far, the other views are computed (`verify`): nothing counts as found unless it
was seen to hold in every view. `python tests/benchmarks/readers.py` compares this with other ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlperturb.attacks.best import Best
from mlperturb.attacks.problem import Problem, each_view, norms

_FRESH = 0.5  # the weight of a new difference in the running mean
LATE = 0.6  # of the way: from there on better iterates are verified, and the worst view is computed
_EARLY = 0.25  # of the way: from there on the first iterate that holds in every view is looked for


class Panel:
    """What is known of the V views of each image of the whole batch.

    Args:
        problem: the images.

    Attributes:
        offsets: the logits of each view less those of the first view, a running mean, (N, V, L).
        learned: whether the difference was seen on an iterate, (N, V).
        worst: the largest violation in each view, computed or expected, at the last iterate, (N, V).
    """

    def __init__(self, problem: Problem) -> None:
        clean = problem.look_at_clean()
        count = len(problem.meter)
        self.offsets = clean.new_zeros(count, *clean.shape[1:])
        self.offsets[problem.rows.to(clean.device)] = clean - clean[:, :1]
        self.learned = torch.zeros(count, clean.shape[1], dtype=torch.bool, device=clean.device)
        self.worst = clean.new_zeros(count, clean.shape[1])

    @classmethod
    def of(cls, problem: Problem) -> Panel | None:
        """Return the panel of a problem; None for a problem of a single view."""
        return None if problem.views == 1 else cls(problem)

    def choose(self, problem: Problem, step: int, late: Tensor) -> Tensor:
        """Return the view in which each image is computed next, (n,).

        At first that is the first view, which computes in floats, in every other iteration, and between the other
        views, which round, in turn. Where `late`, (n,), is true, it is the view that the last iterate violated most.
        """
        others = self.offsets.shape[1] - 1
        in_turn = 0 if step % 2 == 0 else 1 + step // 2 % others
        return torch.where(late, self.worst[self._rows(problem)].argmax(1), in_turn)

    def expect(self, problem: Problem, logits: Tensor, views: Tensor) -> Tensor:
        """Return the logits to be expected in every view, (n, V, L), from those of a view each, (n, L) and (n,)."""
        rows = self._rows(problem)
        return logits.unsqueeze(1) + (self.offsets[rows] - self.offsets[rows, views].unsqueeze(1))

    def learn(self, problem: Problem, logits: Tensor, views: Tensor, others: Tensor, found: Tensor) -> None:
        """Take in two views of the same iterate: `logits` of `views`, and `found` of `others`, (n, L) and (n,) each."""
        rows = self._rows(problem)
        base, held = self.offsets[rows, views], self.offsets[rows, others]
        fresh = torch.where(self.learned[rows, others], _FRESH, 1.0).unsqueeze(1)
        self.offsets[rows, others] = held + fresh * (base + found - logits - held)
        self.learned[rows, others] = True

    def unknown(self, problem: Problem) -> Tensor:
        """Return of which views no difference was seen on an iterate, (n, V)."""
        return ~self.learned[self._rows(problem)]

    def remember(self, problem: Problem, worst: Tensor) -> None:
        """Remember the largest violation in each view at an iterate, (n, V)."""
        self.worst[self._rows(problem)] = worst

    def _rows(self, problem: Problem) -> Tensor:
        return problem.rows.to(self.offsets.device)


@torch.no_grad()
def verify(
    problem: Problem, best: Best, panel: Panel, images: Tensor, logits: Tensor, views: Tensor, way: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the other views of iterates that may be the best so far, the least sure first, until a view fails.

    Args:
        problem: the images; each further view costs an image a forward pass, and leaves a pass for the gradient.
        best: the best iterates so far.
        panel: learns what is seen.
        images: the iterates, (n, 3, H, W).
        logits: of the views computed already, (n, L).
        views: the views computed already, (n,).
        way: how far each image is on its way, 0 to 1, (n,): it is verified from a quarter on until an iterate was seen
            to hold in every view, and from `LATE` on.

    Returns:
        The logits of every view, (n, V, L), computed or expected; and for which images all are computed, (n,).
    """
    goal = problem.goal
    seen = panel.expect(problem, logits, views)
    computed = views.unsqueeze(1) == torch.arange(seen.shape[1], device=views.device)
    worst = _worst(problem, seen)
    promising = ((worst <= 0) | (panel.unknown(problem) & ~computed)).all(1) & goal.met(logits)
    held = best.places(problem)
    better = ~best.met[held] | (norms(images - problem.images) < best.norm[held])
    due = (way >= torch.where(best.met[held], LATE, _EARLY)) & promising & better
    order = worst.masked_fill(computed, -torch.inf).argsort(1, descending=True)
    for place in range(seen.shape[1] - 1):
        due = due & problem.affordable(2)
        some = due.nonzero().flatten()
        if not len(some):
            break
        part, others = problem.select(some), order[some, place]
        found = part.look(images[some], others)
        panel.learn(part, logits[some], views[some], others, found)
        seen[some, others], computed[some, others] = found, True
        due[some] = part.goal.met(found)
    panel.remember(problem, _worst(problem, seen))
    return seen, computed.all(1)


def _worst(problem: Problem, seen: Tensor) -> Tensor:
    """Return the largest violation in each view, (n, V), of logits (n, V, L)."""
    return each_view(lambda values: problem.goal.violations(values).amax(1), seen)
