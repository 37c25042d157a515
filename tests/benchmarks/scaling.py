"""What an attack costs as labels grow and as photos grow: time a pass over the bare network's, and peak memory.

    python tests/benchmarks/scaling.py --labels 20,80,1000,10861 --photos 224x224,500x375,1920x1080,4000x3000

Random photos and labels; a pair of labels is flipped and all others are kept. Labels grow on photos of the network's
own size, photos with 20 labels in batches of --photo-batch; both in --readers. `20 over bare` keeps as many labels as
the first number says, with the same network, and `over 20` is the ratio of the two, measured in turns: what constraints
cost. `over bare` compares with passes of the same network on the same photos, `over 224` with those on photos of its
own size: what resizing, its gradient and the full-size perturbation cost. The memory is that of one reader.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from batches import save_rows
from overhead import added_memory, attack, bare, build, wait
from torch import Tensor

from mlperturb.model.readers import parse_readers
from mlperturb.model.views import ViewedModel
from mlperturb.targets import Targets


def measure(arguments: argparse.Namespace, method: str) -> dict[str, float]:
    """Attack photos of a size in `--readers`, beside bare passes on them and on photos of the network's size, in turns.

    A ratio is the median of those of the turns, and compares the same passes, counted for each photo.
    """
    viewed, images, targets = build_viewed(arguments, arguments.photo)
    small, small_images, _ = build_viewed(arguments, (arguments.size, arguments.size))
    rows = []
    for _ in range(arguments.turns + 1):
        start = wait(arguments.device)
        meter = attack(viewed, images, targets, method, arguments.passes).meter
        spent = wait(arguments.device) - start
        passes = float(meter.forward.sum()), float(meter.backward.sum())
        plain, least = (
            sum(count * seconds for count, seconds in zip(passes, time_bare(*one, arguments.device), strict=True))
            for one in ((viewed, images), (small, small_images))
        )
        rows.append((spent / sum(passes), spent / plain, spent / least))
    seconds, over_bare, over_smallest = (median(values) for values in zip(*rows[1:], strict=True))  # the first warms up
    megabytes = added_memory(arguments, method) / 2**20
    return {"seconds": seconds, "over_bare": over_bare, "over_smallest": over_smallest, "megabytes": megabytes}


def build_viewed(arguments: argparse.Namespace, photo: tuple[int, int]) -> tuple[ViewedModel, Tensor, Targets]:
    """Return a network that is seen in the readers, photos of a size, and what is asked."""
    model, images, targets = build(Namespace(**{**vars(arguments), "photo": photo}))
    readers = parse_readers(arguments.readers.split(","))
    return ViewedModel.bind(model.classifier, readers, [photo] * arguments.batch), images, targets


def measure_labels(arguments: argparse.Namespace, method: str, least: int) -> dict[str, float]:
    """Attack one network with every other label kept and with `least` labels constrained, in turns, in `--readers`.

    An attack's ratio is its time over that of the same passes of the bare network, counted for each photo, because
    other constraints lead to other passes. The ratios are the medians of those of the turns.
    """
    viewed, images, targets = build_viewed(arguments, arguments.photo)
    few = targets.constrained.clone()
    few[:, least:] = False
    ratios: dict[str, list[float]] = {"few": [], "all": []}
    for _ in range(arguments.turns + 1):
        for name, asked in (("few", replace(targets, keep=targets.keep & few)), ("all", targets)):
            start = wait(arguments.device)
            meter = attack(viewed, images, asked, method, arguments.passes).meter
            spent = wait(arguments.device) - start
            forward, backward = time_bare(viewed, images, arguments.device)
            plain = float(meter.forward.sum()) * forward + float(meter.backward.sum()) * backward
            ratios[name].append(spent / plain)
    pairs = list(zip(ratios["all"], ratios["few"], strict=True))[1:]  # the first turn warms up
    return {
        "over_bare": median(one for one, _ in pairs),
        "few_over_bare": median(few for _, few in pairs),
        "over_few": median(one / few for one, few in pairs),
    }


def time_bare(model: ViewedModel, images: Tensor, device: str, passes: int = 4) -> tuple[float, float]:
    """Return the seconds of a forward and of a backward pass of the bare network for a photo."""
    start = wait(device)
    bare(model, images, passes, 0)
    middle = wait(device)
    bare(model, images, passes, passes)
    forward, both = middle - start, wait(device) - middle
    return forward / (passes * len(images)), (both - forward) / (passes * len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="ml-ddn,ml-cw,rank-2")
    parser.add_argument("--labels", dest="label_counts", default="20,80,1000,10861")
    parser.add_argument("--readers", default="float,pillow,torchvision")
    parser.add_argument("--photos", default="224x224,500x375,1920x1080,4000x3000", help="WIDTHxHEIGHT; empty for none")
    parser.add_argument("--photo-batch", type=int, default=1)
    parser.add_argument("--passes", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    rows = []
    methods = arguments.methods.split(",")
    print(f"{arguments.arch}, batch {arguments.batch}, {arguments.device}")
    counts = [int(count) for count in arguments.label_counts.split(",")]
    print(f"| method | labels | over bare | {counts[0]} over bare | over {counts[0]} |\n|---|---:|---:|---:|---:|")
    arguments.photo = (arguments.size, arguments.size)
    for method in methods:
        for count in counts:
            arguments.labels = count
            row = {"method": method, "labels": arguments.labels, **measure_labels(arguments, method, counts[0])}
            rows.append(row)
            print(
                f"| {method} | {row['labels']} | {row['over_bare']:.3f} | {row['few_over_bare']:.3f} "
                f"| {row['over_few']:.3f} |",
                flush=True,
            )
    if not arguments.photos:
        save_rows(arguments, rows)
        return
    print("\n| method | photo | s a pass | over bare | over 224 | MB |\n|---|---:|---:|---:|---:|---:|")
    arguments.labels, arguments.batch = 20, arguments.photo_batch
    for method in methods:
        for photo in arguments.photos.split(","):
            width, _, height = photo.partition("x")
            arguments.photo = (int(height), int(width))
            row = {"method": method, "photo": photo, **measure(arguments, method)}
            rows.append(row)
            print(
                f"| {method} | {photo} | {row['seconds']:.4f} | {row['over_bare']:.2f} | {row['over_smallest']:.2f} "
                f"| {row['megabytes']:.0f} |",
                flush=True,
            )
    save_rows(arguments, rows)


if __name__ == "__main__":
    main()
