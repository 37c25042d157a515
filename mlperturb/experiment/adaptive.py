"""The adaptive attack on a defence: for each purification, an attack that knows it and must survive it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlperturb.errors import ImageError, UsageError
from mlperturb.experiment.curves import summarise
from mlperturb.experiment.defence import Attacked
from mlperturb.labels import Request
from mlperturb.limits import Limits
from mlperturb.metrics import pixel_distortion
from mlperturb.model.classifier import Classifier
from mlperturb.model.readers import Reader
from mlperturb.photos.images import Photo, read_photo
from mlperturb.photos.purify import Purification
from mlperturb.photos.regions import parse_region
from mlperturb.run.search import Found, Searcher
from mlperturb.run.settings import Settings
from mlperturb.run.verdict import look

_SHARED = ("budget", "max_rmsd", "max_linf", "margin", "region")  # what a report's settings and ours have in common


def settings_of(asked: Sequence[Mapping[str, Any]], readers: Sequence[Reader]) -> Settings:
    """Return the settings of an adaptive attack beside plain attacks of these reports' `settings`.

    The budget, the limits on distortion, the margin and the region are the plain attack's. A limit on passes is not:
    each compression is a further view and costs as many passes as the photo itself.

    Raises:
        UsageError: if the reports differ in these, or they cannot be carried out.
        KeyError: if a report lacks them.
    """
    if not asked:
        return Settings("ml-ddn", "balanced", Request(flip=(0,)), readers=tuple(readers))
    first, *others = ({name: one[name] for name in _SHARED} for one in asked)
    different = [name for name in _SHARED if any(other[name] != first[name] for other in others)]
    if different:
        raise UsageError(f"expected reports on the same {different[0]} for an adaptive attack beside them")
    return Settings(
        "ml-ddn",
        first["budget"],
        Request(flip=(0,)),
        Limits(None, first["max_rmsd"], first["max_linf"]),
        margin=first["margin"],
        readers=tuple(readers),
        region=None if first["region"] is None else parse_region(first["region"]),
    )


def adapt(
    classifier: Classifier,
    attacked: Sequence[Attacked],
    purifications: Sequence[Purification],
    settings: Settings,
    *,
    done: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Attack the clean photos again, once for each purification, so that the result survives it.

    Args:
        classifier: the classifier that was attacked.
        attacked: the PNGs; those without a label to flip, or whose clean photo is missing, are left out.
        purifications: the defences.
        settings: of the attacks, see `settings_of`; the purification to survive and the requests are put in.
        done: called with the number of photos attacked, after each batch.

    Returns:
        For each purification the number of `images`, the `successes`, the mean `rmsd` of the successes, the `rmsd_50`
        within which half of the photos succeed, a failure as infinite, and the mean passes `forward` and `backward`;
        None where there is nothing to average.
    """
    photos, requests = _open(classifier, attacked)
    rows = []
    for purification in purifications:
        whole = replace(settings, survive=((purification,), (purification,)))
        found: list[tuple[float, int, int]] = []
        searcher = Searcher(classifier, whole)
        for start, stop in searcher.group([photo.rgb.shape[:2] for photo in photos]):
            for first, last, part in searcher.parts(photos[start:stop], requests[start:stop]):
                for photo, one in zip(
                    photos[start + first : start + last], part or [None] * (last - first), strict=True
                ):
                    found.append(_judge(classifier, photo, one, whole))
                done(last - first)
        rows.append(_describe(found))
    return rows


def _judge(classifier: Classifier, photo: Photo, found: Found | None, settings: Settings) -> tuple[float, int, int]:
    """Return the RMSD of a result, infinite unless it is a success, and its forward and backward passes."""
    if found is None:
        return math.inf, 0, 0
    if look(classifier, found.pixels, photo.rgb, found, settings).status != "success":
        return math.inf, found.forward, found.backward
    return pixel_distortion(found.pixels, photo.rgb).rmsd, found.forward, found.backward


def _describe(found: Sequence[tuple[float, int, int]]) -> dict[str, Any]:
    """Return the figures of one purification."""
    sizes = np.array([size for size, _, _ in found], dtype=np.float64)
    held = sizes[np.isfinite(sizes)]
    passes = {
        name: statistics.fmean(one[place] for one in found) if found else None
        for place, name in ((1, "forward"), (2, "backward"))
    }
    return {
        "images": len(found),
        "successes": len(held),
        "rmsd": float(held.mean()) if len(held) else None,
        "rmsd_50": summarise(sizes)[0]["rmsd_50"] if len(sizes) else None,
        **passes,
    }


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
