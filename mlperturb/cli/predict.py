"""`mlperturb predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlperturb.cli.console import out, print_error, print_note
from mlperturb.cli.options import (
    Activation,
    Arch,
    Checkpoint,
    Device,
    Json,
    Labels,
    Paths,
    PreprocessFile,
    Prompt,
    Readers,
    Recursive,
    Thresholds,
)
from mlperturb.cli.source import Source, find_source
from mlperturb.errors import ImageError

if TYPE_CHECKING:
    from mlperturb.model.classifier import Classifier
    from mlperturb.model.readers import Reader

SCHEMA = "mlperturb.predictions/1"


def predict(
    paths: Paths,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    thresholds: Thresholds = None,
    preprocess: PreprocessFile = None,
    activation: Activation = None,
    prompt: Prompt = None,
    recursive: Recursive = False,
    reader: Readers = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show the labels that a classifier sees in photos, adversarial photos included."""
    from mlperturb.photos.images import describe_left_out, find_photos
    from mlperturb.photos.kinds import is_adversarial
    from mlperturb.run.outputs import is_own

    source = find_source(checkpoint, arch, labels, thresholds, preprocess, activation, prompt)
    left_out: list[Path] = []
    photos = find_photos(
        paths,
        recursive=recursive,
        own=lambda path: is_own(path) and not is_adversarial(path),
        left_out=left_out,
    )
    notes = [*source.notes, *([describe_left_out(left_out)] if left_out else [])]
    raise typer.Exit(run(source, photos, readers=reader or [], device=device, json=json, notes=notes))


def run(
    source: Source,
    photos: list[Path],
    *,
    readers: Sequence[str] = (),
    device: str = "auto",
    json: bool = False,
    notes: Sequence[str] = (),
) -> int:
    """Predict and print, in each of the readers named, or in the checkpoint's first reader; return the exit code.

    The notes are printed once the classifier is loaded, so that an error of loading it is the only line.
    """
    from mlperturb.cli.advice import describe_unclear
    from mlperturb.model.readers import parse_readers
    from mlperturb.run.record import NOT_FINITE
    from mlperturb.run.report import to_json
    from mlperturb.show.tables import clean, prediction_table
    from mlperturb.system.devices import prepare

    chosen = parse_readers(readers or source.readers[:1])
    classifier, description = source.load(prepare(device, 0))
    for note in notes:
        print_note(note)
    images: list[dict[str, Any]] = []
    unclear: list[str] = []
    thresholds = dict(zip(classifier.labels, classifier.thresholds, strict=True))
    for photo in photos:
        for entry in _predict(classifier, photo, chosen):
            images.append(entry)
            if entry["error"] == asdict(NOT_FINITE):
                unclear.append(str(photo))
            if not json and entry["probabilities"]:
                name = str(photo) if len(chosen) == 1 else f"{photo}, {entry['reader']}"
                out.print(clean(name), soft_wrap=True)
                out.print(prediction_table(entry["probabilities"], thresholds))
    if unclear:
        print_error(describe_unclear(unclear))
    if json:
        print(to_json({"schema": SCHEMA, "classifier": description, "images": images}))
    return int(any(entry["error"] for entry in images))


def _predict(classifier: Classifier, photo: Path, readers: Sequence[Reader]) -> Iterator[dict[str, Any]]:
    """Yield what the classifier sees in a photo, in each reader; print what went wrong."""
    from mlperturb.model.views import read_logits
    from mlperturb.photos.images import read_photo
    from mlperturb.run.record import NOT_FINITE, Failure
    from mlperturb.targets import present

    for reader in readers:
        entry: dict[str, Any] = {"source": str(photo), "reader": reader.name, "probabilities": None, "labels": None}
        entry["error"] = None
        try:
            logits = read_logits(classifier, read_photo(photo, over=classifier.preprocess.alpha).rgb, reader)[0]
        except ImageError as error:
            print_error(f"{photo}: {error}" if str(photo) not in str(error) else str(error))
            yield {**entry, "error": asdict(Failure.of(error))}
            return
        if not bool(logits.isfinite().all()):
            yield {**entry, "error": asdict(NOT_FINITE)}
            return
        values = logits.double().sigmoid().tolist()
        there = present(logits, classifier.boundary.cpu()).tolist()
        labels = [label for label, is_there in zip(classifier.labels, there, strict=True) if is_there]
        yield {**entry, "probabilities": dict(zip(classifier.labels, values, strict=True)), "labels": labels}
