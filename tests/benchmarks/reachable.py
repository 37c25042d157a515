"""How many constraints of a case any image at all can meet, whatever its distortion: a bound from the last layer.

    python tests/benchmarks/reachable.py --voc ../shared/voc --case extreme --images 24

MobileNetV2's logits are W f + b, where f, a mean of ReLU6, lies in [0, 6]. The most constraints that one f in that box
meets is a mixed-integer linear programme; no photo meets more, since every photo has some f in it. Solved by HiGHS,
once for each set of decisions among the photos.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from batches import add_options, load_batches, save_rows
from scipy.optimize import Bounds, LinearConstraint, milp

_LARGEST = 6.0  # of ReLU6


def most_met(weight: np.ndarray, bias: np.ndarray, signs: np.ndarray) -> tuple[int, bool]:
    """Return the most constraints s_j (W_j f + b_j) >= 0 that one f in [0, 6] meets, and whether that is proven.

    Args:
        weight: W, (L, d).
        bias: b less the boundaries, (L,).
        signs: s, the decisions asked for: +1, -1, or 0 for none; (L,).
    """
    asked = signs != 0
    rows, offsets = (signs[:, None] * weight)[asked], (signs * bias)[asked]
    count, features = rows.shape
    worst = _LARGEST * np.minimum(rows, 0).sum(1)  # of s_j W_j f; with m_j = 1 where constraint j is met:
    matrix = np.hstack([rows, np.diag(worst + offsets)])  # s_j W_j f + (worst_j + s_j b_j) m_j >= worst_j
    found = milp(
        np.r_[np.zeros(features), -np.ones(count)],
        constraints=LinearConstraint(matrix, lb=worst),
        integrality=np.r_[np.zeros(features), np.ones(count)],
        bounds=Bounds(np.zeros(features + count), np.r_[np.full(features, _LARGEST), np.ones(count)]),
        options={"time_limit": 300},
    )
    return int(np.floor(-found.mip_dual_bound + 1e-6)), bool(found.status == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()

    batches = load_batches(arguments)
    network = batches[0].model.classifier.network
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    weight = last.weight.double().cpu().numpy()
    targets = [batch.targets for batch in batches]
    bias = (last.bias.double() - targets[0].boundary.double()).cpu().numpy()
    signs = torch.cat([one.desired * one.constrained for one in targets]).cpu().numpy().astype(float)
    names = np.array(batches[0].model.classifier.labels)

    rows: list[dict[str, Any]] = []
    print("| photos | to be absent | constraints | at most, at once |\n|---:|---|---:|---:|")
    for pattern, count in zip(*np.unique(signs, axis=0, return_counts=True), strict=True):
        bound, proven = most_met(weight, bias, pattern)
        absent = ", ".join(names[pattern < 0])
        rows.append({"photos": int(count), "absent": absent, "constraints": int((pattern != 0).sum()), "most": bound})
        print(f"| {count} | {absent} | {rows[-1]['constraints']} | {bound}{'' if proven else ' (bound)'} |", flush=True)
    mean = sum(row["photos"] * row["most"] for row in rows) / sum(row["photos"] for row in rows)
    print(f"mean over photos: {mean:.1f}")
    save_rows(arguments, rows)


if __name__ == "__main__":
    main()
