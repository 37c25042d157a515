"""Photos that the classifier gets right, in batches ready to attack: what the benchmarks of methods share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem
from mlperturb.experiment.cases import align, parse_cases
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.model.classifier import BoundClassifier, Classifier
from mlperturb.model.preprocess import to_tensor
from mlperturb.photos.datasets import read_voc
from mlperturb.photos.images import read_photo
from mlperturb.system.devices import prepare
from mlperturb.targets import Targets, decide, make_targets


@dataclass(frozen=True)
class Batch:
    """Photos squeezed to the network's own size, and what is asked of each."""

    model: BoundClassifier
    images: torch.Tensor
    targets: Targets

    def problem(self, passes: int | None) -> Problem:
        return Problem(self.model, self.images, ClassificationGoal(self.targets), limit=passes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--year", default="2012")
    parser.add_argument("--split", default="val")
    parser.add_argument("--case", default="random", help="random, extreme, person or sheep")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--size", type=int, default=224, help="photos are squeezed to so many pixels a side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)


def load_batches(arguments: argparse.Namespace) -> list[Batch]:
    """Draw photos every label of which is got right at this size."""
    checkpoint = arguments.checkpoint or bundled_checkpoint()
    classifier, _ = load_checkpoint(checkpoint, device=prepare(arguments.device, arguments.seed))
    chosen = list(_choose(arguments, classifier))
    batches = []
    for start in range(0, len(chosen), arguments.batch):
        photos, requests = zip(*chosen[start : start + arguments.batch], strict=True)
        images = torch.stack(photos)
        model = classifier.bind([(arguments.size, arguments.size)] * len(images))
        with torch.no_grad():
            truth = decide(model(images), classifier.boundary)
        batches.append(Batch(model, images, make_targets(requests, truth, classifier.boundary, margin=0.01)))
    return batches


def _choose(arguments: argparse.Namespace, classifier: Classifier) -> Iterator[tuple[torch.Tensor, object]]:
    dataset = align(read_voc(arguments.voc, arguments.year, arguments.split), classifier.labels)
    (case,) = parse_cases([arguments.case], [], [], classifier.labels)
    generator = np.random.default_rng(arguments.seed)
    found = 0
    for row in generator.permutation(len(dataset)):
        truth = dataset.truth[row]
        if found == arguments.images:
            return
        if not case.eligible(truth[None])[0]:
            continue
        pixels = Image.fromarray(read_photo(dataset.paths[row]).rgb).resize((arguments.size, arguments.size))
        image = to_tensor(np.array(pixels), classifier.device)
        with torch.no_grad():
            seen = decide(classifier(image[None])[0], classifier.boundary).cpu().numpy()
        if bool(((seen == truth) | (truth == 0)).all()):
            found += 1
            yield image, case.request(truth, generator)


def geometric_mean(ratios: torch.Tensor) -> str:
    """Return the geometric mean of ratios, (n,), with the standard error of its logarithm, as text."""
    logs = ratios.double().log()
    return f"{float(logs.mean().exp()):.3f} +- {float(logs.std() / len(logs) ** 0.5):.3f}"


def save_rows(arguments: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Write the rows of a table, with the command's settings, to --json, if that is given."""
    if arguments.json:
        text = json.dumps({"settings": vars(arguments), "rows": rows}, indent=2, default=str)
        arguments.json.write_text(text + "\n")
