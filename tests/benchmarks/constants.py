"""What each constant of ML-DDN is worth: the attack with the constant at half and at twice its value.

    python tests/benchmarks/constants.py --voc ../shared/voc --case random --images 24 --passes 60

Every variant attacks the same photos, squeezed to 224 pixels, in a single view. The ratio is the mean over the photos
of the RMSD of the variant over the RMSD with the constants as they are, where both meet the goal; its standard error
says what is noise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from batches import add_options, load_batches
from torch import Tensor

from mlperturb.attacks import ddn, pace
from mlperturb.attacks.best import Best

PACE = ("rate", "later", "shrink", "spare", "grow", "need", "sharpness")
MODULES = {pace: ("_OVERSHOOT", "_LEAST"), ddn: ("_RISE", "_FALL", "_SMALLEST")}
ENDLESS = 10_000  # iterations: the passes end the attack


@contextmanager
def changed(name: str, factor: float) -> Iterator[pace.Pace]:
    """Return the pace with a constant multiplied; restore a constant of the module afterwards."""
    if name in PACE:
        yield replace(pace.SEARCH, **{name: factor * getattr(pace.SEARCH, name)})
        return
    module = next(module for module, names in MODULES.items() if name in names)
    value = getattr(module, name)
    setattr(module, name, factor * value)
    try:
        yield pace.SEARCH
    finally:
        setattr(module, name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--passes", type=int, default=60)
    arguments = parser.parse_args()
    batches = load_batches(arguments)

    def attack(steps: pace.Pace) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for batch in batches:
            problem = batch.problem(arguments.passes)
            best = Best(problem)
            ddn.descend(problem, best, ENDLESS, pace=steps)
            sizes: Tensor = 255 * (best.images - batch.images).square().flatten(1).mean(1).sqrt()
            found += zip(sizes.tolist(), best.met.tolist(), strict=True)
        return found

    usual = attack(pace.SEARCH)
    print(f"{arguments.case}, {len(usual)} photos, {arguments.passes} passes: {sum(met for _, met in usual)} met")
    print("| constant | x 0.5 | x 2 |\n|---|---|---|")
    for name in (*PACE, *(name for names in MODULES.values() for name in names)):
        cells = []
        for factor in (0.5, 2.0):
            with changed(name, factor) as steps:
                found = attack(steps)
            ratios = [size / base for (size, met), (base, held) in zip(found, usual, strict=True) if met and held]
            spread = statistics.stdev(ratios) / len(ratios) ** 0.5
            lost = sum(held and not met for (_, met), (_, held) in zip(found, usual, strict=True))
            cells.append(f"{statistics.fmean(ratios):.3f} +- {spread:.3f}" + (f", {lost} not met" if lost else ""))
        print(f"| `{name}` | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
