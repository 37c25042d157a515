"""What tests share: models with known answers, ragged targets, runs of several processes, what a run wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mlperturb.attacks.carlini_wagner import ml_cw
from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.deepfool import ml_dp
from mlperturb.attacks.fast_gradient import fg, fgs
from mlperturb.attacks.ranking import rank_1, rank_2
from mlperturb.attacks.schedule import FAST
from mlperturb.targets import Targets, decide

# Of the fixture `tiny`, and a photo of which it says cat and potted plant.
TINY_LABELS = ("cat", "dog", "potted plant", "hen")
TINY_PIXELS = np.random.default_rng(1).integers(0, 256, (30, 36, 3), dtype=np.uint8)

# Every method, in every variant that takes another way through the code, tuned to be quick.
ATTACKS: dict[str, Callable] = {
    "ml-ddn": lambda problem: ml_ddn(problem, iterations=20),
    "ml-ddn after": lambda problem: ml_ddn(problem, rounding="after", iterations=20),
    "fgs": lambda problem: fgs(problem, grid=8, refinements=3),
    "fg": lambda problem: fg(problem, grid=8, refinements=3),
    "ml-cw": lambda problem: ml_cw(problem, schedule=FAST),
    "ml-cw probability": lambda problem: ml_cw(problem, space="probability", schedule=FAST),
    "ml-dp nnls": lambda problem: ml_dp(problem, iterations=5),
    "ml-dp pinv": lambda problem: ml_dp(problem, solver="pinv", space="probability", iterations=5, stop_when_met=False),
    "rank-1": lambda problem: rank_1(problem, schedule=FAST),
    "rank-1 threshold": lambda problem: rank_1(problem, between="threshold", schedule=FAST),
    "rank-2": lambda problem: rank_2(problem, between="none", schedule=FAST),
}


@dataclass(frozen=True)
class Linear:
    """z = W flat(x) + b."""

    weight: Tensor  # (L, d)
    bias: Tensor  # (L,)

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


def linear_problem(
    count: int, labels: int, *, size: tuple[int, int] = (4, 4), seed: int = 0, scale: float = 1.0, dtype=torch.double
) -> tuple[Linear, Tensor, Tensor]:
    """Return a linear model, mid-grey photos and their labels; every margin is one that a small step crosses."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.01 * torch.randn(count, 3, *size, generator=generator, dtype=dtype)
    weight = scale * torch.randn(labels, images[0].numel(), generator=generator, dtype=dtype)
    centre = torch.full_like(images[:1], 0.5)
    margin = (0.4 + 0.5 * torch.rand(labels, generator=generator, dtype=dtype)) * weight[:, -1].sign()
    model = Linear(weight, scale * margin - centre.flatten() @ weight.T)
    return model, images, decide(model(images), torch.zeros(labels, dtype=dtype))


def mask(count: int, labels: int, chosen: list[int]) -> Tensor:
    """Return the mask of these labels, the same for every image."""
    result = torch.zeros(count, labels, dtype=torch.bool)
    result[:, chosen] = True
    return result


def make_net(labels: int = 6, *, seed: int = 1, dtype=torch.double) -> nn.Module:
    """Return a small, smooth network whose logits come with both signs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(labels)
        ).to(dtype)
        images = torch.rand(64, 3, 10, 10, dtype=dtype)
        with torch.no_grad():
            net[-1].initialize_parameters(net[:-1](images))
            net[-1].reset_parameters()
            net[-1].weight.mul_(6)
            net[-1].bias.sub_(net(images).mean(0))
    return net.eval().requires_grad_(False)


def ragged_targets(net: nn.Module, labels: int = 6, *, dtype=torch.double, margin: float = 0.0):
    """Return 9 photos and targets in which A_1, A_-1, B_1, B_-1 and C are empty for some photos."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(400, 3, 10, 10, generator=generator, dtype=dtype)
    boundary = torch.zeros(labels, dtype=dtype)
    truth = decide(net(images), boundary)
    mixed = ((truth > 0).sum(1) >= 2) & ((truth < 0).sum(1) >= 2)
    images, truth = images[mixed][:9], truth[mixed][:9]
    assert len(images) == 9
    positive, first = truth > 0, torch.zeros_like(truth, dtype=torch.bool)
    first[:, 0] = True
    one_positive = positive & (positive.cumsum(1) == 1)
    one_negative = ~positive & ((~positive).cumsum(1) == 1)
    rows = [
        (one_positive, ~one_positive),  # C and A_-1 empty
        (one_negative, ~one_negative),  # C and A_1 empty
        (one_positive | one_negative, ~(one_positive | one_negative)),
        (one_positive, first & False),  # B empty
        (first | True, first & False),  # B and C empty
        (one_negative, positive),  # B_-1 empty
        (one_positive, ~positive),  # B_1 empty
        (positive, ~positive),  # A = A_1, B = B_-1
        (first, first & False),
    ]
    flip = torch.stack([rows[number][0][number] for number in range(9)])
    keep = torch.stack([rows[number][1][number] for number in range(9)])
    return images, Targets(flip, keep, truth, boundary, margin)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(context, logits, owner):
        context.owner = owner
        return logits.clone()

    @staticmethod
    def backward(context, gradient):
        owner = context.owner
        owner.tally.backward[owner.rows] += 1
        owner.tally.used[owner.rows] += (gradient != 0).any(1).long()
        return gradient, None


@dataclass
class Tally:
    """What a counting model has seen.

    Attributes:
        forward: forward passes of each image.
        backward: backward passes that each image was part of.
        used: those in which it had a gradient of its own.
        batches: the sizes of the batches.
    """

    forward: Tensor
    backward: Tensor
    used: Tensor
    batches: list[int] = field(default_factory=list)


class Counting:
    """A model that counts, by itself, what each image of a batch costs."""

    def __init__(self, model: Callable[[Tensor], Tensor], rows: int | Tensor, tally: Tally | None = None) -> None:
        self.model = model
        self.rows = torch.arange(rows) if isinstance(rows, int) else rows
        self.tally = tally or Tally(*(torch.zeros(len(self.rows), dtype=torch.long) for _ in range(3)))

    def __call__(self, images: Tensor) -> Tensor:
        assert len(images) == len(self.rows), "the model was not narrowed to the images it is called with"
        self.tally.forward[self.rows] += 1
        self.tally.batches.append(len(images))
        return _Count.apply(self.model(images), self)

    def select(self, rows: Tensor) -> Counting:
        return Counting(self.model, self.rows[rows], self.tally)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")


def launch(arguments: list[object], *, restarts: int = 0, processes: int = 2, mark: str = "") -> subprocess.Popen[str]:
    """Start a command of ours under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", "mlperturb", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLPERTURB_TEST": mark}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for it; return exit code, stdout and stderr."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def find_rank(rank: int, mark: str) -> int:
    """Return the process id of a rank of the run of this mark."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"RANK={rank}".encode(), f"MLPERTURB_TEST={mark}".encode()} <= set(environment):
            return int(path.parent.name)
    raise AssertionError(f"no process of rank {rank}")


def write_photos(folder: Path, count: int) -> Path:
    """Write photos of several sizes, named by number, and a file that is none."""
    folder.mkdir()
    for number in range(count):
        pixels = np.roll(TINY_PIXELS, number, 1)[: 30 - number % 3, : 36 - number % 2]
        Image.fromarray(pixels).save(folder / f"{number:0{len(str(count - 1))}}.png")
    (folder / "broken.png").write_bytes(b"nonsense")
    return folder


def contents(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Return the PNGs, and the records of the report without their times."""
    records = json.loads((out / "report.json").read_text())["images"]
    for record in records:
        record["cost"].pop("seconds")
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}, records


def attacked(out: Path) -> list[str]:
    """Return the photos of every attack that came to an end, in the order of the journal."""
    entries = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [r["source"] for entry in entries for r in entry.get("records", ()) if r["error"] is None]


def said(err: str) -> list[str]:
    """Return the lines on stderr, but for that of the file that is no photo."""
    assert "Traceback" not in err
    return [line for line in err.splitlines() if "broken.png" not in line]
