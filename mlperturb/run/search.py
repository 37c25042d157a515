"""The search on the device: a batch of photos is attacked, then rounded to 8 bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.goals import ClassificationGoal, Goal
from mlperturb.attacks.lattice import PIXELS, Lattice
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Meter, Opening, Problem, each_view, is_all, observe
from mlperturb.attacks.quantise import quantise
from mlperturb.attacks.untargeted import MAX_COMPARED, nearest_label
from mlperturb.labels import Request
from mlperturb.metrics import Distortion, distortion
from mlperturb.model.coefficients import JpegLattice
from mlperturb.model.ensemble import SideBySide, Victim, bind, members_of, places_of, to_columns
from mlperturb.model.preprocess import Size, pad_batch, to_tensor
from mlperturb.model.views import ViewedModel, repeat_targets
from mlperturb.photos.images import Photo, Pixels
from mlperturb.photos.jpeg import Plane
from mlperturb.photos.regions import Region
from mlperturb.run.settings import Settings
from mlperturb.system.devices import free_memory
from mlperturb.targets import Targets, decide, make_targets

_BATCH = {"cpu": (8, 4_000_000), "cuda": (64, 64_000_000), "mps": (16, 8_000_000)}  # photos, pixels
_NEEDED = 200  # bytes of memory for a padded pixel; on the CPU an attack takes 180
_ROOM = 16  # times the pixels of _BATCH, if the batch size is given: padding odd shapes to one size may need any memory

LATTICE = {"fast": (6, 20), "balanced": (8, 40), "paper": (10, 100)}  # scales and iterations of `quantise`


@dataclass(frozen=True)
class Found:
    """The result of the search for one photo, on the CPU.

    Attributes:
        pixels: the adversarial photo, 8 bits, (H, W, 3).
        planes: the coefficients of the adversarial JPEG; None where pixels are written.
        goal: the goal of the photo, without a margin, one row.
        before: logits of the photo in each reader, (R, M): M is L, or the columns of several classifiers (`Ensemble`).
        after: logits of the adversarial photo in each reader, (R, M), where the search computed them; else None.
        logits: logits of the float result in the first reader, (M,); None if the result is a lattice point.
        met: whether all constraints hold on the float result in the first reader; None if it is a lattice point.
        distortion: distortion of the float result.
        forward: forward passes spent.
        backward: backward passes spent.
        seconds: the photo's share of the time of its batch.
    """

    pixels: Pixels
    goal: Goal
    before: Tensor
    after: Tensor | None
    logits: Tensor | None
    met: bool | None
    distortion: Distortion
    forward: int
    backward: int
    seconds: float
    planes: tuple[Plane, ...] | None = None

    @property
    def targets(self) -> Targets:
        """A, B and y, one row, without a margin."""
        return self.goal.targets


def search(
    classifier: Victim,
    photos: Sequence[Photo],
    requests: Sequence[Request],
    settings: Settings,
    watch: Callable[[Meter], None] = lambda _: None,
) -> list[Found | None]:
    """Attack a batch; return None in place of a photo on which the network's outputs are not finite.

    Args:
        classifier: to attack, or several.
        photos: N photos of any sizes.
        requests: N requests.
        settings: method, budget and limits.
        watch: called with the meter of the batch, which counts on, before the attack begins.
    """
    started = time.perf_counter()
    images, sizes = pad_batch([to_tensor(photo.rgb, classifier.device) for photo in photos])
    model = bind(classifier, settings.readers, sizes, settings.survive[0])
    before, meter, opening = observe(model, images, opening=find_method(settings.method).opens)
    images, clean, opening = _encoded(model, images, (before, meter, opening), photos)
    meter.owed.add_(settings.looks)
    watch(meter)
    rows = before.isfinite().all(2).all(1).nonzero().flatten()
    found: list[Found | None] = [None] * len(photos)
    if not len(rows):
        return found
    usable = rows.tolist()
    asked, sizes = [requests[row] for row in usable], [sizes[row] for row in usable]
    chosen = [photos[row] for row in usable]
    images = images if is_all(rows, len(photos)) else images[rows]
    columns, places = len(classifier.boundary), places_of(classifier)
    truth = decide(before[rows, 0, :columns], classifier.boundary)
    limits = settings.limits
    problem = Problem(
        replace(model.select(rows), purifications=()),
        images,
        ClassificationGoal(_targets(asked, places, truth, classifier.boundary, settings.margin)),
        limit=limits.passes,
        cap=None if limits.rmsd is None else _norm_cap(limits.rmsd, sizes, images.device),
        bound=None if limits.linf is None else limits.linf / 255,
        region=_region_of(settings.region, chosen, images),
        grey=_grey_of(chosen, images.device),
        lattice=_lattice_of(settings.region, chosen, images),
        meter=meter,
        rows=rows.cpu(),
        clean=clean[rows, :, :columns],
    )
    if any(request.any_label for request in asked):
        asked = _resolve_any(problem, asked, places)
        problem = problem.aim(ClassificationGoal(_targets(asked, places, truth, classifier.boundary, settings.margin)))
    repeated = ClassificationGoal(repeat_targets(problem.targets, 1 + len(model.purifications)))
    whole = replace(
        problem,
        model=model.select(rows),
        goal=repeated,
        clean=clean[rows],
        opening=None if opening is None else opening.select(rows),
    )
    results = _search(problem, whole, sizes, settings)
    share = (time.perf_counter() - started) / len(rows)
    for row, result in zip(usable, results, strict=True):
        found[row] = _finish(result, photos[row], before[row, :, :columns].cpu(), share)
    return found


@dataclass
class Searcher:
    """Searches batches of photos; splits a batch for which the device has too little memory.

    Attributes:
        classifier: to attack, or several.
        settings: what to do.
        warn: called once if the device runs out of memory and the search goes on with smaller batches.
        watch: called with the meter of each batch, see `search`.
        most: largest number of photos for which the memory is enough; None while it was enough for every batch.
    """

    classifier: Victim
    settings: Settings
    warn: Callable[[str], None] = lambda _: None
    watch: Callable[[Meter], None] = lambda _: None
    most: int | None = None

    @property
    def together(self) -> int:
        """The largest number of photos in a batch."""
        return self.settings.batch_size or _BATCH.get(self.classifier.device.type, _BATCH["cpu"])[0]

    @property
    def pixels(self) -> int:
        """The largest number of pixels in a batch, every photo padded to the largest."""
        pixels = _BATCH.get(self.classifier.device.type, _BATCH["cpu"])[1]
        return pixels * (_ROOM if self.settings.batch_size else 1)

    def group(self, sizes: Sequence[Size]) -> Iterator[tuple[int, int]]:
        """Yield the (start, stop) of each batch, in order, for photos of these (height, width)."""
        start = 0
        for stop in range(1, len(sizes) + 1):
            full = stop - start >= self.together
            if stop == len(sizes) or full or not fits(sizes[start : stop + 1], self.pixels):
                yield start, stop
                start = stop

    def parts(
        self, photos: Sequence[Photo], requests: Sequence[Request]
    ) -> Iterator[tuple[int, int, list[Found | None] | None]]:
        """Search a batch; yield the start, stop and results of each part.

        The results are None for a part of one photo for which the device has too little memory.
        """
        start = 0
        while start < len(photos):
            stop = min(start + (self.most or len(photos)), len(photos))
            found = self._search(photos[start:stop], requests[start:stop])
            if found is None and stop - start > 1:
                if self.most is None:
                    self.warn("the device ran out of memory: going on with smaller batches")
                self.most = (stop - start + 1) // 2
                continue
            yield start, stop, found
            start = stop

    def _search(self, photos: Sequence[Photo], requests: Sequence[Request]) -> list[Found | None] | None:
        """Attack some photos; return None if the device has too little memory."""
        heights, widths = zip(*(photo.rgb.shape[:2] for photo in photos), strict=True)
        free = free_memory(self.classifier.device)
        needed = _NEEDED * len(members_of(self.classifier))
        if free is not None and len(photos) * max(heights) * max(widths) * needed > free:
            return None  # on the CPU, Linux would kill the process
        try:
            return search(self.classifier, photos, requests, self.settings, self.watch)
        except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
                raise
            if self.classifier.device.type == "cuda":
                torch.cuda.empty_cache()
            return None


def fits(sizes: Sequence[Size], pixels: float) -> bool:
    """Say whether photos of these (height, width), padded to the largest, have at most so many pixels."""
    heights, widths = zip(*sizes, strict=True)
    return len(sizes) == 1 or len(sizes) * max(heights) * max(widths) <= pixels


def _finish(found: Found, photo: Photo, before: Tensor, seconds: float) -> Found:
    """Return a result with what the search did not know: it saw a photo that becomes a JPEG as that JPEG."""
    found = replace(found, before=before, seconds=seconds)
    if photo.encoded is None:
        return found
    moved = torch.from_numpy(found.pixels.astype(np.int16) - photo.rgb)
    return replace(found, distortion=distortion(moved))


def _encoded(
    model: ViewedModel | SideBySide,
    images: Tensor,
    observed: tuple[Tensor, Meter, Opening | None],
    photos: Sequence[Photo],
) -> tuple[Tensor, Tensor, Opening | None]:
    """Return the photos as their files hold them before the attack, their logits and opening, counted by the meter."""
    before, meter, opening = observed
    if all(photo.encoded is None for photo in photos):
        return images, before, opening
    images = images.clone()
    for row, photo in enumerate(photos):
        if photo.encoded is not None:
            height, width = photo.encoded.shape[:2]
            images[row, :, :height, :width] = to_tensor(photo.encoded, images.device)
    clean, again, opening = observe(model, images, opening=opening is not None)
    meter.forward.add_(again.forward)
    return images, clean, opening


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


def _search(problem: Problem, whole: Problem, sizes: Sequence[Size], settings: Settings) -> list[Found]:
    """Attack the photos that are not as asked already; no image spends more than the limit of passes.

    Args:
        problem: the photos themselves, in every reader.
        whole: the same problem with the compressions to survive, whose constraints are repeated.
        sizes: (height, width) of the photos.
        settings: see `search`.
    """
    bare = whole.goal.aimed_at(replace(whole.targets, margin=0.0))
    asked = each_view(bare.met, whole.look_at_clean()).all(1) & ~problem.targets.flip.any(1)
    rows = (~asked).nonzero().flatten()
    images, outcome, logits, seen = problem.images.clone(), None, None, None
    if len(rows):
        outcome, file, logits = _attack(whole.select(rows), settings)
        images[rows], seen = file.images, file.logits
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    targets = replace(problem.targets, margin=0.0).cpu()
    goal = problem.goal if outcome is None else outcome.goal
    place = {row: number for number, row in enumerate(rows.tolist())}
    found = []
    for row, (height, width) in enumerate(sizes):
        number = place.get(row)
        exact = problem.images[row] if outcome is None or number is None else outcome.images[number]
        one = targets.select(torch.tensor([row]))
        known = None if logits is None or number is None else logits[number, : one.truth.shape[1]].cpu()
        shown = pixels[row, :height, :width]
        found.append(
            Found(
                shown,
                goal.aimed_at(one),
                problem.look_at_clean()[row].cpu(),
                None if seen is None or number is None else _finite(seen[number, :, : one.truth.shape[1]].cpu()),
                known,
                None if known is None else bool(one.holds(known[None]).all()),
                distortion((exact * 255 - problem.images[row] * 255)[:, :height, :width]),
                int(problem.meter.forward[problem.rows[row]]),
                int(problem.meter.backward[problem.rows[row]]),
                0.0,
                problem.lattice.planes(row, shown) if isinstance(problem.lattice, JpegLattice) else None,
            )
        )
    return found


def _finite(logits: Tensor) -> Tensor | None:
    """Return logits; None if one is not finite, as where the search did not compute them."""
    return logits if bool(logits.isfinite().all()) else None


def _attack(problem: Problem, settings: Settings) -> tuple[Outcome, Outcome, Tensor | None]:
    """Attack a batch, then bring it to 8 bits.

    Returns:
        The attack's own outcome; the outcome on the 8-bit lattice; the logits of the attack's own outcome,
        (n, (1 + Q) L), in the first view, None if it is a lattice point.
    """
    method = find_method(settings.method)
    tuning = method.tuning(settings.budget, **settings.options)
    scales, iterations = LATTICE[settings.budget]
    if method.writes_lattice(tuning):
        outcome = method.load()(problem, **tuning)
        return outcome, outcome, None
    short = problem
    if problem.limit is not None:  # some passes are kept for the 8-bit search, and a call for the float result
        reserved = min(problem.cost * (scales + 2 * iterations + 1), problem.limit // 3)
        short = replace(problem, limit=problem.limit - problem.cost - reserved)
    outcome = method.load()(short, **tuning)
    with torch.no_grad():
        logits = problem.logits(outcome.images)
    return outcome, quantise(problem, outcome, scales=scales, iterations=iterations), logits


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
