"""What an attack will cost: the most passes for a photo, by method, budget and limits, and the time of a pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import observe
from mlperturb.labels import Request
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import pad_batch, to_tensor
from mlperturb.model.views import ViewedModel
from mlperturb.photos.images import Photo
from mlperturb.run.search import LATTICE
from mlperturb.run.settings import Settings


def most_passes(settings: Settings, labels: int, request: Request | None = None) -> int:
    """Return about the most passes, forward and backward together, that the attack of a photo takes.

    A photo whose search ends early takes fewer.

    Args:
        settings: method, budget and limits.
        labels: the number of labels of the classifier.
        request: the photo's own request; None for that of the settings.
    """
    request = request or settings.request
    method = find_method(settings.method)
    tuning = method.tuning(settings.budget, **settings.options)
    named = [*request.flip, *request.keep, *request.add, *request.remove]
    constraints = labels if request.keep_rest else len(named) + request.any_label
    calls = _search_calls(tuning, constraints)
    if not method.writes_lattice(tuning):
        scales, iterations = LATTICE[settings.budget]
        calls += scales + 2 * iterations + 1
    readers, cost = len(settings.readers), 1 + len(settings.survive[0])
    looks = readers + calls // 4 if readers > 1 else 0  # a fifth of all passes may go to the other readers
    most = (calls + looks + readers) * cost + settings.looks
    if request.any_label:
        most += labels + 1  # the gradient of every label, to find the nearest
    return most if settings.limits.passes is None else min(most, settings.limits.passes)


def _search_calls(tuning: dict[str, Any], constraints: int) -> int:
    """Return the most forward and backward passes of a method's own search, for one view of a photo."""
    if "schedule" in tuning:
        return 2 * int(tuning["schedule"].searches) * int(tuning["schedule"].iterations)
    if "grid" in tuning:
        return 1 + int(tuning["grid"]) + int(tuning["refinements"])
    per_iteration = 2 if "rounding" in tuning else 1 + constraints  # ML-DP has a gradient for each constraint
    return int(tuning["iterations"]) * per_iteration


def time_pass(classifier: Classifier, photos: Sequence[Photo], settings: Settings) -> float:
    """Return the seconds that a pass of a batch takes, the mean of a forward and a backward pass.

    Args:
        classifier: the classifier.
        photos: photos of a batch, of any sizes.
        settings: the readers.
    """
    images, sizes = pad_batch([to_tensor(photo.rgb, classifier.device) for photo in photos])
    model = ViewedModel.bind(classifier, settings.readers[:1], sizes, settings.survive[0])
    best = float("inf")
    for _ in range(2):  # the first time also warms up
        started = time.perf_counter()
        _, _, opening = observe(model, images, opening=True)
        assert opening is not None
        torch.autograd.grad(opening.logits.sum(), opening.images)
        if classifier.device.type == "cuda":
            torch.cuda.synchronize(classifier.device)
        best = min(best, time.perf_counter() - started)
    return best / 2
