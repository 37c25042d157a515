"""Rank I and Rank II, the attacks on multi-label ranking (Section III-C, Eq. 9-11)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mlperturb.attacks.common import Outcome, Problem
from mlperturb.attacks.penalty import minimise_penalty
from mlperturb.attacks.schedule import BALANCED, Schedule
from mlperturb.metrics import kendall_tau
from mlperturb.targets import Space, Targets

Between = Literal["rest", "rest-positive", "rest-negative", "none", "threshold"]


@dataclass(frozen=True)
class RankingGoal:
    """Eq. 2, and for Rank II Eq. 10, as hinges of exp(f) between the extremes of two sets of labels.

    Attributes:
        targets: A, B and y.
        between: Omega0, the labels that are to lie between Omega- and Omega+: C (`rest`), its positive or negative
            half, no label, or the fixed decision threshold in place of a label (Section III-A2).
        separate: add Eq. 10, which tells A from B inside Omega- and Omega+.
        space: the hinge lies on exp(f), as in the paper, or on the logits. The constraints are the same, for exp and
            sigmoid rise; but the order of two confident labels has hardly a gradient in exp(f).
    """

    targets: Targets
    between: Between = "rest"
    separate: bool = False
    space: Space = "probability"

    def violations(self, logits: Tensor) -> Tensor:
        """Return max exp(f) over the lower set - min exp(f) over the higher one, (N, K); -inf where a set is empty."""
        if self.space == "logit":
            return self._terms(logits, lambda values: values)
        return self._terms(logits, lambda values: torch.sigmoid(values).exp())

    def met(self, logits: Tensor) -> Tensor:
        """Say for which images every ranking constraint holds, (N,); a NaN never holds.

        The order of the logits is that of the probabilities, and is not lost where those round to 0 or 1.
        """
        return (self._terms(logits, lambda values: values) <= 0).all(1)

    def _terms(self, logits: Tensor, rising: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the pairs of sets of Eq. 9, then of Eq. 10, measured after a rising function of the logits."""
        margin = self.targets.margin  # a lower label's logit must stay that much below a higher one's
        above, below = rising(logits + margin), rising(logits)
        targets, positive = self.targets, self.targets.truth > 0
        low = targets.constrained & (targets.desired < 0)  # Omega- = A_1 u B_-1
        high = targets.constrained & (targets.desired > 0)  # Omega+ = A_-1 u B_1
        if self.between == "threshold":
            edge, edge_above = rising(targets.boundary), rising(targets.boundary + margin)
            terms = [_largest(above - edge, low), _largest(edge_above - below, high)]
        else:
            middle = self._middle()
            direct = _gap(above, below, low, high)
            # Where Omega0 is empty its terms vanish; where it is not, the direct term follows from them.
            terms = [
                direct.masked_fill(middle.any(1), -torch.inf),
                _gap(above, below, low, middle),
                _gap(above, below, middle, high),
            ]
        if self.separate:
            a, b = targets.flip, targets.keep
            terms += [_gap(above, below, a & positive, b & ~positive), _gap(above, below, b & positive, a & ~positive)]
        return torch.stack(terms, 1)

    def score(self, logits: Tensor) -> Tensor:
        """Return Kendall's tau_b against y^tau, and 2 more where every ranking constraint holds, (N,)."""
        return kendall_tau(logits, self.targets.ranks).nan_to_num(0.0).to(logits.dtype) + 2 * self.met(logits)

    def select(self, rows: Tensor) -> RankingGoal:
        """Return the goal of some images."""
        return replace(self, targets=self.targets.select(rows))

    def _middle(self) -> Tensor:
        rest, positive = ~self.targets.constrained, self.targets.truth > 0
        if self.between == "rest":
            return rest
        if self.between == "rest-positive":
            return rest & positive
        if self.between == "rest-negative":
            return rest & ~positive
        return torch.zeros_like(rest)


def rank_1(
    problem: Problem, *, between: Between = "rest", space: Space = "logit", schedule: Schedule = BALANCED
) -> Outcome:
    """Min ||r||_2 + lambda * sum of max(0, max exp(f_low) - min exp(f_high)) over the pairs of sets of Eq. 9.

    Of the iterates that satisfy every ranking constraint (else of all), the one of highest Kendall tau_b against
    y^tau is kept, then of least distortion. One lambda, an image's own, serves all terms.

    Args:
        problem: the batch; any of A_1, A_-1, B_1, B_-1, C may be empty, an empty set contributes zero.
        between: Omega0, see `RankingGoal`.
        space: of the hinge, see `RankingGoal`; the paper's is `probability`.
        schedule: how long to search; `schedule.PAPER` is the paper's.
    """
    return minimise_penalty(problem, RankingGoal(problem.targets, between, space=space), schedule)


def rank_2(
    problem: Problem, *, between: Between = "rest", space: Space = "logit", schedule: Schedule = BALANCED
) -> Outcome:
    """Rank I with the two terms of Eq. 10 added, Eq. 11: A_1 below B_-1, and A_-1 above B_1.

    Args:
        problem: the batch.
        between: Omega0, see `RankingGoal`.
        space: of the hinge, see `RankingGoal`; the paper's is `probability`.
        schedule: how long to search; `schedule.PAPER` is the paper's.
    """
    return minimise_penalty(problem, RankingGoal(problem.targets, between, separate=True, space=space), schedule)


def _largest(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the largest chosen value of each row, (n,); -inf if none is chosen."""
    return values.masked_fill(~chosen, -torch.inf).amax(1)


def _gap(above: Tensor, below: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the largest value of the lower set less the smallest of the higher one, (n,); -inf if one is empty."""
    return _largest(above, low) + _largest(-below, high)
