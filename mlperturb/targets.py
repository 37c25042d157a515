"""The sets A and B of a batch, the desired signs, and the one predicate for a constraint that holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mlperturb.errors import UsageError
from mlperturb.labels import Request

Space = Literal["logit", "probability"]


@dataclass(frozen=True)
class Targets:
    """The labels that an attacked batch is to have (docs/methods.md, Notation).

    Attributes:
        flip: A, boolean, (N, L).
        keep: B, boolean, (N, L), disjoint from A. C is the rest.
        truth: y, the labels the photos have now, +1 / -1, (N, L).
        boundary: logit(t_j), the decision threshold of each label on its logit, (L,).
        margin: the distance from its boundary that a logit must have; 0 for the bare decision. With a small margin,
            a decision does not change on another device or batch size, which adds in another order.
    """

    flip: Tensor
    keep: Tensor
    truth: Tensor
    boundary: Tensor
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.flip.shape == self.keep.shape == self.truth.shape or self.flip.dim() != 2:
            shapes = [tuple(t.shape) for t in (self.flip, self.keep, self.truth)]
            raise UsageError(f"expected flip, keep and truth of one shape (N, L), got {shapes}")
        if bool((self.flip & self.keep).any()):
            raise UsageError("expected disjoint sets A and B, got a label in both")

    @cached_property
    def desired(self) -> Tensor:
        """y*: y with the signs of A reversed, (N, L)."""
        return torch.where(self.flip, -self.truth, self.truth)

    @cached_property
    def constrained(self) -> Tensor:
        """A u B, boolean, (N, L)."""
        return self.flip | self.keep

    @property
    def ranks(self) -> Tensor:
        """y^tau: -2, -1, 0, 1, 2 for A_1, B_-1, C, B_1, A_-1; (N, L)."""
        return self.desired * (2 * self.flip.to(self.truth.dtype) + self.keep.to(self.truth.dtype))

    def holds(self, logits: Tensor) -> Tensor:
        """Say which constraints hold: h_j(x*) = y*_j, for j in A u B; (N, L), true outside A u B.

        No other code decides whether a constraint holds. f_j >= t_j is decided as z_j >= logit(t_j). A NaN never holds.
        """
        wanted, unwanted, free = self._sides
        above, below = logits >= self.boundary + self.margin, logits < self.boundary - self.margin
        return above.logical_and_(wanted).logical_or_(below.logical_and_(unwanted)).logical_or_(free)

    def hold_all(self, logits: Tensor) -> Tensor:
        """Say for which images every constraint holds, (N,); `holds(logits).all(1)`, ten times as fast."""
        return self.holds(logits).view(torch.uint8).amin(1).bool()

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """The labels that are to be present, that are to be absent, and those outside A u B, boolean, (N, L) each."""
        wanted = self.desired > 0
        return wanted, ~wanted, ~self.constrained

    @cached_property
    def _outside(self) -> Tensor:
        """-inf outside A u B, else 0, (N, L): a sum is faster than a fill."""
        return torch.zeros_like(self.truth, dtype=self.boundary.dtype).masked_fill_(~self.constrained, -torch.inf)

    def violations(self, logits: Tensor, space: Space = "logit") -> Tensor:
        """Return y'_j F'_j - c_j of Eq. 4: positive where a constraint is violated, (N, L), -inf outside A u B.

        Args:
            logits: z, (N, L).
            space: measure on the logits (their gradient does not vanish) or, as the paper does, on the probabilities.
        """
        if space == "logit":
            distance = self.desired * (self.boundary - logits) + self.margin
        else:
            edge = torch.sigmoid(self.boundary + self.desired * self.margin)
            distance = self.desired * (edge - torch.sigmoid(logits))
        return distance + self._outside

    def select(self, rows: Tensor) -> Targets:
        """Return the targets of some images of the batch."""
        return replace(self, flip=self.flip[rows], keep=self.keep[rows], truth=self.truth[rows])

    def cpu(self) -> Targets:
        """Return the targets on the CPU."""
        return Targets(self.flip.cpu(), self.keep.cpu(), self.truth.cpu(), self.boundary.cpu(), self.margin)


def present(logits: Tensor, boundary: Tensor) -> Tensor:
    """Decide which labels are present, boolean, in the shape of `logits`: z_j >= logit(t_j); a NaN is absent.

    All code that decides calls this function, or `labels.present_labels` where it has no tensors.
    """
    return logits >= boundary


def decide(logits: Tensor, boundary: Tensor) -> Tensor:
    """Return the decisions h_j as +1 / -1, (N, L), in the dtype of `logits`."""
    return torch.where(present(logits, boundary), 1.0, -1.0).to(logits.dtype)


def make_targets(
    request: Request | Sequence[Request], truth: Tensor, boundary: Tensor, *, margin: float = 0.0
) -> Targets:
    """Apply a `Request`, the same for all images or one for each, to the labels of a batch.

    A label to add that a photo has already becomes a keep constraint of that photo, and so does a label to remove
    that the photo does not have.

    Args:
        request: label numbers; `any_label` must be resolved before, see `attacks.untargeted`.
        truth: y, +1 / -1, (N, L).
        boundary: logit(t), (L,).
        margin: see `Targets`.

    Raises:
        UsageError: if the number of requests is not the number of images.
    """
    flip = torch.zeros_like(truth, dtype=torch.bool)
    keep = flip.clone()
    requests = [request] * len(truth) if isinstance(request, Request) else request
    if len(requests) != len(truth):
        raise UsageError(f"expected a request for each of {len(truth)} images, got {len(requests)}")
    for row, one in enumerate(requests):
        if one.keep_present:
            keep[row] = truth[row] > 0
            keep[row, list(one.named)] = False
        flip[row, list(one.flip)] = True
        keep[row, list(one.keep)] = True
        for labels, wanted in ((one.add, 1), (one.remove, -1)):
            columns = list(labels)
            flip[row, columns] = truth[row, columns] != wanted
            keep[row, columns] = truth[row, columns] == wanted
    return Targets(flip, keep, truth, boundary, margin)
