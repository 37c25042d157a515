"""The search on the device: a batch of photos is attacked, then rounded to 8 bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.goals import Goal
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Meter, Problem, each_view
from mlperturb.attacks.quantise import quantise
from mlperturb.labels import Request
from mlperturb.metrics import Distortion, distortion, distortion_of, pixel_distortion
from mlperturb.model.coefficients import JpegLattice
from mlperturb.model.ensemble import Victim, members_of
from mlperturb.model.linear import strips, to_pixels
from mlperturb.model.preprocess import Size
from mlperturb.photos.images import Photo, Pixels
from mlperturb.photos.jpeg import Plane
from mlperturb.run.pose import observe_photos, pose
from mlperturb.run.settings import Settings
from mlperturb.system.devices import free_memory, return_freed_memory
from mlperturb.targets import Targets

_BATCH = {"cpu": (8, 4_000_000), "cuda": (64, 64_000_000), "mps": (16, 8_000_000)}  # photos, pixels
_NEEDED = 200  # bytes of memory for a padded pixel; on the CPU an attack takes 180
_LARGE = 4_000_000  # pixels of a photo, padded, after which freed memory is given back
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
    seen = observe_photos(classifier, photos, settings)
    seen.meter.owed.add_(settings.looks)
    watch(seen.meter)
    rows = seen.before.isfinite().all(2).all(1).nonzero().flatten()
    found: list[Found | None] = [None] * len(photos)
    if not len(rows):
        return found
    seen, usable = seen.select(rows), rows.tolist()
    chosen, asked = [photos[row] for row in usable], [requests[row] for row in usable]
    problem, whole = pose(classifier, seen, chosen, asked, settings)
    results = _search(problem, whole, seen.sizes, settings)
    share = (time.perf_counter() - started) / len(rows)
    before = seen.before[:, :, : len(classifier.boundary)].cpu()
    for row, result, logits in zip(usable, results, before, strict=True):
        found[row] = _finish(result, photos[row], logits, share)
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
            found = search(self.classifier, photos, requests, self.settings, self.watch)
        except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
                raise
            if self.classifier.device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        if max(heights) * max(widths) >= _LARGE:
            return_freed_memory()  # threads that write need large blocks, and would find what is free in pieces
        return found


def fits(sizes: Sequence[Size], pixels: float) -> bool:
    """Say whether photos of these (height, width), padded to the largest, have at most so many pixels."""
    heights, widths = zip(*sizes, strict=True)
    return len(sizes) == 1 or len(sizes) * max(heights) * max(widths) <= pixels


def _finish(found: Found, photo: Photo, before: Tensor, seconds: float) -> Found:
    """Return a result with what the search did not know: it saw a photo that becomes a JPEG as that JPEG."""
    found = replace(found, before=before, seconds=seconds)
    if photo.encoded is None:
        return found
    return replace(found, distortion=pixel_distortion(found.pixels, photo.rgb))


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
    outcome, logits, seen = None, None, None
    if len(rows):
        outcome, file, logits = _attack(whole.select(rows), settings)
        made, seen = to_pixels(file.kept), file.logits
    if len(rows) < len(sizes):
        whole_batch = to_pixels(problem.images)
        if len(rows):
            whole_batch[rows] = made
        made = whole_batch
    pixels = made.permute(0, 2, 3, 1).cpu().numpy()
    targets = replace(problem.targets, margin=0.0).cpu()
    goal = problem.goal if outcome is None else outcome.goal
    place = {row: number for number, row in enumerate(rows.tolist())}
    found = []
    for row, (height, width) in enumerate(sizes):
        number = place.get(row)
        exact = problem.images[row] if outcome is None or number is None else outcome.kept[number]
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
                _distortion(problem.images[row, :, :height, :width], exact[:, :height, :width]),
                int(problem.meter.forward[problem.rows[row]]),
                int(problem.meter.backward[problem.rows[row]]),
                0.0,
                problem.lattice.planes(row, shown) if isinstance(problem.lattice, JpegLattice) else None,
            )
        )
    return found


def _distortion(photo: Tensor, image: Tensor) -> Distortion:
    """Measure how far an image, (3, H, W), is from the photo: in [0, 1], or in 8-bit pixels, strip by strip."""
    parts = strips(photo[None])
    if image.dtype == torch.uint8:
        return distortion_of(image[:, rows].short() - to_pixels(photo[None, :, rows])[0] for rows in parts)
    moved = torch.empty_like(photo)
    for rows in parts:
        torch.sub(image[:, rows] * 255, photo[:, rows] * 255, out=moved[:, rows])
    return distortion(moved)


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
