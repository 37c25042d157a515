"""ML-DP, multi-label DeepFool (Section III-B2, Eq. 6-7, Algorithm 1)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem
from mlperturb.targets import Space

Solver = Literal["pinv", "nnls"]


def ml_dp(
    problem: Problem,
    *,
    solver: Solver = "nnls",
    space: Space = "logit",
    iterations: int = 20,
    overshoot: float = 0.02,
    stop_when_met: bool = True,
) -> Outcome:
    """Linearise the constraints, step to where they hold, repeat: P(x_i)^T dr <= q(x_i), Algorithm 1.

    Deviations from Algorithm 1 as printed (docs/methods.md): line 8 is x_{i+1} = x + r_{i+1}; line 14 compares the
    perturbations; lines 13 and 15 keep the iterate just tested; x + r is clipped to the pixel range.

    Args:
        problem: the batch.
        solver: `pinv`, the paper's, solves the *equalities* P^T dr = q, and so moves labels that are already right to
            their thresholds; `nnls` solves the inequalities of Eq. 7 exactly.
        space: linearise logits or, as the paper does, probabilities.
        iterations: the paper's limit is 20.
        overshoot: step past violated constraints by this share, as DeepFool does for a single label, because the
            linear step falls short of a curved boundary. The paper does not overshoot.
        stop_when_met: an image leaves the batch when all its constraints hold.
    """
    problem = problem.aim(ClassificationGoal(problem.targets, space))
    goal, best = problem.goal, Best(problem)
    perturbed = problem.images.clone()
    for iteration in range(iterations + 1):
        present = problem.targets.constrained
        images = perturbed.requires_grad_()
        logits = problem.logits(images)
        met = best.update(problem, images.detach(), logits.detach())
        if iteration == iterations:
            break
        active = problem.affordable(present.sum(1).cpu() + 1) & logits.isfinite().all(1)
        if stop_when_met or iteration == 0:
            active &= ~met
        if not bool(active.any()):
            break
        values = problem.goal.violations(logits)  # -q, (n, L)
        matrix = problem.jacobian(values, images, present & active[:, None])  # P^T, (n, L, 3, H, W)
        kept = active.nonzero().flatten()
        q = -values.detach().masked_fill(~present, 0.0)[kept]
        q = torch.where(q < 0, q * (1 + overshoot), q)
        step = solve_step(matrix[kept].flatten(2), q, present[kept], solver)  # dr, (n, d)
        problem = problem.select(kept)
        perturbed = problem.within_cap(problem.clip(images.detach()[kept] + step.view_as(problem.images)))
    return best.outcome(goal)


def solve_step(matrix: Tensor, q: Tensor, present: Tensor, solver: Solver) -> Tensor:
    """Return the shortest dr, (n, d), with P^T dr = q (`pinv`) or P^T dr <= q (`nnls`), through the k x k Gram matrix.

    Args:
        matrix: P^T, (n, k, d).
        q: (n, k).
        present: which constraints exist, boolean, (n, k).
        solver: see `ml_dp`.
    """
    gram = torch.zeros(*q.shape, q.shape[1], dtype=torch.double, device=q.device)
    for strip in torch.split(matrix, 1 << 20, dim=2):  # P^T P, (n, k, k), in double without a double copy of P
        gram += strip.double() @ strip.double().transpose(1, 2)
    right = q.double()
    if solver == "pinv":
        weights = (torch.linalg.pinv(gram, hermitian=True) @ right.unsqueeze(2)).squeeze(2)
    else:
        solved = [
            -solve_dual(g, r, p)
            for g, r, p in zip(gram.cpu().numpy(), right.cpu().numpy(), present.cpu().numpy(), strict=True)
        ]
        weights = torch.from_numpy(np.stack(solved)).to(gram.device)
    step: Tensor = (weights.to(matrix.dtype).unsqueeze(1) @ matrix).squeeze(1)
    return step


def solve_dual(gram: np.ndarray, q: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Return mu >= 0, (k,), so that dr = -P mu is the shortest dr with P^T dr <= q.

    The dual of Eq. 7, min 1/2 mu^T (P^T P) mu + q^T mu over mu >= 0, is a non-negative least squares problem on a
    Cholesky factor of the Gram matrix. A ridge of 1e-9 keeps it solvable where constraints depend on each other.

    Args:
        gram: P^T P, (k, k).
        q: (k,).
        present: which constraints exist, boolean, (k,); mu is 0 elsewhere.
    """
    mu = np.zeros(len(q))
    k = int(present.sum())
    if k == 0 or not np.isfinite(gram).all():
        return mu
    inner = gram[np.ix_(present, present)]
    factor = np.linalg.cholesky(inner + (1e-9 * np.trace(inner) / k + 1e-300) * np.eye(k))
    mu[present] = nnls(factor.T, -np.linalg.solve(factor, q[present]), maxiter=100 * k)[0]
    return mu
