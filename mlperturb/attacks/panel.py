"""What an attack expects of the views of a photo that it did not compute: little difference from the computed view.

Two readers of one photo differ by the rounding of the resized pixels. The effect on a logit changes slowly from one
iterate to the next, so a difference seen once stands for the next iterates (`Panel`). Where an iterate is expected to
hold everywhere and would be the best so far, the other views are computed (`verify`): nothing counts as found unless it
was seen to hold in every view. `python tests/benchmarks/readers.py` compares this with other ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.attacks.best import Best
from mlperturb.attacks.problem import Problem, each_view

# `LATE` and `_EARLY` were compared with other values (docs/readers.md, "Variants that were tried"), `_SHARE` with .10
# and .15 on 24 photos a case, at 30 and 40 passes; `_FRESH` was not.
_FRESH = 0.5  # the weight of a new difference in the running mean
LATE = 0.6  # from this share of the way on, better iterates are verified, and the worst view is computed
_SHARE = 0.2  # the largest share of the passes that goes to other views, once an iterate was seen to hold in all views
_EARLY = 0.25  # from this share of the way on, the first iterate that holds in every view is looked for


@dataclass(frozen=True)
class Waiting:
    """Iterates that are expected to hold in every view, and are nearer than the best.

    Attributes:
        images: the iterates, (N, 3, H, W).
        logits: of the views computed, (N, L).
        views: the views computed, (N,).
        length: ||x* - x||_2, (N,); infinite where there is no such iterate.
    """

    images: Tensor
    logits: Tensor
    views: Tensor
    length: Tensor

    @classmethod
    def empty(cls, count: int, images: Tensor, logits: Tensor, views: Tensor) -> Waiting:
        """Return room for `count` iterates like these."""
        images, logits, views = (values.new_zeros(count, *values.shape[1:]) for values in (images, logits, views))
        return cls(images, logits, views, logits.new_full((count,), torch.inf))


class Panel:
    """What is known of the V views of each image of the whole batch.

    Args:
        problem: the images.

    Attributes:
        offsets: the logits of each view less those of the first view, a running mean, (N, V, L).
        learned: whether the difference was seen on an iterate, (N, V).
        worst: the largest violation in each view, computed or expected, at the last iterate, (N, V).
        looks: the passes spent on other views of an iterate, (N,), on the CPU.
        waiting: iterates whose other views are to be computed at the end; None while there are none.
    """

    def __init__(self, problem: Problem) -> None:
        clean = problem.look_at_clean()
        count = len(problem.meter)
        self.offsets = clean.new_zeros(count, *clean.shape[1:])
        self.offsets[problem.rows.to(clean.device)] = clean - clean[:, :1]
        self.learned = torch.zeros(count, clean.shape[1], dtype=torch.bool, device=clean.device)
        self.worst = clean.new_zeros(count, clean.shape[1])
        self.looks = torch.zeros(count, dtype=torch.long)
        self.waiting: Waiting | None = None

    @classmethod
    def of(cls, problem: Problem) -> Panel | None:
        """Return the panel of a problem; None for a problem of a single view."""
        return None if problem.views == 1 else cls(problem)

    def choose(self, problem: Problem, step: int, late: Tensor) -> Tensor:
        """Return the view in which each image is computed next, (n,).

        At first it is the first view, which computes in floats, in every second iteration, and one of the other views,
        which round, in turn in the iterations between. Where `late`, (n,), is true, it is the view in which the last
        iterate had the largest violation.
        """
        others = self.offsets.shape[1] - 1
        in_turn = 0 if step % 2 == 0 else 1 + step // 2 % others
        return torch.where(late, self.worst[self._rows(problem)].argmax(1), in_turn)

    def expect(self, problem: Problem, logits: Tensor, views: Tensor) -> Tensor:
        """Return the logits to be expected in every view, (n, V, L), from those of a view each, (n, L) and (n,)."""
        rows = self._rows(problem)
        return logits.unsqueeze(1) + (self.offsets[rows] - self.offsets[rows, views].unsqueeze(1))

    def learn(self, problem: Problem, logits: Tensor, views: Tensor, others: Tensor, found: Tensor) -> None:
        """Learn from two views of an iterate: `logits` of `views`, and `found` of `others`, (n, L) and (n,) each."""
        rows = self._rows(problem)
        base, held = self.offsets[rows, views], self.offsets[rows, others]
        fresh = torch.where(self.learned[rows, others], _FRESH, 1.0).unsqueeze(1)
        self.offsets[rows, others] = held + fresh * (base + found - logits - held)
        self.learned[rows, others] = True

    def unknown(self, problem: Problem) -> Tensor:
        """Return of which views no difference was seen on an iterate, (n, V)."""
        return ~self.learned[self._rows(problem)]

    def may_look(self, problem: Problem) -> Tensor:
        """Say whether the other views of an iterate are within the share of the passes that may go to them, (n,)."""
        wanted = self.looks[problem.rows] + problem.views - 1
        return (problem.cost * wanted <= _SHARE * problem.spent).to(self.worst.device)

    def remember(self, problem: Problem, worst: Tensor) -> None:
        """Remember the largest violation in each view at an iterate, (n, V)."""
        self.worst[self._rows(problem)] = worst

    def defer(
        self, problem: Problem, chosen: Tensor, images: Tensor, logits: Tensor, views: Tensor, length: Tensor
    ) -> None:
        """Let iterates, those `chosen` of (n,), wait for the end if they are nearer than those that wait already.

        Args:
            problem: the images.
            chosen: boolean, (n,).
            images: the iterates, (n, 3, H, W).
            logits: of the views computed, (n, L).
            views: the views computed, (n,).
            length: ||x* - x||_2, (n,).
        """
        if not bool(chosen.any()):
            return
        if self.waiting is None:
            self.waiting = Waiting.empty(len(self.worst), images, logits, views)
        rows = self._rows(problem)
        nearer = chosen & (length < self.waiting.length[rows])
        kept = Waiting(images[nearer], logits[nearer], views[nearer], length[nearer])
        for field, values in vars(kept).items():
            getattr(self.waiting, field)[rows[nearer]] = values

    def await_(self, problem: Problem) -> Waiting | None:
        """Return the iterates of these images that wait; the length is infinite where there is none."""
        if self.waiting is None:
            return None
        rows = self._rows(problem)
        return Waiting(*(values[rows] for values in vars(self.waiting).values()))

    def _rows(self, problem: Problem) -> Tensor:
        return problem.rows.to(self.offsets.device)


@torch.no_grad()
def verify(
    problem: Problem,
    best: Best,
    panel: Panel,
    images: Tensor,
    logits: Tensor,
    views: Tensor,
    way: Tensor,
    *,
    last: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the other views of iterates that may be the best so far, the least sure first, until a view fails.

    Args:
        problem: the images; each further view costs an image a forward pass.
        best: the best iterates so far.
        panel: learns what is seen.
        images: the iterates, (n, 3, H, W).
        logits: of the views computed already, (n, L).
        views: the views computed already, (n,).
        way: how far each image is on its way, 0 to 1, (n,): it is verified from a quarter on until an iterate was seen
            to hold in every view, and from `LATE` on.
        last: compute the other views of every better iterate, with the last passes; else leave the passes of the
            backward pass and of a last look, and spend a share of `_SHARE` on other views, once something was found. An
            iterate for which none is left waits in the panel, see `Panel.defer`.

    Returns:
        The logits of every view, (n, V, L), computed or expected; and for which images all are computed, (n,).
    """
    goal, count = problem.goal, problem.views
    seen = panel.expect(problem, logits, views)
    computed = views.unsqueeze(1) == torch.arange(count, device=views.device)
    worst = _worst(problem, seen)
    promising = ((worst <= 0) | (panel.unknown(problem) & ~computed)).all(1) & goal.met(logits)
    held = best.places(problem)
    found, nearest = best.met[held], best.norm[held]
    due = (way >= torch.where(found, LATE, _EARLY)) & promising
    length = best.measure(problem, images) if bool(due.any()) else torch.full_like(nearest, torch.inf)
    due = due & (~found | (length < nearest))
    if last:
        due = due & problem.affordable(count - 1)
    else:  # leave the backward pass; where something was found, also a last look in every view
        now = torch.where(found, problem.affordable(2 * count) & panel.may_look(problem), problem.affordable(count))
        panel.defer(problem, due & found & ~now, images, logits, views, length)
        due = due & now
    fresh = False
    order = worst.masked_fill(computed, -torch.inf).argsort(1, descending=True)
    for place in range(count - 1):
        some = due.nonzero().flatten()
        if not len(some):
            break
        part, others = problem.select(some), order[some, place]
        looked, fresh = part.look(images[some], others), True
        panel.learn(part, logits[some], views[some], others, looked)
        panel.looks[part.rows] += 1
        seen[some, others], computed[some, others] = looked, True
        due[some] = part.goal.met(looked)
    panel.remember(problem, _worst(problem, seen) if fresh else worst)
    return seen, computed.all(1)


def verify_waiting(problem: Problem, best: Best, panel: Panel) -> None:
    """Compute the other views of the iterates that wait, and keep those that hold in every view."""
    waiting = panel.await_(problem)
    if waiting is None:
        return
    rows = waiting.length.isfinite().nonzero().flatten()
    if len(rows):
        part, images = problem.select(rows), waiting.images[rows]
        end = torch.ones_like(waiting.length[rows])
        logits, computed = verify(part, best, panel, images, waiting.logits[rows], waiting.views[rows], end, last=True)
        best.update(part, images, logits, computed)


def _worst(problem: Problem, seen: Tensor) -> Tensor:
    """Return the largest violation in each view, (n, V), of logits (n, V, L)."""
    return each_view(lambda values: problem.goal.violations(values).amax(1), seen)
