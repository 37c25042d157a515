"""How a folder's size tells: memory, and the time until the first batch is in the journal.

    python tests/benchmarks/folders.py --memory 100,10000 --start 100,100000

Each folder holds one small photo under many names, attacked by `python -m mlperturb attack` in a process of its own
with a small random network: what is measured is the cost of files, not of passes. For `--start` the run is ended at its
first batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mlperturb.model.checkpoints import Metadata, build_network, save_checkpoint
from mlperturb.model.preprocess import Preprocess

LABELS = ("cat", "dog", "hen")


def prepare(folder: Path, count: int) -> list[str]:
    """Make the photos; return the command."""
    torch.manual_seed(0)
    metadata = Metadata("shufflenet_v2_x0_5", LABELS, (0.5,) * 3, Preprocess(resize=(40, 40)).to_dict())
    save_checkpoint(folder / "tiny.safetensors", build_network("shufflenet_v2_x0_5", 3).state_dict(), metadata)
    photo = folder / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 36, 3), dtype=np.uint8)).save(photo)
    photos = folder / "photos"
    photos.mkdir()
    for number in range(count):
        if number % 50_000 == 0:  # a file cannot have many more names
            source = photos / f"{number:06}.png"
            source.write_bytes(photo.read_bytes())
        else:
            os.link(source, photos / f"{number:06}.png")
    options = [
        "--flip",
        "any",
        "--budget",
        "fast",
        "--passes",
        "20",
        "--batch-size",
        "64",
        "--device",
        "cpu",
        "--quiet",
    ]
    command = [sys.executable, "-m", "mlperturb", "attack", str(photos), *options]
    return [*command, "--checkpoint", str(folder / "tiny.safetensors"), "--out", str(folder / "out")]


def measure(count: int, *, to_the_end: bool) -> dict[str, Any]:
    """Run on a folder of so many photos, to the end or to the first batch."""
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        command = prepare(folder, count)
        journal, started = folder / "out" / "journal.jsonl", time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not (journal.exists() and journal.read_bytes().count(b"\n") > 1) and process.poll() is None:
                time.sleep(0.02)
            first = time.perf_counter() - started
            if not to_the_end:
                process.kill()
            _, _, usage = os.wait4(process.pid, 0)
            process.returncode = 0
        seconds = time.perf_counter() - started
    result = {"photos": count, "first_batch": first, "peak_mb": usage.ru_maxrss / 1024}
    return {**result, "photos_per_second": count / seconds} if to_the_end else result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="100,10000")
    parser.add_argument("--start", default="100,100000")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    results = {}
    for name in ("memory", "start"):
        counts = [int(text) for text in getattr(arguments, name).split(",") if text]
        results[name] = [measure(count, to_the_end=name == "memory") for count in counts]
    for row in results["memory"]:
        print(f"{row['photos']:7} photos: peak {row['peak_mb']:.0f} MB, {row['photos_per_second']:.0f} photos a second")
    for row in results["start"]:
        print(f"{row['photos']:7} photos: {row['first_batch']:.1f} s from the start to the first batch in the journal")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
