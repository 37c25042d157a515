"""Several classifiers that one file must fool: their logits lie side by side, and each has readers of its own.

A column is a logit of one classifier, so that a label that two classifiers have has two columns. View v is a reader; a
classifier that does not have this reader reads by the first of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from mlperturb.errors import UsageError
from mlperturb.labels import Request, join_categories
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Size
from mlperturb.model.readers import Reader, parse_reader, parse_readers
from mlperturb.model.survival import compress
from mlperturb.model.views import ViewedModel, read_logits
from mlperturb.photos.images import Pixels
from mlperturb.photos.purify import Purification


class Ensemble:
    """Several classifiers that one file must fool.

    Labels are matched by name. A label that a member lacks constrains only the members that have it; a label of A is
    flipped to the reverse of the decision of the first member that has it.

    Args:
        members: the classifiers by name; at least two, on one device.
        readers: names of readers, for all members; empty for each member's own.

    Attributes:
        members: as given.
        readers: for each member, the names of its readers.
        labels: every label that a member has, L names: those of the first member, then those that each next one adds.
        thresholds: of each label, that of the first member that has it.
        categories: of the labels, those of the first member that has each; empty text where it has none.
        alpha: the colour that a transparent photo is laid over, see `Preprocess`.
        places: for each label, its columns, in the order of the members that have it.
        boundary: logit(t) of every column, (M,).

    Raises:
        UsageError: if there are fewer than two members, on different devices, or with different colours `alpha`.
    """

    def __init__(self, members: Mapping[str, Classifier], readers: Sequence[str] = ()) -> None:
        self.members = dict(members)
        if len(self.members) < 2:
            raise UsageError(f"expected at least two classifiers, got {len(self.members)}")
        if len({one.device for one in self.members.values()}) > 1:
            raise UsageError("expected classifiers on one device, got several devices")
        colours = {one.preprocess.alpha for one in self.members.values()}
        if len(colours) > 1:
            raise UsageError("expected classifiers that lay a transparent photo over the same colour, got several")
        self.alpha = colours.pop()
        named = [parse_readers(readers or one.preprocess.readers) for one in self.members.values()]
        self.readers = tuple(tuple(reader.name for reader in own) for own in named)
        places: dict[str, list[int]] = {}
        thresholds: dict[str, float] = {}
        names = [label for one in self.members.values() for label in one.labels]
        for column, label in enumerate(names):
            places.setdefault(label, []).append(column)
        for one in self.members.values():
            thresholds = dict(zip(one.labels, one.thresholds, strict=True)) | thresholds
        self.labels = tuple(places)
        self.places = tuple(map(tuple, places.values()))
        self.thresholds = tuple(thresholds[label] for label in self.labels)
        self.categories = join_categories(self.labels, [(one.labels, one.categories) for one in self.members.values()])
        self.boundary = torch.cat([one.boundary for one in self.members.values()])

    @property
    def device(self) -> torch.device:
        """The device of the classifiers."""
        return self.boundary.device

    @property
    def every_reader(self) -> tuple[str, ...]:
        """The names of all readers, in the order in which members name them."""
        return tuple(dict.fromkeys(name for names in self.readers for name in names))

    def reader_of(self, number: int, reader: Reader) -> Reader:
        """Return the reader of member `number` in the view of `reader`: that reader, or the member's own first."""
        own = self.readers[number]
        return reader if reader.name in own else parse_reader(own[0])

    def columns(self) -> list[slice]:
        """Return the columns of each member."""
        ends = torch.tensor([0, *(len(one.labels) for one in self.members.values())]).cumsum(0).tolist()
        return [slice(start, stop) for start, stop in pairwise(ends)]


Victim: TypeAlias = Classifier | Ensemble


def members_of(victim: Victim) -> list[Classifier]:
    """Return the classifiers that a file must fool."""
    return [victim] if isinstance(victim, Classifier) else list(victim.members.values())


def places_of(victim: Victim) -> Sequence[tuple[int, ...]]:
    """Return for each label its columns, in the order of the classifiers that have it."""
    return [(number,) for number in range(len(victim.labels))] if isinstance(victim, Classifier) else victim.places


def alpha_of(victim: Victim) -> tuple[int, int, int] | None:
    """Return the colour that a transparent photo is laid over; None for no colour."""
    return victim.preprocess.alpha if isinstance(victim, Classifier) else victim.alpha


def check_size(victim: Victim, size: Size) -> None:
    """Check that a photo of this (height, width) can be read.

    Raises:
        ImageError: if a classifier cannot resize it.
    """
    for one in members_of(victim):
        one.preprocess.check(size)


def read_columns(victim: Victim, rgb: Pixels, reader: Reader) -> Tensor:
    """Return the logits of one photo, 8-bit pixels (H, W, 3), in the view of a reader; (1, M), on the CPU."""
    if isinstance(victim, Classifier):
        return read_logits(victim, rgb, reader)
    parts = [
        read_logits(one, rgb, victim.reader_of(number, reader)) for number, one in enumerate(victim.members.values())
    ]
    return torch.cat(parts, dim=1)


def to_columns(request: Request, places: Sequence[tuple[int, ...]], truth: Tensor) -> Request:
    """Return a request for labels as a request for columns.

    A label is flipped to the reverse of the decision of the first classifier that has it. Where another classifier has
    that decision already, its column is kept.

    Args:
        request: numbers of labels.
        places: for each label, its columns.
        truth: the decisions on the photo, +1 / -1, (M,).
    """
    add, remove = ([column for label in labels for column in places[label]] for labels in (request.add, request.remove))
    for label in request.flip:
        first, *others = places[label]
        (remove if float(truth[first]) > 0 else add).extend(others)
    return replace(
        request,
        flip=tuple(places[label][0] for label in request.flip),
        keep=tuple(column for label in request.keep for column in places[label]),
        add=tuple(add),
        remove=tuple(remove),
    )


@dataclass(frozen=True)
class SideBySide:
    """The classifiers of an ensemble, of a batch, in V views; see `mlperturb.model.views.ViewedModel`.

    Attributes:
        models: each member of the batch, in V views, without compressions.
        purifications: Q compressions.
    """

    models: tuple[ViewedModel, ...]
    purifications: tuple[Purification, ...] = ()

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(height, width) of the photos."""
        return self.models[0].sizes

    @property
    def views(self) -> int:
        """The number of views, V."""
        return self.models[0].views

    @property
    def networks(self) -> int:
        """How many networks see a photo in a view."""
        return len(self.models)

    @property
    def passes(self) -> int:
        """Passes of networks for one call."""
        return len(self.models) * (1 + len(self.purifications))

    def __call__(self, images: Tensor, view: int = 0) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to logits in one view, (N, (1 + Q) M)."""
        return self._logits(images, lambda model, seen: model(seen, view))

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        """Map photos to logits, (N, (1 + Q) M), each photo in its own view, (N,)."""
        return self._logits(images, lambda model, seen: model.look(seen, views))

    def select(self, rows: Tensor) -> SideBySide:
        """Return the model of some photos of the batch."""
        return SideBySide(tuple(model.select(rows) for model in self.models), self.purifications)

    def _logits(self, images: Tensor, call: Callable[[ViewedModel, Tensor], Tensor]) -> Tensor:
        seen = [images, *(compress(images, self.sizes, one) for one in self.purifications)]
        return torch.cat([call(model, one) for one in seen for model in self.models], dim=1)


def bind(
    victim: Victim, readers: Iterable[Reader], sizes: Sequence[Size], purifications: Sequence[Purification] = ()
) -> ViewedModel | SideBySide:
    """Return the model of a batch of photos of these (height, width), in a view for each reader."""
    if isinstance(victim, Classifier):
        return ViewedModel.bind(victim, readers, sizes, purifications)
    chosen = list(readers)
    models = [
        ViewedModel.bind(one, [victim.reader_of(number, reader) for reader in chosen], sizes)
        for number, one in enumerate(victim.members.values())
    ]
    return SideBySide(tuple(models), tuple(purifications))
