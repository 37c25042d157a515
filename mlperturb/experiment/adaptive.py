"""The adaptive attack on a defence: for each purification, an attack that knows it and must survive it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mlperturb.errors import ImageError
from mlperturb.experiment.defence import Attacked
from mlperturb.labels import Request
from mlperturb.metrics import distortion
from mlperturb.model.classifier import Classifier
from mlperturb.model.readers import Reader
from mlperturb.photos.images import Photo, read_photo
from mlperturb.photos.purify import Purification
from mlperturb.run.search import Searcher
from mlperturb.run.settings import Settings
from mlperturb.run.verdict import look


def adapt(
    classifier: Classifier,
    attacked: Sequence[Attacked],
    purifications: Sequence[Purification],
    readers: Sequence[Reader],
    *,
    budget: str = "balanced",
    done: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Attack the clean photos again, by ML-DDN, once for each purification, so that the result survives it.

    Args:
        classifier: the classifier that was attacked.
        attacked: the PNGs; those without a label to flip, or whose clean photo is missing, are left out.
        purifications: the defences.
        readers: readers in all of which the result must hold.
        budget: a name of `attacks.BUDGETS`.
        done: called with the number of photos attacked, after each batch.

    Returns:
        For each purification the number of `images`, the `successes`, and the mean `rmsd` of the successes, or None.
    """
    photos, requests = _open(classifier, attacked)
    rows = []
    for purification in purifications:
        settings = Settings(
            "ml-ddn", budget, Request(flip=(0,)), survive=((purification,), (purification,)), readers=tuple(readers)
        )
        sizes: list[float] = []
        searcher = Searcher(classifier, settings)
        for start, stop in searcher.group([photo.rgb.shape[:2] for photo in photos]):
            for first, last, found in searcher.parts(photos[start:stop], requests[start:stop]):
                for photo, one in zip(photos[start + first : start + last], found or (), strict=False):
                    if one is not None and look(classifier, one.pixels, photo.rgb, one, settings).status == "success":
                        moved = torch.from_numpy(one.pixels.astype(np.int16) - photo.rgb)
                        sizes.append(distortion(moved).rmsd)
                done(last - first)
        rmsd = statistics.fmean(sizes) if sizes else None
        rows.append({"images": len(photos), "successes": len(sizes), "rmsd": rmsd})
    return rows


def _open(classifier: Classifier, attacked: Sequence[Attacked]) -> tuple[list[Photo], list[Request]]:
    """Return the clean photos that can be read, and what was asked of each."""
    place = {label: number for number, label in enumerate(classifier.labels)}
    photos, requests = [], []
    for one in attacked:
        try:
            photo = None if one.clean is None else read_photo(one.clean, over=classifier.preprocess.alpha)
        except ImageError:
            continue  # the sweep has reported it
        if photo is None or not one.flip:
            continue
        flip, keep = (tuple(place[label] for label in names) for names in (one.flip, one.keep))
        photos.append(replace(photo, alpha=None))
        requests.append(Request(flip=flip, keep=keep))
    return photos, requests
