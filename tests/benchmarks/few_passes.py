"""What few passes lack: the length of the perturbation, or its direction.

    python tests/benchmarks/few_passes.py --voc ../shared/voc --case random --images 48 --passes 30 --long 400

The same photos, squeezed to 224 pixels, in a single view, are attacked within --passes and within --long. Every ratio
is a geometric mean over the photos where both meet the goal, with the standard error of its logarithm:

- found: the RMSD within --passes over the least RMSD of the two runs;
- length: the same if the last perturbation of the few passes is multiplied by the best of 31 factors, .7 to 1.3, for
  which the goal is met once it is rounded, wherever that is nearer than what was found. No rule for the length alone
  could do better with that direction;
- cosine: of the angle between the last perturbation of the long run and minus the gradient of an iteration, or the last
  perturbation, of the short run.

With --single, one label of A is to flip, and nothing is kept: what is left then is not for want of a gradient for each
constraint.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from batches import Batch, add_options, geometric_mean, load_batches
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mlperturb.attacks import ddn
from mlperturb.attacks.best import Best
from mlperturb.attacks.geometry import norms
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.walk import Walk

ENDLESS = 10_000  # iterations: the passes end the attack
FACTORS = torch.linspace(0.7, 1.3, 31)


@dataclass
class Trace:
    """The gradients of a run, and the last perturbation before any rounding, (n, 3 H W) each."""

    last: Tensor
    gradients: list[Tensor] = field(default_factory=list)


@contextmanager
def traced(images: Tensor) -> Iterator[Trace]:
    """Record the steps of ML-DDN."""
    step, perturbed, trace = ddn._step, ddn._perturbed, Trace(torch.zeros_like(images).flatten(1))

    def record_step(latent: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:
        trace.gradients.append(gradient.flatten(1).clone())
        return step(latent, gradient, scale)

    def record_point(problem: Problem, walk: Walk, *, lattice: bool) -> Tensor:
        trace.last[problem.rows] = walk.latent.flatten(1)
        return perturbed(problem, walk, lattice=lattice)

    ddn._step, ddn._perturbed = record_step, record_point
    try:
        yield trace
    finally:
        ddn._step, ddn._perturbed = step, perturbed


def attack(batch: Batch, passes: int) -> tuple[Best, Trace]:
    problem = batch.problem(passes)
    best = Best(problem)
    with traced(batch.images) as trace:
        ddn.descend(problem, best, ENDLESS)
    return best, trace


@torch.no_grad()
def best_length(batch: Batch, latent: Tensor) -> Tensor:
    """Return the least ||round(x + a r) - x|| over the factors a with which the goal is met, (n,); else infinite."""
    problem, least = batch.problem(None), torch.full((len(latent),), torch.inf)
    for factor in FACTORS:
        points = problem.lattice.points(batch.images, factor * latent.view_as(batch.images))
        met = problem.goal.met(problem.logits(points))
        least = torch.where(met, least.minimum(norms(points - batch.images)), least)
    return least


def single(batch: Batch) -> Batch:
    """Return the batch with the first label of A alone, and nothing to keep."""
    flip = torch.zeros_like(batch.targets.flip)
    flip[torch.arange(len(flip)), batch.targets.flip.to(torch.int8).argmax(1)] = True
    return replace(batch, targets=replace(batch.targets, flip=flip, keep=torch.zeros_like(flip)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--passes", type=int, default=30)
    parser.add_argument("--long", type=int, default=400)
    parser.add_argument("--single", action="store_true")
    arguments = parser.parse_args()
    found: list[Tensor] = []
    lengths: list[Tensor] = []
    cosines: list[Tensor] = []
    for whole in load_batches(arguments):
        batch = single(whole) if arguments.single else whole
        (few, short), (many, long) = attack(batch, arguments.passes), attack(batch, arguments.long)
        met = few.met & many.met
        known = few.norm.minimum(many.norm)
        nearest = few.norm.minimum(best_length(batch, short.last))
        found.append((few.norm / known)[met])
        lengths.append((nearest / known)[met])
        end, count = long.last, len(short.gradients)
        seen = [-short.gradients[step] for step in (0, count // 4, count // 2, count - 1)] + [short.last]
        cosines.append(torch.stack([cosine_similarity(value, end) for value in seen], 1)[met])
    photos = sum(len(part) for part in found)
    print(f"{arguments.case}{', one label' * arguments.single}, {photos} photos, {arguments.passes} passes")
    print(f"found  {geometric_mean(torch.cat(found))}\nlength {geometric_mean(torch.cat(lengths))}")
    means = torch.cat(cosines).mean(0).tolist()
    print("cosine of -g at 0, 1/4, 1/2 and the end, and of r: " + ", ".join(f"{value:.2f}" for value in means))


if __name__ == "__main__":
    main()
