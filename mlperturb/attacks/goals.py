"""The goals of attacks, apart from their optimisers: a classification (Eq. 1) or a ranking (Eq. 2, 9-11)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from mlperturb.metrics import kendall_tau
from mlperturb.targets import Space, Targets

Between = Literal["rest", "rest-positive", "rest-negative", "none", "threshold"]


class Goal(Protocol):
    """The goal of an attack: constraints on the logits, and a score.

    Attributes:
        targets: the sets A and B, and y, of the batch.
    """

    @property
    def targets(self) -> Targets:
        """The sets A and B, and y, of the batch."""
        ...

    def violations(self, logits: Tensor) -> Tensor:
        """Return how far each of K constraints is from holding, (N, K): positive if violated, -inf if absent."""
        ...

    def met(self, logits: Tensor) -> Tensor:
        """Say for which images every constraint holds, (N,)."""
        ...

    def score(self, logits: Tensor) -> Tensor:
        """Return the score of each image, whatever its distortion, (N,); images that meet the goal score highest."""
        ...

    def select(self, rows: Tensor) -> Self:
        """Return the goal of some images: rows of the batch, (n,)."""
        ...

    def aimed_at(self, targets: Targets) -> Self:
        """Return the same kind of goal for other targets."""
        ...

    def describe(self, logits: Tensor) -> dict[str, Any] | None:
        """Return the fields of the first image's record beside its decisions, or None for no fields."""
        ...


@dataclass(frozen=True)
class ClassificationGoal:
    """Eq. 1: every label of A flipped, every label of B kept; the score is the number of constraints that hold.

    Attributes:
        targets: A, B and y.
        space: measure violations on the logits, whose gradient does not vanish, or on the probabilities.
    """

    targets: Targets
    space: Space = "logit"

    def violations(self, logits: Tensor) -> Tensor:
        """Return y'_j F'_j - c_j of Eq. 4, (N, L); -inf outside A u B."""
        return self.targets.violations(logits, self.space)

    def met(self, logits: Tensor) -> Tensor:
        """Say for which images every constraint holds, (N,)."""
        return self.targets.hold_all(logits)

    def score(self, logits: Tensor) -> Tensor:
        """Count the constraints that hold, (N,)."""
        return self.targets.holds(logits).sum(1).to(logits.dtype)

    def select(self, rows: Tensor) -> Self:
        """Return the goal of some images: rows of the batch, (n,)."""
        return replace(self, targets=self.targets.select(rows))

    def aimed_at(self, targets: Targets) -> Self:
        """Return the goal of other targets."""
        return replace(self, targets=targets)

    def describe(self, logits: Tensor) -> None:
        """Return None: a record has no fields beside the decisions."""


@dataclass(frozen=True)
class LargestMargin(ClassificationGoal):
    """Eq. 1 too; of results with which every constraint holds, the result of the largest least margin scores best."""

    def score(self, logits: Tensor) -> Tensor:
        """Count the constraints that hold; where all do, add m / (1 + m) for the least margin m, (N,)."""
        margin = -self.violations(logits).amax(1).clamp(max=0)
        return super().score(logits) + torch.where(self.met(logits), margin / (1 + margin), 0)


@dataclass(frozen=True)
class RankingGoal:
    """Eq. 2, and for Rank II Eq. 10, as hinges of exp(f) between the extremes of two sets of labels.

    Attributes:
        targets: A, B and y.
        between: Omega0, the labels that are to rank between Omega- and Omega+: C (`rest`), its positive or negative
            half, no label, or the fixed decision threshold in place of a label (Section III-A2).
        separate: add Eq. 10, which tells A from B inside Omega- and Omega+.
        space: measure the hinge on exp(f), as in the paper, or on the logits. The constraints are the same, because exp
            and sigmoid rise; but the order of two confident labels has almost no gradient in exp(f).
    """

    targets: Targets
    between: Between = "rest"
    separate: bool = False
    space: Space = "probability"

    def violations(self, logits: Tensor) -> Tensor:
        """Return max exp(f) over the lower set - min exp(f) over the higher set, (N, K); -inf where a set is empty."""
        if self.space == "logit":
            return self._terms(logits, lambda values: values)
        return self._terms(logits, lambda values: torch.sigmoid(values).exp())

    def met(self, logits: Tensor) -> Tensor:
        """Say for which images every ranking constraint holds, (N,); a NaN never holds.

        Logits and probabilities have the same order, but probabilities may round to 0 or 1 and lose it.
        """
        return (self._terms(logits, lambda values: values) <= 0).all(1)

    def _terms(self, logits: Tensor, rising: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the pairs of sets of Eq. 9, then of Eq. 10, measured after a rising function of the logits."""
        margin = self.targets.margin  # a lower label's logit must be below a higher label's by this
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
            # Where Omega0 is empty, its terms vanish; elsewhere the direct term follows from them, and is dropped.
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
        """Return the goal of some images: rows of the batch, (n,)."""
        return replace(self, targets=self.targets.select(rows))

    def aimed_at(self, targets: Targets) -> RankingGoal:
        """Return the goal of other targets."""
        return replace(self, targets=targets)

    def describe(self, logits: Tensor) -> dict[str, Any]:
        """Return whether every ranking constraint of the first image holds, and its tau_b (None if undefined)."""
        tau = float(kendall_tau(logits, self.targets.ranks)[0])
        return {"satisfied": bool(self.met(logits)[0]), "kendall_tau": None if tau != tau else tau}

    def _middle(self) -> Tensor:
        rest, positive = ~self.targets.constrained, self.targets.truth > 0
        if self.between == "rest":
            return rest
        if self.between == "rest-positive":
            return rest & positive
        if self.between == "rest-negative":
            return rest & ~positive
        return torch.zeros_like(rest)


def _largest(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the largest chosen value of each row, (n,); -inf if none is chosen."""
    return values.masked_fill(~chosen, -torch.inf).amax(1)


def _gap(above: Tensor, below: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the largest value of the lower set less the smallest of the higher set, (n,); -inf if a set is empty."""
    return _largest(above, low) + _largest(-below, high)
