"""Logits and masks by label name, as a record has them: of one classifier, or of each of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlperturb.model.ensemble import Ensemble, Victim, places_of
from mlperturb.targets import Targets

if TYPE_CHECKING:
    from mlperturb.run.search import Found
    from mlperturb.run.verdict import Seen


@dataclass(frozen=True)
class Names:
    """The labels of M columns of logits.

    Attributes:
        labels: L names.
        places: for each label, its columns; the first of them stands for the label.
    """

    labels: tuple[str, ...]
    places: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, victim: Victim) -> Names:
        """Return the names of a classifier's labels, or of all labels of several classifiers."""
        return cls(victim.labels, places_of(victim))

    def asked(self, targets: Targets) -> dict[str, Any]:
        """Return y, A and B of the first row."""
        truth, flip, keep = (self._first(values[0]) for values in (targets.truth, targets.flip, targets.keep))
        return {
            "truth": {label: sign > 0 for label, sign in zip(self.labels, truth, strict=True)},
            "flip": self._named(flip),
            "keep": self._named(keep),
        }

    def held(self, held: Tensor, targets: Targets) -> dict[str, Any]:
        """Return how many constraints hold, of how many, and the labels of which one does not; masks are (1, M)."""
        broken = (~held[0]).tolist()
        violated = [
            label
            for label, columns in zip(self.labels, self.places, strict=True)
            if any(broken[column] for column in columns)
        ]
        return {
            "held": int((held & targets.constrained).sum()),
            "total": int(targets.constrained.sum()),
            "violated": violated,
        }

    def probabilities(self, logits: Tensor) -> dict[str, float]:
        """Return the probabilities of logits, (M,)."""
        return dict(zip(self.labels, self._first(torch.sigmoid(logits.double().cpu())), strict=True))

    def finite(self, logits: Tensor | None) -> dict[str, float] | None:
        """Return the probabilities; None where they are unknown or not finite."""
        return None if logits is None or not bool(logits.isfinite().all()) else self.probabilities(logits)

    def _first(self, values: Tensor) -> list[Any]:
        """Return the value of the first column of each label."""
        whole = values.tolist()
        return [whole[columns[0]] for columns in self.places]

    def _named(self, wanted: Sequence[bool]) -> list[str]:
        return [label for label, one in zip(self.labels, wanted, strict=True) if one]


def by_reader(names: Names, found: Found, seen: Seen) -> dict[str, dict[str, Any]]:
    """Return for each reader which constraints hold, and the probabilities before and after."""
    return {
        name: {
            **names.held(held, found.targets),
            "before": names.probabilities(found.before[number]),
            "after": names.probabilities(seen.logits[number]),
        }
        for number, (name, held) in enumerate(seen.readers.items())
    }


def by_classifier(ensemble: Ensemble, found: Found, seen: Seen) -> dict[str, dict[str, Any]]:
    """Return for each classifier its own decisions on the photo, what is asked of it, and what holds in its readers."""
    described: dict[str, dict[str, Any]] = {}
    for (name, one), columns, own in zip(ensemble.members.items(), ensemble.columns(), ensemble.readers, strict=True):
        names, targets = Names.of(one), _narrow(found.targets, columns)
        part = replace(found, before=found.before[:, columns], goal=found.goal.aimed_at(targets))
        inside = replace(
            seen,
            logits=seen.logits[:, columns],
            held=seen.held[:, columns],
            readers={reader: held[:, columns] for reader, held in seen.readers.items()},
        )
        readers = {reader: values for reader, values in by_reader(names, part, inside).items() if reader in own}
        described[name] = {
            **names.asked(targets),
            **names.held(inside.held, targets),
            "before": names.probabilities(part.before[0]),
            "after": names.probabilities(inside.logits[0]),
            "readers": readers,
        }
    return described


def _narrow(targets: Targets, columns: slice) -> Targets:
    """Return the targets of some columns."""
    masks = (targets.flip, targets.keep, targets.truth)
    flip, keep, truth = (mask[:, columns] for mask in masks)
    return replace(targets, flip=flip, keep=keep, truth=truth, boundary=targets.boundary[columns])
