"""Fit the last layer alone, on the cached features of every photo, before fine-tuning.

A layer fitted without regularisation separates the training photos perfectly and generalises badly, so its weight decay
is chosen on validation photos. The objective is convex but for Eq. 12's term, and L-BFGS minimises it in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError
from mlperturb.metrics import average_precision
from mlperturb.model.classifier import fold_batch_norm
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import Dataset
from mlperturb.training.loading import predict_dataset
from mlperturb.training.losses import cross_entropy, eq12_loss

DECAYS = (0.003, 0.01, 0.02, 0.04, 0.1)  # of weights on features that vary by 1 on average
_STEPS = 100  # of L-BFGS, at most


@dataclass(frozen=True)
class Probe:
    """A fitted last layer.

    Attributes:
        weight: (L, F).
        bias: (L,).
        decay: the weight decay that was chosen.
        mean_precision: mean average precision over labels on the validation photos; NaN without positives.
    """

    weight: Tensor
    bias: Tensor
    decay: float
    mean_precision: float


def find_head(network: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the last linear layer.

    Raises:
        CheckpointError: if the network has none.
    """
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise CheckpointError("expected a network whose head is a linear layer, got a network without linear layers")
    return linear[-1]


@torch.inference_mode()
def read_features(
    network: nn.Module, dataset: Dataset, preprocess: Preprocess, *, device: str, workers: int = 0, amp: bool = False
) -> Tensor:
    """Return the input of the last layer for every photo, (N, F), on the CPU."""
    kept: list[Tensor] = []
    folded = fold_batch_norm(network)
    handle = find_head(folded)[1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().cpu()))
    try:
        predict_dataset(folded, dataset, preprocess, device=device, workers=workers, amp=amp)
    finally:
        handle.remove()
    return torch.cat(kept).clone()


def fit_probe(
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    instance_weight: float,
    calibration_weight: float,
    teacher: Tensor | None = None,
    teacher_weight: float = 0.5,
) -> Probe:
    """Fit a last layer for each weight decay of `DECAYS`; return the layer of the best validation mAP.

    Args:
        training: features, (N, F), and truth, (N, L).
        validation: the same of photos to choose the decay on.
        instance_weight: lambda of Eq. 12.
        calibration_weight: weight of the cross-entropy beside Eq. 12.
        teacher: logits to learn from too, (N, L).
        teacher_weight: of the teacher, in [0, 1].
    """
    features, truth = training
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt().clamp(min=1e-6)
    centred = (features - mean) / scale
    found: list[Probe] = []
    weight, bias = features.new_zeros(truth.shape[1], features.shape[1]), features.new_zeros(truth.shape[1])
    for decay in sorted(DECAYS, reverse=True):  # each starts where the one before ended

        def objective(weight: Tensor, bias: Tensor, decay: float = decay) -> Tensor:
            logits = centred @ weight.T + bias
            loss = eq12_loss(logits, truth, instance_weight) + decay / 2 * weight.square().sum()
            return loss + calibration_weight * cross_entropy(logits, truth, teacher, teacher_weight)

        weight, bias = _minimise(objective, weight, bias)
        raw = Probe(weight / scale, bias - weight @ mean / scale, decay, float("nan"))
        scores = validation[0] @ raw.weight.T + raw.bias
        precision = float(average_precision(scores.T, validation[1].T).nanmean())
        found.append(Probe(raw.weight, raw.bias, decay, precision))
    return max(found, key=lambda probe: -1.0 if probe.mean_precision != probe.mean_precision else probe.mean_precision)


def _minimise(objective: Callable[[Tensor, Tensor], Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and bias at which L-BFGS with a line search ends."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective(weight, bias)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
