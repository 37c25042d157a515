"""Write an adversarial photo, read it back, and judge the pixels that were read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlperturb.errors import ImageError, OutputError, StorageError
from mlperturb.metrics import distortion
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import to_tensor
from mlperturb.photos.images import Photo, Pixels, magnify, read_pixels, write_png
from mlperturb.photos.purify import Purification
from mlperturb.run.jobs import Job
from mlperturb.run.record import Failure, Record, Status
from mlperturb.run.search import Found
from mlperturb.run.settings import Settings
from mlperturb.system.files import remove_file
from mlperturb.targets import Targets


def save(job: Job, photo: Photo, found: Found, out: Path, settings: Settings) -> Pixels | OutputError | ImageError:
    """Write the adversarial PNG and the map; return the PNG's pixels as read back, (H, W, 3), or the error.

    If the pixels equal the photo's, no label flipped: nothing is written, unless `settings.keep_failed`.

    Raises:
        StorageError: if nothing can be written to `out` any more.
    """
    if not settings.keep_failed and found.targets.flip.any() and np.array_equal(found.pixels, photo.rgb):
        return photo.rgb
    try:
        write_png(out / job.adversarial, found.pixels, photo.alpha)
        write_png(out / job.map, magnify(found.pixels.astype(np.int16) - photo.rgb))
        return read_pixels(out / job.adversarial)
    except StorageError:
        raise
    except (OutputError, ImageError) as error:
        return error


def judge(
    classifier: Classifier,
    job: Job,
    photo: Photo,
    found: Found,
    saved: Pixels | OutputError | ImageError,
    out: Path,
    settings: Settings,
) -> Record:
    """Classify the pixels that `save` returned; return the record of the photo.

    Raises:
        StorageError: if the files of a failure cannot be deleted.
    """
    labels, asked = classifier.labels, found.targets
    cost = {"forward": found.forward, "backward": found.backward, "seconds": round(found.seconds, 4)}
    probabilities: dict[str, dict[str, float] | None] = {
        "before": _probabilities(labels, found.before),
        "float": _probabilities(labels, found.logits) if found.logits.isfinite().all() else None,
        "after": None,
    }
    facts: dict[str, Any] = facts_of(job, photo) | {
        "truth": {label: bool(sign > 0) for label, sign in zip(labels, asked.truth[0].tolist(), strict=True)},
        "flip": _chosen(labels, asked.flip[0]),
        "keep": _chosen(labels, asked.keep[0]),
        "distortion_float": found.distortion,
        "success_float": found.met,
        "probabilities": probabilities,
    }
    if isinstance(saved, Exception):
        return Record(**facts, status="failed", cost=cost, error=Failure.of(saved))
    known = found.before.unsqueeze(0) if saved is photo.rgb else None
    seen = look(classifier, saved, asked, settings.survive[1], known)
    cost["forward"] += seen.passes
    facts |= {
        "status": seen.status,
        "constraints": _held(labels, seen.held, asked),
        "survival": {name: _held(labels, held, asked) for name, held in seen.survival.items()} or None,
        "ranking": found.goal.describe(seen.logits),
        "cost": cost,
    }
    if seen.status == "failed" and not settings.keep_failed:
        for name in (job.adversarial, job.map):
            remove_file(out / name)
        return Record(**{**facts, "survival": None})
    probabilities["after"] = _probabilities(labels, seen.logits[0])
    return Record(
        **facts,
        distortion=distortion(torch.from_numpy(saved.astype(np.int16) - photo.rgb)),
        files={"adversarial": job.adversarial, "map": job.map},
    )


def facts_of(job: Job, photo: Photo) -> dict[str, Any]:
    """Return the part of a record that describes the photo itself."""
    return {
        "source": str(job.source),
        "sha256": photo.sha256,
        "width": photo.rgb.shape[1],
        "height": photo.rgb.shape[0],
        "notes": list(photo.notes),
    }


@dataclass(frozen=True)
class Seen:
    """The classifier's decisions on the pixels of an adversarial photo.

    Attributes:
        logits: (1, L), on the CPU.
        held: whether each label's constraint holds, boolean, (1, L).
        survival: the same once the photo is compressed, by the compression's name.
        status: `success` if all constraints hold, compressed too; else `partial` if a label of A flipped, else
            `failed`.
        passes: forward passes spent.
    """

    logits: Tensor
    held: Tensor
    survival: dict[str, Tensor]
    status: Status
    passes: int


def look(
    classifier: Classifier,
    rgb: Pixels,
    targets: Targets,
    checked: Sequence[Purification] = (),
    known: Tensor | None = None,
) -> Seen:
    """Classify the pixels of one adversarial photo, (H, W, 3).

    Args:
        classifier: the classifier that was attacked.
        rgb: the pixels, 8 bits.
        targets: the targets of the photo, one row, without a margin.
        checked: compressions that the result is to survive.
        known: the logits of these pixels, (1, L), if they are known already.
    """
    logits = _logits(classifier, rgb) if known is None else known
    held = targets.holds(logits)
    survival = {one.name: targets.holds(_logits(classifier, one.apply(rgb)[0])) for one in checked}
    flipped = bool((held & targets.flip).any()) or not bool(targets.flip.any())
    everywhere = all(bool(one.all()) for one in (held, *survival.values()))
    status: Status = "success" if everywhere else "partial" if flipped else "failed"
    return Seen(logits, held, survival, status, (known is None) + len(survival))


@torch.no_grad()
def _logits(classifier: Classifier, rgb: Pixels) -> Tensor:
    """Return the logits of one photo, (H, W, 3), on the CPU, (1, L)."""
    logits: Tensor = classifier([to_tensor(rgb, classifier.device)])
    return logits.cpu()


def _held(labels: Sequence[str], held: Tensor, targets: Targets) -> dict[str, Any]:
    return {
        "held": int((held & targets.constrained).sum()),
        "total": int(targets.constrained.sum()),
        "violated": _chosen(labels, ~held[0]),
    }


def _chosen(labels: Sequence[str], mask: Tensor) -> list[str]:
    return [label for label, wanted in zip(labels, mask.tolist(), strict=True) if wanted]


def _probabilities(labels: Sequence[str], logits: Tensor) -> dict[str, float]:
    return dict(zip(labels, torch.sigmoid(logits.double().cpu()).tolist(), strict=True))
