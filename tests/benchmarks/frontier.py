"""Distortion against passes: every method under caps of 10 to 1000 passes a photo, everything counted.

    python tests/benchmarks/frontier.py --voc ../shared/voc --images 24 --cases random,person,extreme --out frontier

The photos, cases and metrics are those of `mlperturb evaluate`; a cap that a method does not use up ends its curve.
With `--scale-only` the 8-bit search after an attack looks for the least scale and does not go on with ML-DDN's descent.
Stopped, the same command goes on. Writes frontier.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from mlperturb.attacks import methods
from mlperturb.experiment.cases import Protocol, align, parse_cases, parse_variants
from mlperturb.experiment.evaluate import run as run_evaluation
from mlperturb.limits import Limits
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.photos.datasets import read_voc
from mlperturb.run import search
from mlperturb.system.devices import prepare
from mlperturb.system.files import file_sha256
from mlperturb.system.journal import Journal

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGETS = {"ml-ddn": "paper"}  # whose schedule fits itself to the cap; the others are cut short by it


def measure(arguments: argparse.Namespace, method: str, passes: int) -> list[dict[str, Any]]:
    """Return the rows of one method under one cap."""
    folder = arguments.out / f"{method}-{passes}".replace(":", "_")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.checkpoint or bundled_checkpoint()
    classifier, _ = load_checkpoint(checkpoint, device=prepare(arguments.device, arguments.seed))
    dataset = align(read_voc(arguments.voc, arguments.year, arguments.split), classifier.labels)
    budget = arguments.budget or BUDGETS.get(method.partition(":")[0], "balanced")
    protocol = Protocol(
        parse_cases([arguments.cases], [], [], classifier.labels),
        parse_variants([method], budget),
        arguments.images,
        budget,
        Limits(passes, rmsd=10.0),
        seed=arguments.seed,
    )
    key = {"checkpoint": file_sha256(checkpoint), "data": dataset.fingerprint, "passes": passes, "budget": budget}
    key |= {
        "images": arguments.images,
        "seed": arguments.seed,
        "method": method,
        "lattice": list(search.LATTICE[budget]),
    }
    journal = Journal(folder / "records.jsonl", key)
    known = arguments.out / "correct.json"  # the same for every point
    if known.exists() and not journal.resumed:
        journal.append(json.loads(known.read_text()))
    results = run_evaluation(classifier, dataset, protocol, journal)
    assert results is not None  # this is the only process
    known.write_text(json.dumps(next(iter(journal.entries()))))
    return [{**row, "cap": passes} for row in results.rows]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot against passes, a column a case, the saved RMSD (where most of A flipped) and Hamming(A)."""
    cases, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "method"))
    figure, panels = plt.subplots(2, len(cases), figsize=(3.2 * len(cases), 5), squeeze=False, layout="constrained")
    for column, case in enumerate(cases):
        for number, method in enumerate(methods):
            mine = [row for row in rows if (row["case"], row["method"]) == (case, method)]
            for panel, metric in zip(panels[:, column], ("rmsd", "hamming_a"), strict=True):
                shown = [row for row in mine if metric != "rmsd" or row["saved"]["hamming_a"] < 0.5]  # most flipped
                points = [(row["passes"], row["saved"][metric]) for row in shown] or [(float("nan"),) * 2]
                style = {"color": f"C{number}", "marker": "os^Dv<>"[number % 7], "label": method}
                panel.plot(*zip(*points, strict=True), **style)
        panels[0, column].set(title=case, ylabel="RMSD of the PNG")
        panels[1, column].set(xlabel="passes a photo", ylabel="Hamming(A)", ylim=(-0.05, 1.05))
        for panel in panels[:, column]:
            caps = sorted({row["cap"] for row in rows})
            panel.set(xscale="log", xlim=(0.4 * caps[0], 1.3 * caps[-1]))
            panel.set_xticks(caps, [str(cap) for cap in caps])
            panel.minorticks_off()
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--year", default="2012")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--cases", default="random,person,extreme")
    parser.add_argument("--methods", default="ml-ddn,ml-cw,ml-dp,rank-2")
    parser.add_argument("--passes", default="10,30,100,300,1000")
    parser.add_argument("--budget", choices=methods.BUDGETS, help="Default: balanced; paper for ml-ddn.")
    parser.add_argument("--scale-only", action="store_true")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.scale_only:
        search.LATTICE |= {budget: (scales, 0) for budget, (scales, _) in search.LATTICE.items()}

    rows: list[dict[str, Any]] = []
    columns = ("case", "method", "cap", "passes", "success", "RMSD PNG", "RMSD float", "Hamming(A)")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    print("\n".join(lines))
    for method in arguments.methods.split(","):
        for passes in map(int, arguments.passes.split(",")):
            for row in measure(arguments, method, passes):
                rows.append(row)
                lines.append(
                    f"| {row['case']} | {method} | {passes} | {row['passes']:.0f} | {row['success_rate']:.0%} "
                    f"| {row['saved']['rmsd']:.3f} | {row['float']['rmsd']:.3f} | {row['saved']['hamming_a']:.3f} |"
                )
                print(lines[-1], flush=True)
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "frontier.json").write_text(json.dumps(rows, indent=2) + "\n")
    (arguments.out / "frontier.md").write_text("\n".join(lines) + "\n")
    draw(rows, arguments.out / "frontier.png")


if __name__ == "__main__":
    main()
