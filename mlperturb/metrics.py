"""Distortion, classification and ranking metrics (Section IV-D, Tables III-V); pure tensors.

`truth` is +1 present, -1 absent and 0 for labels left out (difficult labels, or labels outside A or B).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlperturb.targets import decide

_PART = 2**22  # numbers that are measured at once: their copies in double precision are 8 bytes each
_PAIRWISE = 128  # labels up to which `kendall_tau` compares all pairs at once


@dataclass(frozen=True)
class Distortion:
    """The distortion of a photo, x* - x, on the 0-255 scale, at the photo's own resolution."""

    rmsd: float
    l2: float
    linf: float


def distortion(difference: Tensor) -> Distortion:
    """Measure r = x* - x of one photo, on the 0-255 scale, any shape: RMSD = sqrt(mean(r^2)), L2, L-infinity."""
    return distortion_of(torch.split(difference.flatten(), _PART))


def pixel_distortion(pixels: npt.NDArray[np.uint8], photo: npt.NDArray[np.uint8]) -> Distortion:
    """Measure r = x* - x of a photo x and its change x*, 8 bits, a part at a time.

    Raises:
        ValueError: if their shapes differ.
    """
    if pixels.shape != photo.shape:
        raise ValueError(f"expected pixels of shape {photo.shape}, got {pixels.shape}")
    pairs = [array.reshape(-1) for array in (pixels, photo)]
    parts = (slice(start, start + _PART) for start in range(0, photo.size, _PART))
    return distortion_of(torch.from_numpy(np.subtract(*(one[part] for one in pairs), dtype=np.int16)) for part in parts)


def distortion_of(parts: Iterable[Tensor]) -> Distortion:
    """Measure r = x* - x of one photo, on the 0-255 scale, given in parts of any shape."""
    lengths, largest, count = [0.0], torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        if part.numel():
            exact = part.double()
            lengths.append(float(exact.norm()))
            largest, count = largest.maximum(exact.abs_().max().cpu()), count + part.numel()
    l2 = math.hypot(*lengths)
    return Distortion(l2 / max(count, 1) ** 0.5, l2, float(largest))


def hamming(decisions: Tensor, truth: Tensor) -> float:
    """Return the share of labels decided wrongly; (N, L) signs; NaN if no label counts."""
    counted = truth != 0
    return float((decisions != truth)[counted].double().mean())


def instance_hamming(decisions: Tensor, truth: Tensor) -> Tensor:
    """Return the share of labels decided wrongly of each image, (N,); NaN where no label counts."""
    counted = truth != 0
    return ((decisions != truth) & counted).sum(1).double() / counted.sum(1)


def f1_scores(decisions: Tensor, truth: Tensor) -> dict[str, float]:
    """Return instance, micro and macro F1 of (N, L) signs; 0 where nothing is present or predicted."""
    both, either = _overlap(decisions, truth)
    return {
        "instance_f1": float(instance_f1(decisions, truth).mean()),
        "micro_f1": float(2 * both.sum() / either.sum().clamp(min=1)),
        "macro_f1": float(instance_f1(decisions.T, truth.T).mean()),
    }


def instance_f1(decisions: Tensor, truth: Tensor) -> Tensor:
    """Return F1 of each image, (N,); 0 where no label is present or predicted, as in scikit-learn."""
    both, either = _overlap(decisions, truth)
    return 2 * both.sum(1) / either.sum(1).clamp(min=1)


def _overlap(decisions: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each label of each image, present AND predicted (0 or 1), and present + predicted (0, 1 or 2)."""
    counted = truth != 0
    present, predicted = ((truth > 0) & counted).double(), ((decisions > 0) & counted).double()
    return present * predicted, present + predicted


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the average precision of each row, (R,), NaN for a row without positives.

    Rows are images (instance mAP) or, with transposed matrices, labels. Ties count as in scikit-learn.

    Args:
        scores: (R, M), larger is more relevant.
        truth: +1, -1 or 0, (R, M).
    """
    at_least, hits_at_least = _at_least(scores, truth != 0), _at_least(scores, truth > 0)
    positive = truth > 0
    precision = torch.where(positive, hits_at_least / at_least.clamp(min=1), 0.0)
    return precision.sum(1) / positive.sum(1)


def ranking_loss(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the share of misordered (positive, negative) pairs of each row, (R,); a tie counts as misordered.

    A row whose relevant set is empty or full gives NaN.
    """
    above = torch.where(truth > 0, _at_least(scores, truth < 0), 0.0)
    return above.sum(1) / ((truth > 0).sum(1) * (truth < 0).sum(1))


def auc(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the area under the ROC curve of each row, (R,); NaN where the relevant set is empty or full."""
    negative = truth < 0
    above = _at_least(scores, negative)
    ties = above - _above(scores, negative)
    wrong = torch.where(truth > 0, above - ties / 2, 0.0)
    return 1 - wrong.sum(1) / ((truth > 0).sum(1) * negative.sum(1))


def kendall_tau(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return Kendall's tau_b of each row's scores against y^tau, (N, L) each -> (N,); NaN if a row is constant."""
    if scores.shape[1] > _PAIRWISE:
        return _kendall_tau_of_many(scores, ranks)
    score_signs = (scores.unsqueeze(2) - scores.unsqueeze(1)).sign()
    rank_signs = (ranks.unsqueeze(2) - ranks.unsqueeze(1)).sign().to(score_signs.dtype)
    agreement = (score_signs * rank_signs).sum((1, 2))
    untied = score_signs.abs().sum((1, 2)) * rank_signs.abs().sum((1, 2))
    return agreement / untied.sqrt()


def _kendall_tau_of_many(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return `kendall_tau` in memory that grows with L, not with its square: pairs are counted rank by rank."""
    count = scores.shape[1]
    everyone = torch.ones_like(scores, dtype=torch.bool)
    tied = _at_least(scores, everyone) - _above(scores, everyone)
    untied_scores = (count - tied).sum(1)
    agreement = torch.zeros_like(untied_scores)
    untied_ranks = torch.full_like(untied_scores, float(count) ** 2)
    values: Tensor = torch.unique(ranks)
    for place, rank in enumerate(values):
        here = ranks == rank
        untied_ranks -= here.sum(1).double().square()
        if place < len(values) - 1:  # entries of a higher rank that score more, less those that score less
            higher = ranks > rank
            balance = _above(scores, higher) + _at_least(scores, higher) - higher.sum(1, keepdim=True)
            agreement += 2 * torch.where(here, balance, 0.0).sum(1)
    tau = agreement / (untied_scores * untied_ranks).sqrt()
    return tau.masked_fill(scores.isnan().any(1), torch.nan).to(scores.dtype)


def classifier_metrics(logits: Tensor, truth: Tensor, boundary: Tensor, labels: tuple[str, ...]) -> dict[str, object]:
    """Return Table III's figures of a classifier, and average precision and F1 of each label.

    A figure without photos or labels to count is None.

    Args:
        logits: (N, L).
        truth: annotations, (N, L).
        boundary: logit(t), (L,).
        labels: L names.
    """
    decisions = decide(logits, boundary)
    by_label = average_precision(logits.T, truth.T)
    losses = ranking_loss(logits, truth)
    figures = {
        "hamming": hamming(decisions, truth),
        **f1_scores(decisions, truth),
        "ranking_loss": float(losses.nanmean()),
        "map": float(by_label.nanmean()),
    }
    return {
        "images": len(truth),
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
        "per_label": {
            label: {
                "positives": int((truth[:, column] > 0).sum()),
                "average_precision": None if by_label[column].isnan() else round(float(by_label[column]), 4),
                "f1": round(f1_scores(decisions[:, [column]], truth[:, [column]])["micro_f1"], 4),
            }
            for column, label in enumerate(labels)
        },
    }


def _at_least(scores: Tensor, counted: Tensor) -> Tensor:
    """Count, for each entry, the entries of its row that are counted and score no less; (R, M)."""
    return _count(scores, counted, right=False)


def _above(scores: Tensor, counted: Tensor) -> Tensor:
    """Count, for each entry, the entries of its row that are counted and score more; (R, M)."""
    return _count(scores, counted, right=True)


def _count(scores: Tensor, counted: Tensor, *, right: bool) -> Tensor:
    scores = scores.double().contiguous()
    ordered = scores.masked_fill(~counted, -torch.inf).sort(dim=1).values
    count = scores.shape[1] - torch.searchsorted(ordered, scores, right=right)
    return count.minimum(counted.sum(1, keepdim=True)).double()  # -inf ties with entries not counted
