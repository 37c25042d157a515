"""The problem of a batch: the photos are padded, looked at, and given to an attack with the requests for labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlperturb.attacks.geometry import is_all
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.lattice import PIXELS, Lattice
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Meter, Opening, Problem, observe
from mlperturb.attacks.untargeted import MAX_COMPARED, nearest_label
from mlperturb.labels import Request
from mlperturb.model.coefficients import JpegLattice
from mlperturb.model.ensemble import SideBySide, Victim, bind, places_of, to_columns
from mlperturb.model.preprocess import Size, pad_batch, to_tensor
from mlperturb.model.views import ViewedModel, repeat_targets
from mlperturb.photos.images import Photo
from mlperturb.photos.regions import Region
from mlperturb.run.settings import Settings
from mlperturb.targets import Targets, decide, make_targets


@dataclass(frozen=True)
class Observed:
    """A padded batch of N photos, and the classifier's logits of them before the attack.

    Attributes:
        model: the classifier, or several, for these photos, with the compressions to survive.
        images: the photos as their files hold them before the attack, (N, 3, H, W).
        sizes: their (height, width).
        before: logits of the photos themselves in each reader, (N, R, (1 + Q) M), with Q compressions.
        clean: logits of `images`, (N, R, (1 + Q) M): those of `before` but for photos that become JPEGs.
        meter: the passes of all photos of the batch.
        rows: the places of the photos in the batch, (N,).
        opening: the forward pass at `images`, if the method begins with its backward pass.
    """

    model: ViewedModel | SideBySide
    images: Tensor
    sizes: Sequence[Size]
    before: Tensor
    clean: Tensor
    meter: Meter
    rows: Tensor
    opening: Opening | None

    def select(self, rows: Tensor) -> Observed:
        """Return some of the photos."""
        return Observed(
            self.model.select(rows),
            self.images if is_all(rows, len(self.images)) else self.images[rows],
            [self.sizes[row] for row in rows.tolist()],
            self.before[rows],
            self.clean[rows],
            self.meter,
            self.rows[rows],
            None if self.opening is None else self.opening.select(rows),
        )


def observe_photos(classifier: Victim, photos: Sequence[Photo], settings: Settings) -> Observed:
    """Pad photos to one size, and look at them in every reader."""
    images, sizes = pad_batch([to_tensor(photo.rgb, classifier.device) for photo in photos])
    model = bind(classifier, settings.readers, sizes, settings.survive[0])
    before, meter, opening = observe(model, images, opening=find_method(settings.method).opens)
    clean, rows = before, torch.arange(len(photos), device=images.device)
    if any(photo.encoded is not None for photo in photos):
        images = images.clone()
        for row, photo in enumerate(photos):
            if photo.encoded is not None:
                height, width = photo.encoded.shape[:2]
                images[row, :, :height, :width] = to_tensor(photo.encoded, images.device)
        clean, again, opening = observe(model, images, opening=opening is not None)
        meter.forward.add_(again.forward)
    return Observed(model, images, sizes, before, clean, meter, rows, opening)


def pose(
    classifier: Victim, seen: Observed, photos: Sequence[Photo], requests: Sequence[Request], settings: Settings
) -> tuple[Problem, Problem]:
    """Return the problem of the photos in every reader, and the same problem with the compressions to survive.

    In the second problem the constraints are repeated for each compression. The search for the label that `any` stands
    for spends passes on the first problem.

    Args:
        classifier: to attack, or several.
        seen: N photos on which all logits are finite.
        photos: the same photos.
        requests: N requests.
        settings: method, limits, margin and region.
    """
    columns, places, limits = len(classifier.boundary), places_of(classifier), settings.limits
    truth = decide(seen.before[:, 0, :columns], classifier.boundary)

    def goal(asked: Sequence[Request]) -> ClassificationGoal:
        return ClassificationGoal(_targets(asked, places, truth, classifier.boundary, settings.margin))

    problem = Problem(
        replace(seen.model, purifications=()),
        seen.images,
        goal(requests),
        limit=limits.passes,
        cap=None if limits.rmsd is None else _norm_cap(limits.rmsd, seen.sizes, seen.images.device),
        bound=None if limits.linf is None else limits.linf / 255,
        region=_region_of(settings.region, photos, seen.images),
        grey=_grey_of(photos, seen.images.device),
        lattice=_lattice_of(settings.region, photos, seen.images),
        meter=seen.meter,
        rows=seen.rows.cpu(),
        clean=seen.clean[:, :, :columns],
    )
    if any(request.any_label for request in requests):
        problem = problem.aim(goal(_resolve_any(problem, requests, places)))
    repeated = ClassificationGoal(repeat_targets(problem.targets, 1 + len(seen.model.purifications)))
    return problem, replace(problem, model=seen.model, goal=repeated, clean=seen.clean, opening=seen.opening)


def _lattice_of(region: Region | None, photos: Sequence[Photo], images: Tensor) -> Lattice:
    """Return the lattice of a padded batch, (N, 3, H, W): coefficients for the photos that become JPEGs."""
    if all(photo.jpeg is None for photo in photos):
        return PIXELS
    regions = [None if region is None else region.inside(*photo.rgb.shape[:2]) for photo in photos]
    size = int(images.shape[2]), int(images.shape[3])
    return JpegLattice([photo.jpeg for photo in photos], size, images.device, regions)


def _norm_cap(rmsd: float, sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Return the L2 norm, in [0, 1] units, that an RMSD on the 0-255 scale is at each size, (N,)."""
    return torch.tensor([rmsd / 255 * (3 * height * width) ** 0.5 for height, width in sizes], device=device)


def _region_of(region: Region | None, photos: Sequence[Photo], images: Tensor) -> Tensor | None:
    """Return the pixels of a padded batch, (N, 3, H, W), that may change, (N, 1, H, W); None for all.

    Pixels under full transparency never change.
    """
    if region is None and all(photo.changeable is None for photo in photos):
        return None
    allowed = torch.zeros_like(images[:, :1])
    for row, photo in enumerate(photos):
        height, width = photo.rgb.shape[:2]
        inside = np.ones((height, width), dtype=np.bool_) if region is None else region.inside(height, width)
        if photo.changeable is not None:
            inside = inside & photo.changeable
        allowed[row, 0, :height, :width] = torch.from_numpy(inside).to(allowed)
    return allowed


def _grey_of(photos: Sequence[Photo], device: torch.device) -> Tensor | None:
    """Return which photos have a single channel of colour, boolean, (N,); None if no photo has."""
    grey = torch.tensor([photo.grey for photo in photos], device=device)
    return grey if bool(grey.any()) else None


def _targets(
    requests: Sequence[Request], places: Sequence[tuple[int, ...]], truth: Tensor, boundary: Tensor, margin: float
) -> Targets:
    """Apply requests for labels to the columns of a batch, see `to_columns`."""
    if len(boundary) == len(places):  # a column for each label, in their order
        return make_targets(requests, truth, boundary, margin=margin)
    asked = [to_columns(request, places, row) for request, row in zip(requests, truth.cpu(), strict=True)]
    return make_targets(asked, truth, boundary, margin=margin)


def _resolve_any(problem: Problem, requests: Sequence[Request], places: Sequence[tuple[int, ...]]) -> list[Request]:
    """Return the requests with the label nearest to its threshold in place of `any`.

    Of several classifiers, it is a label that most of them have, and the first of these decides which is the nearest.
    """
    most = max(map(len, places))
    labels = {columns[0]: label for label, columns in enumerate(places) if len(columns) == most}
    candidates = torch.zeros_like(problem.targets.flip)
    for row, request in enumerate(requests):
        named = {*request.keep, *request.add, *request.remove}
        candidates[row, [column for column, label in labels.items() if label not in named]] = request.any_label
    candidates &= ~problem.targets.keep  # the labels that are present, where those are kept
    spare = MAX_COMPARED if problem.limit is None else problem.limit // (3 * problem.cost)
    nearest = nearest_label(problem, candidates, compared=min(spare, MAX_COMPARED))
    resolved = []
    for request, chosen in zip(requests, nearest.cpu(), strict=True):
        flip = (*request.flip, *(labels[column] for column in chosen.nonzero().flatten().tolist()))
        named = {*flip, *request.add, *request.remove}
        keep = tuple(label for label in range(len(places)) if label not in named) if request.keep_rest else request.keep
        resolved.append(replace(request, flip=flip, keep=keep, any_label=False))
    return resolved
