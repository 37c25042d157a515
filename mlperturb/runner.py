"""The batch: photos in, adversarial PNGs and records out; one bad photo is recorded and the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlperturb.attacks import find_method
from mlperturb.attacks.common import MAX_COMPARED, Outcome, Problem, nearest_label
from mlperturb.attacks.ranking import RankingGoal
from mlperturb.classifier import Classifier
from mlperturb.errors import ImageError, OutputError, StorageError
from mlperturb.images import Photo, Pixels, magnify, read_photo, read_pixels, write_png
from mlperturb.jobs import Job, Settings
from mlperturb.labels import Request
from mlperturb.metrics import distortion, kendall_tau
from mlperturb.preprocess import Size, pad_batch, to_tensor
from mlperturb.purify import Purification
from mlperturb.quantise import Lattice, quantise
from mlperturb.regions import Region
from mlperturb.report import Record, Status
from mlperturb.survival import SurvivingModel, repeat_targets
from mlperturb.targets import Targets, decide, make_targets

_LATTICE = {"fast": (6, 20), "balanced": (8, 40), "paper": (10, 100)}  # scales and iterations of `quantise`
_BATCH = {"cpu": (8, 4_000_000), "cuda": (64, 64_000_000), "mps": (16, 8_000_000)}  # photos, pixels


def run_attack(
    classifier: Classifier,
    jobs: Sequence[Job],
    out: Path,
    settings: Settings,
    done: Callable[[list[Record]], None],
    *,
    finished: Mapping[Path, Size] = MappingProxyType({}),
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    warn: Callable[[str], None] = lambda message: None,
) -> None:
    """Attack every photo, write its files to `out`, and hand the records of each batch to `done` once they are final.

    Args:
        classifier: to attack.
        jobs: the photos.
        out: folder of the outputs.
        settings: what to do.
        done: told of every batch.
        finished: photos that are done already, and their (height, width): the others are attacked in the batches that
            they would be in without them, so that their results are the same to the last bit.
        hold: entered while a batch is being written and handed to `done`.
        warn: told, once, that the device ran out of memory and smaller batches go on.

    Raises:
        StorageError: if nothing can be written to `out` any more.
    """
    most: int | None = None  # photos that the device's memory takes at a time; None while it took every batch
    for batch in _batches(jobs, settings, classifier.device, done, finished):
        while batch:
            part = batch[:most]
            searched = _search_if_it_fits(classifier, part, settings)
            if searched is None and len(part) > 1:
                if most is None:
                    warn("the device ran out of memory: going on with smaller batches")
                most = (len(part) + 1) // 2
                continue
            batch = batch[len(part) :]
            if searched is None:
                message = f"{part[0][0].source}: too large for the device's memory"
                error = {"type": "MemoryError", "message": message}
                done([Record(**_facts(*part[0]), status="failed", error=error)])
                continue
            with hold():
                done(_write_batch(classifier, part, searched, out, settings))


def _batches(
    jobs: Sequence[Job],
    settings: Settings,
    device: torch.device,
    done: Callable[[list[Record]], None],
    finished: Mapping[Path, Size],
) -> Iterator[list[tuple[Job, Photo]]]:
    """Decode photos and group them; a photo that cannot be decoded becomes a record at once."""
    limit, pixels = _BATCH.get(device.type, _BATCH["cpu"])
    limit = settings.batch_size or limit
    batch: list[tuple[Job, Photo]] = []
    sizes: list[Size] = []  # of the batch with the finished photos
    for job in jobs:
        photo = None
        if job.source in finished:
            size = finished[job.source]
        else:
            try:
                photo = read_photo(job.source)
            except ImageError as error:
                done([Record(source=str(job.source), error=_describe(error))])
                continue
            size = (photo.rgb.shape[0], photo.rgb.shape[1])
            try:
                if settings.region:
                    settings.region.inside(*size)
            except ImageError as error:
                named = _describe(ImageError(f"{job.source}: {error}"))
                done([Record(**_facts(job, photo), status="failed", error=named)])
                continue
        heights, widths = zip(*sizes, size, strict=True)
        padded = (len(sizes) + 1) * max(heights) * max(widths)
        if sizes and (len(sizes) == limit or (settings.batch_size is None and padded > pixels)):
            if batch:
                yield batch
            batch, sizes = [], []
        sizes.append(size)
        if photo is not None:
            batch.append((job, photo))
    if batch:
        yield batch


@dataclass(frozen=True)
class _Searched:
    """A batch that has been attacked and not been written.

    Attributes:
        sizes: (height, width) of the photos.
        before: logits of the photos, (N, L).
        rows: those whose logits are finite, (n,).
        found: what the search of those came to; None if there are none.
        seconds: of the search.
    """

    sizes: Sequence[Size]
    before: Tensor
    rows: Tensor
    found: _Found | None
    seconds: float


def _search_if_it_fits(
    classifier: Classifier, batch: Sequence[tuple[Job, Photo]], settings: Settings
) -> _Searched | None:
    """Attack a batch; None if the device ran out of memory."""
    try:
        return _search_batch(classifier, batch, settings)
    except torch.OutOfMemoryError:
        if classifier.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _search_batch(classifier: Classifier, batch: Sequence[tuple[Job, Photo]], settings: Settings) -> _Searched:
    started = time.perf_counter()
    images, sizes = pad_batch([to_tensor(photo.rgb, classifier.device) for _, photo in batch])
    model = classifier.bind(sizes)
    with torch.no_grad():
        before = model(images)
    rows = before.isfinite().all(1).nonzero().flatten()
    found = None
    if len(rows):
        requests = [batch[row][0].request or settings.request for row in rows.tolist()]
        truth = decide(before[rows], classifier.boundary)
        problem = Problem.start(
            model.select(rows),
            images[rows],
            make_targets(requests, truth, classifier.boundary, margin=settings.margin),
            cap=None if settings.max_rmsd is None else _norm_cap(settings.max_rmsd, sizes, images.device)[rows],
            region=None if settings.region is None else _region_of(settings.region, sizes, images)[rows],
        )
        problem.meter.forward += 1  # `before`
        found = _search(problem, [sizes[row] for row in rows.tolist()], requests, settings)
    return _Searched(sizes, before, rows, found, time.perf_counter() - started)


def _write_batch(
    classifier: Classifier, batch: Sequence[tuple[Job, Photo]], searched: _Searched, out: Path, settings: Settings
) -> list[Record]:
    records: dict[int, Record] = {}
    for place, row in enumerate(searched.rows.tolist()):
        assert searched.found is not None
        job, photo = batch[row]
        size, before, share = searched.sizes[row], searched.before[row], searched.seconds / len(searched.rows)
        records[row] = _finish(classifier, job, photo, size, searched.found, place, before, out, share, settings)
    unusable = {"type": "NumericalError", "message": "the network's outputs are not finite"}
    return [
        records[row] if row in records else Record(**_facts(*batch[row]), status="failed", error=unusable)
        for row in range(len(batch))
    ]


@dataclass(frozen=True)
class _Found:
    """What the search of one batch came to."""

    problem: Problem
    outcome: Outcome
    lattice: Lattice
    logits: Tensor  # of the float result
    met: Tensor  # whether all constraints hold on the float result, compressed too


def _norm_cap(rmsd: float, sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Return the L2 norm, in [0, 1] units, that an RMSD on the 0-255 scale is at each size, (N,)."""
    return torch.tensor([rmsd / 255 * (3 * height * width) ** 0.5 for height, width in sizes], device=device)


def _region_of(region: Region, sizes: Sequence[Size], images: Tensor) -> Tensor:
    """Return the pixels of a padded batch, (N, 3, H, W), that may change, (N, 1, H, W)."""
    allowed = torch.zeros_like(images[:, :1])
    for row, (height, width) in enumerate(sizes):
        allowed[row, 0, :height, :width] = torch.from_numpy(region.inside(height, width)).to(allowed)
    return allowed


def _search(problem: Problem, sizes: Sequence[Size], requests: Sequence[Request], settings: Settings) -> _Found:
    """Attack a batch, then find the 8-bit photos; no image spends more than `settings.passes`."""
    method = find_method(settings.method)
    tuning = method.tuning(settings.budget, **settings.options)
    scales, iterations = _LATTICE[settings.budget]
    seen, checked = settings.survive
    after = 1 + len(checked)  # decisions on the PNG as read back, and compressed
    if settings.passes is not None:
        reserved = min(scales + 2 * iterations + 1, settings.passes // 3)
        if tuning.get("rounding") == "inside":
            reserved = 0
        problem.meter.limit = settings.passes - after - (1 + len(seen)) - reserved  # the float result's decision
    if any(request.any_label for request in requests):
        problem = _resolve_any(problem, requests)
    asked = problem
    if seen:
        model = SurvivingModel(problem.model, sizes, seen)
        problem = replace(problem, model=model, targets=repeat_targets(problem.targets, model.passes))
    outcome = method.load()(problem, **tuning)
    with torch.no_grad():
        logits = problem.logits(outcome.images)
    if settings.passes is not None:
        problem.meter.limit = settings.passes - after
    lattice = quantise(problem, outcome, scales=scales, iterations=iterations)
    met = replace(problem.targets, margin=0.0).holds(logits).all(1)
    return _Found(asked, outcome, lattice, logits[:, : asked.targets.truth.shape[1]], met)


def _resolve_any(problem: Problem, requests: Sequence[Request]) -> Problem:
    """Turn `--flip any` into A = the label nearest to its threshold."""
    targets = problem.targets
    fixed = torch.zeros_like(targets.flip)
    for row, request in enumerate(requests):
        fixed[row, [*request.keep, *request.add, *request.remove]] = True
        fixed[row] |= not request.any_label
    rest = torch.tensor([request.keep_rest for request in requests], device=fixed.device).unsqueeze(1)
    spare = MAX_COMPARED if problem.meter.limit is None else problem.meter.limit // 3
    flip = targets.flip | nearest_label(problem, ~fixed, compared=min(spare, MAX_COMPARED))
    keep = torch.where(rest, ~flip, targets.keep)
    resolved = Targets(flip, keep, targets.truth, targets.boundary, targets.margin)
    return replace(problem, targets=resolved)


def _finish(
    classifier: Classifier,
    job: Job,
    photo: Photo,
    size: Size,
    found: _Found,
    row: int,
    before: Tensor,
    out: Path,
    seconds: float,
    settings: Settings,
) -> Record:
    """Write one photo's files, read the PNG back, and judge by what was read."""
    height, width = size
    labels, targets = classifier.labels, found.problem.targets.select(torch.tensor([row]))
    bare = replace(targets, margin=0.0)
    exact = found.outcome.images[row, :, :height, :width] * 255 - to_tensor(photo.rgb, classifier.device) * 255
    facts: dict[str, Any] = _facts(job, photo) | {
        "truth": {label: bool(sign > 0) for label, sign in zip(labels, targets.truth[0].tolist(), strict=True)},
        "flip": _chosen(labels, targets.flip[0]),
        "keep": _chosen(labels, targets.keep[0]),
        "distortion_float": distortion(exact),
        "success_float": bool(found.met[row]),
    }
    meter = found.problem.meter
    cost = {"forward": int(meter.forward[row]), "backward": int(meter.backward[row]), "seconds": round(seconds, 4)}
    pixels = (found.lattice.images[row, :, :height, :width] * 255).round().to(torch.uint8)
    rgb = pixels.permute(1, 2, 0).cpu().numpy()
    probabilities: dict[str, dict[str, float] | None] = {
        "before": _probabilities(labels, before),
        "float": _probabilities(labels, found.logits[row]) if found.logits[row].isfinite().all() else None,
        "after": None,
    }
    if settings.keep_failed or not (bare.flip.any() and np.array_equal(rgb, photo.rgb)):
        try:
            saved = _save(job, photo, rgb, out)
        except StorageError:
            raise
        except (OutputError, ImageError) as error:
            return Record(**facts, status="failed", probabilities=probabilities, cost=cost, error=_describe(error))
        with torch.no_grad():
            after = classifier([to_tensor(saved, classifier.device)])
        cost["forward"] += 1
    else:
        saved, after = photo.rgb, before.unsqueeze(0)
    held = bare.holds(after)
    survival = {one.name: _survives(classifier, saved, one, bare) for one in settings.survive[1]}
    cost["forward"] += len(survival)
    flipped = bool((held & bare.flip).any()) or not bool(bare.flip.any())
    everywhere = bool(held.all()) and not any(result["violated"] for result in survival.values())
    status: Status = "success" if everywhere else "partial" if flipped else "failed"
    violated = _chosen(labels, ~held[0])
    facts |= {
        "probabilities": probabilities,
        "constraints": {
            "held": int((held & bare.constrained).sum()),
            "total": int(bare.constrained.sum()),
            "violated": violated,
        },
        "survival": survival or None,
        "ranking": _ranking(found.outcome, after, targets),
        "cost": cost,
    }
    if status == "failed" and not settings.keep_failed:
        for name in (job.adversarial, job.map):
            (out / name).unlink(missing_ok=True)
        return Record(**{**facts, "survival": None}, status=status)
    probabilities["after"] = _probabilities(labels, after[0])
    return Record(
        **facts,
        status=status,
        distortion=distortion(torch.from_numpy(saved.astype(np.int16) - photo.rgb)),
        files={"adversarial": job.adversarial, "map": job.map},
    )


def _save(job: Job, photo: Photo, rgb: Pixels, out: Path) -> Pixels:
    """Write the adversarial PNG and the map; return the PNG's pixels as read back from disk."""
    write_png(out / job.adversarial, rgb, photo.alpha)
    write_png(out / job.map, magnify(rgb.astype(np.int16) - photo.rgb))
    return read_pixels(out / job.adversarial)


def _survives(classifier: Classifier, rgb: Pixels, purification: Purification, targets: Targets) -> dict[str, Any]:
    """Say which constraints hold on a photo, (H, W, 3), once it is compressed."""
    with torch.no_grad():
        held = targets.holds(classifier([to_tensor(purification.apply(rgb)[0], classifier.device)]))
    return {
        "held": int((held & targets.constrained).sum()),
        "total": int(targets.constrained.sum()),
        "violated": _chosen(classifier.labels, ~held[0]),
    }


def _facts(job: Job, photo: Photo) -> dict[str, Any]:
    return {
        "source": str(job.source),
        "sha256": photo.sha256,
        "width": photo.rgb.shape[1],
        "height": photo.rgb.shape[0],
        "notes": list(photo.notes),
    }


def _ranking(outcome: Outcome, after: Tensor, targets: Targets) -> dict[str, Any] | None:
    """Say how the PNG ranks, if ranking was the goal."""
    if not isinstance(outcome.goal, RankingGoal):
        return None
    bare = replace(targets, margin=0.0)
    goal = RankingGoal(bare, outcome.goal.between, outcome.goal.separate)
    tau = float(kendall_tau(after, bare.ranks)[0])
    return {"satisfied": bool(goal.met(after)[0]), "kendall_tau": None if tau != tau else tau}


def _chosen(labels: Sequence[str], mask: Tensor) -> list[str]:
    return [label for label, wanted in zip(labels, mask.tolist(), strict=True) if wanted]


def _probabilities(labels: Sequence[str], logits: Tensor) -> dict[str, float]:
    return dict(zip(labels, torch.sigmoid(logits.double().cpu()).tolist(), strict=True))


def _describe(error: Exception) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}
