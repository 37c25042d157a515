"""The interface of a model for the attacks: photos in [0, 1] to logits."""

from __future__ import annotations

from typing import Any, Protocol

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


class Viewed(Model, Protocol):
    """A model of several views of each image; what holds must hold in all of them, see `mlperturb.model.views`.

    A call gives the logits of one view.
    """

    @property
    def views(self) -> int:
        """How many views there are."""
        ...

    def __call__(self, images: Tensor, /, view: int = 0) -> Tensor:
        """Return the logits of one view, (N, L)."""
        ...

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        """Return the logits of each image in a view of its own, (N,); (N, L)."""
        ...


class Readable(Viewed, Protocol):
    """A model that can stop at the network's input, which is far smaller than a large photo."""

    def read(self, images: Tensor, views: Tensor | None) -> Tensor:
        """Return the network's input before it is normalised, (N, 3, h, w), in [0, 1], without a gradient.

        Args:
            images: (N, 3, H, W), in [0, 1] or 8-bit pixels.
            views: the view of each image, (N,); None for the first.
        """
        ...

    def resize(self, images: Tensor) -> Tensor:
        """Return what `read` gives of images in [0, 1] in the first view, differentiable."""
        ...

    def span(self, images: Tensor) -> Any:
        """Return a lattice for the images, in coordinates of the network's input; None if it does not serve them."""
        ...

    def judge(self, resized: Tensor) -> Tensor:
        """Return the logits, (N, L), of what `read` gave."""
        ...


def narrow(model: Model | Viewed, rows: Tensor) -> Model | Viewed:
    """Return the model of some images of the batch: the model itself, unless it has a method `select`."""
    narrower = getattr(model, "select", None)
    narrowed: Model | Viewed = narrower(rows) if narrower else model
    return narrowed
