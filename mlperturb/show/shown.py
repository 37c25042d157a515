"""The labels of a photo that a figure or the gallery shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlperturb.run.record import kept_labels


@dataclass(frozen=True)
class Shown:
    """A label of a photo in a figure or the gallery.

    Attributes:
        label: its name.
        group: `flip` for A, `keep` for B, `free` for neither.
        before: probability on the photo, in [0, 1].
        after: probability on the adversarial file, in [0, 1]; None if there is no file.
        threshold: the probability from which the label is present.
        violated: whether the constraint on the label does not hold.
    """

    label: str
    group: Literal["flip", "keep", "free"]
    before: float
    after: float | None
    threshold: float
    violated: bool


def choose_labels(image: dict[str, Any], thresholds: dict[str, float], most: int) -> list[Shown]:
    """Return the labels of a photo that matter most: labels of A, then violated labels, then the most probable.

    Within A, the label whose probability changed most comes first. Among other labels, violated labels come first, then
    labels of B, then free labels; within each group, the label with the largest probability comes first.

    Args:
        image: a record of a report.
        thresholds: the thresholds on the probability, by label.
        most: largest number of labels.
    """
    probabilities = image["probabilities"]
    if not probabilities:
        return []
    before, after = probabilities["before"], probabilities["after"] or {}
    violated = set((image["constraints"] or {"violated": ()})["violated"])
    flipped, chosen = list(image["flip"]), set(image["flip"])
    kept = set(kept_labels(image, list(thresholds)))
    flipped.sort(key=lambda label: -abs(after.get(label, before[label]) - before[label]))
    others = [label for label in before if label not in chosen]
    others.sort(
        key=lambda label: (label in violated, label in kept, max(before[label], after.get(label, 0.0))), reverse=True
    )
    return [
        Shown(
            label,
            "flip" if label in chosen else "keep" if label in kept else "free",
            before[label],
            after.get(label),
            thresholds[label],
            label in violated,
        )
        for label in [*flipped, *others][:most]
    ]
