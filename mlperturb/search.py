"""A batch of photos on the device: attacked, then brought to 8 bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.goals import ClassificationGoal, Goal
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Problem, observe
from mlperturb.attacks.quantise import quantise
from mlperturb.attacks.untargeted import MAX_COMPARED, nearest_label
from mlperturb.classifier import Classifier
from mlperturb.images import Photo, Pixels
from mlperturb.jobs import Settings
from mlperturb.labels import Request
from mlperturb.metrics import Distortion, distortion
from mlperturb.preprocess import Size, pad_batch, to_tensor
from mlperturb.regions import Region
from mlperturb.survival import SurvivingModel, repeat_targets
from mlperturb.targets import Targets, decide, make_targets

LATTICE = {"fast": (6, 20), "balanced": (8, 40), "paper": (10, 100)}  # scales and iterations of `quantise`


@dataclass(frozen=True)
class Found:
    """What the search for one photo's perturbation came to, on the CPU.

    Attributes:
        pixels: the adversarial photo, (H, W, 3).
        goal: what was asked of the photo, without a margin, one row.
        before: logits of the photo, (L,).
        logits: of the float result, (L,).
        met: whether all constraints hold on the float result, compressed too.
        distortion: of the float result.
        forward: passes.
        backward: passes.
        seconds: the photo's share of its batch.
    """

    pixels: Pixels
    goal: Goal
    before: Tensor
    logits: Tensor
    met: bool
    distortion: Distortion
    forward: int
    backward: int
    seconds: float

    @property
    def targets(self) -> Targets:
        """A, B and y, one row, without a margin."""
        return self.goal.targets


def search(
    classifier: Classifier, photos: Sequence[Photo], requests: Sequence[Request], settings: Settings
) -> list[Found | None]:
    """Attack a batch; None for a photo on which the network's outputs are not finite.

    Args:
        classifier: to attack.
        photos: of any sizes.
        requests: one for each photo.
        settings: what to do.
    """
    started = time.perf_counter()
    images, sizes = pad_batch([to_tensor(photo.rgb, classifier.device) for photo in photos])
    model = classifier.bind(sizes)
    before, meter = observe(model, images)
    rows = before.isfinite().all(1).nonzero().flatten()
    found: list[Found | None] = [None] * len(photos)
    if not len(rows):
        return found
    usable = rows.tolist()
    asked, sizes = [requests[row] for row in usable], [sizes[row] for row in usable]
    truth = decide(before[rows], classifier.boundary)
    problem = Problem(
        model.select(rows),
        images[rows],
        ClassificationGoal(make_targets(asked, truth, classifier.boundary, margin=settings.margin)),
        cap=None if settings.max_rmsd is None else _norm_cap(settings.max_rmsd, sizes, images.device),
        bound=None if settings.max_linf is None else settings.max_linf / 255,
        region=None if settings.region is None else _region_of(settings.region, sizes, images[rows]),
        meter=meter,
        rows=rows.cpu(),
    )
    results = _search(problem, sizes, asked, before[rows], settings)
    share = (time.perf_counter() - started) / len(rows)
    for row, result in zip(usable, results, strict=True):
        found[row] = replace(result, seconds=share)
    return found


def _norm_cap(rmsd: float, sizes: Sequence[Size], device: torch.device) -> Tensor:
    """Return the L2 norm, in [0, 1] units, that an RMSD on the 0-255 scale is at each size, (N,)."""
    return torch.tensor([rmsd / 255 * (3 * height * width) ** 0.5 for height, width in sizes], device=device)


def _region_of(region: Region, sizes: Sequence[Size], images: Tensor) -> Tensor:
    """Return the pixels of a padded batch, (N, 3, H, W), that may change, (N, 1, H, W)."""
    allowed = torch.zeros_like(images[:, :1])
    for row, (height, width) in enumerate(sizes):
        allowed[row, 0, :height, :width] = torch.from_numpy(region.inside(height, width)).to(allowed)
    return allowed


def _search(
    problem: Problem, sizes: Sequence[Size], requests: Sequence[Request], before: Tensor, settings: Settings
) -> list[Found]:
    """Attack a batch, then find the 8-bit photos; no image spends more than `settings.passes`."""
    method = find_method(settings.method)
    tuning = method.tuning(settings.budget, **settings.options)
    scales, iterations = LATTICE[settings.budget]
    seen, checked = settings.survive
    if settings.passes is not None:
        left = settings.passes - 1 - len(checked)  # decisions on the PNG as read back, and compressed
        reserved = 0 if method.writes_lattice(tuning) else min(scales + 2 * iterations + 1, settings.passes // 3)
        problem = replace(problem, limit=left - (1 + len(seen)) - reserved)  # the float result's decision
    if any(request.any_label for request in requests):
        problem = problem.aim(_resolve_any(problem, requests))
    asked = problem
    if seen:
        model = SurvivingModel(problem.model, sizes, seen)
        problem = replace(problem, model=model, goal=ClassificationGoal(repeat_targets(asked.targets, model.passes)))
    outcome = method.load()(problem, **tuning)
    with torch.no_grad():
        logits = problem.logits(outcome.images)
    if settings.passes is not None:
        problem = replace(problem, limit=left)
    lattice = quantise(problem, outcome, scales=scales, iterations=iterations)
    met = replace(problem.targets, margin=0.0).holds(logits).all(1)
    pixels = (lattice.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    targets = replace(asked.targets.cpu(), margin=0.0)
    logits, before = logits[:, : targets.truth.shape[1]].cpu(), before.cpu()
    return [
        Found(
            pixels[row, :height, :width],
            outcome.goal.aimed_at(targets.select(torch.tensor([row]))),
            before[row],
            logits[row],
            bool(met[row]),
            _distortion(outcome, asked, row, (height, width)),
            int(asked.meter.forward[asked.rows[row]]),
            int(asked.meter.backward[asked.rows[row]]),
            0.0,
        )
        for row, (height, width) in enumerate(sizes)
    ]


def _distortion(outcome: Outcome, problem: Problem, row: int, size: Size) -> Distortion:
    """Measure the float result of one photo of a padded batch."""
    height, width = size
    exact, clean = (images[row, :, :height, :width] * 255 for images in (outcome.images, problem.images))
    return distortion(exact - clean)


def _resolve_any(problem: Problem, requests: Sequence[Request]) -> Goal:
    """Return the goal in which `any` label to flip is the label nearest to its threshold."""
    targets = problem.targets
    fixed = torch.zeros_like(targets.flip)
    for row, request in enumerate(requests):
        fixed[row, [*request.keep, *request.add, *request.remove]] = True
        fixed[row] |= not request.any_label
    rest = torch.tensor([request.keep_rest for request in requests], device=fixed.device).unsqueeze(1)
    spare = MAX_COMPARED if problem.limit is None else problem.limit // 3
    flip = targets.flip | nearest_label(problem, ~fixed, compared=min(spare, MAX_COMPARED))
    keep = torch.where(rest, ~flip, targets.keep)
    return ClassificationGoal(replace(targets, flip=flip, keep=keep))
