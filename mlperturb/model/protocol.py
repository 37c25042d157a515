"""The interface of a model for the attacks: photos in [0, 1] to logits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Model(Protocol):
    """A function from images in [0, 1], (N, 3, H, W), to logits, (N, L).

    If the logits depend on the place of an image in the batch (as in a batch of mixed photo sizes), the model has a
    method `select(rows)` that returns the model of these images. A call costs one pass for each image, or the number
    of passes in the model's attribute `passes`.
    """

    def __call__(self, images: Tensor, /) -> Tensor:
        """Return the logits."""
        ...


def narrow(model: Model, rows: Tensor) -> Model:
    """Return the model of some images of the batch: the model itself, unless it has a method `select`."""
    narrower = getattr(model, "select", None)
    narrowed: Model = narrower(rows) if narrower else model
    return narrowed
