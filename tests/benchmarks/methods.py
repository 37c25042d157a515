"""Success, distortion and cost of the attacks on real photos, judged on the PNGs as read back from disk.

    python tests/benchmarks/methods.py --voc ../shared/voc --photos 50 --case pair --methods all

Photos are drawn with a seed from a split, among those where the classifier sees what the case needs. Cases: `person`
(--remove person --keep rest, person seen) and `pair` (one label present and one absent flipped, at random, the rest
kept).
Prints a table and, with --json, writes the rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mlperturb.attacks import METHODS
from mlperturb.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.classifier import Classifier
from mlperturb.devices import prepare
from mlperturb.images import read_photo
from mlperturb.labels import Request
from mlperturb.report import Record, summarise
from mlperturb.runner import Job, Settings, plan_outputs, run_attack
from mlperturb.voc import Dataset, read_voc


def choose(classifier: Classifier, dataset: Dataset, case: str, seed: int) -> Iterator[tuple[Path, Request]]:
    """Yield photos in random order with what is asked of each."""
    generator = np.random.default_rng(seed)
    person = classifier.labels.index("person")
    everything = set(range(len(classifier.labels)))
    for row in generator.permutation(len(dataset)):
        pixels = torch.from_numpy(read_photo(dataset.paths[row]).rgb).permute(2, 0, 1).to(classifier.device)
        with torch.inference_mode():
            present = (classifier([pixels / 255])[0] >= classifier.boundary).cpu().numpy()
        if case == "person" and present[person]:
            yield dataset.paths[row], Request(remove=(person,), keep=tuple(everything - {person}))
        elif case == "pair" and present.any() and not present.all():
            pair = (int(generator.choice(present.nonzero()[0])), int(generator.choice((~present).nonzero()[0])))
            yield dataset.paths[row], Request(flip=pair, keep=tuple(everything - set(pair)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--year", default="2012")
    parser.add_argument("--split", default="val")
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument("--case", choices=["person", "pair"], default="pair")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--budget", default="balanced")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    classifier, _ = load_checkpoint(
        arguments.checkpoint or bundled_checkpoint(), device=prepare(arguments.device, arguments.seed)
    )
    chosen = choose(
        classifier, read_voc(arguments.voc, arguments.year, arguments.split), arguments.case, arguments.seed
    )
    pairs = [pair for pair, _ in zip(chosen, range(arguments.photos), strict=False)]
    jobs: list[Job] = [
        replace(job, request=request)
        for job, (_, request) in zip(plan_outputs([path for path, _ in pairs]), pairs, strict=True)
    ]
    rows = []
    print(f"case {arguments.case}, {len(jobs)} photos of VOC{arguments.year} {arguments.split}, {arguments.budget}")
    print("| method | success, PNG | success, float | RMSD PNG | RMSD float | forward | backward | s a photo |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS if arguments.methods == "all" else arguments.methods.split(","):
        records: list[Record] = []
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(method, arguments.budget, Request(flip=(0,)))
            run_attack(classifier, jobs, Path(folder), settings, records.extend)
        seconds = time.perf_counter() - started
        row = {"method": method, **summarise(records, seconds)}
        exact = [r.distortion_float.rmsd for r in records if r.success_float and r.distortion_float]
        row["success_float"] = len(exact)
        row["rmsd_float"] = float(np.mean(exact)) if exact else None
        ranked = [r.ranking for r in records if r.ranking]
        row["ranking_satisfied"] = sum(r["satisfied"] for r in ranked) if ranked else None
        rows.append(row)
        sizes = [f"{size:.3f}" if size is not None else "-" for size in (row["rmsd"]["mean"], row["rmsd_float"])]
        count = len(records)
        extra = f" (ranking {row['ranking_satisfied']})" if ranked else ""
        print(
            f"| {method} | {row['success']}/{count}{extra} | {row['success_float']}/{count} | {sizes[0]} | {sizes[1]} "
            f"| {row['forward'] / count:.0f} | {row['backward'] / count:.0f} | {seconds / count:.1f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
