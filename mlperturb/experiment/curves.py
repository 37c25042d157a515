"""Success against RMSD: on what share of the photos a method succeeds within each RMSD, with bootstrap bands.

A photo on which the method failed counts as infinite: a mean over the successes alone flatters a method that fails on
the hard photos. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlperturb.experiment.cases import Protocol
from mlperturb.experiment.records import gather
from mlperturb.system.journal import Journal

SCHEMA = "mlperturb.curves/1"
RANGE = (0.01, 10.0)  # of the area: three decades of RMSD
LEVELS = {"rmsd_50": 0.5, "rmsd_90": 0.9}
RESULTS = {"float": ("success_float", "distortion_float"), "saved": ("status", "distortion")}  # keys of a record
RESAMPLES = 1000  # of the bootstrap

Sizes = npt.NDArray[np.float64]  # the RMSD of each of N photos, infinite where the method failed, (N,)
Interval = list[float | None]  # the ends; None for infinity


def summarise(sizes: Sizes) -> tuple[dict[str, float | None], dict[str, Interval]]:
    """Return the figures of a curve, and a 95% bootstrap interval of each.

    `rmsd_50` and `rmsd_90` are the least RMSD within which the method succeeds on half and on nine tenths of the
    photos, None if it does not. `area` is the area under the curve over log10 RMSD, as a share of `RANGE`: the mean
    over the photos of clip(log10(10 / RMSD) / 3, 0, 1), 0 for a photo on which the method failed. Half the RMSD on
    every photo is .1 more.
    """
    order = np.sort(sizes)
    weights = _resample(len(order))
    shares = areas(order)
    held = weights.cumsum(1)
    values: dict[str, float | None] = {}
    intervals: dict[str, Interval] = {}
    for name, level in LEVELS.items():
        needed = math.ceil(level * len(order) - 1e-9)
        values[name] = _finite(order[needed - 1])
        intervals[name] = _ends(order[(held >= needed).argmax(1)])
    values["area"], intervals["area"] = float(shares.mean()), _ends(weights @ shares / len(order))
    return values, intervals


def areas(sizes: Sizes) -> Sizes:
    """Return each photo's part of the area, in [0, 1], (N,)."""
    low, high = np.log(RANGE)
    with np.errstate(divide="ignore"):
        shares: Sizes = np.clip((high - np.log(sizes)) / (high - low), 0.0, 1.0)
    return shares


def trace(sizes: Sizes) -> dict[str, list[float]]:
    """Return the steps of a curve: each finite `rmsd`, the share with `success` within it, and a 95% band."""
    order = np.sort(sizes)
    steps = np.unique(order[np.isfinite(order)])
    held = _resample(len(order)).cumsum(1) / len(order)
    places = np.searchsorted(order, steps, side="right") - 1
    low, high = np.percentile(held[:, places], [2.5, 97.5], axis=0) if len(steps) else (steps, steps)
    success = (places + 1) / len(order)
    named = {"rmsd": steps, "success": success, "low": low, "high": high}
    return {name: values.tolist() for name, values in named.items()}


def read_curves(journal: Journal, protocol: Protocol, wanted: Mapping[str, Container[int]]) -> list[dict[str, Any]]:
    """Return the curve of each case, method and result that has records, in the form of the schema.

    `wanted` holds the rows of the data set that count, by case.
    """
    found = gather(journal, wanted, lambda record: {result: size_of(record, result) for result in RESULTS})
    return [
        {
            "case": case.name,
            "method": variant.name,
            "result": result,
            "images": len(sizes),
            **trace(np.array([size[result] for size in sizes])),
        }
        for case in protocol.cases
        for variant in protocol.variants
        for result in RESULTS
        if (sizes := found.get((case.name, variant.name)))
    ]


def size_of(record: Mapping[str, Any], result: str) -> float:
    """Return the RMSD of a record's result, `float` or `saved`, infinite where it is not a success."""
    key, distortion = RESULTS[result]
    return float(record[distortion]["rmsd"]) if record[key] in (True, "success") else math.inf


def by_case(curves: Sequence[dict[str, Any]], result: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each case with the curves of its methods."""
    for case in dict.fromkeys(curve["case"] for curve in curves):
        yield case, [curve for curve in curves if (curve["case"], curve["result"]) == (case, result)]


def _resample(count: int) -> npt.NDArray[np.int64]:
    """Return how often each of `count` photos is drawn in each bootstrap sample, (`RESAMPLES`, count)."""
    generator = np.random.default_rng(0)
    return generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _ends(values: Sizes) -> Interval:
    """Return the 2.5% and 97.5% quantiles; of order, since some values may be infinite."""
    return [_finite(end) for end in np.percentile(values, [2.5, 97.5], method="inverted_cdf")]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
