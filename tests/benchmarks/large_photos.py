"""Large photos: the perturbation kept at the network's size, as it is, beside the photo's own size.

    python tests/benchmarks/large_photos.py --voc ../shared/voc --images 24 --side 1600 --passes 30,60

Photos of VOC 2012 val, enlarged to --side pixels (bicubic), are attacked in the three default readers (Random) with
`mlperturb.model.span` and without it. The ratio is the geometric mean of the RMSD with it over the RMSD without it,
over the photos where both succeed, with the standard error of its logarithm, and the least and the largest ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from batches import geometric_mean
from PIL import Image
from readers import choose

import mlperturb
from mlperturb import Limits
from mlperturb.attacks.problem import Problem
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.photos.images import read_photo
from mlperturb.system.devices import prepare


@contextmanager
def without_span() -> Iterator[None]:
    """Keep perturbations at the size of the photo."""
    in_span = Problem.in_span
    Problem.in_span = lambda self: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Problem.in_span = in_span  # type: ignore[method-assign]


def enlarge(path: Path, side: int) -> np.ndarray:
    photo = Image.fromarray(read_photo(path).rgb)
    scale = side / max(photo.size)
    width, height = (round(scale * length) for length in photo.size)
    return np.array(photo.resize((width, height), Image.Resampling.BICUBIC))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--side", type=int, default=1600, help="the longer side of the photos, in pixels")
    parser.add_argument("--passes", default="30,60")
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    arguments.skip = 0
    classifier, _ = load_checkpoint(arguments.checkpoint or bundled_checkpoint(), device=prepare("cpu", arguments.seed))
    limits = [int(part) for part in arguments.passes.split(",")]
    ratios: dict[int, list[float]] = {limit: [] for limit in limits}
    held: dict[int, list[int]] = {limit: [0, 0] for limit in limits}
    for path, request in choose(arguments, classifier, "random"):
        photo = enlarge(path, arguments.side)
        flip, keep = ([classifier.labels[place] for place in places] for places in (request.flip, request.keep))
        for limit in limits:
            bounds = Limits(passes=limit)
            inside = mlperturb.attack(classifier, [photo], flip=flip, keep=keep, limits=bounds)
            with without_span():
                outside = mlperturb.attack(classifier, [photo], flip=flip, keep=keep, limits=bounds)
            found = bool(inside.success[0]), bool(outside.success[0])
            held[limit] = [count + one for count, one in zip(held[limit], found, strict=True)]
            if all(found):
                ratios[limit].append(float(inside.rmsd[0]) / float(outside.rmsd[0]))
    for limit, found_ratios in ratios.items():
        mean = geometric_mean(torch.tensor(found_ratios))
        count = f"{held[limit][0]} and {held[limit][1]} of {arguments.images} succeed"
        print(f"{limit} passes: {count}, ratio {mean}, {min(found_ratios):.3f} to {max(found_ratios):.3f}")


if __name__ == "__main__":
    main()
