"""The shape of a model as an attack sees it: photos in [0, 1] to logits."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Model(Protocol):
    """Images in [0, 1], (N, 3, H, W), to logits, (N, L).

    A model whose answer depends on the place of an image in the batch (as that of a batch of mixed photo sizes does)
    has a method `select(rows)` that returns the model of some images. A call costs a pass for each image, or as many
    passes as the model's attribute `passes` says.
    """

    def __call__(self, images: Tensor, /) -> Tensor:
        """Return the logits."""
        ...


def narrow(model: Model, rows: Tensor) -> Model:
    """Return the model of some images of the batch: the model itself, unless it has a method `select`."""
    narrower = getattr(model, "select", None)
    narrowed: Model = narrower(rows) if narrower else model
    return narrowed
