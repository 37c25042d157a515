"""Transfer: the files of an attack before classifiers that were not attacked, each in its own readers.

A label counts where the other classifier has it, by name, and decides on the clean photo in every reader as the
attacked classifier did: a flip that it already saw, or a mistake of its own, says nothing about the attack. A flip
holds, and a kept label stays, where every reader of the other classifier says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from mlperturb import __version__
from mlperturb.errors import ImageError
from mlperturb.experiment.defence import Attacked
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import pad_batch, to_tensor
from mlperturb.model.readers import Reader, parse_readers
from mlperturb.model.views import ViewedModel
from mlperturb.photos.images import Pixels, read_photo
from mlperturb.run.record import Failure
from mlperturb.targets import present

SCHEMA = "mlperturb.transfer/1"


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema of `transfer.json`."""
    schema: dict[str, Any] = json.loads((files("mlperturb") / "schemas" / "transfer-1.json").read_text())
    return schema


@dataclass(frozen=True)
class Made:
    """The files that an attack made.

    Attributes:
        source: the name of the classifier that was attacked, or of the run.
        attacked: the files.
    """

    source: str
    attacked: Sequence[Attacked]


@dataclass
class _Count:
    """The counts of the files of a source before one target."""

    images: int = 0  # files with a label to flip that counts
    fooled: int = 0  # of these: every label to flip of the target is as wanted
    successes: int = 0  # of these: and every label to keep that counts stays
    flips: list[int] = field(default_factory=lambda: [0, 0])  # flips that hold, of the flips that count
    broken: list[int] = field(default_factory=lambda: [0, 0])  # kept labels that break, of those that count
    already: int = 0  # flips that the target saw before the attack
    unread: int = 0
    labels: dict[str, list[int]] = field(default_factory=dict)  # flips that hold, of, broken, of; by label
    missing: Counter[str] = field(default_factory=Counter)  # labels asked for that the target lacks

    def row(self, source: str, target: str) -> dict[str, Any]:
        """Return the counts in the form of the JSON."""
        return {
            "source": source,
            "target": target,
            "images": self.images,
            "fooled": self.fooled,
            "successes": self.successes,
            "flips": {"labels": self.flips[0], "total": self.flips[1]},
            "broken": {"labels": self.broken[0], "total": self.broken[1]},
            "already": self.already,
            "unread": self.unread,
            "labels": {
                label: {"flips": {"labels": a, "total": b}, "broken": {"labels": c, "total": d}}
                for label, (a, b, c, d) in self.labels.items()
            },
            "missing": dict(self.missing),
        }


def transfer(
    sources: Sequence[Made],
    targets: Mapping[str, Classifier],
    *,
    readers: Sequence[str] = (),
    done: Callable[[str | None], None] | None = None,
) -> dict[str, Any]:
    """Show every file to every target; return the counts, and the decisions of each target on each file.

    Args:
        sources: the files, by the classifier that they were made on.
        targets: the classifiers to show them to, by name.
        readers: readers of all targets; empty for the own readers of each target.
        done: called after each file, with the error if the file or its photo could not be read, else with None.
    """
    named = {name: parse_readers(readers or one.preprocess.readers) for name, one in targets.items()}
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for made in sources:
        counts = {name: _Count() for name in targets}
        for one in made.attacked:
            entry: dict[str, Any] = {
                "source": made.source, "adversarial": str(one.adversarial), "photo": one.clean and str(one.clean),
                "targets": {}, "error": None,
            }  # fmt: skip
            images.append(entry)
            try:
                seen = {name: _look(target, one, named[name]) for name, target in targets.items()}
            except ImageError as error:
                entry["error"] = asdict(Failure.of(error))
                for count in counts.values():
                    count.unread += 1
            else:
                entry["targets"] = seen
                for name, said in seen.items():
                    _tally(counts[name], said)
            if done:
                done(entry["error"] and entry["error"]["message"])
        rows += [count.row(made.source, name) for name, count in counts.items()]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "readers": {name: [reader.name for reader in own] for name, own in named.items()},
        "pairs": rows,
        "images": images,
    }


def _look(target: Classifier, one: Attacked, readers: Sequence[Reader]) -> dict[str, Any]:
    """Return what a target says of a file: by label of A and of B, whether it counts and whether it holds.

    Raises:
        ImageError: if the file or its photo cannot be read, or is not to be opened.
    """
    if one.problem is not None:
        raise ImageError(one.problem)
    over = target.preprocess.alpha
    png = read_photo(one.adversarial, over=over).rgb
    photo = None if one.clean is None else read_photo(one.clean, over=over).rgb
    target.preprocess.check(png.shape[:2])
    boundary, place = target.boundary.cpu(), {label: number for number, label in enumerate(target.labels)}
    after = _read(target, png, readers)
    before = None if photo is None else _read(target, photo, readers)
    truth = one.truth or {}
    chosen: dict[str, dict[str, Any]] = {"flip": {}, "keep": {}}
    for part, labels in (("flip", one.flip), ("keep", one.keep)):
        for label in labels:
            if label not in place:
                continue
            number, was = place[label], bool(truth[label])
            wanted = was != (part == "flip")
            clean = None if before is None else _says(before[:, number], boundary[number])
            chosen[part][label] = {
                "counts": clean is None or clean is was,
                "already": part == "flip" and clean is wanted,
                "holds": _says(after[:, number], boundary[number]) is wanted,
                "before": None if before is None else _probability(before[0, number]),
                "after": _probability(after[0, number]),
            }
    missing = [label for label in (*one.flip, *one.keep) if label not in place]
    return {**chosen, "missing": missing}


def _probability(logit: Tensor) -> float | None:
    """Return the probability of a logit; None for a NaN, which JSON does not have."""
    return float(logit.double().sigmoid()) if bool(logit.isfinite()) else None


def _says(logits: Tensor, boundary: Tensor) -> bool | None:
    """Return whether every reader sees a label present, or absent; None where they disagree, or a logit is a NaN."""
    there = present(logits, boundary)
    if not bool(logits.isfinite().all()):
        return None
    return True if bool(there.all()) else False if not bool(there.any()) else None


def _tally(count: _Count, seen: dict[str, Any]) -> None:
    """Count the labels of one file."""
    flips = {label: one for label, one in seen["flip"].items() if one["counts"]}
    kept = {label: one for label, one in seen["keep"].items() if one["counts"]}
    count.already += sum(one["already"] for one in seen["flip"].values())
    count.missing.update(seen["missing"])
    for label, one in flips.items():
        _add(count, label, one["holds"], 0)
    for label, one in kept.items():
        _add(count, label, not one["holds"], 2)
    if not flips:
        return
    count.images += 1
    fooled = all(one["holds"] for one in seen["flip"].values())
    count.fooled += fooled
    count.successes += fooled and all(one["holds"] for one in kept.values())


def _add(count: _Count, label: str, part: bool, place: int) -> None:
    """Count a label, in its own row and in the sum: as a flip at place 0, as a kept label at place 2."""
    own, pair = count.labels.setdefault(label, [0, 0, 0, 0]), count.broken if place else count.flips
    own[place] += part
    own[place + 1] += 1
    pair[0] += part
    pair[1] += 1


@torch.no_grad()
def _read(target: Classifier, rgb: Pixels, readers: Sequence[Reader]) -> Tensor:
    """Return the logits of a picture in every reader, (R, L), on the CPU."""
    images, sizes = pad_batch([to_tensor(rgb, target.device)])
    model = ViewedModel.bind(target, readers, sizes)
    return torch.cat([model(images, view) for view in range(model.views)]).cpu()
