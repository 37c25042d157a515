"""Which minimum-norm attack serves sets A and B best at so many passes: the comparison behind ML-DDN.

    python tests/benchmarks/minimum_norm.py --voc ../shared/voc --case random --images 16 --passes 30,100

The rivals live here, not in the package. Each is stopped at the limit on passes, everything counted; where it does not
round inside its loop, a third of the passes is kept for `quantise`, as `mlperturb attack` does. Every photo is attacked
by all of them. RMSD is on the 0-255 scale, over the photos on which the goal was met.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from batches import add_options, load_batches, save_rows
from torch import Tensor
from torch.nn import functional

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.ddn import descend
from mlperturb.attacks.deepfool import solve_step
from mlperturb.attacks.geometry import norms, spread
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.quantise import quantise

_SHARE = 3  # one in so many passes is kept for the 8-bit search


def ddn(problem: Problem, weighted: bool) -> Outcome:
    """DDN as Rony et al. 2019 have it (gamma .05, step 1 to .01), on the summed softplus of the violations.

    With `weighted`, each constraint has a multiplier that grows while it is violated and decays while it is slack.
    """
    goal, best = problem.goal, Best(problem)
    latent, radius = torch.zeros_like(problem.images), problem.images.new_ones(len(problem))
    multipliers = problem.targets.constrained.to(latent.dtype)
    steps = (problem.limit or 0) // 2
    for step in range(steps):
        images = (problem.images + latent).requires_grad_()
        logits = problem.logits(images)
        violations = goal.violations(logits).masked_fill(~problem.targets.constrained, -1e9)
        losses = (multipliers * functional.softplus(violations)).sum(1)
        gradient = problem.gradient(losses, images)
        met = best.update(problem, images.detach(), logits.detach())
        rate = 0.01 + 0.99 * (1 + torch.cos(torch.tensor(step / steps * torch.pi))) / 2
        latent = latent - rate * gradient / spread(norms(gradient).clamp(min=1e-30))
        radius = radius * torch.where(met, 0.95, 1.05)
        latent = latent * spread(radius / norms(latent).clamp(min=1e-30))
        latent = (problem.images + latent).clamp(0, 1) - problem.images
        if weighted:
            multipliers = multipliers * torch.where(violations.detach() > 0, 1.5, 0.9)
            multipliers = multipliers / multipliers.amax(1, keepdim=True)
    return best.outcome(goal)


def linearised(problem: Problem, *, from_clean: bool, trust: float, near: int = 6) -> Outcome:
    """Sequential quadratic programming on the Jacobian of the `near` constraints nearest to their edges.

    With `from_clean`, each step projects the *clean* photo onto the constraints linearised at the present point (FAB,
    and SQP): no step is longer than `trust` times the distance so far. Without, the shortest step from the present
    point, its length found by a line search of forward passes (JMA with the identity for its metric). Once the goal
    is met, a radial search goes back towards the clean photo.
    """
    goal, best = problem.goal, Best(problem)
    current = problem.images.clone()
    span = problem.images.new_full((len(problem),), torch.inf)
    while bool((active := problem.affordable(near + 4)).any()):
        if not bool(active.all()):
            rows = active.nonzero().flatten()
            problem, current, span = problem.select(rows), current[rows], span[rows]
        images = current.requires_grad_()
        logits = problem.logits(images)
        values = problem.goal.violations(logits)
        met = best.update(problem, images.detach(), logits.detach())
        least = values.detach().argsort(1, descending=True)[:, :near]
        present = torch.zeros_like(values, dtype=torch.bool).scatter_(1, least, True) & problem.targets.constrained
        matrix = problem.jacobian(values, images, present).flatten(2)
        current = images.detach()
        moved = (current - problem.images).flatten(1)
        bounds = -values.detach().masked_fill(~present, 0.0)
        bounds = torch.where(bounds < 0, 1.1 * bounds, bounds)
        if from_clean:
            bounds = bounds + (matrix @ moved.unsqueeze(2)).squeeze(2)
        step = solve_step(matrix, bounds, present, "nnls").view_as(current)
        if from_clean:
            step = problem.images + step - current
            span = torch.where(span.isinf(), 2 * norms(step), span)
            step = step * spread((span / norms(step).clamp(min=1e-30)).clamp(max=1))
            span = span * trust
        current = (current + step).clamp(0, 1)
        for share in (1.0, 0.9, 0.8):  # back towards the photo, or a little beyond
            with torch.no_grad():
                tried = torch.where(spread(met), share, 2 - share) * (current - problem.images) + problem.images
                found = best.update(problem, tried.clamp(0, 1), problem.logits(tried.clamp(0, 1)))
            if not from_clean and bool(found.all()):
                break
        rows = problem.rows.to(current.device)
        held = best.met[rows]
        current = torch.where(spread(held & ~met), best.images[rows], current) if not from_clean else current
    return best.outcome(goal)


def jacobian_start(problem: Problem) -> Outcome:
    """ML-DDN from the exact solution of the problem linearised at the clean photo, in place of its gradient step."""
    goal, best = problem.goal, Best(problem)
    images = problem.images.clone().requires_grad_()
    logits = problem.logits(images)
    values, present = goal.violations(logits), problem.targets.constrained.clone()
    least = values.detach().argsort(1, descending=True)[:, :6]
    present &= torch.zeros_like(present).scatter_(1, least, True)
    matrix = problem.jacobian(values, images, present).flatten(2)
    bounds = -1.3 * values.detach().masked_fill(~present, 0.0)
    step = solve_step(matrix, bounds, present, "nnls").view_as(images)
    descend(problem, best, (problem.limit or 0) // 2, start=step.detach())
    return best.outcome(goal, on_lattice=True)


RIVALS = {
    "DDN, summed softplus": lambda problem: ddn(problem, weighted=False),
    "DDN, a multiplier a constraint": lambda problem: ddn(problem, weighted=True),
    "SQP from the clean photo (FAB)": lambda problem: linearised(problem, from_clean=True, trust=0.8),
    "SQP from the last point (JMA)": lambda problem: linearised(problem, from_clean=False, trust=1.0),
    "ml-dp, nnls": lambda problem: find_method("ml-dp").load()(problem),
    "ml-cw": lambda problem: find_method("ml-cw").load()(problem),
    "ml-ddn, rounding after": lambda problem: find_method("ml-ddn").load()(problem, rounding="after", iterations=500),
    "Jacobian step, then ml-ddn": jacobian_start,
    "ml-ddn": lambda problem: find_method("ml-ddn").load()(problem, iterations=500),
}
INSIDE = ("Jacobian step, then ml-ddn", "ml-ddn")  # they round inside their loop


def rmsd(images: Tensor, clean: Tensor, met: Tensor) -> list[float]:
    return (255 * (images - clean)[met].square().flatten(1).mean(1).sqrt()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--passes", default="30,100")
    arguments = parser.parse_args()
    batches = load_batches(arguments)
    count = sum(len(batch.images) for batch in batches)
    rows = []
    print(f"{arguments.case}, {count} photos of {arguments.size} pixels")
    print(
        "| attack | passes | float success | float RMSD | 8-bit success | 8-bit RMSD |\n|---|---:|---:|---:|---:|---:|"
    )
    for passes in map(int, arguments.passes.split(",")):
        for name, rival in RIVALS.items():
            found: dict[str, list[float]] = {"float": [], "saved": []}
            spent = []
            for batch in batches:
                problem = batch.problem(passes if name in INSIDE else passes - passes // _SHARE)
                outcome = rival(problem)
                lattice = quantise(replace(problem, limit=passes), outcome)
                found["float"] += rmsd(outcome.images, batch.images, outcome.met)
                found["saved"] += rmsd(lattice.images, batch.images, lattice.met)
                spent += problem.meter.spent.tolist()
            row = {"attack": name, "passes": sum(spent) / count}
            for which, values in found.items():
                row |= {f"{which}_success": len(values) / count, f"{which}_rmsd": sum(values) / max(len(values), 1)}
            rows.append(row)
            print(
                f"| {name} | {row['passes']:.0f} | {row['float_success']:.0%} | {row['float_rmsd']:.3f} "
                f"| {row['saved_success']:.0%} | {row['saved_rmsd']:.3f} |",
                flush=True,
            )
    save_rows(arguments, rows)


if __name__ == "__main__":
    main()
