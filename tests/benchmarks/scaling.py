"""What an attack costs as labels grow and as photos grow: time a pass over the bare network's, and peak memory.

    python tests/benchmarks/scaling.py --labels 20,80,1000,10000 --photos 224x224,500x375,1920x1080,4000x3000

Random photos and labels; a pair of labels is flipped and all others are kept. Labels grow on photos of the network's
own size; photos grow one at a time, with 20 labels. `over bare` compares with passes of the same network on the same
photo, `over 224` with those on a photo of 224 pixels: what resizing, its gradient and the full-size perturbation cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from batches import save_rows
from overhead import added_memory, build, take_turns


def measure(arguments: argparse.Namespace, method: str) -> dict[str, float]:
    """Return the seconds of a pass in the attack and bare, in turns, and the attack's memory."""
    turns, _, _ = take_turns(arguments, build(arguments), method)
    spent, plain = (min(seconds) for seconds in zip(*turns, strict=True))
    megabytes = added_memory(arguments, method) / 2**20
    return {"seconds": spent, "bare": plain, "over_bare": spent / plain, "megabytes": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="ml-ddn,ml-cw,rank-2")
    parser.add_argument("--labels", dest="label_counts", default="20,80,1000,10000")
    parser.add_argument("--photos", default="224x224,500x375,1920x1080,4000x3000", help="WIDTHxHEIGHT")
    parser.add_argument("--passes", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    rows = []
    methods = arguments.methods.split(",")
    print(f"{arguments.arch}, batch {arguments.batch}, {arguments.device}")
    print("| method | labels | s a pass | over bare | MB |\n|---|---:|---:|---:|---:|")
    arguments.photo = (arguments.size, arguments.size)
    for method in methods:
        for count in map(int, arguments.label_counts.split(",")):
            arguments.labels = count
            row = {"method": method, "labels": arguments.labels, **measure(arguments, method)}
            rows.append(row)
            print(
                f"| {method} | {row['labels']} | {row['seconds']:.4f} | {row['over_bare']:.2f} "
                f"| {row['megabytes']:.0f} |",
                flush=True,
            )
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
