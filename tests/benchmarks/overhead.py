"""What an attack costs beyond its passes: time over that of the bare passes, peak memory over that of a bare pass.

    python tests/benchmarks/overhead.py --arch mobilenet_v2 --size 224 --batch 16 --device cpu --json overhead.json

Random images of the network's own size, so that resizing changes nothing; random labels to flip and keep. Bare passes
and attacks take turns, and the ratio is the median of those of the turns. Memory is what a fresh process adds, at its
peak, to what it had before: to the resident set on the CPU, to the allocator on CUDA.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from batches import save_rows

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.methods import METHODS, find_method
from mlperturb.attacks.problem import Problem
from mlperturb.model.checkpoints import build_network, default_preprocess
from mlperturb.model.classifier import BoundClassifier, Classifier, fold_batch_norm
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.protocol import Model, Viewed
from mlperturb.system.devices import prepare
from mlperturb.targets import Targets, decide


def build(arguments: argparse.Namespace) -> tuple[BoundClassifier, torch.Tensor, Targets]:
    """Return a classifier bound to a batch of random photos, and what is asked of each: a pair flipped, the rest kept.

    Of `arguments`: arch, its size and number of labels, batch, the photo's (height, width), device.
    """
    device = prepare(arguments.device, 0)
    normalise = default_preprocess(arguments.arch)
    preprocess = Preprocess((arguments.size, arguments.size), mean=normalise.mean, std=normalise.std)
    network = fold_batch_norm(build_network(arguments.arch, arguments.labels))
    classifier = Classifier(network, [str(number) for number in range(arguments.labels)], None, preprocess).to(device)
    images = (torch.rand(arguments.batch, 3, *arguments.photo) * 255).round().div(255).to(device)
    model = classifier.bind([arguments.photo] * arguments.batch)
    with torch.no_grad():
        logits = model(images)
        classifier.boundary += logits.mean(0)  # so that labels of both signs are near
        truth = decide(logits, classifier.boundary)
    flip = torch.zeros_like(truth, dtype=torch.bool)
    flip[:, :2] = True
    return model, images, Targets(flip, ~flip, truth, classifier.boundary)


def attack(model: Model | Viewed, images: torch.Tensor, targets: Targets, method: str, passes: int) -> Problem:
    """Run one method under a cap on passes; return its problem, with the passes counted."""
    problem = Problem(model, images, ClassificationGoal(targets), limit=passes)
    budget = "paper" if method == "ml-ddn" else "balanced"
    find_method(method).load()(problem, **find_method(method).tuning(budget))
    return problem


def bare(model: Model | Viewed, images: torch.Tensor, forward: int, backward: int) -> None:
    """Run so many passes of the network and nothing else."""
    for number in range(forward):
        if number >= backward:
            with torch.no_grad():
                model(images)
            continue
        variable = images.clone().requires_grad_()
        torch.autograd.grad(model(variable).sum(), variable)


def wait(device: str) -> float:
    """Return the time once the device is idle."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_memory(arguments: argparse.Namespace, method: str | None) -> int:
    """Return the bytes that one attack, or bare passes, add at their peak."""
    model, images, targets = build(arguments)
    before = peak_memory(arguments.device)
    if method is None:
        bare(model, images, 3, 3)
    else:
        attack(model, images, targets, method, 12)
    return peak_memory(arguments.device) - before


def peak_memory(device: str) -> int:
    """Return the most memory that this process had: allocated on CUDA; on the CPU the resident set (Linux)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def added_memory(arguments: argparse.Namespace, method: str | None) -> int:
    """Measure in a fresh process, which has no peak of earlier work."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_memory, arguments, method).result()


def take_turns(
    arguments: argparse.Namespace, built: tuple[Model | Viewed, torch.Tensor, Targets], method: str
) -> tuple[list[tuple[float, float]], int, int]:
    """Attack and run as many bare passes, in turns; return the seconds of a pass of both, and the passes of a turn."""
    model, images, targets = built
    turns = []
    for turn in range(arguments.turns + 1):
        start = wait(arguments.device)
        meter = attack(model, images, targets, method, arguments.passes).meter
        middle = wait(arguments.device)
        forward, backward = int(meter.forward.max()), int(meter.backward.max())
        bare(model, images, forward, backward)
        end = wait(arguments.device)
        if turn:  # the first one warms up
            turns.append(((middle - start) / (forward + backward), (end - middle) / (forward + backward)))
    return turns, forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--passes", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.labels, arguments.photo = 20, (arguments.size, arguments.size)

    methods = list(METHODS) if arguments.methods == "all" else arguments.methods.split(",")
    model, images, targets = build(arguments)
    memory = added_memory(arguments, None)
    rows = []
    print(f"{arguments.arch}, {arguments.size} pixels, batch {arguments.batch}, {arguments.device}")
    print("| method | forward | backward | s a pass | over bare | memory over bare |\n|---|---:|---:|---:|---:|---:|")
    for method in methods:
        turns, forward, backward = take_turns(arguments, (model, images, targets), method)
        row = {
            "method": method,
            "forward": forward,
            "backward": backward,
            "seconds_per_pass": statistics.median(spent for spent, _ in turns),
            "over_bare": statistics.median(spent / plain for spent, plain in turns),
            "memory_over_bare": added_memory(arguments, method) / memory,
        }
        rows.append(row)
        print(
            f"| {method} | {forward} | {backward} | {row['seconds_per_pass']:.4f} | {row['over_bare']:.3f} "
            f"| {row['memory_over_bare']:.2f} |",
            flush=True,
        )
    save_rows(arguments, rows)


if __name__ == "__main__":
    main()
