"""Write an adversarial photo, read it back, and judge the pixels that were read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlperturb.errors import ImageError, OutputError, StorageError
from mlperturb.metrics import pixel_distortion
from mlperturb.model.ensemble import Ensemble, Victim, read_columns
from mlperturb.photos.formats import decode_elsewhere, read_pixels, write_jpeg, write_pixels
from mlperturb.photos.images import Beside, Photo, Pixels, magnify
from mlperturb.run.jobs import Job
from mlperturb.run.names import Names, by_classifier, by_reader
from mlperturb.run.record import Failure, Record, Status
from mlperturb.run.search import Found
from mlperturb.run.settings import Settings
from mlperturb.system.files import remove_file

_RANK = ("unchanged", "success", "partial", "failed")


def save(job: Job, photo: Photo, found: Found, out: Path, settings: Settings) -> Pixels | OutputError | ImageError:
    """Write the adversarial photo and the map; return the photo's pixels as read back, (H, W, 3), or the error.

    If the pixels equal the photo's, no label flipped: nothing is written, unless `settings.keep_failed`.

    Raises:
        StorageError: if nothing can be written to `out` any more.
    """
    if not settings.keep_failed and found.targets.flip.any() and np.array_equal(found.pixels, photo.rgb):
        return photo.rgb
    try:
        if found.planes is not None:
            write_jpeg(out / job.adversarial, photo, found.planes, metadata=settings.keep_metadata)
        else:
            beside = photo.beside if settings.keep_metadata else Beside(photo.beside.profile)
            write_pixels(out / job.adversarial, found.pixels, photo.alpha, grey=photo.grey, beside=beside)
        write_pixels(out / job.map, magnify(found.pixels, photo.rgb), grey=photo.grey)
        return read_pixels(out / job.adversarial)
    except StorageError:
        raise
    except (OutputError, ImageError) as error:
        return error


def judge(
    classifier: Victim,
    job: Job,
    photo: Photo,
    found: Found,
    saved: Pixels | OutputError | ImageError,
    out: Path,
    settings: Settings,
) -> Record:
    """Classify the pixels that `save` returned; return the record of the photo.

    Of several classifiers, the record's own labels are all of theirs, each as the first that has it sees it.

    Raises:
        StorageError: if the files of a failure cannot be deleted.
    """
    names, asked = Names.of(classifier), found.targets
    cost = {"forward": found.forward, "backward": found.backward, "seconds": round(found.seconds, 4)}
    probabilities: dict[str, dict[str, float] | None] = {
        "before": names.probabilities(found.before[0]),
        "float": names.finite(found.logits),
        "after": None,
    }
    facts: dict[str, Any] = facts_of(job, photo) | {
        **names.asked(asked),
        "distortion_float": found.distortion,
        "success_float": found.met,
        "probabilities": probabilities,
    }
    if isinstance(saved, Exception):
        return Record(**facts, status="failed", cost=cost, error=Failure.of(saved))
    seen = look(classifier, saved, photo.rgb, found, settings)
    if found.planes is not None and saved is not photo.rgb:
        seen, notes = _look_elsewhere(classifier, out / job.adversarial, saved, photo, found, settings, seen)
        facts["notes"] += notes
    cost["forward"] += seen.passes
    if found.logits is None:  # the attack's own result is the file
        facts["success_float"] = bool(next(iter(seen.readers.values())).all())
        probabilities["float"] = names.finite(seen.logits[0])
    facts |= {
        "status": seen.status,
        "constraints": names.held(seen.held, asked),
        "readers": by_reader(names, found, seen),
        "classifiers": by_classifier(classifier, found, seen) if isinstance(classifier, Ensemble) else None,
        "survival": {name: names.held(held, asked) for name, held in seen.survival.items()} or None,
        "ranking": found.goal.describe(seen.logits[:1]),
        "cost": cost,
    }
    if seen.status == "failed" and not settings.keep_failed:
        for name in (job.adversarial, job.map):
            remove_file(out / name)
        return Record(**{**facts, "survival": None, "readers": None, "classifiers": None})
    probabilities["after"] = names.probabilities(seen.logits[0])
    return Record(
        **facts,
        distortion=pixel_distortion(saved, photo.rgb),
        files={"adversarial": job.adversarial, "map": job.map},
    )


def _look_elsewhere(
    classifier: Victim, path: Path, saved: Pixels, photo: Photo, found: Found, settings: Settings, seen: Seen
) -> tuple[Seen, list[str]]:
    """Judge a JPEG as other decoders see it; return the worst of all decoders, and notes on those that differ."""
    notes = []
    for name, pixels in decode_elsewhere(path).items():
        if np.array_equal(pixels, saved):
            continue
        notes.append(f"{name} decodes other pixels than Pillow: judged in both")
        other = look(classifier, pixels, photo.rgb, found, settings)
        worse = _RANK.index(other.status) > _RANK.index(seen.status)
        seen = replace(other if worse else seen, passes=seen.passes + other.passes)
    return seen, notes


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
        logits: the logits in each reader, (R, M), on the CPU: M is L, or the columns of several classifiers.
        held: whether each constraint holds in every reader, boolean, (1, M).
        readers: whether each constraint holds in a reader, boolean, (1, M), by the reader's name.
        survival: whether it holds in every reader once the photo is compressed, by the compression's name.
        status: `success` if all constraints hold, compressed too, or `unchanged` if the photo was as asked; else
            `partial` if a label of A flipped in every reader, else `failed`.
        passes: forward passes spent.
    """

    logits: Tensor
    held: Tensor
    readers: dict[str, Tensor]
    survival: dict[str, Tensor]
    status: Status
    passes: int


def look(classifier: Victim, rgb: Pixels, photo: Pixels, found: Found, settings: Settings) -> Seen:
    """Classify the pixels of one adversarial photo, (H, W, 3), in every reader, by the reader's real code.

    The search reads lattice points by the same code. Where the file has the very pixels that the search found, the
    logits that it computed of them stand, and no pass is spent.

    Args:
        classifier: the classifier that was attacked, or several.
        rgb: the pixels, 8 bits; the same object as `photo` if no file was written.
        photo: the clean photo's pixels, (H, W, 3).
        found: the targets, the pixels found and their logits, and the logits of the clean photo.
        settings: the readers, and the compressions that the result is to survive.
    """
    targets = found.targets

    def read(pixels: Pixels) -> Tensor:
        return torch.cat([read_columns(classifier, pixels, reader) for reader in settings.readers])

    def everywhere(logits: Tensor) -> Tensor:
        return torch.cat([targets.holds(row[None]) for row in logits]).all(0, keepdim=True)

    checked = settings.survive[1]
    known = found.before if rgb is photo else found.after if np.array_equal(rgb, found.pixels) else None
    logits = read(rgb) if known is None else known
    readers = {reader.name: targets.holds(row[None]) for reader, row in zip(settings.readers, logits, strict=True)}
    held = everywhere(logits)
    survival = {one.name: everywhere(read(one.apply(rgb)[0])) for one in checked}
    flipped = bool((held & targets.flip).any()) or not bool(targets.flip.any())
    holds = all(bool(one.all()) for one in (held, *survival.values()))
    untouched = not bool(targets.flip.any()) and np.array_equal(rgb, photo)
    status: Status = "unchanged" if holds and untouched else "success" if holds else "partial" if flipped else "failed"
    passes = settings.networks * len(settings.readers) * ((known is None) + len(survival))
    return Seen(logits, held, readers, survival, status, passes)
