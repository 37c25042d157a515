"""What an attack costs as labels grow and as photos grow: time a pass over the bare network's, and peak memory.

    python tests/benchmarks/scaling.py --labels 20,80,1000,10861 --photos 224x224,500x375,1920x1080,4000x3000

Random photos and labels; a pair of labels is flipped and all others are kept. Labels grow on photos of the network's
own size, in three readers; photos grow one at a time, with 20 labels, in one. `over 20` is the time of a pass over that
with the first number of labels, measured in turns; `without head` leaves out what the larger head costs the bare
network. `over bare` compares with passes of the same network on the same
photo, `over 224` with those on a photo of 224 pixels: what resizing, its gradient and the full-size perturbation cost.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch
from batches import save_rows
from overhead import added_memory, build, take_turns

from mlperturb.model.readers import parse_readers
from mlperturb.model.views import ViewedModel


def measure(arguments: argparse.Namespace, method: str) -> dict[str, float]:
    """Return the seconds of a pass in the attack and bare, in turns, and the attack's memory."""
    turns, _, _ = take_turns(arguments, build(arguments), method)
    spent, plain = (min(seconds) for seconds in zip(*turns, strict=True))
    megabytes = added_memory(arguments, method) / 2**20
    return {"seconds": spent, "bare": plain, "over_bare": spent / plain, "megabytes": megabytes}


def measure_labels(arguments: argparse.Namespace, method: str, least: int) -> dict[str, float]:
    """Attack with many labels and with `least` labels in turns, each beside bare passes, in the readers of `--readers`.

    A ratio is the median of those of the turns.
    """
    built = {}
    for count in {least, arguments.labels}:
        model, images, targets = build(Namespace(**{**vars(arguments), "labels": count}))
        sizes = [arguments.photo] * arguments.batch
        viewed = ViewedModel.bind(model.classifier, parse_readers(arguments.readers.split(",")), sizes)
        built[count] = viewed, images, targets
    one_turn = Namespace(**{**vars(arguments), "turns": 1})
    turns = [
        {count: take_turns(one_turn, one, method)[0][0] for count, one in built.items()} for _ in range(arguments.turns)
    ]
    spent, bare = ([turn[arguments.labels][which] for turn in turns] for which in (0, 1))
    before, bare_before = ([turn[least][which] for turn in turns] for which in (0, 1))
    without = [a - b + c for a, b, c in zip(spent, bare, bare_before, strict=True)]
    return {
        "seconds": min(spent),
        "bare": min(bare),
        "over_bare": median(a / b for a, b in zip(spent, bare, strict=True)),
        "over_least": median(a / b for a, b in zip(spent, before, strict=True)),
        "without_head": median(a / b for a, b in zip(without, before, strict=True)),
    }


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
    parser.add_argument("--passes", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    rows = []
    methods = arguments.methods.split(",")
    print(f"{arguments.arch}, batch {arguments.batch}, {arguments.device}")
    counts = [int(count) for count in arguments.label_counts.split(",")]
    print(
        f"| method | labels | s a pass | over bare | over {counts[0]} | without head |\n|---|---:|---:|---:|---:|---:|"
    )
    arguments.photo = (arguments.size, arguments.size)
    for method in methods:
        for count in counts:
            arguments.labels = count
            row = {"method": method, "labels": arguments.labels, **measure_labels(arguments, method, counts[0])}
            rows.append(row)
            print(
                f"| {method} | {row['labels']} | {row['seconds']:.4f} | {row['over_bare']:.2f} "
                f"| {row['over_least']:.3f} | {row['without_head']:.3f} |",
                flush=True,
            )
    if not arguments.photos:
        save_rows(arguments, rows)
        return
    print("\n| method | photo | s a pass | over bare | over 224 | MB |\n|---|---:|---:|---:|---:|---:|")
    arguments.labels, arguments.batch = 20, 1
    least = None
    for method in methods:
        for photo in arguments.photos.split(","):
            width, _, height = photo.partition("x")
            arguments.photo = (int(height), int(width))
            row = {"method": method, "photo": photo, **measure(arguments, method)}
            least = least or row["bare"]  # of the first photo
            row["over_smallest"] = row["seconds"] / least
            rows.append(row)
            print(
                f"| {method} | {photo} | {row['seconds']:.4f} | {row['over_bare']:.2f} | {row['over_smallest']:.2f} "
                f"| {row['megabytes']:.0f} |",
                flush=True,
            )
    save_rows(arguments, rows)


if __name__ == "__main__":
    main()
