"""Draw success against RMSD of several runs of `mlperturb evaluate` in a picture, a line for each run and method.

    python tests/benchmarks/compare_curves.py ordinary robust --case random --out curve.png

A run's line has the name of its folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlperturb.show.curves import draw_curves
from mlperturb.show.figures import save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--case", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [
        {**curve, "method": f"{curve['method']}, {run.name}"}
        for run in arguments.runs
        for curve in json.loads((run / "curves.json").read_text())["curves"]
        if (curve["case"], curve["result"]) == (arguments.case, "saved")
    ]
    if not lines:
        parser.error(f"expected runs that have the case {arguments.case}, got none")
    save_figure(draw_curves(arguments.case, lines), arguments.out)


if __name__ == "__main__":
    main()
