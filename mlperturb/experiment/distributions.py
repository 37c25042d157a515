"""Figure 1 of the paper: the probability of the label that a case flips, before and after the attack. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
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
    journal: Journal, protocol: Protocol, labels: Sequence[str], wanted: Mapping[str, Container[int]]
) -> list[Distribution]:
    """Return the distribution of each case that flips a single label and has records.

    Args:
        journal: of the evaluation.
        protocol: the cases and methods.
        labels: L names.
        wanted: the rows of the data set that count, by case.
    """
    found = gather(journal, wanted, lambda record: record["probabilities"])
    return [
        Distribution(case.name, case.label, series)
        for case in protocol.cases
        if case.label is not None and (series := _read_case(found, case.name, protocol, labels[case.label]))
    ]


def _read_case(
    found: Mapping[tuple[str, str], Sequence[dict[str, Any] | None]], case: str, protocol: Protocol, label: str
) -> dict[str, list[float]]:
    """Return the series of a case, those without a photo left out. A photo without a file stays as it was."""
    series: dict[str, list[float]] = {}
    for variant in protocol.variants:
        probabilities = [seen for seen in found.get((case, variant.name), ()) if seen]
        if probabilities:
            series.setdefault(CLEAN, [seen["before"][label] for seen in probabilities])
            series[variant.name] = [(seen["after"] or seen["before"])[label] for seen in probabilities]
    return series
