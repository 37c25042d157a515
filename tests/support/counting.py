"""A model that counts its own passes, apart from the `Meter`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from mlperturb.model.protocol import Model, Viewed


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(context, logits, owner):
        context.owner = owner
        return logits.clone()

    @staticmethod
    def backward(context, gradient):
        owner = context.owner
        owner.tally.backward[owner.rows] += 1
        owner.tally.used[owner.rows] += (gradient != 0).any(1).long()
        return gradient, None


@dataclass
class Tally:
    """The passes of a counting model.

    Attributes:
        forward: forward passes of each image.
        backward: backward passes that each image was part of.
        used: backward passes in which the image had a gradient of its own.
        batches: the sizes of the batches.
    """

    forward: Tensor
    backward: Tensor
    used: Tensor
    batches: list[int] = field(default_factory=list)


def _start_tally(count: int) -> Tally:
    forward, backward, used = torch.zeros(3, count, dtype=torch.long)
    return Tally(forward, backward, used)


class Counting:
    """A model, of one view or several, that counts the passes of each image of a batch."""

    def __init__(self, model: Model | Viewed, rows: int | Tensor, tally: Tally | None = None) -> None:
        self.model = model
        self.rows = torch.arange(rows) if isinstance(rows, int) else rows
        self.tally = tally or _start_tally(len(self.rows))

    @property
    def views(self) -> int:
        """The number of views of the model."""
        return int(getattr(self.model, "views", 1))

    def __call__(self, images: Tensor, view: int = 0) -> Tensor:
        return self._count(images, self.model(images) if self.views == 1 else cast(Viewed, self.model)(images, view))

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        return self._count(images, cast(Viewed, self.model).look(images, views))

    def _count(self, images: Tensor, logits: Tensor) -> Tensor:
        assert len(images) == len(self.rows), "the model was not narrowed to the images it is called with"
        self.tally.forward[self.rows] += 1
        self.tally.batches.append(len(images))
        return _Count.apply(logits, self)

    def select(self, rows: Tensor) -> Counting:
        return Counting(self.model, self.rows[rows], self.tally)
