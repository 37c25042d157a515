"""The paper's experiment (Section IV-E): attack photos that the classifier gets right; make Tables IV and V."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlperturb.attacks.problem import Meter
from mlperturb.errors import CheckpointError, ImageError, StorageError, UsageError
from mlperturb.experiment.cases import Protocol, Variant, choose
from mlperturb.experiment.curves import read_curves
from mlperturb.experiment.distributions import Distribution, read_distributions
from mlperturb.experiment.records import slug
from mlperturb.experiment.statistics import tabulate
from mlperturb.labels import Request
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Size, pad_batch, to_tensor
from mlperturb.model.readers import Reader
from mlperturb.model.views import ViewedModel
from mlperturb.photos.datasets import Dataset
from mlperturb.photos.images import read_photo
from mlperturb.run.jobs import Job, plan_outputs
from mlperturb.run.ledger import Ledger, Part, size_of
from mlperturb.run.record import NOT_FINITE, Record
from mlperturb.run.runner import run_attack
from mlperturb.run.settings import Settings
from mlperturb.system.files import is_remote, remove_file
from mlperturb.system.journal import Journal
from mlperturb.system.processes import Share
from mlperturb.targets import decide

_BATCH = 32  # photos classified together, before any attack
FLOAT = Reader("float")


@torch.inference_mode()
def predict_photos(
    classifier: Classifier, dataset: Dataset, done: Callable[[int], None] | None = None, *, reader: Reader = FLOAT
) -> Tensor:
    """Return the logits of every photo at its own size, (N, L), on the CPU.

    They are NaN for a photo that cannot be read, and infinite for a photo on which an output is not finite.

    Args:
        classifier: the classifier.
        dataset: N photos.
        done: called with the number of photos done since the last call.
        reader: how the photos are read.
    """
    logits = torch.full((len(dataset), len(dataset.labels)), torch.nan)
    for start in range(0, len(dataset), _BATCH):
        rows, images = [], []
        for row in range(start, min(start + _BATCH, len(dataset))):
            try:
                rgb = read_photo(dataset.paths[row], over=classifier.preprocess.alpha).rgb
                classifier.preprocess.check(rgb.shape[:2])
            except ImageError:
                continue
            rows.append(row)
            images.append(to_tensor(rgb, classifier.device))
        if images:
            batch, sizes = pad_batch(images)
            got = ViewedModel.bind(classifier, [reader], sizes)(batch).float().cpu()
            logits[rows] = torch.where(got.isfinite().all(1, keepdim=True), got, torch.inf)
        if done:
            done(min(_BATCH, len(dataset) - start))
    return logits


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    Attributes:
        rows: of Tables IV and V, see `tabulate`.
        curves: success against RMSD, see `read_curves`.
        distributions: of the labels of the cases that flip a single label, see `read_distributions`.
    """

    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    distributions: list[Distribution]


def run(
    classifier: Classifier,
    dataset: Dataset,
    protocol: Protocol,
    journal: Journal,
    *,
    share: Share | None = None,
    scanned: Callable[[int], None] | None = None,
    planned: Callable[[int, int], None] | None = None,
    done: Callable[[Part, int], None] | None = None,
    watch: Callable[[Meter, int], None] = lambda *_: None,
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Results | None:
    """Attack every case with every method, resume from the journal, and return the results.

    Args:
        classifier: to attack.
        dataset: with the classifier's labels in its order, see `align`.
        protocol: the settings of the evaluation.
        journal: holds X and the records of every finished batch; the images lie beside it. A photo with an error is
            attacked again.
        share: the part of the run that this process does; None for the whole run.
        scanned: called while X is being found, with the number of photos that have just been classified.
        planned: called with the number of attacks, and the number of attacks that the journal has already.
        done: called after every finished batch, with its part and its number of photos, in a thread of its own.
        watch: see `run_attack`.
        hold: a context entered while the last batches are written.

    Returns:
        The results, from the records of all processes; None in every process but the first.

    Raises:
        UsageError: if no photo has the labels for a case, or a finished photo has changed.
        CheckpointError: if the network's outputs are finite on no photo.
        StorageError: if nothing can be written any more, or the journal is damaged.
    """
    share = share or Share()
    correct = _find_correct(classifier, dataset, journal, share, scanned, protocol.readers[0])
    parts = _plan(dataset, correct, protocol, journal.path.parent / "images")
    ledger = Ledger(journal, [part for _, part in parts], dataset.paths)
    if planned:
        planned(sum(len(part.jobs) for _, part in parts), len(ledger))
    for variant, part in parts:
        if ledger.is_done(part):
            continue
        _make_folder(part.folder, journal.path.parent)
        run_attack(
            classifier,
            part.jobs,
            part.folder,
            make_settings(protocol, variant),
            partial(_keep, ledger, part, protocol, done),
            finished=partial(_size_of_finished, ledger, part),
            claims=partial(share.claims, f"{part.case}/{part.method}"),
            hold=hold,
            watch=watch,
        )
    share.gather()
    return _finish(classifier, dataset, protocol, journal, parts) if share.first else None


def _plan(dataset: Dataset, correct: Sequence[int], protocol: Protocol, images: Path) -> list[tuple[Variant, Part]]:
    """Return a part for each case and method.

    Raises:
        UsageError: if no photo has the labels for a case.
    """
    chosen = {case: choose(case, dataset, correct, protocol) for case in protocol.cases}
    if not any(chosen.values()):
        raise UsageError(f"of the {len(correct)} photos that the classifier gets right, none has the labels for a case")
    return [
        (
            variant,
            Part(_jobs(dataset, chosen[case]), images / slug(case.name) / slug(variant.name), case.name, variant.name),
        )
        for case in protocol.cases
        for variant in protocol.variants
    ]


def _finish(
    classifier: Classifier,
    dataset: Dataset,
    protocol: Protocol,
    journal: Journal,
    parts: Sequence[tuple[Variant, Part]],
) -> Results:
    """Remove the folders of images that are not kept; return the results, from the journal's records."""
    if not protocol.keep_images:
        _remove_empty_folders(journal.path.parent / "images")
    rows = {str(path): row for row, path in enumerate(dataset.paths)}
    wanted = {str(part.case): {rows[str(job.source)] for job in part.jobs} for _, part in parts}
    return Results(
        tabulate(journal, protocol, dataset.labels, classifier.boundary.cpu(), wanted),
        read_curves(journal, protocol, wanted),
        read_distributions(journal, protocol, wanted),
    )


def _keep(
    ledger: Ledger, part: Part, protocol: Protocol, done: Callable[[Part, int], None] | None, records: list[Record]
) -> None:
    """Write the records of a finished batch, then delete its images unless `keep_images` is set."""
    ledger.write(records, part)
    if not protocol.keep_images:
        for name in [name for record in records for name in record.files.values() if name]:
            remove_file(part.folder / name)
    if done:
        done(part, len(records))


def _size_of_finished(ledger: Ledger, part: Part, job: Job) -> Size | None:
    record = ledger.finished(job, part)
    return None if record is None else size_of(record)


def _remove_empty_folders(folder: Path) -> None:
    """Remove a folder and its subfolders, except folders that hold a file."""
    if is_remote(folder):
        return
    for place in [*sorted(folder.rglob("*"), reverse=True), folder]:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _find_correct(
    classifier: Classifier,
    dataset: Dataset,
    journal: Journal,
    share: Share,
    scanned: Callable[[int], None] | None,
    reader: Reader,
) -> list[int]:
    """Return the rows of X, the photos on which the classifier gets every label right, difficult labels aside."""
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
        logits = predict_photos(classifier, part, scanned, reader=reader)
        truth = torch.from_numpy(part.truth)
        right = ((decide(logits, classifier.boundary.cpu()) == truth) | (truth == 0)).all(1) & logits.isfinite().all(1)
        parts[number] = {
            "correct": rows[right].tolist(),
            "unreadable": rows[logits.isnan().all(1)].tolist(),
            "unclear": rows[logits.isinf().all(1)].tolist(),
        }
        share.tell(f"scan/{number}", json.dumps(parts[number]))
    if not share.first:
        return [int(row) for row in json.loads(share.ask("correct") or "[]")]
    for number in set(range(len(starts))) - parts.keys():
        parts[number] = json.loads(share.ask(f"scan/{number}") or "{}")
    correct, unreadable, unclear = (
        [row for n in sorted(parts) for row in parts[n][which]] for which in ("correct", "unreadable", "unclear")
    )
    if unclear and len(unreadable) + len(unclear) == len(dataset):
        raise CheckpointError(f"{NOT_FINITE.message} on any of {len(unclear)} photos: nothing can be attacked")
    lost = {
        name: [str(dataset.paths[row]) for row in rows]
        for name, rows in (("unreadable", unreadable), ("unclear", unclear))
    }
    journal.append({"correct": correct, "photos": len(dataset), **lost})
    share.tell("correct", json.dumps(correct))
    return correct


def _make_folder(folder: Path, out: Path) -> None:
    """Make a folder inside the output folder, which must still exist.

    Raises:
        StorageError: if the folder cannot be made.
    """
    if is_remote(folder):
        return
    try:
        out.stat()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror or error}") from error


def make_settings(protocol: Protocol, variant: Variant) -> Settings:
    """Return the settings of one method's attacks; every job has its own request.

    Raises:
        UsageError: if the settings cannot be carried out.
    """
    return Settings(
        variant.method, protocol.budget, Request(flip=(0,)), protocol.limits, protocol.batch_size,
        protocol.margin, readers=protocol.readers, keep_failed=True, options=variant.options,
    )  # fmt: skip


def _jobs(dataset: Dataset, chosen: dict[int, Request]) -> list[Job]:
    planned = plan_outputs([dataset.paths[row] for row in chosen])
    return [replace(job, request=request) for job, request in zip(planned, chosen.values(), strict=True)]
