"""Figure 1 of the paper: the probability of the label that a case flips, before and after the attack. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from mlperturb.experiment.cases import Protocol
from mlperturb.experiment.records import gather
from mlperturb.system.journal import Journal

CLEAN = "clean"  # the series of the photos themselves


@dataclass(frozen=True)
class Distribution:
    """The probabilities of the label of a case such as Person or Sheep.

    Attributes:
        case: the name of the case.
        label: number of the label that it flips.
        series: the probability on each photo, by method; first `CLEAN`, before the attack.
    """

    case: str
    label: int
    series: dict[str, list[float]]


def read_distributions(
    journal: Journal, protocol: Protocol, wanted: Mapping[str, Container[int]]
) -> list[Distribution]:
    """Return the distribution of each case that flips a single label and has records.

    Args:
        journal: of the evaluation.
        protocol: the cases and methods.
        wanted: the rows of the data set that count, by case.
    """
    single = {case.name: case.label for case in protocol.cases if case.label is not None}
    rows = {name: wanted[name] for name in single if name in wanted}
    found = gather(journal, rows, _read_pair) if rows else {}
    distributions = []
    for name, label in single.items():
        series: dict[str, list[float]] = {}
        for variant in protocol.variants:
            if pairs := [pair for pair in found.get((name, variant.name), ()) if pair]:
                series.setdefault(CLEAN, [before for before, _ in pairs])
                series[variant.name] = [after for _, after in pairs]
        if series:
            distributions.append(Distribution(name, label, series))
    return distributions


def _read_pair(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the probability of a record's only label to flip, on the photo and in the file.

    A photo without a file stays as it was; None for a photo that could not be read.
    """
    seen = record["probabilities"]
    if not seen:
        return None
    (label,) = record["flip"]
    return seen["before"][label], (seen["after"] or seen["before"])[label]
