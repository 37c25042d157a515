"""What transfers: files made on each classifier, before the others, against the RMSD that they may have.

    python tests/benchmarks/transfer.py --voc ../shared/voc --checkpoint weights/voc-mobilenet-v2.safetensors \\
        --checkpoint weights/voc-efficientnet-lite2.safetensors --images 24 --rmsd 1,2,4,8 --out transfer

Photos of VOC 2012 val that the first --agree classifiers get right in the float reader, in a random order. Case random:
one present and one absent label flipped, every other label kept; person: removed where there is another label.
Three ways: `least` is ML-DDN's least distortion; `strongest` the largest margin within an RMSD; `diverse` the same with
`--diversity both`. Files lie in OUT/CASE/SOURCE/WAY; those that exist are not made again. They are judged by
`mlperturb.experiment.transfer`, each classifier in its own readers: OUT/transfer.json, transfer.md and the curve
transfer.png.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

import mlperturb
from mlperturb import Classifier, Limits
from mlperturb.experiment.cases import align, parse_cases
from mlperturb.experiment.defence import Attacked
from mlperturb.experiment.transfer import Made, transfer
from mlperturb.labels import Request
from mlperturb.photos.datasets import Dataset, read_splits

matplotlib.use("agg")
import matplotlib.pyplot as plt

WAYS = {"least": {}, "strongest": {"aim": "strongest"}, "diverse": {"aim": "strongest", "diversity": "both"}}


def choose(case_name: str, dataset: Dataset, nets: dict[str, Classifier], images: int) -> list[tuple[Path, Request]]:
    """Return photos that every one of these classifiers gets right, each with its request."""
    first = next(iter(nets.values()))
    data, case = align(dataset, first.labels), parse_cases([case_name], (), (), first.labels)[0]
    generator = np.random.default_rng([3, zlib.crc32(case_name.encode())])
    chosen: list[tuple[Path, Request]] = []
    for row in generator.permutation(np.flatnonzero(case.eligible(data.truth))):
        truth, request = data.truth[row], case.request(data.truth[row], generator)
        right = True
        for net in nets.values():
            seen = mlperturb.predict(net, [data.paths[row]], reader="float")[0].numpy() >= np.array(net.thresholds)
            right = right and bool(((seen == (truth > 0)) | (truth == 0)).all())
            if not right:
                break
        if right:
            chosen.append((data.paths[row], request))
        if len(chosen) == images:
            break
    return chosen


def make(
    folder: Path, net: Classifier, photos: list[tuple[Path, Request]], rmsd: float | None, way: str, budget: str
) -> None:
    """Attack each photo that has no file yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (path, request) in enumerate(photos):
        if (folder / f"{number}.json").exists():
            continue
        names: dict[str, Any] = {
            part: [net.labels[label] for label in getattr(request, part)] for part in ("flip", "keep")
        }
        more: dict[str, Any] = {**names, **WAYS[way], "budget": budget}
        result = mlperturb.attack(net, [path], limits=Limits(rmsd=rmsd), **more)
        image = result.images[0]
        assert isinstance(image, Image.Image)
        image.save(folder / f"{number}.png")
        truth = dict(zip(net.labels, (result.before[0] >= 0.5).tolist(), strict=True))
        held = {"success": bool(result.success[0]), "rmsd": float(result.rmsd[0]), "passes": int(result.passes[0])}
        (folder / f"{number}.json").write_text(json.dumps({"photo": str(path), **names, "truth": truth, **held}))


def read(folder: Path) -> tuple[list[Attacked], list[dict[str, Any]]]:
    """Return the files of a folder, and what was written of each."""
    notes = [json.loads((folder / f"{n}.json").read_text()) for n in range(len(list(folder.glob("*.json"))))]
    attacked = [
        Attacked(folder / f"{n}.png", Path(one["photo"]), tuple(one["flip"]), tuple(one["keep"]), one["truth"])
        for n, one in enumerate(notes)
    ]
    return attacked, notes


def judge(out: Path, nets: dict[str, Classifier]) -> list[dict[str, Any]]:
    """Show every file to every classifier; return a row for each case, source, way and target."""
    rows: list[dict[str, Any]] = []
    for folder in sorted(path.parent for path in out.glob("*/*/*/0.json")):
        case, source, way = folder.relative_to(out).parts
        kind, _, rmsd = way.partition("-")
        attacked, notes = read(folder)
        found = transfer([Made(source, attacked)], nets)["pairs"]
        mean = float(np.mean([one["rmsd"] for one in notes]))
        own = sum(one["success"] for one in notes)
        facts = {"case": case, "way": kind, "limit": float(rmsd) if rmsd else None, "rmsd": mean, "own": own}
        rows += [{**facts, "files": len(notes), **row} for row in found]
    return rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, a line for each case, source, way and limit."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = ["| case | made on | way | RMSD | holds on its own | " + " | ".join(targets) + " |"]
    lines.append("|---|---|---|---:|---:|" + "---:|" * len(targets))
    keys = list(dict.fromkeys((row["case"], row["source"], row["way"], row["limit"]) for row in rows))
    for key in sorted(keys, key=lambda key: (key[0], key[1], key[3] or 0, key[2])):
        mine = [row for row in rows if (row["case"], row["source"], row["way"], row["limit"]) == key]
        cells = []
        for target in targets:
            row = next(row for row in mine if row["target"] == target)
            flips, broken = row["flips"], row["broken"]
            pairs = (flips["labels"], flips["total"]), (row["successes"], row["images"]), tuple(broken.values())
            cells.append(", ".join(f"{part}/{whole}" for part, whole in pairs))
        head = [key[0], key[1], key[2], f"{mine[0]['rmsd']:.2f}", f"{mine[0]['own']}/{mine[0]['files']}"]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of flips that hold before each other classifier, against the RMSD; a panel for each source."""
    sources = list(dict.fromkeys(row["source"] for row in rows if row["limit"]))
    figure, axes = plt.subplots(
        1, len(sources), figsize=(4 * len(sources) + 2.5, 3), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, source in zip(axes[0], sources, strict=True):
        targets = [name for name in dict.fromkeys(row["target"] for row in rows) if name != source]
        for number, target in enumerate(targets):
            for way, style in (("strongest", "--"), ("diverse", "-")):
                mine = [r for r in rows if (r["source"], r["target"], r["way"]) == (source, target, way)]
                limits = sorted({row["limit"] for row in mine})
                counts = [[r["flips"] for r in mine if r["limit"] == limit] for limit in limits]
                shares = [sum(c["labels"] for c in some) / max(sum(c["total"] for c in some), 1) for some in counts]
                panel.plot(limits, shares, style, marker="o", ms=3, color=f"C{number}", label=f"{target}, {way}")
        panel.set(title=f"made on {source}", xlabel="RMSD", ylim=(-0.03, 1.03))
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({row["limit"] for row in rows if row["limit"]}))
        panel.xaxis.set_major_formatter("{x:g}")
    axes[0][0].set_ylabel("flips that hold")
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=7, loc="outside right upper", handlelength=3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, action="append", required=True)
    parser.add_argument("--agree", type=int, default=2, help="how many of the checkpoints must get a photo right")
    parser.add_argument("--sources", type=int, default=None, help="how many of the checkpoints are attacked; 0: none")
    parser.add_argument("--cases", default="random")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rmsd", default="1,2,4,8")
    parser.add_argument("--ways", default="least,strongest,diverse")
    parser.add_argument("--budget", default="fast")
    parser.add_argument("--no-judge", action="store_true", help="make the files, and judge them later")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    nets = {path.stem: mlperturb.load(path) for path in given.checkpoint}
    agreeing = dict(list(nets.items())[: given.agree])
    data = next(iter(read_splits(given.voc, ["2012"], "val").values()))
    for case in given.cases.split(","):
        listed = given.out / f"{case}.json"
        if not listed.exists():
            chosen = choose(case, data, agreeing, given.images)
            given.out.mkdir(parents=True, exist_ok=True)
            listed.write_text(json.dumps([[str(path), request.flip, request.keep] for path, request in chosen]))
        listing = json.loads(listed.read_text())[: given.images]
        photos = [(Path(path), Request(flip=tuple(flip), keep=tuple(keep))) for path, flip, keep in listing]
        for name in list(nets)[: given.sources]:
            for way in given.ways.split(","):
                for limit in [None] if way == "least" else [float(value) for value in given.rmsd.split(",")]:
                    folder = given.out / case / name / (way if limit is None else f"{way}-{limit:g}")
                    make(folder, nets[name], photos, limit, way, given.budget)
                    print(folder, flush=True)
    if given.no_judge:
        return
    rows = judge(given.out, nets)
    (given.out / "transfer.json").write_text(json.dumps(rows, indent=1))
    (given.out / "transfer.md").write_text(to_markdown(rows))
    print(to_markdown(rows))
    draw(rows, given.out / "transfer.png")


if __name__ == "__main__":
    main()
