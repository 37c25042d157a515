"""Make the rows of Tables IV and V from records: means over the photos, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlperturb.errors import StorageError
from mlperturb.experiment.cases import Protocol
from mlperturb.experiment.curves import RESULTS, summarise
from mlperturb.experiment.records import batches
from mlperturb.metrics import (
    auc,
    average_precision,
    instance_f1,
    instance_hamming,
    kendall_tau,
    ranking_loss,
)
from mlperturb.system.journal import Journal
from mlperturb.targets import Targets, decide

METRICS = ("rmsd", "hamming_a", "hamming_b", "f1", "ranking_loss", "map", "auc", "kendall_tau")
_RESAMPLES = 1000

Figures = dict[str, npt.NDArray[np.float64]]  # by name, the figure of each of N photos, (N,)


def tabulate(
    journal: Journal, protocol: Protocol, labels: Sequence[str], boundary: Tensor, wanted: Mapping[str, Container[int]]
) -> list[dict[str, Any]]:
    """Read the journal, a batch at a time, and return a row for each case and method that has records.

    Args:
        journal: of the evaluation.
        protocol: the cases and methods.
        labels: L names.
        boundary: the logits from which the labels are present, (L,).
        wanted: the rows of the data set that count, by case: an earlier start may have attacked more photos.

    Raises:
        StorageError: if the journal is damaged.
    """
    gathered: dict[tuple[str, str], list[Figures]] = {}
    for entry in batches(journal):
        try:
            places = [n for n, row in enumerate(entry["rows"]) if row in wanted.get(entry["case"], ())]
            if not places:
                continue
            figures = measure([entry["records"][place] for place in places], labels, boundary)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{journal.path} has a damaged record ({error!r:.80}); `overwrite` starts again"
            ) from error
        figures["row"] = np.array([entry["rows"][place] for place in places], dtype=np.float64)
        gathered.setdefault((entry["case"], entry["method"]), []).append(figures)
    return [
        make_row(case.name, variant.name, gathered[case.name, variant.name])
        for case in protocol.cases
        for variant in protocol.variants
        if (case.name, variant.name) in gathered
    ]


def measure(records: Sequence[dict[str, Any]], labels: Sequence[str], boundary: Tensor) -> Figures:
    """Return the figures of each of N records: `METRICS` by result, and those of the whole record.

    These are `success`, `success_float`, `forward`, `backward`, `passes`, which is their sum, and `error`. The results
    are `float` and `saved`, and both are compared with y*. A figure that is not defined for a photo is NaN: Hamming(B)
    if B is empty; ranking loss, mAP and AUC if no label is positive in y*, or every label is.
    """
    figures: Figures = {
        "success": np.array([record["status"] == "success" for record in records], dtype=np.float64),
        "success_float": np.array([bool(record["success_float"]) for record in records], dtype=np.float64),
        "forward": np.array([record["cost"]["forward"] for record in records], dtype=np.float64),
        "backward": np.array([record["cost"]["backward"] for record in records], dtype=np.float64),
        "error": np.array([record["error"] is not None for record in records], dtype=np.float64),
    }
    figures["passes"] = figures["forward"] + figures["backward"]

    def table(values: Iterable[Iterable[float]]) -> Tensor:
        return torch.tensor([list(row) for row in values], dtype=torch.double).view(-1, len(labels))

    for name, when, distortion in (("float", "float", "distortion_float"), ("saved", "after", "distortion")):
        rows = [n for n, r in enumerate(records) if r[distortion] and (r["probabilities"] or {}).get(when)]
        had = [records[row] for row in rows]
        scores = table([r["probabilities"][when][label] for label in labels] for r in had)
        truth = table([1.0 if r["truth"][label] else -1.0 for label in labels] for r in had)
        flip, keep = (table([label in r[which] for label in labels] for r in had).bool() for which in ("flip", "keep"))
        targets = Targets(flip, keep, truth, boundary)
        decisions, desired = decide(scores, torch.sigmoid(boundary.double())), targets.desired
        values = {
            "rmsd": torch.tensor([r[distortion]["rmsd"] for r in had], dtype=torch.double),
            "hamming_a": instance_hamming(decisions, desired * flip),
            "hamming_b": instance_hamming(decisions, desired * keep),
            "f1": instance_f1(decisions, desired),
            "ranking_loss": ranking_loss(scores, desired),
            "map": average_precision(scores, desired),
            "auc": auc(scores, desired),
            "kendall_tau": kendall_tau(scores, targets.ranks),
        }
        for metric, value in values.items():
            figures[f"{name}.{metric}"] = np.full(len(records), np.nan)
            figures[f"{name}.{metric}"][rows] = value.numpy()
    return figures


def make_row(case: str, method: str, figures: Sequence[Figures]) -> dict[str, Any]:
    """Average the figures of a case and method; `intervals` holds 95% bootstrap intervals over the photos.

    `curve` holds the figures of success against RMSD, see `curves.summarise`, by result.
    """
    joined = {name: np.concatenate([part[name] for part in figures]) for name in figures[0]}
    if "row" in joined:  # in the order of the data set; of two attempts at a photo, take the later
        last = {row: place for place, row in enumerate(joined["row"].tolist())}
        order = [last[row] for row in sorted(last)]
        joined = {name: values[order] for name, values in joined.items()}
    row: dict[str, Any] = {"case": case, "method": method, "images": len(joined["success"])}
    intervals: dict[str, Any] = {}
    for name in ("success_rate", "success_rate_float", "passes", "forward", "backward"):
        row[name], intervals[name] = _mean(joined[name.replace("_rate", "")])
    for which in ("float", "saved"):
        pairs = {metric: _mean(joined[f"{which}.{metric}"]) for metric in METRICS}
        row[which] = {metric: mean for metric, (mean, _) in pairs.items()}
        intervals[which] = {metric: interval for metric, (_, interval) in pairs.items()}
    row["curve"], intervals["curve"] = {}, {}
    for which, source in zip(RESULTS, ("success_float", "success"), strict=True):
        sizes = np.where(joined[source] > 0, joined[f"{which}.rmsd"], np.inf)
        row["curve"][which], intervals["curve"][which] = summarise(sizes)
    counts = {"ranked_images": int((~np.isnan(joined["saved.auc"])).sum()), "errors": int(joined["error"].sum())}
    return {**row, **counts, "intervals": intervals}


def _mean(values: npt.NDArray[np.float64]) -> tuple[float | None, list[float] | None]:
    """Return the mean of the values that are not NaN, and its 95% bootstrap interval (percentile method)."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None, None
    generator = np.random.default_rng(0)
    means = [known[generator.integers(len(known), size=len(known))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(known.mean()), [float(low), float(high)]
