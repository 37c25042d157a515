"""Views: the ways in which programs see a photo. A result must hold in all of them.

A view is a reader (how a program turns pixels into network input), and before it, perhaps, a compression that the photo
goes through on its way. `ViewedModel` answers for each view; a pass of the network is one view of one image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlperturb.model.classifier import Classifier
from mlperturb.model.engines import BoundReader
from mlperturb.model.preprocess import Resizer, Size, to_tensor
from mlperturb.model.readers import Reader
from mlperturb.model.survival import compress
from mlperturb.photos.images import Pixels
from mlperturb.photos.purify import Purification


@dataclass(frozen=True)
class View:
    """One way in which a program sees a photo.

    Attributes:
        reader: how the program turns pixels into network input.
        purification: what the photo goes through before; None for the photo as it is.
    """

    reader: Reader
    purification: Purification | None = None


def make_views(readers: Iterable[Reader], purifications: Iterable[Purification] = ()) -> tuple[View, ...]:
    """Return every reader's view of the photo itself, then of each purified photo."""
    readers = tuple(readers)
    return tuple(View(reader, one) for one in (None, *purifications) for reader in readers)


@torch.no_grad()
def read_logits(classifier: Classifier, rgb: Pixels, reader: Reader) -> Tensor:
    """Return the logits of one photo, 8-bit pixels (H, W, 3), as a reader reads it; (1, L), on the CPU."""
    size = (rgb.shape[0], rgb.shape[1])
    prepare = reader.bind(classifier.preprocess, [size], classifier.device, classifier.boundary.dtype)
    logits: Tensor = classifier.network_logits(prepare(to_tensor(rgb, classifier.device)[None]))
    return logits.cpu()


@dataclass(frozen=True)
class ViewedModel:
    """A classifier of a batch, in several views.

    Attributes:
        classifier: whose network all views share.
        sizes: (height, width) of the photos.
        maps: from padded photos in [0, 1], (N, 3, H, W), to network input, of each view.
        purifications: what the photos go through before, of each view.
    """

    classifier: Classifier
    sizes: tuple[Size, ...]
    maps: tuple[Resizer | BoundReader, ...]
    purifications: tuple[Purification | None, ...]

    @classmethod
    def bind(cls, classifier: Classifier, views: Sequence[View], sizes: Sequence[Size]) -> ViewedModel:
        """Return the model of a batch of photos of these (height, width)."""
        device, dtype = classifier.device, classifier.boundary.dtype
        made = {view.reader: view.reader.bind(classifier.preprocess, sizes, device, dtype) for view in views}
        maps = tuple(made[view.reader] for view in views)
        return cls(classifier, tuple(sizes), maps, tuple(view.purification for view in views))

    @property
    def views(self) -> int:
        """How many views there are."""
        return len(self.maps)

    def __call__(self, images: Tensor, view: int = 0) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to the logits of one view, (N, L)."""
        return self.classifier.network_logits(self._prepare(images, view))

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        """Map photos to logits, (N, L), each photo in a view of its own, (N,), in one call of the network."""
        inputs: Tensor | None = None
        for view in sorted(set(views.tolist())):
            rows = (views == view).nonzero().flatten()
            seen = self.select(rows)._prepare(images[rows], view)
            if inputs is None:
                inputs = seen.new_empty(len(images), *seen.shape[1:])
            inputs[rows] = seen
        assert inputs is not None
        return self.classifier.network_logits(inputs)

    def select(self, rows: Tensor) -> ViewedModel:
        """Return the model of some photos of the batch."""
        made = {id(one): one.select(rows) for one in self.maps}
        maps = tuple(made[id(one)] for one in self.maps)
        return ViewedModel(self.classifier, tuple(self.sizes[row] for row in rows.tolist()), maps, self.purifications)

    def _prepare(self, images: Tensor, view: int) -> Tensor:
        """Return network input, (N, 3, h, w)."""
        purification = self.purifications[view]
        if purification is not None:
            images = compress(images, self.sizes, purification)
        return self.maps[view](images)
