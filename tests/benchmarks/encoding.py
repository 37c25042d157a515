"""What zlib's levels cost for the PNGs that `attack` writes: time and bytes a photo, and what of level 6 that is.

    python tests/benchmarks/encoding.py mlperturb-out

The files are those of a finished `attack`; adversarial PNGs, which are noisy photos, and maps, which are mostly black.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path

from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    images = [Image.open(path).copy() for path in sorted(arguments.folder.glob("*.png"))[:100]]
    cost = {level: {"seconds": 0.0, "bytes": 0} for level in range(10)}
    for turn in range(arguments.turns):
        for level, sums in cost.items():
            for image in images:
                stream, started = io.BytesIO(), time.process_time()
                image.save(stream, "PNG", compress_level=level)
                sums["seconds"] += time.process_time() - started
                sums["bytes"] += stream.tell() if turn == 0 else 0
    print(f"{len(images)} PNGs of {arguments.folder}")
    print("level   ms    KiB   of level 6: time  bytes")
    for level, sums in cost.items():
        milliseconds, size = sums["seconds"] / arguments.turns / len(images) * 1e3, sums["bytes"] / len(images) / 1024
        share = sums["seconds"] / cost[6]["seconds"], sums["bytes"] / cost[6]["bytes"]
        print(f"{level:5}{milliseconds:6.1f}{size:6.0f}{share[0]:17.2f}{share[1]:7.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(cost, indent=2) + "\n")


if __name__ == "__main__":
    main()
