"""Purification as a defence (Section IV-H2): the flipped labels that it recovers, and the labels that it damages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlperturb import __version__
from mlperturb.errors import ImageError
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import to_tensor
from mlperturb.photos.images import Pixels, read_photo
from mlperturb.photos.purify import Purification
from mlperturb.run.record import Failure
from mlperturb.run.report import find_output, find_photo
from mlperturb.targets import present

SCHEMA = "mlperturb.jpeg-defence/1"
CRITERIA = {  # by whether every clean photo is found
    True: "share of the flipped labels recovered, less share of the clean photos' labels damaged",
    False: "share of the flipped labels recovered, less share of the PNGs' kept labels damaged",
}
_TOGETHER = 8  # largest number of views in a batch


@dataclass(frozen=True)
class Attacked:
    """An adversarial PNG, its photo, and the labels of its attack.

    Attributes:
        adversarial: the PNG.
        clean: the photo that it was made of; None if the photo is not found.
        flip: the labels of A.
        keep: the labels of B.
        truth: y, the decisions on the photo. If None, y is taken from the decisions on the PNG, reversed for A.
    """

    adversarial: Path
    clean: Path | None
    flip: tuple[str, ...]
    keep: tuple[str, ...]
    truth: dict[str, bool] | None = None


@dataclass(frozen=True)
class Views:
    """The decisions on one photo and the logits of its views, (L,) each, in the classifier's order of labels.

    Attributes:
        truth: y, boolean.
        asked: masks of A and of B, boolean.
        adversarial: logits of the PNG.
        clean: logits of the photo; None if the photo is not found.
        defended: logits of the purified PNG, for each purification.
        control: logits of the purified photo, for each purification; None if the photo is not found.
        size: bytes of the PNG, then of each purified file; None for a purification that makes no file.
    """

    truth: Tensor
    asked: tuple[Tensor, Tensor]
    adversarial: Tensor
    clean: Tensor | None
    defended: list[Tensor]
    control: list[Tensor] | None
    size: list[int | None]


def find_attacked(report: dict[str, Any], folder: Path, photos: Path | None = None) -> list[Attacked]:
    """Return the images of a report that have an adversarial PNG in `folder`, with their photos.

    Raises:
        ImageError: if the report names a file outside the folder.
        KeyError: if the labels of an image are not the classifier's.
    """
    labels = set(report["classifier"]["labels"])
    found = []
    for image in report["images"]:
        png = find_output(image, "adversarial", folder)
        if png is None:
            continue
        truth, flip, keep = image["truth"], tuple(image["flip"]), tuple(image["keep"])
        if not labels <= truth.keys() or not labels >= {*flip, *keep}:
            raise KeyError("the labels of an image are not the classifier's")
        found.append(Attacked(png, find_photo(image, folder, report["settings"], photos), flip, keep, truth))
    return found


def sweep(
    classifier: Classifier,
    attacked: Sequence[Attacked],
    purifications: Sequence[Purification],
    done: Callable[[str | None], None] | None = None,
) -> dict[str, Any]:
    """Apply every purification to every PNG, and to its photo as a control; return the counts and probabilities.

    Args:
        classifier: the classifier that was attacked.
        attacked: the PNGs.
        purifications: the purifications to try.
        done: called after each PNG, with the error if the PNG or its photo could not be read, else with None.
    """
    labels, boundary = classifier.labels, classifier.boundary.cpu()
    tallies = [_Tally(purification, len(labels)) for purification in purifications]
    images: list[dict[str, Any]] = []
    for one in attacked:
        entry: dict[str, Any] = {"adversarial": str(one.adversarial), "source": one.clean and str(one.clean)}
        images.append(entry)
        try:
            views = _look(classifier, one, purifications)
        except ImageError as error:
            entry["error"] = asdict(Failure.of(error))
            if done:
                done(str(error))
            continue
        for number, tally in enumerate(tallies):
            tally.add(views, number, boundary)
        entry |= _describe(one, views, labels, purifications)
        if done:
            done(None)
    control = all(tally.controls == tally.images for tally in tallies)
    rows = [tally.row(labels, control=control) for tally in tallies]
    scores = [row["score"] if row["score"] is not None else -2.0 for row in rows]
    equals = [row for row, score in zip(rows, scores, strict=True) if score == max(scores)]
    best = max((row for row in equals if row["defence"] == equals[0]["defence"]), key=lambda row: row["quality"])
    ties = [f"{row['defence']} {row['quality']}" for row in equals if row is not best]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "qualities": rows,
        "best": {key: best[key] for key in ("defence", "quality", "score")}
        | {"criterion": CRITERIA[control], "equals": ties},
        "images": images,
    }


class _Tally:
    """The counts of one purification over all photos."""

    def __init__(self, purification: Purification, labels: int) -> None:
        self.purification = purification
        self.images = self.restored = self.controls = self.asked = self.survived = 0
        self.recovered, self.damaged, self.clean = [0, 0], [0, 0], [0, 0]
        self.shift = torch.zeros(labels, dtype=torch.double)
        self.bytes: list[int] = []

    def add(self, views: Views, number: int, boundary: Tensor) -> None:
        """Count the labels of one photo under purification `number`."""
        defended, size = views.defended[number], views.size[1 + number]
        flip, keep = views.asked
        png, after = present(views.adversarial, boundary), present(defended, boundary)
        flipped, held = flip & (png != views.truth), keep & (png == views.truth)
        back = after == views.truth
        self.images += 1
        for pair, these, among in ((self.recovered, back, flipped), (self.damaged, ~back, held)):
            pair[0] += int((these & among).sum())
            pair[1] += int(among.sum())
        self.asked += bool(flip.any())
        self.survived += bool(flip.any()) and bool((~flip | ~back).all()) and bool((~keep | back).all())
        self.restored += bool(flipped.any()) and bool((back | ~(flip | keep)).all())
        self.shift += torch.sigmoid(defended.double()) - torch.sigmoid(views.adversarial.double())
        if views.control is not None:
            self.controls += 1
            self.clean[0] += int(((present(views.control[number], boundary) != views.truth) & (flip | keep)).sum())
            self.clean[1] += int((flip | keep).sum())
        if size is not None:
            self.bytes.append(size)

    def row(self, labels: Sequence[str], *, control: bool) -> dict[str, Any]:
        """Return the counts in the form of the JSON; the score (see `CRITERIA`) is None if no label was flipped."""
        score = None
        if self.recovered[1]:
            broken = self.clean if control else self.damaged
            score = self.recovered[0] / self.recovered[1] - broken[0] / max(broken[1], 1)
        shift = (self.shift / max(self.images, 1)).tolist()
        return {
            "defence": self.purification.kind,
            "quality": self.purification.setting,
            "images": self.images,
            "recovered": _count(self.recovered),
            "damaged": _count(self.damaged),
            "restored_images": self.restored,
            "plain": {"images": self.asked, "successes": self.survived},
            "clean_images": self.controls,
            "clean_damaged": _count(self.clean),
            "score": score,
            "bytes": sum(self.bytes) / len(self.bytes) if self.bytes else None,
            "probability_shift": dict(zip(labels, shift, strict=True)),
        }


def _count(pair: Sequence[int]) -> dict[str, int]:
    return {"labels": pair[0], "total": pair[1]}


def _look(classifier: Classifier, one: Attacked, purifications: Sequence[Purification]) -> Views:
    """Classify a PNG, its photo, and the purified versions of both.

    Raises:
        ImageError: if the PNG or the photo cannot be read.
    """
    png = read_photo(one.adversarial).rgb
    photo = None
    if one.clean is not None:
        photo = read_photo(one.clean).rgb
    purified = [purification.apply(png) for purification in purifications]
    pixels: list[Pixels] = [png, *(rgb for rgb, _ in purified)]
    if photo is not None:
        pixels += [photo, *(purification.apply(photo)[0] for purification in purifications)]
    with torch.no_grad():
        logits = torch.cat(
            [
                classifier([to_tensor(rgb, classifier.device) for rgb in pixels[start : start + _TOGETHER]]).cpu()
                for start in range(0, len(pixels), _TOGETHER)
            ]
        )
    count = 1 + len(purifications)
    flip, keep = (torch.tensor([label in names for label in classifier.labels]) for names in (one.flip, one.keep))
    if one.truth is not None:
        truth = torch.tensor([one.truth[label] for label in classifier.labels])
    else:
        truth = present(logits[0], classifier.boundary.cpu()) ^ flip
    return Views(
        truth,
        (flip, keep),
        logits[0],
        None if photo is None else logits[count],
        list(logits[1:count]),
        None if photo is None else list(logits[count + 1 :]),
        [one.adversarial.stat().st_size, *(size for _, size in purified)],
    )


def _describe(
    one: Attacked, views: Views, labels: Sequence[str], purifications: Sequence[Purification]
) -> dict[str, Any]:
    """Return the probabilities of the labels of A in every view."""

    def of(logits: Tensor | None) -> dict[str, float] | None:
        if logits is None:
            return None
        values = torch.sigmoid(logits.double()).tolist()
        return {label: value for label, value in zip(labels, values, strict=True) if label in one.flip}

    defended = {p.name: of(logits) for p, logits in zip(purifications, views.defended, strict=True)}
    truth = {label: bool(there) for label, there in zip(labels, views.truth.tolist(), strict=True) if label in one.flip}
    return {
        "flip": list(one.flip),
        "truth": truth,
        "bytes": views.size[0],
        "probabilities": {"clean": of(views.clean), "adversarial": of(views.adversarial), "defended": defended},
    }
