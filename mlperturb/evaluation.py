"""The paper's experiment (Section IV-E): cases on photos that the classifier gets right -> rows of Tables IV and V."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlperturb.cases import Case, Protocol, Variant, choose
from mlperturb.classifier import Classifier
from mlperturb.errors import ImageError, StorageError, UsageError
from mlperturb.files import file_sha256, is_remote, remove_file
from mlperturb.images import read_photo
from mlperturb.jobs import Job, Settings, plan_outputs
from mlperturb.journal import Journal, find_journal
from mlperturb.labels import Request
from mlperturb.metrics import (
    auc,
    average_precision,
    instance_f1,
    instance_hamming,
    kendall_tau,
    ranking_loss,
)
from mlperturb.preprocess import Size, to_tensor
from mlperturb.record import Record
from mlperturb.runner import run_attack
from mlperturb.sharing import Share
from mlperturb.targets import Targets, decide
from mlperturb.voc import Dataset

METRICS = ("rmsd", "hamming_a", "hamming_b", "f1", "ranking_loss", "map", "auc", "kendall_tau")
_NEEDED = {field.name for field in fields(Record)}  # of every record in a journal
_RESAMPLES = 1000
_BATCH = 32  # photos decided on together, before any attack

Figures = dict[str, npt.NDArray[np.float64]]  # of N photos, (N,) each


@torch.inference_mode()
def predict_photos(classifier: Classifier, dataset: Dataset, done: Callable[[int], None] | None = None) -> Tensor:
    """Return the logits of every photo at its own size, (N, L), on the CPU; NaN for a photo that cannot be read."""
    logits = torch.full((len(dataset), len(dataset.labels)), torch.nan)
    for start in range(0, len(dataset), _BATCH):
        rows, images = [], []
        for row in range(start, min(start + _BATCH, len(dataset))):
            try:
                rgb = read_photo(dataset.paths[row]).rgb
                classifier.preprocess.check(rgb.shape[:2])
            except ImageError:
                continue
            rows.append(row)
            images.append(to_tensor(rgb, classifier.device))
        if images:
            logits[rows] = classifier(images).float().cpu()
        if done:
            done(min(_BATCH, len(dataset) - start))
    return logits


def run(
    classifier: Classifier,
    dataset: Dataset,
    protocol: Protocol,
    journal: Journal,
    *,
    share: Share | None = None,
    scanned: Callable[[int], None] | None = None,
    planned: Callable[[int, int], None] | None = None,
    done: Callable[[Case, Variant, list[Record]], None] | None = None,
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[dict[str, Any]]:
    """Attack every case with every method, going on from the journal, and return the rows of the tables.

    Args:
        classifier: to attack.
        dataset: with the classifier's labels in its order, see `align`.
        protocol: what to do.
        journal: holds X and the records of every finished batch; the images lie beside it. A photo with an error is
            attacked again.
        share: what this process does of it; all if None.
        scanned: told how many more photos have been decided on, while X is being found.
        planned: told how many attacks there are and how many of them the journal has.
        done: told of every finished batch, in a thread of its own.
        hold: entered while what is attacked is being written.

    Returns:
        The rows, of all processes' records; none in a process that is not the first.

    Raises:
        UsageError: if no case fits a photo, or a photo that is done has changed.
        StorageError: if nothing can be written any more, or the journal is damaged.
    """
    share = share or Share()
    row_of = {str(path): row for row, path in enumerate(dataset.paths)}
    correct = _find_correct(classifier, dataset, journal, share, scanned)
    chosen = {case: choose(case, dataset, correct, protocol) for case in protocol.cases}
    if not any(chosen.values()):
        raise UsageError(f"of the {len(correct)} photos that the classifier gets right, none has the labels for a case")
    finished = _finished(journal, dataset)
    plan = [
        (case, variant, _jobs(dataset, chosen[case]), finished.get((case.name, variant.name), {}))
        for case in protocol.cases
        for variant in protocol.variants
    ]
    if planned:
        planned(sum(len(jobs) for _, _, jobs, _ in plan), sum(len(known) for _, _, _, known in plan))
    images = journal.path.parent / "images"
    for case, variant, jobs, known in plan:
        if len(known) == len(jobs):
            continue
        folder = images / _slug(case.name) / _slug(variant.name)
        _make_folder(folder, journal.path.parent)

        def keep(records: list[Record], case: Case = case, variant: Variant = variant, folder: Path = folder) -> None:
            """Make a finished batch durable, then drop its files unless they are to be kept."""
            entry = {"case": case.name, "method": variant.name, "rows": [row_of[record.source] for record in records]}
            journal.append({**entry, "records": [asdict(record) for record in records]})
            if not protocol.keep_images:
                for name in [name for record in records for name in record.files.values() if name]:
                    remove_file(folder / name)
            if done:
                done(case, variant, records)

        def sizes(job: Job, known: dict[str, Size] = known) -> Size | None:
            return known.get(str(job.source))

        def claims(count: int, name: str = f"{case.name}/{variant.name}") -> Iterator[int]:
            return share.claims(name, count)

        run_attack(
            classifier, jobs, folder, make_settings(protocol, variant), keep, finished=sizes, claims=claims, hold=hold
        )
    share.gather()
    if not share.first:
        return []
    if not protocol.keep_images and not is_remote(images):
        for place in sorted(images.rglob("*"), reverse=True) + [images]:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
    return tabulate(journal, protocol, dataset.labels, classifier.boundary.cpu())


def tabulate(journal: Journal, protocol: Protocol, labels: Sequence[str], boundary: Tensor) -> list[dict[str, Any]]:
    """Read the journal, a batch at a time, and return a row for each case and method that has records.

    Raises:
        StorageError: if the journal is damaged.
    """
    gathered: dict[tuple[str, str], list[Figures]] = {}
    for entry in _batches(journal):
        try:
            figures = measure(entry["records"], labels, boundary)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{journal.path} has a damaged record ({error!r:.80}); --overwrite starts again"
            ) from error
        figures["row"] = np.array(entry["rows"], dtype=np.float64)
        gathered.setdefault((entry["case"], entry["method"]), []).append(figures)
    return [
        make_row(case.name, variant.name, gathered[case.name, variant.name])
        for case in protocol.cases
        for variant in protocol.variants
        if (case.name, variant.name) in gathered
    ]


def failures(journal: Journal) -> list[str]:
    """Return a line for each photo that could not be read or attacked, its latest attempt counting."""
    latest: dict[tuple[str, str, int], str | None] = {}
    lines: list[str] = []
    for entry in journal.entries():
        lines += [f"{name}: could not be read, and is left out" for name in entry.get("unreadable", ())]
    for entry in _batches(journal):
        for row, record in zip(entry["rows"], entry["records"], strict=True):
            error = record.get("error")
            message = f"{entry['case']}, {entry['method']}: {error['message']}" if error else None
            latest[entry["case"], entry["method"], row] = message
    return lines + [message for message in latest.values() if message]


def measure(records: Sequence[dict[str, Any]], labels: Sequence[str], boundary: Tensor) -> Figures:
    """Return the figures of each of N records: `success`, `success_float`, `passes`, `error`, and `METRICS` by result.

    The results are `float` and `saved`; the truth that they are compared with is y*. A figure that a photo has none
    of is NaN: Hamming(B) without B; ranking loss, mAP and AUC where no label is relevant, or all are.
    """
    figures: Figures = {
        "success": np.array([record["status"] == "success" for record in records], dtype=np.float64),
        "success_float": np.array([bool(record["success_float"]) for record in records], dtype=np.float64),
        "passes": np.array([r["cost"]["forward"] + r["cost"]["backward"] for r in records], dtype=np.float64),
        "error": np.array([record["error"] is not None for record in records], dtype=np.float64),
    }

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
    """Average the figures of a case and method; `intervals` holds 95% bootstrap intervals over the photos."""
    joined = {name: np.concatenate([part[name] for part in figures]) for name in figures[0]}
    if "row" in joined:  # in the order of the data set; of two attempts at a photo the later one counts
        last = {row: place for place, row in enumerate(joined["row"].tolist())}
        order = [last[row] for row in sorted(last)]
        joined = {name: values[order] for name, values in joined.items()}
    row: dict[str, Any] = {"case": case, "method": method, "images": len(joined["success"])}
    intervals: dict[str, Any] = {}
    for name, source in (("success_rate", "success"), ("success_rate_float", "success_float"), ("passes", "passes")):
        row[name], intervals[name] = _mean(joined[source])
    for which in ("float", "saved"):
        pairs = {metric: _mean(joined[f"{which}.{metric}"]) for metric in METRICS}
        row[which] = {metric: mean for metric, (mean, _) in pairs.items()}
        intervals[which] = {metric: interval for metric, (_, interval) in pairs.items()}
    counts = {"ranked_images": int((~np.isnan(joined["saved.auc"])).sum()), "errors": int(joined["error"].sum())}
    return {**row, **counts, "intervals": intervals}


def _mean(values: npt.NDArray[np.float64]) -> tuple[float | None, list[float] | None]:
    """Return the mean of what is not NaN and its 95% bootstrap interval, percentile method."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None, None
    generator = np.random.default_rng(0)
    means = [known[generator.integers(len(known), size=len(known))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(known.mean()), [float(low), float(high)]


def _find_correct(
    classifier: Classifier,
    dataset: Dataset,
    journal: Journal,
    share: Share,
    scanned: Callable[[int], None] | None,
) -> list[int]:
    """Return the rows of X: photos every label of which the classifier gets right; difficult labels do not count."""
    if share.first:
        known = next((entry["correct"] for entry in journal.entries() if "correct" in entry), None)
        share.tell("known", json.dumps(known))
    else:
        known = json.loads(share.ask("known") or "null")
    if known is not None:
        return [int(row) for row in known]
    starts = range(0, len(dataset), _BATCH)
    parts: dict[int, dict[str, list[int]]] = {}
    for number in share.claims("scan", len(starts)):
        rows = np.arange(starts[number], min(starts[number] + _BATCH, len(dataset)))
        part = dataset.subset(rows)
        logits = predict_photos(classifier, part, scanned)
        truth = torch.from_numpy(part.truth)
        right = ((decide(logits, classifier.boundary.cpu()) == truth) | (truth == 0)).all(1) & logits.isfinite().all(1)
        parts[number] = {"correct": rows[right].tolist(), "unreadable": rows[logits.isnan().all(1)].tolist()}
        share.tell(f"scan/{number}", json.dumps(parts[number]))
    if not share.first:
        return [int(row) for row in json.loads(share.ask("correct") or "[]")]
    for number in set(range(len(starts))) - parts.keys():
        parts[number] = json.loads(share.ask(f"scan/{number}") or "{}")
    correct, unreadable = (
        [row for n in sorted(parts) for row in parts[n][which]] for which in ("correct", "unreadable")
    )
    names = [str(dataset.paths[row]) for row in unreadable]
    journal.append({"correct": correct, "photos": len(dataset), "unreadable": names})
    share.tell("correct", json.dumps(correct))
    return correct


def _batches(journal: Journal) -> Iterator[dict[str, Any]]:
    """Read the finished batches: `case`, `method`, and for each photo its row of the data set and its record."""
    for entry in journal.entries():
        if "records" not in entry:
            continue
        parts = [entry.get("rows"), entry["records"]]
        whole = all(isinstance(part, list) for part in parts) and entry.keys() >= {"case", "method"}
        if not whole or not all(isinstance(record, dict) and record.keys() >= _NEEDED for record in entry["records"]):
            raise StorageError(f"{journal.path} has a damaged batch; --overwrite starts again")
        yield entry


def _finished(journal: Journal, dataset: Dataset) -> dict[tuple[str, str], dict[str, Size]]:
    """Return the photos that need no further attack, by case and method, and their (height, width).

    Raises:
        UsageError: if one of them is not the photo that it was.
    """
    found: dict[tuple[str, str], dict[str, Size]] = {}
    known: dict[int, str] = {}
    for entry in _batches(journal):
        if not all(isinstance(row, int) and 0 <= row < len(dataset) for row in entry["rows"]):
            raise StorageError(f"{journal.path} has a damaged batch: a row outside the data; --overwrite starts again")
        for row, record in zip(entry["rows"], entry["records"], strict=True):
            path = dataset.paths[row]
            if record.get("error"):
                continue
            if known.setdefault(row, record.get("sha256")) != record.get("sha256") or not path.is_file():
                raise UsageError(f"{path} changed while {journal.path} was written: give --overwrite or another --out")
            sizes = found.setdefault((entry["case"], entry["method"]), {})
            sizes[str(path)] = (record["height"], record["width"])
    for row, digest in known.items():
        if file_sha256(dataset.paths[row]) != digest:
            raise UsageError(f"{dataset.paths[row]} changed since {journal.path} was written: give another --out")
    return found


def _make_folder(folder: Path, out: Path) -> None:
    """Make a folder inside the output folder, which must be there still.

    Raises:
        StorageError: if it cannot be made.
    """
    if is_remote(folder):
        return
    try:
        os.stat(out)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror or error}") from error


def make_settings(protocol: Protocol, variant: Variant) -> Settings:
    """Return the settings of one method's attacks; every photo has a request of its own.

    Raises:
        UsageError: if they cannot be carried out.
    """
    return Settings(
        variant.method, protocol.budget, Request(flip=(0,)), protocol.passes, protocol.batch_size,
        max_rmsd=protocol.max_rmsd, max_linf=protocol.max_linf, keep_failed=True, options=variant.options,
    )  # fmt: skip


def _jobs(dataset: Dataset, chosen: dict[int, Request]) -> list[Job]:
    planned = plan_outputs([dataset.paths[row] for row in chosen])
    return [replace(job, request=request) for job, request in zip(planned, chosen.values(), strict=True)]


def kept_images(path: Path) -> set[str]:
    """Return the image files that the records of a journal's file name, relative to its folder."""
    names: set[str] = set()
    lines = [line for file in find_journal(path) for line in file.read_text("utf-8", "replace").splitlines()]
    for line in lines:
        try:
            entry = json.loads(line)
            folder = f"images/{_slug(entry['case'])}/{_slug(entry['method'])}"
            files = [name for record in entry["records"] for name in record["files"].values() if name]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # not of a batch, or damaged
        names |= {f"{folder}/{name}" for name in files if Path(name).name == name}
    return names


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=-]", "_", name)
