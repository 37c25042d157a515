"""Ways of attacking several readers at once: success in each on the 8-bit file, RMSD, and passes, everything counted.

    python tests/benchmarks/readers.py --voc ../shared/voc --images 48 --skip 16 --passes 40,100,200 --out readers

Photos of VOC 2012 val at their own size, all of whose labels the checkpoint gets right in the float reader. Random:
one present and one absent label flipped, the others kept; Person: removed where there is another label. The passes of a
photo are those before the attack (one in each reader), the attack's, and the decision on the file in each reader.
The rivals of `ml-ddn`'s own way live here, not in the package:

- float: today's attack, which knows one reader;
- margin: the same, every logit .6 beyond its threshold in the float reader;
- all: every reader forward and backward in each iteration;
- drawn: one reader an iteration in turn, the others looked at where that one holds and the file would be the best;
  nothing is remembered of their differences;
- views: the package's own (`mlperturb.attacks.panel`).

RMSD is the mean over photos; the ratio is that of each photo to the float attack's file with as many passes, and with
100, over the photos that hold in every reader. Each batch done is a line of OUT/rows.jsonl and is not done again.
OUT has a folder a way with the PNGs and a `report.json` for `judge_readers.py`. With --margins, files of the last way
are made with further margins, and all files are read by readers not attacked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlperturb.attacks.best import Best
from mlperturb.attacks.ddn import descend
from mlperturb.attacks.geometry import norms
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.panel import Panel
from mlperturb.attacks.problem import Opening, Problem
from mlperturb.experiment.cases import align, parse_cases
from mlperturb.labels import Request
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Size, pad_batch, to_tensor
from mlperturb.model.protocol import Model, Viewed
from mlperturb.model.readers import DEFAULT_READERS, parse_readers
from mlperturb.model.views import ViewedModel, repeat_targets
from mlperturb.photos.datasets import read_voc
from mlperturb.photos.images import read_photo
from mlperturb.system.devices import prepare
from mlperturb.targets import Targets, decide, make_targets

matplotlib.use("agg")
import matplotlib.pyplot as plt

OTHERS = ("pillow-12", "torchvision-cuda", "pillow:bicubic", "torchvision:no-antialias", "opencv", "opencv:area")
SHIFTED = "shifted"  # the network's input moved by a pixel
READERS = len(DEFAULT_READERS)
BLIND, MARGIN = 0.6, 0.01
ENDLESS = 10_000  # iterations: the passes end the attack


@dataclass(frozen=True)
class Batch:
    """Photos, what is asked of them, and what each reader makes of them."""

    case: str
    paths: list[Path]
    images: Tensor
    sizes: list[Size]
    requests: list[Request]
    model: ViewedModel
    clean: Tensor

    def targets(self, boundary: Tensor, margin: float) -> Targets:
        return make_targets(self.requests, decide(self.clean[:, 0], boundary), boundary, margin=margin)

    def problem(
        self, model: Model | Viewed, targets: Targets, limit: int, spent: int, clean: Tensor | None = None
    ) -> Problem:
        problem = Problem(model, self.images, ClassificationGoal(targets), limit=limit, clean=clean)
        problem.meter.forward.add_(spent)
        return problem


@dataclass(frozen=True)
class OneView:
    """The float reader alone."""

    model: ViewedModel

    def __call__(self, images: Tensor) -> Tensor:
        return self.model(images, 0)

    def select(self, rows: Tensor) -> OneView:
        return OneView(self.model.select(rows))


@dataclass(frozen=True)
class AllViews:
    """The logits of every reader side by side, (N, V L): a call is a pass for each."""

    model: ViewedModel
    passes: int = READERS

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(images, view) for view in range(READERS)], dim=1)

    def select(self, rows: Tensor) -> AllViews:
        return AllViews(self.model.select(rows))


class Forgetful(Panel):
    """A panel that expects every view to be as the view it saw, and takes the views in turn to the end."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.offsets.zero_()

    def choose(self, problem: Problem, step: int, late: Tensor) -> Tensor:
        return super().choose(problem, step, torch.zeros_like(late))

    def learn(self, problem: Problem, logits: Tensor, views: Tensor, others: Tensor, found: Tensor) -> None:
        super().learn(problem, logits, views, others, found)
        self.offsets.zero_()


def attack_float(batch: Batch, targets: Targets, best: Callable[[Problem], Best], passes: int) -> Problem:
    problem = batch.problem(OneView(batch.model), targets, passes, 1)
    problem = replace(problem, opening=Opening.of(batch.images, lambda leaf: batch.model(leaf, 0)))
    descend(problem, best(problem), ENDLESS)
    return problem


def attack_margin(batch: Batch, targets: Targets, best: Callable[[Problem], Best], passes: int) -> Problem:
    wide = replace(targets, margin=max(BLIND, targets.margin))
    problem = batch.problem(OneView(batch.model), wide, passes - READERS, READERS)
    descend(problem, best(problem), ENDLESS)
    problem.meter.forward.add_(READERS)
    return problem


def attack_all(batch: Batch, targets: Targets, best: Callable[[Problem], Best], passes: int) -> Problem:
    wide = repeat_targets(targets, READERS)
    problem = batch.problem(AllViews(batch.model), wide, passes - READERS, READERS)
    descend(problem, best(problem), ENDLESS)
    problem.meter.forward.add_(READERS)
    return problem


def attack_drawn(batch: Batch, targets: Targets, best: Callable[[Problem], Best], passes: int) -> Problem:
    problem = batch.problem(batch.model, targets, passes - READERS, READERS, batch.clean)
    descend(problem, best(problem), ENDLESS, panel=Forgetful(problem))
    problem.meter.forward.add_(READERS)
    return problem


def attack_views(batch: Batch, targets: Targets, best: Callable[[Problem], Best], passes: int) -> Problem:
    problem = batch.problem(batch.model, targets, passes, READERS, batch.clean)
    problem = replace(problem, opening=Opening.of(batch.images, lambda leaf: batch.model(leaf, 0)))
    problem.meter.owed.add_(READERS)
    descend(problem, best(problem), ENDLESS)
    problem.meter.forward.add_(problem.meter.owed)
    return problem


WAYS: dict[str, Callable[[Batch, Targets, Callable[[Problem], Best], int], Problem]] = {
    "float": attack_float,
    "margin": attack_margin,
    "all": attack_all,
    "drawn": attack_drawn,
    "views": attack_views,
}


def choose(arguments: argparse.Namespace, classifier: Classifier, name: str) -> list[tuple[Path, Request]]:
    """Draw photos of a case; fewer photos are the first of more."""
    dataset = align(read_voc(arguments.voc, "2012", "val"), classifier.labels)
    (case,) = parse_cases([name], [], [], classifier.labels)
    generator = np.random.default_rng([arguments.seed, zlib.crc32(name.encode())])
    found: list[tuple[Path, Request]] = []
    for row in generator.permutation(len(dataset)).tolist():
        truth = dataset.truth[row]
        if len(found) == arguments.skip + arguments.images:
            break
        if not case.eligible(truth[None])[0]:
            continue
        with torch.inference_mode():
            logits = classifier([to_tensor(read_photo(dataset.paths[row]).rgb, classifier.device)])[0]
        seen = decide(logits, classifier.boundary).cpu().numpy()
        if bool(((seen == truth) | (truth == 0)).all()):
            found.append((dataset.paths[row], case.request(truth, generator)))
    return found[arguments.skip :]


def bind(classifier: Classifier, case: str, chosen: list[tuple[Path, Request]]) -> Batch:
    photos = [to_tensor(read_photo(path).rgb, classifier.device) for path, _ in chosen]
    images, sizes = pad_batch(photos)
    model = ViewedModel.bind(classifier, parse_readers(DEFAULT_READERS), sizes)
    with torch.inference_mode():
        clean = torch.stack([model(images, view) for view in range(READERS)], dim=1)
    requests = [request for _, request in chosen]
    return Batch(case, [path for path, _ in chosen], images, sizes, requests, model, clean.clone())


@torch.inference_mode()
def read_all(
    classifier: Classifier, batch: Batch, images: Tensor, targets: Targets, others: bool
) -> dict[str, list[bool]]:
    """Say which photos hold in which reader."""
    model = batch.model
    found = {name: model(images, view) for view, name in enumerate(DEFAULT_READERS)}
    if others:
        more = ViewedModel.bind(classifier, parse_readers(OTHERS), batch.sizes)
        found |= {name: more(images, view) for view, name in enumerate(OTHERS)}
        moved = model.maps[0](images).roll(1, dims=3)
        moved[..., 0] = moved[..., 1]
        found[SHIFTED] = classifier.network(moved)
    return {name: targets.holds(logits).all(1).tolist() for name, logits in found.items()}


def attack(
    arguments: argparse.Namespace, classifier: Classifier, batch: Batch, way: str, passes: int, margin: float
) -> dict[str, Any]:
    """Attack a batch one way; write its PNGs; return a row for each photo."""
    targets, made = batch.targets(classifier.boundary, margin), []
    started = time.perf_counter()

    def keep(problem: Problem) -> Best:
        made.append(Best(problem, files=True))
        return made[0]

    problem = WAYS[way](batch, targets, keep, passes)
    best = made[0]
    seconds = time.perf_counter() - started
    bare = replace(targets, margin=0.0)
    holds = read_all(classifier, batch, best.images, bare, others=arguments.margins is not None)
    numbers = torch.tensor([3.0 * height * width for height, width in batch.sizes], device=best.images.device)
    rmsd = 255 * norms(best.images - batch.images) / numbers.sqrt()
    folder = arguments.out / f"{batch.case}-{way}-{passes}-{margin:g}"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for row, (path, (height, width)) in enumerate(zip(batch.paths, batch.sizes, strict=True)):
        pixels = (best.images[row, :, :height, :width] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        names.append(f"{path.stem}.adv.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return {
        "photos": [path.name for path in batch.paths],
        "files": names,
        "truth": (targets.truth > 0).tolist(),
        "flip": targets.flip.tolist(),
        "keep": targets.keep.tolist(),
        "holds": holds,
        "rmsd": rmsd.tolist(),
        "forward": problem.meter.forward.tolist(),
        "backward": problem.meter.backward.tolist(),
        "seconds": seconds,
    }


def write_report(folder: Path, rows: list[dict[str, Any]], labels: tuple[str, ...]) -> None:
    """Write what `judge_readers.py` needs, in the words of `mlperturb attack`."""
    images = []
    for row in rows:
        for number, name in enumerate(row["files"]):
            flip, keep, truth = (
                [label for label, wanted in zip(labels, row[field][number], strict=True) if wanted]
                for field in ("flip", "keep", "truth")
            )
            held = all(row["holds"][reader][number] for reader in DEFAULT_READERS)
            images.append(
                {
                    "source": row["photos"][number],
                    "status": "success" if held else "partial",
                    "truth": {label: label in truth for label in labels},
                    "flip": flip,
                    "keep": keep,
                    "files": {"adversarial": name},
                }
            )
    (folder / "report.json").write_text(json.dumps({"images": images}, indent=1) + "\n")


def table(rows: list[dict[str, Any]], passes: list[int], ways: list[str], margin: float = MARGIN) -> str:
    """Compare the ways, by case and limit on passes."""
    lines = [
        "| photos | passes | way | float | pillow | torchvision | all three | RMSD | to float's | to float's at 100 |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    at = {(row["case"], row["passes"], row["way"], row["batch"]): row for row in rows if row["margin"] == margin}
    for case in dict.fromkeys(row["case"] for row in rows):
        for limit in passes:
            for way in ways:
                mine = [row for key, row in at.items() if key[:3] == (case, limit, way)]
                if not mine:
                    continue
                cells = []
                held = [list(zip(*(row["holds"][name] for name in DEFAULT_READERS), strict=True)) for row in mine]
                flat = [one for row in held for one in row]
                cells += [f"{sum(column)}/{len(flat)}" for column in zip(*flat, strict=True)]
                cells.append(f"{sum(map(all, flat)) / len(flat):.1%}")
                cells.append(f"{statistics.fmean(value for row in mine for value in row['rmsd']):.3f}")
                for other in (limit, 100):
                    ratios = [
                        value / theirs
                        for row, which in zip(mine, held, strict=True)
                        for value, theirs, ok in zip(
                            row["rmsd"], at.get((case, other, "float", row["batch"]), {"rmsd": []})["rmsd"], which,
                            strict=False,
                        )
                        if all(ok)
                    ]  # fmt: skip
                    cells.append(f"{statistics.fmean(ratios):.3f}" if ratios else "-")
                lines.append(f"| {case}, {len(flat)} | {limit} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def margin_table(rows: list[dict[str, Any]], way: str, passes: int, margins: list[float]) -> str:
    """Say how success in readers not attacked grows with the margin."""
    names = [*DEFAULT_READERS, *OTHERS, SHIFTED]
    lines = ["| margin | RMSD | " + " | ".join(names) + " |", "|---:|---:|" + "---:|" * len(names)]
    for margin in margins:
        mine = [
            row
            for row in rows
            if (row["way"], row["passes"], row["margin"]) == (way, passes, margin) and SHIFTED in row["holds"]
        ]
        if mine:
            shares = [statistics.fmean(value for row in mine for value in row["holds"][name]) for name in names]
            rmsd = statistics.fmean(value for row in mine for value in row["rmsd"])
            lines.append(f"| {margin:g} | {rmsd:.3f} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines)


def draw_margins(rows: list[dict[str, Any]], way: str, passes: int, margins: list[float], path: Path) -> None:
    """Draw the share of files that hold in each reader, and the RMSD, against the margin."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(2, 1), layout="constrained")
    names = [*DEFAULT_READERS, *OTHERS, SHIFTED]
    parts = [
        [row for row in rows if (row["way"], row["passes"], row["margin"]) == (way, passes, margin)]
        for margin in margins
    ]
    for number, name in enumerate(names):
        shares = [statistics.fmean(value for row in part for value in row["holds"][name]) for part in parts]
        style = "--" if name in DEFAULT_READERS else "-"
        left.plot(margins, shares, style, marker="osv^D<>*x"[number % 9], ms=4, label=name)
    left.set(xscale="log", xlabel="margin, on the logit", ylabel="share of files that hold", ylim=(0, 1.03))
    right.plot(
        margins, [statistics.fmean(value for row in part for value in row["rmsd"]) for part in parts], "ko-", ms=4
    )
    right.set(xscale="log", xlabel="margin, on the logit", ylabel="mean RMSD")
    left.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--cases", default="random,person")
    parser.add_argument("--images", type=int, default=48, help="photos of each case")
    parser.add_argument("--skip", type=int, default=0, help="photos of each case left out before them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--passes", default="40,100,200")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--margins", help="further margins for the last way: .1,.3,.6,1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = prepare(arguments.device, arguments.seed)
    classifier, _ = load_checkpoint(arguments.checkpoint or bundled_checkpoint(), device=device)
    passes, ways = [int(part) for part in arguments.passes.split(",")], arguments.ways.split(",")
    margins = [MARGIN, *(float(part) for part in (arguments.margins or "").split(",") if part)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["case"], row["way"], row["passes"], row["margin"], row["batch"]) for row in rows}
    chosen = {case: choose(arguments, classifier, case) for case in arguments.cases.split(",")}
    for start in range(0, arguments.images, arguments.batch):
        for case, photos in chosen.items():
            part, number = photos[start : start + arguments.batch], arguments.skip + start
            batch = None
            for limit in passes:
                for way, margin in [(way, MARGIN) for way in ways] + [(ways[-1], margin) for margin in margins[1:]]:
                    if (case, way, limit, margin, number) in done or not part:
                        continue
                    batch = batch or bind(classifier, case, part)
                    row = {"case": case, "way": way, "passes": limit, "margin": margin, "batch": number}
                    rows.append(row | attack(arguments, classifier, batch, way, limit, margin))
                    with log.open("a") as stream:
                        stream.write(json.dumps(rows[-1]) + "\n")
        print(table(rows, passes, ways), flush=True)
    for key in {(row["case"], row["way"], row["passes"], row["margin"]) for row in rows}:
        same = [row for row in rows if (row["case"], row["way"], row["passes"], row["margin"]) == key]
        write_report(arguments.out / "{}-{}-{}-{:g}".format(*key), same, classifier.labels)
    if arguments.margins:
        for limit in passes:
            print(f"\n{ways[-1]}, {limit} passes\n" + margin_table(rows, ways[-1], limit, margins))
            draw_margins(rows, ways[-1], limit, margins, arguments.out / f"margins-{limit}.png")


if __name__ == "__main__":
    main()
