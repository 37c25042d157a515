"""`mlperturb predict`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from mlperturb.cli.console import out, print_error
from mlperturb.cli.options import Arch, Checkpoint, Device, Json, Labels, Paths, Recursive, Source, find_source
from mlperturb.errors import ImageError

SCHEMA = "mlperturb.predictions/1"


def predict(
    paths: Paths,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    recursive: Recursive = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show the labels that a classifier sees in photos, adversarial PNGs included."""
    from mlperturb.photos.images import find_photos

    source = find_source(checkpoint, arch, labels)
    photos = find_photos(paths, recursive=recursive)
    raise typer.Exit(run(source, photos, device=device, json=json))


def run(source: Source, photos: list[Path], *, device: str = "auto", json: bool = False) -> int:
    """Predict and print; return the exit code."""
    import torch

    from mlperturb.model.preprocess import to_tensor
    from mlperturb.photos.images import read_photo
    from mlperturb.run.record import NOT_FINITE, Failure
    from mlperturb.run.report import to_json
    from mlperturb.show.tables import clean, prediction_table
    from mlperturb.system.devices import prepare
    from mlperturb.targets import present

    classifier, description = source.load(prepare(device, 0))
    images: list[dict[str, Any]] = []
    thresholds = dict(zip(classifier.labels, classifier.thresholds, strict=True))
    for photo in photos:
        entry: dict[str, Any] = {"source": str(photo), "probabilities": None, "labels": None, "error": None}
        images.append(entry)
        try:
            image = to_tensor(read_photo(photo).rgb, classifier.device)
            with torch.inference_mode():
                logits = classifier([image])[0]
        except ImageError as error:
            entry["error"] = asdict(Failure.of(error))
            print_error(f"{photo}: {error}" if str(photo) not in str(error) else str(error))
            continue
        if not bool(logits.isfinite().all()):
            entry["error"] = asdict(NOT_FINITE)
            print_error(f"{photo}: {NOT_FINITE.message}")
            continue
        values = torch.sigmoid(logits.double().cpu()).tolist()
        entry["probabilities"] = dict(zip(classifier.labels, values, strict=True))
        there = present(logits, classifier.boundary).tolist()
        entry["labels"] = [label for label, is_there in zip(classifier.labels, there, strict=True) if is_there]
        if not json:
            out.print(clean(str(photo)), soft_wrap=True)
            out.print(prediction_table(entry["probabilities"], thresholds))
    if json:
        print(to_json({"schema": SCHEMA, "classifier": description, "images": images}))
    return int(any(entry["error"] for entry in images))
