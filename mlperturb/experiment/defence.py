"""Purification as a defence (Section IV-H2): the flipped labels that it recovers, and the labels that it damages.

A file is judged as `success` is: a decision counts as flipped, as kept or as recovered only if every reader of the run
sees it so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlperturb import __version__
from mlperturb.errors import ImageError
from mlperturb.metrics import pixel_distortion
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import pad_batch, to_tensor
from mlperturb.model.readers import Reader
from mlperturb.model.views import ViewedModel
from mlperturb.photos.images import Pixels, read_photo
from mlperturb.photos.purify import Purification
from mlperturb.run.pictures import find_output, find_photo
from mlperturb.run.record import MANY, Failure, kept_labels
from mlperturb.run.report import is_unchanged
from mlperturb.system.text import printable
from mlperturb.targets import present

SCHEMA = "mlperturb.jpeg-defence/2"
EARLIER = ("mlperturb.jpeg-defence/1",)  # schemas that are read too
CRITERIA = {  # by whether every clean photo is found
    True: "share of the flipped labels recovered, less share of the clean photos' labels damaged",
    False: "share of the flipped labels recovered, less share of the PNGs' kept labels damaged",
}
_TOGETHER = 8  # largest number of pictures in a batch


@dataclass(frozen=True)
class Attacked:
    """An adversarial PNG, its photo, and the labels of its attack.

    Attributes:
        adversarial: the PNG.
        clean: the photo that it was made of; None if the photo is not found.
        flip: the labels of A.
        keep: the labels of B.
        truth: y, the decisions on the photo in the first reader. If None, y is taken from the decisions on the PNG,
            reversed for A.
        problem: why the PNG cannot be opened; None if it may be.
        passes: forward and backward passes of its attack; None if no report says.
    """

    adversarial: Path
    clean: Path | None
    flip: tuple[str, ...]
    keep: tuple[str, ...]
    truth: dict[str, bool] | None = None
    problem: str | None = None
    passes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Views:
    """The decisions on one photo and the logits of its views, (R, L) each: R readers, the classifier's L labels.

    Attributes:
        truth: y, boolean, (L,).
        asked: masks of A and of B, boolean, (L,) each.
        adversarial: logits of the PNG.
        clean: logits of the photo; None if the photo is not found.
        defended: logits of the purified PNG, for each purification.
        control: logits of the purified photo, for each purification; None if the photo is not found.
        size: bytes of the PNG, then of each purified file; None for a purification that makes no file.
        rmsd: RMSD of the PNG; None if the photo is not found or has another size.
    """

    truth: Tensor
    asked: tuple[Tensor, Tensor]
    adversarial: Tensor
    clean: Tensor | None
    defended: list[Tensor]
    control: list[Tensor] | None
    size: list[int | None]
    rmsd: float | None = None

    def before(self, logits: Tensor, boundary: Tensor) -> Tensor:
        """Say which labels are as on the photo in every reader, boolean, (L,)."""
        return (present(logits, boundary) == self.truth).all(0)

    def reversed(self, logits: Tensor, boundary: Tensor) -> Tensor:
        """Say which labels are reversed in every reader, boolean, (L,)."""
        return (present(logits, boundary) != self.truth).all(0)


def find_attacked(report: dict[str, Any], folder: Path, photos: Path | None = None) -> list[Attacked]:
    """Return the images of a report that were attacked and have an adversarial PNG in `folder`, with their photos.

    A photo that was as asked already is left out: no purification can undo an attack there.

    Raises:
        KeyError: if the labels of an image are not the classifier's.
    """
    labels = report["classifier"]["labels"]
    known = set(labels)
    found = []
    for image in report["images"]:
        problem = None
        try:
            png = find_output(image, "adversarial", folder, report["settings"])
        except ImageError as error:
            png, problem = Path(printable(image["files"]["adversarial"])), str(error)
        if png is None or is_unchanged(image):
            continue
        truth, flip, keep = image["truth"], tuple(image["flip"]), tuple(kept_labels(image, labels))
        if len(labels) > MANY:  # absent labels are left out, see `condense`
            truth = {**dict.fromkeys(labels, False), **truth}
        if not known <= truth.keys() or not known >= {*flip, *keep}:
            raise KeyError("the labels of an image are not the classifier's")
        photo = find_photo(image, folder, report["settings"], photos)
        cost = image.get("cost")
        passes = None if cost is None else (int(cost["forward"]), int(cost["backward"]))
        found.append(Attacked(png, photo, flip, keep, truth, problem, passes))
    return found


def sweep(
    classifier: Classifier,
    attacked: Sequence[Attacked],
    purifications: Sequence[Purification],
    readers: Sequence[Reader],
    done: Callable[[str | None], None] | None = None,
) -> dict[str, Any]:
    """Apply every purification to every PNG, and to its photo as a control; return the counts and probabilities.

    Args:
        classifier: the classifier that was attacked.
        attacked: the PNGs.
        purifications: the purifications to try.
        readers: the readers of the run, in all of which a decision must hold; the first decided on the photos.
        done: called after each PNG, with the error if the PNG or its photo could not be read, else with None.
    """
    names, boundary = [reader.name for reader in readers], classifier.boundary.cpu()
    tallies = [_Tally(purification, classifier.labels, names) for purification in purifications]
    images: list[dict[str, Any]] = []
    for one in attacked:
        entry: dict[str, Any] = {"adversarial": str(one.adversarial), "source": one.clean and str(one.clean)}
        images.append(entry)
        try:
            views = _look(classifier, one, purifications, readers)
        except ImageError as error:
            entry["error"] = asdict(Failure.of(error))
            if done:
                done(str(error))
            continue
        for number, tally in enumerate(tallies):
            tally.add(views, number, boundary, one.passes)
        entry |= _describe(one, views, classifier.labels, purifications, names)
        if done:
            done(None)
    control = all(tally.controls == tally.images for tally in tallies)
    rows = [tally.row(control=control) for tally in tallies]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "readers": names,
        "qualities": rows,
        "best": _best(rows, CRITERIA[control]),
        "images": images,
    }


def _best(rows: Sequence[dict[str, Any]], criterion: str) -> dict[str, Any] | None:
    """Return the setting of the highest score; None if no setting recovers more than it breaks."""
    scores = [row["score"] or 0.0 for row in rows]
    if max(scores) <= 0:
        return None
    equals = [row for row, score in zip(rows, scores, strict=True) if score == max(scores)]
    best = max((row for row in equals if row["defence"] == equals[0]["defence"]), key=lambda row: row["quality"])
    ties = [f"{row['defence']} {row['quality']}" for row in equals if row is not best]
    return {key: best[key] for key in ("defence", "quality", "score")} | {"criterion": criterion, "equals": ties}


@dataclass
class _Counts:
    """The counts of one purification in some of the readers, over all photos; a pair is a part and its whole."""

    recovered: list[int] = field(default_factory=lambda: [0, 0])
    damaged: list[int] = field(default_factory=lambda: [0, 0])
    clean: list[int] = field(default_factory=lambda: [0, 0])
    flipped: int = 0  # photos on which a label was flipped
    restored: int = 0
    survived: int = 0

    def add(self, views: Views, number: int, boundary: Tensor, rows: slice) -> None:
        """Count the labels of one photo under purification `number`, in the readers of `rows`."""
        flip, keep = views.asked
        png, defended = views.adversarial[rows], views.defended[number][rows]
        flipped, held = flip & views.reversed(png, boundary), keep & views.before(png, boundary)
        back, stays = views.before(defended, boundary), views.reversed(defended, boundary)
        _add(self.recovered, back, flipped)
        _add(self.damaged, ~back, held)
        self.flipped += bool(flipped.any())
        self.restored += bool(flipped.any()) and bool((back | ~(flip | keep)).all())
        self.survived += bool(flip.any()) and bool((~flip | stays).all()) and bool((~keep | back).all())
        if views.control is not None and views.clean is not None:
            there = (flip | keep) & views.before(views.clean[rows], boundary)
            _add(self.clean, ~views.before(views.control[number][rows], boundary), there)

    def describe(self) -> dict[str, Any]:
        """Return the counts in the form of the JSON."""
        return {
            "recovered": _count(self.recovered),
            "damaged": _count(self.damaged),
            "flipped_images": self.flipped,
            "restored_images": self.restored,
            "clean_damaged": _count(self.clean),
        }


def _add(pair: list[int], part: Tensor, whole: Tensor) -> None:
    """Count a mask within another mask."""
    pair[0] += int((part & whole).sum())
    pair[1] += int(whole.sum())


class _Tally:
    """The counts of one purification over all photos: in all readers together, and in each."""

    def __init__(self, purification: Purification, labels: Sequence[str], readers: Sequence[str]) -> None:
        self.purification, self.labels = purification, labels
        self.everywhere, self.each = _Counts(), {name: _Counts() for name in readers}
        self.images = self.controls = self.asked = 0
        self.sizes: list[float] = []
        self.passes: list[tuple[int, int]] = []
        self.shift = torch.zeros(len(labels), dtype=torch.double)
        self.bytes: list[int] = []

    def add(self, views: Views, number: int, boundary: Tensor, passes: tuple[int, int] | None = None) -> None:
        """Count the labels of one photo, whose attack took so many passes, under purification `number`."""
        self.everywhere.add(views, number, boundary, slice(None))
        for row, counts in enumerate(self.each.values()):
            counts.add(views, number, boundary, slice(row, row + 1))
        self.images += 1
        self.controls += views.control is not None
        if views.asked[0].any():
            self.asked += 1
            self.sizes += [views.rmsd] if views.rmsd is not None else []
            self.passes += [passes] if passes is not None else []
        after, before = views.defended[number][0].double(), views.adversarial[0].double()
        self.shift += torch.sigmoid(after) - torch.sigmoid(before)
        size = views.size[1 + number]
        if size is not None:
            self.bytes.append(size)

    def row(self, *, control: bool) -> dict[str, Any]:
        """Return the counts in the form of the JSON; the score (see `CRITERIA`) is None if no label was flipped."""
        score, counts = None, self.everywhere
        if counts.recovered[1]:
            broken = counts.clean if control else counts.damaged
            score = counts.recovered[0] / counts.recovered[1] - broken[0] / max(broken[1], 1)
        shift = (self.shift / max(self.images, 1)).tolist()
        forward, backward = (
            (sum(spent) / len(spent) for spent in zip(*self.passes, strict=True)) if self.passes else (None, None)
        )
        return {
            "defence": self.purification.kind,
            "quality": self.purification.setting,
            "images": self.images,
            **counts.describe(),
            "plain": {
                "images": self.asked,
                "successes": counts.survived,
                "rmsd": sum(self.sizes) / len(self.sizes) if self.sizes else None,
                "forward": forward,
                "backward": backward,
            },
            "clean_images": self.controls,
            "score": score,
            "bytes": sum(self.bytes) / len(self.bytes) if self.bytes else None,
            "probability_shift": dict(zip(self.labels, shift, strict=True)),
            "readers": {name: one.describe() | {"successes": one.survived} for name, one in self.each.items()},
        }


def _count(pair: Sequence[int]) -> dict[str, int]:
    return {"labels": pair[0], "total": pair[1]}


def _look(
    classifier: Classifier, one: Attacked, purifications: Sequence[Purification], readers: Sequence[Reader]
) -> Views:
    """Classify a PNG, its photo, and the purified versions of both, in every reader.

    Raises:
        ImageError: if the PNG or the photo cannot be read.
    """
    if one.problem is not None:
        raise ImageError(one.problem)
    png = read_photo(one.adversarial, over=classifier.preprocess.alpha).rgb
    photo = None
    if one.clean is not None:
        photo = read_photo(one.clean, over=classifier.preprocess.alpha).rgb
    purified = [purification.apply(png) for purification in purifications]
    pixels: list[Pixels] = [png, *(rgb for rgb, _ in purified)]
    if photo is not None:
        pixels += [photo, *(purification.apply(photo)[0] for purification in purifications)]
    logits = _read(classifier, pixels, readers)
    count = 1 + len(purifications)
    flip, keep = (
        torch.tensor([label in names for label in classifier.labels]) for names in map(set, (one.flip, one.keep))
    )
    if one.truth is not None:
        truth = torch.tensor([one.truth[label] for label in classifier.labels])
    else:
        truth = present(logits[0, 0], classifier.boundary.cpu()) ^ flip
    return Views(
        truth,
        (flip, keep),
        logits[0],
        None if photo is None else logits[count],
        list(logits[1:count]),
        None if photo is None else list(logits[count + 1 :]),
        [one.adversarial.stat().st_size, *(size for _, size in purified)],
        None if photo is None or photo.shape != png.shape else pixel_distortion(png, photo).rmsd,
    )


@torch.no_grad()
def _read(classifier: Classifier, pixels: Sequence[Pixels], readers: Sequence[Reader]) -> Tensor:
    """Return the logits of pictures in every reader, (n, R, L), on the CPU."""
    parts = []
    for start in range(0, len(pixels), _TOGETHER):
        images, sizes = pad_batch([to_tensor(rgb, classifier.device) for rgb in pixels[start : start + _TOGETHER]])
        model = ViewedModel.bind(classifier, readers, sizes)
        parts.append(torch.stack([model(images, view) for view in range(model.views)], dim=1).cpu())
    return torch.cat(parts)


def _describe(
    one: Attacked, views: Views, labels: Sequence[str], purifications: Sequence[Purification], readers: Sequence[str]
) -> dict[str, Any]:
    """Return the probabilities of the labels of A in every view, in the first reader and in each."""

    def of(logits: Tensor | None, reader: int) -> dict[str, float] | None:
        if logits is None:
            return None
        values = torch.sigmoid(logits[reader].double()).tolist()
        return {label: value for label, value in zip(labels, values, strict=True) if label in one.flip}

    def probabilities(reader: int) -> dict[str, Any]:
        defended = {p.name: of(seen, reader) for p, seen in zip(purifications, views.defended, strict=True)}
        return {"clean": of(views.clean, reader), "adversarial": of(views.adversarial, reader), "defended": defended}

    truth = {label: bool(there) for label, there in zip(labels, views.truth.tolist(), strict=True) if label in one.flip}
    return {
        "flip": list(one.flip),
        "truth": truth,
        "bytes": views.size[0],
        "probabilities": probabilities(0),
        "readers": {name: probabilities(row) for row, name in enumerate(readers)},
    }
