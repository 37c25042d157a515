"""Average precision by label on VOC 2012 val: photos whose difficult objects are marked, and photos where they are not.

    python tests/benchmarks/difficult.py --voc ../shared/voc

In ../shared/voc the labels of a photo from 2008 mark what is too small or too hidden to be counted; on a later photo
such an object counts as present.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from mlperturb.experiment.cases import align
from mlperturb.experiment.evaluate import predict_photos
from mlperturb.metrics import classifier_metrics
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.photos.datasets import read_voc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    classifier, _ = load_checkpoint(arguments.checkpoint or bundled_checkpoint(), device=arguments.device)
    dataset = align(read_voc(arguments.voc, "2012", "val"), classifier.labels)
    logits, truth = predict_photos(classifier, dataset), torch.from_numpy(dataset.truth)
    marked = torch.tensor([path.stem.startswith("2008_") for path in dataset.paths])
    parts = {"all": torch.ones_like(marked), "marked": marked, "not marked": ~marked}
    found: dict[str, Any] = {
        name: classifier_metrics(logits[rows], truth[rows], classifier.boundary.cpu(), classifier.labels)
        for name, rows in parts.items()
    }
    heads = [f"{name}: {int(rows.sum())} photos | with it" for name, rows in parts.items()]
    print(f"| label | {' | '.join(heads)} |")
    print("|---" * (1 + 2 * len(parts)) + "|")
    for label in classifier.labels:
        cells = [found[name]["per_label"][label] for name in parts]
        shown = [f"{one['average_precision'] or 0:.3f} | {one['positives']}" for one in cells]
        print(f"| {label} | {' | '.join(shown)} |")
    means = [f"{found[name]['map']:.3f} | " for name in parts]
    print(f"| mean | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
