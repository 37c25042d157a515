"""The 8-bit leaderboard: minimum-norm attacks by roundings, on one label and on many, a line of JSON for each result.

    pip install -e '.[bench]' && pip install --no-deps adv-lib
    python tests/benchmarks/leaderboard.py --voc ../shared/voc --images 24 --passes 30,100 --out leaderboard.jsonl
    python tests/benchmarks/leaderboard.py --table leaderboard.jsonl

Cases: `one` flips `person` and keeps nothing; `person` and `random` are the paper's, with all other labels kept. The
photos are squeezed to the network's own input, and every file is judged by the network on its 8-bit pixels.

Roundings: `nearest`; `scale`, the least scale of the float perturbation that still holds once rounded; `bfb`, that of
Bonnet, Furon and Bas (2020): each pixel to the integer below or above, by its cost and the loss's gradient; `ours`, the
search of `attacks.quantise`, and for ml-ddn its own rounding inside the loop. A rounding's passes are part of the
limit: the attack gets what is left, and roundings that leave it nearly as much share a run. Where a library goes on
beyond that, it is cut off, and its best iterate counts.

The other libraries see a network of classes that says whether the whole goal is met: the least slack of all
constraints, with the gradient of that constraint or of all of them (`--gradient`). The iterate that counts is the
nearest that met the goal, of all that they showed to the network.

Stopped, the same command goes on. Every photo is attacked alone. A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from batches import Batch, add_options, load_batches
from torch import Tensor, nn
from torch.nn import functional

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.lattice import to_lattice
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Meter, Problem, call
from mlperturb.attacks.quantise import quantise
from mlperturb.experiment.curves import summarise
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.system.files import file_sha256

ROUNDINGS = ("nearest", "scale", "bfb", "ours")
_SCALES = 18  # tried by `scale`, so that it can share a run with `bfb`
_BISECTIONS = 18  # of `bfb`: a photo has about 2^18 pixels
_OURS = 88  # passes that `quantise` can use


class CutOffError(Exception):
    """The limit on passes is reached."""


class Goal(nn.Module):
    """Whether a photo meets its goal as two classes, unmet and met, and a third that never wins, which ALMA needs.

    The logits are -m, m and -50, with m the least slack of the constraints. The gradient is that of m (`worst`), or of
    -sum softplus(-slack) over all constraints (`all`). It counts passes, cuts off at the limit, and keeps the best.
    """

    def __init__(self, batch: Batch, limit: int, gradient: str) -> None:
        super().__init__()
        self.batch, self.limit, self.gradient = batch, limit, gradient
        self.forward_passes = self.backward_passes = 0
        self.best, self.distance = batch.images.clone(), math.inf

    def forward(self, images: Tensor) -> Tensor:
        if self.forward_passes + self.backward_passes >= self.limit:
            raise CutOffError
        self.forward_passes += 1
        targets, images = self.batch.targets, images.to(self.batch.images.dtype)
        logits = self.batch.model(images)
        slack = (logits - targets.boundary) * targets.desired
        least = slack.masked_fill(~targets.constrained, math.inf).amin(1)
        if self.gradient == "all":
            total = -(functional.softplus(-slack) * targets.constrained).sum(1)
            least = total + (least - total).detach()
        if logits.requires_grad:
            logits.register_hook(self._count)
        distance = float((images.detach() - self.batch.images).norm())
        if bool(least > 0) and distance < self.distance:
            self.best, self.distance = images.detach().clone(), distance
        return torch.stack([-least, least, torch.full_like(least, -50.0)], dim=1)

    def _count(self, _: Tensor) -> None:
        self.backward_passes += 1


Rival = Callable[[Goal, Tensor, Tensor, int], object]  # network, images, their class, passes


def _foolbox(name: str) -> Rival:
    def run(network: Goal, images: Tensor, classes: Tensor, passes: int) -> None:
        import foolbox

        wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
        if name == "ddn":
            attack = foolbox.attacks.DDNAttack(steps=passes // 2)
        else:
            searches = 1 if passes < 60 else 3 if passes < 200 else 5
            attack = foolbox.attacks.L2CarliniWagnerAttack(
                binary_search_steps=searches, steps=passes // 2 // searches, initial_const=1.0, abort_early=False
            )
        attack(wrapped, images, foolbox.criteria.Misclassification(classes), epsilons=None)

    return run


def _adv_lib(name: str) -> Rival:
    def run(network: Goal, images: Tensor, classes: Tensor, passes: int) -> None:
        sys.modules.setdefault("visdom", ModuleType("visdom"))  # which it imports to draw with; nothing is drawn here
        from adv_lib import attacks

        if name == "ddn":
            attacks.ddn(network, images, classes, steps=passes // 2)
        elif name == "fmn":
            attacks.fmn(network, images, classes, norm=2, steps=passes // 2)
        else:
            attacks.alma(network, images, classes, num_steps=passes // 2, init_lr_distance=0.5)

    return run


def _deepfool(network: Goal, images: Tensor, _: Tensor, passes: int) -> None:
    from art.attacks.evasion import DeepFool
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(network, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 3, clip_values=(0, 1))
    attack = DeepFool(wrapped, max_iter=max(passes // 3, 1), nb_grads=2, batch_size=1, verbose=False)
    network(torch.from_numpy(attack.generate(images.cpu().numpy().astype(np.float32))).to(images.device))


RIVALS: dict[str, tuple[str, str, Rival]] = {  # the module that it needs, the gradient that serves it best
    "adv-lib DDN": ("adv_lib", "all", _adv_lib("ddn")),
    "adv-lib FMN": ("adv_lib", "worst", _adv_lib("fmn")),
    "adv-lib ALMA": ("adv_lib", "worst", _adv_lib("alma")),
    "foolbox DDN": ("foolbox", "all", _foolbox("ddn")),
    "foolbox C&W": ("foolbox", "all", _foolbox("cw")),
    "ART DeepFool": ("art", "worst", _deepfool),
}
OURS: dict[str, dict[str, Any]] = {"ml-ddn": {"rounding": "after", "iterations": 500}, "ml-cw": {}, "ml-dp": {}}


@dataclass(frozen=True)
class Found:
    """A float result and the passes that it cost."""

    images: Tensor
    forward: int
    backward: int


def reserve(rounding: str, passes: int) -> int:
    """Return the passes that a rounding keeps for itself."""
    most = {"nearest": 1, "scale": _SCALES + 2, "bfb": _BISECTIONS + 2, "ours": _OURS}[rounding]
    return min(most, max(passes // 3, 1))


def attack(batch: Batch, name: str, passes: int, gradient: str | None) -> Found:
    """Run an attack in floats within a limit on passes."""
    if name in OURS:
        problem = batch.problem(passes)
        outcome = find_method(name).load()(problem, **OURS[name])
        return Found(outcome.images, int(problem.meter.forward[0]), int(problem.meter.backward[0]))
    _, usual, rival = RIVALS[name]
    network = Goal(batch, passes, gradient or usual).eval()
    unmet = torch.zeros(1, dtype=torch.long, device=batch.images.device)
    with contextlib.suppress(CutOffError):
        rival(network, batch.images.clone(), unmet, passes)
    return Found(network.best, network.forward_passes, network.backward_passes)


def bring_to_bits(problem: Problem, found: Found, rounding: str) -> Tensor:
    """Return the 8-bit photo of a float result, within the problem's limit on passes."""
    if rounding == "nearest":
        problem.meter.forward.add_(1)  # a look at the file, which every other rounding has had
        return to_lattice(found.images)
    if rounding == "bfb":
        return bonnet_furon_bas(problem, found.images)
    with torch.no_grad():
        met = problem.goal.met(call(problem.model, found.images, 0))  # not counted: the attack has seen it
    scales, iterations = (_SCALES, 0) if rounding == "scale" else (8, 40)
    return quantise(problem, Outcome(found.images, met, problem.goal), scales=scales, iterations=iterations).images


def bonnet_furon_bas(problem: Problem, images: Tensor) -> Tensor:
    """Round by Bonnet, Furon and Bas, "What if adversarial samples were digital images?" (IH&MMSec 2020).

    Pixel j of the perturbation u = 255 (x* - x) becomes floor(u_j) or ceil(u_j), whichever has the lower
    q_j^2 / 2 + lambda g_j q_j, g the loss's gradient at x*: ceil where ceil(u_j) + lambda g_j < 1/2. The least lambda
    whose photo meets the goal is found by a binary search among those at which a pixel changes.
    """
    targets, goal = problem.targets, problem.goal
    point = images.clone().requires_grad_()
    slack = (problem.logits(point) - targets.boundary) * targets.desired
    losses = (functional.softplus(-slack) * targets.constrained).sum(1)
    gradient = problem.gradient(losses, point)
    moved = 255 * (images.detach() - problem.images)
    moved = torch.where((moved - moved.round()).abs() < 1e-3, moved.round(), moved)  # whole steps stay as they are
    up, down = moved.ceil(), moved.floor()
    turns = (0.5 - up) / gradient
    turns = turns[(turns > 0) & turns.isfinite() & (up > down)].sort().values

    def rounded(weight: float) -> Tensor:
        steps = torch.where(up + weight * gradient < 0.5, up, down)
        return to_lattice(problem.images + steps / 255)

    best, low, high = rounded(0.0), -1, len(turns)
    while high - low > 1 and bool(problem.affordable(1).all()):
        middle = (low + high) // 2
        tried = rounded(0.0 if middle < 0 else float(turns[middle]) * (1 + 1e-6))
        with torch.no_grad():
            met = bool(goal.met(problem.logits(tried)))
        if met:
            best, high = tried, middle
        else:
            low = middle
    if high == len(turns) and len(turns):
        best = rounded(float(turns[-1]) * 2)
    return best


def compete(batch: Batch, name: str, passes: int, gradient: str | None) -> Iterator[dict[str, Any]]:
    """Yield the result of each rounding of an attack on a single photo."""
    with torch.no_grad():
        clean = batch.model(batch.images)
    known: dict[int, Found] = {}
    for rounding in sorted(ROUNDINGS, key=lambda one: -reserve(one, passes)):
        if name == "ml-ddn" and rounding == "ours":
            problem = batch.problem(passes)
            images = find_method(name).load()(problem, iterations=500).images
            result = found = Found(images, int(problem.meter.forward[0]), int(problem.meter.backward[0]))
        else:
            left = passes - reserve(rounding, passes)
            left = next((other for other in known if 0.9 * left <= other <= left), left)
            found = known[left] if left in known else known.setdefault(left, attack(batch, name, left, gradient))
            meter = Meter(*torch.tensor([[found.forward], [found.backward], [0]]))
            problem = replace(batch.problem(passes), meter=meter, clean=clean.unsqueeze(1))
            images = bring_to_bits(problem, found, rounding)
            result = Found(images, int(meter.forward[0]), int(meter.backward[0]))
        row: dict[str, Any] = {"rounding": rounding, "forward": result.forward, "backward": result.backward}
        for which, one in (("float", found), ("saved", result)):
            met, rmsd = judge(batch, one.images)
            row |= {f"{which}_met": met, f"{which}_rmsd": rmsd}
        yield row


@torch.no_grad()
def judge(batch: Batch, images: Tensor) -> tuple[bool, float]:
    """Return whether the goal is met, and the RMSD on the 0-255 scale."""
    met = bool(batch.problem(None).goal.met(batch.model(images)))
    return met, float(255 * (images - batch.images).square().mean().sqrt())


def load(arguments: argparse.Namespace, case: str) -> list[Batch]:
    """Return a case's photos, each alone, without a margin."""
    options = argparse.Namespace(**{**vars(arguments), "case": "person" if case == "one" else case, "batch": 1})
    batches = []
    for batch in load_batches(options):
        targets = replace(batch.targets, margin=0.0)
        if case == "one":
            targets = replace(targets, keep=torch.zeros_like(targets.keep))
        batches.append(replace(batch, targets=targets))
    return batches


def read(path: Path, key: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the results that a file holds; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise
    if key is not None and found and found[0] != key:
        raise SystemExit(f"{path} was written with other settings: {found[0]}")
    return found[1:]


def tabulate(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the tables: by case and passes, the attacks by rounding, and each beside ml-ddn."""
    for case, passes in dict.fromkeys((row["case"], row["passes"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["passes"]) == (case, passes)]
        attacks = list(dict.fromkeys(row["attack"] for row in mine))
        photos = {name: {row["photo"] for row in mine if row["attack"] == name} for name in attacks}
        shared = set.intersection(*photos.values())  # those that every attack has had
        mine = [row for row in mine if row["photo"] in shared]
        best = {r["photo"]: r for r in mine if (r["attack"], r["rounding"]) == ("ml-ddn", "ours")}
        yield f"\n**{case}, {passes} passes, {len(shared)} photos**\n"
        yield "| attack | float | " + " | ".join(ROUNDINGS) + " |"
        yield "|---|---" + "|---" * len(ROUNDINGS) + "|"
        for name in attacks:
            cells = [_cell([row for row in mine if (row["attack"], row["rounding"]) == (name, "nearest")], "float", {})]
            for rounding in ROUNDINGS:
                part = [row for row in mine if (row["attack"], row["rounding"]) == (name, rounding)]
                cells.append(_cell(part, "saved", best))
            yield f"| {name} | " + " | ".join(cells) + " |"


def _cell(rows: list[dict[str, Any]], which: str, best: dict[int, dict[str, Any]]) -> str:
    """Return the share of successes, the RMSD that half the photos need, and the ratio to ml-ddn's."""
    if not rows:
        return "-"
    sizes = np.array([row[f"{which}_rmsd"] if row[f"{which}_met"] else np.inf for row in rows])
    half = summarise(sizes)[0]["rmsd_50"]
    text = f"{np.isfinite(sizes).mean():.0%}, {'-' if half is None else f'{half:.3f}'}"
    pairs = [
        (size, best[row["photo"]]["saved_rmsd"])
        for row, size in zip(rows, sizes, strict=True)
        if np.isfinite(size) and row["photo"] in best and best[row["photo"]]["saved_met"]
    ]
    return text + (f", x {np.exp(np.mean([np.log(a / b) for a, b in pairs])):.2f}" if pairs else "")


def run(arguments: argparse.Namespace) -> None:
    """Append what the file does not hold yet, photo by photo."""
    checkpoint = arguments.checkpoint or bundled_checkpoint()
    if not arguments.size:
        (arguments.size, _) = load_checkpoint(checkpoint)[0].preprocess.output_size
    key = {name: getattr(arguments, name) for name in ("year", "split", "size", "seed", "gradient")} | {
        "checkpoint": file_sha256(checkpoint)
    }
    done = {tuple(row[name] for name in ("case", "photo", "attack", "passes")) for row in read(arguments.out, key)}
    fresh = not arguments.out.exists()
    present = [name for name in arguments.attacks.split(",") if name in OURS or find_spec(RIVALS[name][0])]
    photos = {case: load(arguments, case) for case in arguments.cases.split(",")}
    with arguments.out.open("a") as stream:
        if fresh:
            stream.write(json.dumps(key) + "\n")
        for number in range(max(map(len, photos.values()))):
            for case, batches in photos.items():
                if number >= len(batches):
                    continue
                for passes in map(int, arguments.passes.split(",")):
                    for name in present:
                        if (case, number, name, passes) in done:
                            continue
                        head = {"case": case, "photo": number, "attack": name, "passes": passes}
                        rows = [head | row for row in compete(batches[number], name, passes, arguments.gradient)]
                        stream.write("".join(json.dumps(row) + "\n" for row in rows))
                        stream.flush()


def main() -> None:
    if sys.argv[1:2] == ["--table"]:
        print("\n".join(tabulate(read(Path(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(size=0)  # the network's own
    parser.add_argument("--cases", default="one,person,random")
    parser.add_argument("--attacks", default=",".join([*OURS, *RIVALS]))
    parser.add_argument("--passes", default="30,100,300")
    parser.add_argument("--gradient", choices=("worst", "all"), help="the same for all; default: each attack's best")
    parser.add_argument("--out", type=Path, default=Path("leaderboard.jsonl"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the libraries', of their own dependencies
    run(arguments)
    print("\n".join(tabulate(read(arguments.out))))


if __name__ == "__main__":
    main()
