"""Which labels of a photo a picture shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Shown:
    """A label of a photo, as a picture shows it.

    Attributes:
        label: its name.
        group: `flip` of A, `keep` of B, `free` of neither.
        before: probability on the photo.
        after: probability on the adversarial file; None if there is no file.
        threshold: from which probability the label is present.
        violated: the constraint on it does not hold.
    """

    label: str
    group: Literal["flip", "keep", "free"]
    before: float
    after: float | None
    threshold: float
    violated: bool


def choose_labels(image: dict[str, Any], thresholds: dict[str, float], most: int) -> list[Shown]:
    """Return the labels of a photo that matter most: those of A, then the violated, then those nearest to present.

    Of A, the label that moved most comes first; of two others alike, the label of B comes before a free label.

    Args:
        image: a record of a report.
        thresholds: by label.
        most: how many labels at most; those of A come first.
    """
    probabilities = image["probabilities"]
    if not probabilities:
        return []
    before, after = probabilities["before"], probabilities["after"] or {}
    violated = set((image["constraints"] or {"violated": ()})["violated"])
    flipped, kept = list(image["flip"]), set(image["keep"])
    flipped.sort(key=lambda label: -abs(after.get(label, before[label]) - before[label]))
    others = [label for label in before if label not in flipped]
    others.sort(
        key=lambda label: (label in violated, label in kept, max(before[label], after.get(label, 0.0))), reverse=True
    )
    return [
        Shown(
            label,
            "flip" if label in image["flip"] else "keep" if label in kept else "free",
            before[label],
            after.get(label),
            thresholds[label],
            label in violated,
        )
        for label in [*flipped, *others][:most]
    ]
