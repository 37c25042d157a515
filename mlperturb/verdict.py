"""An adversarial photo, written, read back, and judged by what was read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlperturb.classifier import Classifier
from mlperturb.errors import ImageError, OutputError, StorageError
from mlperturb.files import remove_file
from mlperturb.images import Photo, Pixels, magnify, read_pixels, write_png
from mlperturb.jobs import Job, Settings
from mlperturb.metrics import distortion
from mlperturb.preprocess import to_tensor
from mlperturb.purify import Purification
from mlperturb.report import Record, Status
from mlperturb.search import Found
from mlperturb.targets import Targets


def save(job: Job, photo: Photo, found: Found, out: Path, settings: Settings) -> Pixels | OutputError | ImageError:
    """Write the adversarial PNG and the map; return the PNG's pixels as read back, (H, W, 3), or what went wrong.

    Where nothing that was to flip can have flipped, nothing is written.

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
    """Decide on what `save` returned, and say how the attack came out.

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
        return Record(**facts, status="failed", cost=cost, error=describe(saved))
    written = saved is not photo.rgb
    after = _logits(classifier, saved) if written else found.before.unsqueeze(0)
    held = asked.holds(after)
    survival = {one.name: _survives(classifier, saved, one, asked) for one in settings.survive[1]}
    cost["forward"] += written + len(survival)
    flipped = bool((held & asked.flip).any()) or not bool(asked.flip.any())
    everywhere = bool(held.all()) and not any(result["violated"] for result in survival.values())
    status: Status = "success" if everywhere else "partial" if flipped else "failed"
    facts |= {
        "status": status,
        "constraints": _held(labels, held, asked),
        "survival": survival or None,
        "ranking": found.goal.describe(after),
        "cost": cost,
    }
    if status == "failed" and not settings.keep_failed:
        for name in (job.adversarial, job.map):
            remove_file(out / name)
        return Record(**{**facts, "survival": None})
    probabilities["after"] = _probabilities(labels, after[0])
    return Record(
        **facts,
        distortion=distortion(torch.from_numpy(saved.astype(np.int16) - photo.rgb)),
        files={"adversarial": job.adversarial, "map": job.map},
    )


def facts_of(job: Job, photo: Photo) -> dict[str, Any]:
    """Return what a record says of the photo itself."""
    return {
        "source": str(job.source),
        "sha256": photo.sha256,
        "width": photo.rgb.shape[1],
        "height": photo.rgb.shape[0],
        "notes": list(photo.notes),
    }


def describe(error: Exception) -> dict[str, str]:
    """Return an error as a record has it."""
    return {"type": type(error).__name__, "message": str(error)}


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


def _survives(classifier: Classifier, rgb: Pixels, purification: Purification, targets: Targets) -> dict[str, Any]:
    """Say which constraints hold on a photo, (H, W, 3), once it is compressed."""
    return _held(classifier.labels, targets.holds(_logits(classifier, purification.apply(rgb)[0])), targets)


def _chosen(labels: Sequence[str], mask: Tensor) -> list[str]:
    return [label for label, wanted in zip(labels, mask.tolist(), strict=True) if wanted]


def _probabilities(labels: Sequence[str], logits: Tensor) -> dict[str, float]:
    return dict(zip(labels, torch.sigmoid(logits.double().cpu()).tolist(), strict=True))
