"""How near to the least possible RMSD the files of `jpegs.py` are: a bound for JPEGs and for PNGs.

    python tests/benchmarks/jpegs.py make --voc ../shared/voc --out jpegs --images 25
    python tests/benchmarks/jpeg_bound.py jpegs

For a found file x + r, the mean of a constraint's gradient along the way from x to x + r says exactly by how much the
constraint fell: g . r. `bound` is the least length of a change on the file's own lattice that lowers the constraints of
the flipped labels, weighted, as far along the same g, with kept labels ignored and a step cut where the last share of
it suffices: a knapsack, solved exactly by taking steps in the order of their fall for their squared length, and the
largest result of several weights. No file on which the network is as linear is nearer. `decoded` is the RMSD of the
knapsack's own steps (the last one whole) as Pillow decodes them: a decoder rounds each pixel, which makes a small
change longer, and the bound does not know it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlperturb import Classifier, load
from mlperturb.metrics import distortion
from mlperturb.model.coefficients import JpegLattice
from mlperturb.model.preprocess import to_tensor
from mlperturb.photos.images import read_photo
from mlperturb.photos.jpeg import read_jpeg

POINTS = 8  # along the way from the photo to the file
WEIGHTS = 9  # of the second flipped label against the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="efficientnet-lite2", help="Name of a bundled one, or a path.")
    arguments = parser.parse_args()
    classifier = load(arguments.checkpoint)
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for record in json.loads((arguments.folder / "records.json").read_text()):
        if record["status"] == "success":
            found = measure(classifier, record, arguments.folder / record["case"] / record["format"] / record["file"])
            rows.setdefault((record["case"], record["format"]), []).append(found)
    print("| case | format | photos | RMSD | bound | RMSD / bound | decoded |\n|---|---|---:|---:|---:|---:|---:|")
    for (case, form), several in rows.items():
        rmsd, bound, decoded = (statistics.fmean(values) for values in zip(*several, strict=True))
        print(f"| {case} | {form} | {len(several)} | {rmsd:.3f} | {bound:.3f} | {rmsd / bound:.2f} | {decoded:.3f} |")


def measure(classifier: Classifier, record: dict[str, Any], path: Path) -> tuple[float, float, float]:
    """Return the RMSD of a file, its bound, and the RMSD of the bound's own steps as decoded."""
    source = Path(record["source"])
    clean, after = (to_tensor(read_photo(one).rgb, classifier.device)[None] for one in (source, path))
    jpeg = read_jpeg(source.read_bytes()) if record["format"] == "jpeg" else None
    lattice = JpegLattice([jpeg], (clean.shape[2], clean.shape[3]), clean.device)
    gradients = torch.stack(
        [mean_gradient(classifier, clean, after - clean, number) for number in flipped(classifier, record)]
    )
    falls = -(gradients * (after - clean)).flatten(1).sum(1)
    pulled = torch.stack([lattice.pull(gradient[None], clean)[0] for gradient in gradients])
    best: tuple[float, Tensor] = (0.0, torch.zeros_like(lattice.steps[0]))
    for share in [0.5] if len(falls) == 1 else np.linspace(0, 1, WEIGHTS):
        weights = torch.tensor([1.0] if len(falls) == 1 else [1 - float(share), float(share)])
        gradient = (weights[:, None, None, None] * pulled).sum(0)
        length, changes = knapsack(gradient, lattice.steps[0], float(weights @ falls))
        if length > best[0]:
            best = length, changes
    decoded = lattice.points(clean, best[1][None])
    found, reached = (distortion((image - clean) * 255).rmsd for image in (after, decoded))
    return found, best[0] * 255 / clean.numel() ** 0.5, reached


def flipped(classifier: Classifier, record: dict[str, Any]) -> list[int]:
    return [classifier.labels.index(label) for label in record["flip"]]


def mean_gradient(classifier: Classifier, clean: Tensor, change: Tensor, label: int) -> Tensor:
    """Return the mean gradient of a label's logit along the way, turned so that it falls, (3, H, W)."""
    model = classifier.bind([(clean.shape[2], clean.shape[3])])
    total = torch.zeros_like(clean)
    ends = []
    for point in range(POINTS):
        images = (clean + (point + 0.5) / POINTS * change).requires_grad_()
        logit = model(images)[0, label]
        ends.append(float(logit.detach()))
        total += torch.autograd.grad(logit, images)[0]
    sign = 1.0 if ends[-1] < ends[0] else -1.0
    return sign * total[0] / POINTS


def knapsack(gradient: Tensor, steps: Tensor, fall: float) -> tuple[float, Tensor]:
    """Return the least length of a change whose fall along the gradient is `fall`, and the change in whole steps.

    The n-th step of a coordinate lowers by |g| s and adds (2 n - 1) s^2 to the squared length.
    """
    gain = (gradient.abs() * steps).flatten().double()
    cost = steps.flatten().double().square()
    able = gain > 0
    level = bisect(gain, cost, able, fall)
    number = torch.where(able, ((gain / cost.clamp(min=1e-30)) / level + 1) / 2, 0).floor()
    reached = float((gain * number).sum())
    squared = float((cost * number.square()).sum())
    # The shares of the steps at the level itself: bisection leaves the sum just below the fall.
    squared += max(fall - reached, 0.0) / level
    whole = torch.where(number > 0, number, 0).view_as(steps) * steps
    return squared**0.5, -gradient.sign() * whole


def bisect(gain: Tensor, cost: Tensor, able: Tensor, fall: float) -> float:
    """Return the ratio of fall to squared length at which the steps of a larger ratio just do not suffice."""
    ratio = torch.where(able, gain / cost.clamp(min=1e-30), 0)
    low, high = 0.0, float(ratio.max()) * 2
    for _ in range(100):
        level = (low + high) / 2
        number = ((ratio / level + 1) / 2).floor()
        if float((gain * number).sum()) > fall:
            low = level
        else:
            high = level
    return high


if __name__ == "__main__":
    main()
