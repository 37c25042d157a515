"""Views: each view is the photo as one reader reads it; a result must hold in all of them.

A photo may go through a compression before it is read, and a compressed photo is opened by the same programs. So a call
of `ViewedModel` gives the logits of the photo itself and of each compressed photo, all in one view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlperturb.model.classifier import Classifier
from mlperturb.model.engines import BoundReader
from mlperturb.model.linear import mix, stand_in
from mlperturb.model.preprocess import Resizer, Size, to_tensor
from mlperturb.model.readers import Reader
from mlperturb.model.span import SpanLattice, span_of
from mlperturb.model.survival import compress
from mlperturb.photos.images import Pixels
from mlperturb.photos.purify import Purification
from mlperturb.targets import Targets


@torch.no_grad()
def read_logits(classifier: Classifier, rgb: Pixels, reader: Reader) -> Tensor:
    """Return the logits of one photo, 8-bit pixels (H, W, 3), as a reader reads it; (1, L), on the CPU."""
    size = (rgb.shape[0], rgb.shape[1])
    prepare = reader.bind(classifier.preprocess, [size], classifier.device, classifier.boundary.dtype)
    logits: Tensor = classifier.network_logits(prepare(to_tensor(rgb, classifier.device)[None]))
    return logits.cpu()


@dataclass(frozen=True)
class ViewedModel:
    """A classifier of a batch, in V views, that sees each photo as it is and after each of Q compressions.

    Attributes:
        classifier: the classifier; all views share its network.
        sizes: (height, width) of the photos.
        maps: for each view, the map from padded photos in [0, 1], (N, 3, H, W), to network input.
        purifications: Q compressions.
    """

    classifier: Classifier
    sizes: tuple[Size, ...]
    maps: tuple[Resizer | BoundReader, ...]
    purifications: tuple[Purification, ...] = ()

    @classmethod
    def bind(
        cls,
        classifier: Classifier,
        readers: Iterable[Reader],
        sizes: Sequence[Size],
        purifications: Iterable[Purification] = (),
    ) -> ViewedModel:
        """Return the model of a batch of photos of these (height, width)."""
        device, dtype = classifier.device, classifier.boundary.dtype
        maps = tuple(reader.bind(classifier.preprocess, sizes, device, dtype) for reader in readers)
        return cls(classifier, tuple(sizes), maps, tuple(purifications))

    @property
    def views(self) -> int:
        """The number of views, V."""
        return len(self.maps)

    @property
    def passes(self) -> int:
        """Passes of the network for one call, 1 + Q."""
        return 1 + len(self.purifications)

    def __call__(self, images: Tensor, view: int = 0) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to logits in one view, (N, (1 + Q) L)."""
        return self._logits(images, lambda seen: self.maps[view](seen))

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        """Map photos to logits, (N, (1 + Q) L), each photo in its own view, (N,)."""
        return self._logits(images, lambda seen: read_each(self.maps, seen, views))

    @torch.no_grad()
    def read(self, images: Tensor, views: Tensor | None) -> Tensor:
        """Return the network's input before it is normalised, see `protocol.Readable`; of the photos as they are."""
        if views is None:
            return self.maps[0].read(images)
        return _read_parts(self.maps, images, views)

    def resize(self, images: Tensor) -> Tensor:
        """Return what `read` gives of images in [0, 1] in the first view, differentiable."""
        return self.maps[0].resize(images)

    def judge(self, resized: Tensor) -> Tensor:
        """Return the logits, (N, L), of what `read` gave."""
        return self.classifier.network_logits(_resizer_of(self.maps[0]).normalise(resized))

    def span(self, images: Tensor) -> SpanLattice | None:
        """Return the lattice of large photos, (N, 3, H, W), in coordinates of the network's input; else None."""
        return span_of([_resizer_of(one).linear for one in self.maps], self.sizes, images)

    def select(self, rows: Tensor) -> ViewedModel:
        """Return the model of some photos of the batch."""
        sizes = tuple(self.sizes[row] for row in rows.tolist())
        return ViewedModel(self.classifier, sizes, tuple(one.select(rows) for one in self.maps), self.purifications)

    def _logits(self, images: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits of the photos, then of each compression of the photos, (N, (1 + Q) L)."""
        seen = [images, *(compress(images, self.sizes, one) for one in self.purifications)]
        return torch.cat([self.classifier.network_logits(prepare(one)) for one in seen], dim=1)


def read_each(maps: Sequence[Resizer | BoundReader], images: Tensor, views: Tensor) -> Tensor:
    """Map padded photos, (N, 3, H, W), to network input, (N, 3, h, w), each by the map of its own view, (N,)."""
    used = sorted(set(views.tolist()))
    if len(used) == 1:
        inputs: Tensor = maps[used[0]](images)
        return inputs
    whole = _read_parts(maps, images.detach(), views)
    resizers = [_resizer_of(one) for one in maps]
    linear = mix([one.linear for one in resizers], views)
    return resizers[0].normalise(stand_in(images, whole, linear))


def _resizer_of(one: Resizer | BoundReader) -> Resizer:
    """Return the linear map of a view, with the mean and std."""
    return one if isinstance(one, Resizer) else one.resizer


def _read_parts(maps: Sequence[Resizer | BoundReader], images: Tensor, views: Tensor) -> Tensor:
    """Return photos, (N, 3, H, W), resized by the map of their own view, (N,), without a gradient, (N, 3, h, w)."""
    used = sorted(set(views.tolist()))
    if len(used) == 1:
        whole: Tensor = maps[used[0]].read(images)
        return whole
    parts = [(views == view).nonzero().flatten() for view in used]
    resized: list[Tensor] = [maps[view].select(rows).read(images[rows]) for view, rows in zip(used, parts, strict=True)]
    return torch.cat(resized)[torch.cat(parts).argsort()]


def repeat_targets(targets: Targets, times: int) -> Targets:
    """Repeat the targets of the photo for every compression: (N, L) becomes (N, times L)."""
    flip, keep, truth = (mask.repeat(1, times) for mask in (targets.flip, targets.keep, targets.truth))
    return replace(targets, flip=flip, keep=keep, truth=truth, boundary=targets.boundary.repeat(times))
