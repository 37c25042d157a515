"""The training losses (Eq. 12 and cross-entropy), and the calibration of logits to thresholds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def eq12_loss(logits: Tensor, truth: Tensor, instance_weight: float = 0.5) -> Tensor:
    """Return J of Eq. 12: BP-MLL's pairwise exponential loss by image and, across the batch, by label.

    The sum over pairs factorises: sum_pq exp(f_q - f_p) = (sum_q exp(f_q)) (sum_p exp(-f_p)). An image without
    positives or without negatives, or a label with none in the batch, contributes zero to its mean.

    Args:
        logits: z, (N, L); f = sigmoid(z).
        truth: +1, -1, or 0 for a difficult label, which is left out; (N, L).
        instance_weight: lambda.
    """
    probabilities = torch.sigmoid(logits)
    positive, negative = (truth > 0).to(logits.dtype), (truth < 0).to(logits.dtype)
    up, down = probabilities.exp() * negative, (-probabilities).exp() * positive

    def pairwise(dim: int) -> Tensor:
        pairs = positive.sum(dim) * negative.sum(dim)
        return (up.sum(dim) * down.sum(dim) / pairs.clamp(min=1)).mean()

    return instance_weight * pairwise(1) + pairwise(0)


def cross_entropy(logits: Tensor, truth: Tensor, teacher: Tensor | None = None, weight: float = 0.5) -> Tensor:
    """Return the calibrating term beside Eq. 12, binary cross-entropy.

    With a teacher the target is (1 - weight) [y = 1] + weight sigmoid(teacher); of a difficult label, which is left out
    otherwise, sigmoid(teacher) alone.

    Args:
        logits: z, (N, L).
        truth: y: +1, -1, or 0 for a difficult label; (N, L).
        teacher: logits of the networks to learn from, (N, L).
        weight: of the teacher, in [0, 1].
    """
    counted, target = (truth != 0).to(logits.dtype), (truth > 0).to(logits.dtype)
    if teacher is not None:
        soft = torch.sigmoid(teacher)
        target = torch.where(truth == 0, soft, torch.lerp(target, soft, weight))
        counted = torch.ones_like(counted)
    losses = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * counted).sum(1).mean() / 2  # summed over labels, so that it weighs as much as Eq. 12's means


SHIFTS = {"label": 1.5, "one": 6.0, "none": 0.0}  # by name, how far one shift for all labels may go


def calibrate(logits: Tensor, truth: Tensor, boundary: Tensor, shift: str = "label") -> Tensor:
    """Fit a bias for each label, (L,), so that its threshold separates: Eq. 12 alone does not place it.

    With `label`, each bias maximises the likelihood of the annotations at a fixed slope, shrunk a little to zero so
    that a rare label is not thrown about. Then, or with `one` alone, one shift for all labels maximises micro-F1 at the
    thresholds. With `none`, every bias is zero.

    Args:
        logits: of validation photos, (N, L).
        truth: (N, L).
        boundary: logit(t), (L,).
        shift: a name of `SHIFTS`.
    """
    counted, positive = (truth != 0).double(), (truth > 0).double()
    scores = logits.double() - boundary
    bias = torch.zeros(scores.shape[1], dtype=torch.double)
    for _ in range(50 if shift == "label" else 0):  # Newton's method on a concave function of one variable a label
        predicted = torch.sigmoid(scores + bias)
        slope = ((positive - predicted) * counted).sum(0) - bias
        curvature = (predicted * (1 - predicted) * counted).sum(0) + 1
        bias = bias + (slope / curvature).clamp(-1, 1)

    def micro_f1(moved: float) -> float:
        decided = (scores + bias + moved >= 0).double() * counted
        return float(2 * (decided * positive).sum() / (decided.sum() + (positive * counted).sum()).clamp(min=1))

    if not SHIFTS[shift]:
        return bias.to(logits.dtype)
    shifts = np.linspace(-SHIFTS[shift], SHIFTS[shift], round(40 * SHIFTS[shift]) + 1)
    smooth = np.convolve([micro_f1(float(moved)) for moved in shifts], np.ones(7) / 7, mode="valid")
    best = shifts[3:-3][smooth >= smooth.max() - 1e-9]  # a plateau where many shifts decide alike
    return (bias + float(best[np.argmin(np.abs(best))])).to(logits.dtype)
