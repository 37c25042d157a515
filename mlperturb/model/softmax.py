"""Networks whose probabilities are a softmax: a photo has one label of L, as in ImageNet and most filters of content.

Their probabilities p_j = exp(z_j) / sum_k exp(z_k) are those of L sigmoids of other logits,

    logit(p_j) = log(p_j / (1 - p_j)) = z_j - log sum_{k != j} exp(z_k),

so that attacks on multi-label networks need nothing new. With a threshold of 0.5 at most one label is present: to flip
a label that is absent makes it that label, and takes the place of the label that was present.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError


class SoftmaxLogits(nn.Module):
    """A network of L softmax outputs, as a network of L sigmoid outputs with the same probabilities.

    Args:
        network: maps (N, 3, h, w) to scores z, (N, L), with L of at least 2.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logit(p_j), (N, L)."""
        return softmax_logits(self.network(inputs))


def softmax_logits(scores: Tensor) -> Tensor:
    """Return logit(p_j) = z_j - log sum_{k != j} exp(z_k), of scores z, both (N, L).

    The sum of the others is that of all less exp(z_j), except for the largest score, for which it would cancel.
    """
    largest = torch.arange(scores.shape[1], device=scores.device) == scores.argmax(1, keepdim=True)
    whole = scores.logsumexp(1, keepdim=True)
    others = scores.masked_fill(largest, -torch.inf).logsumexp(1, keepdim=True)
    below = (scores - whole).masked_fill(largest, -torch.inf)  # log p_j, at most log 1/2
    return torch.where(largest, scores - others, scores - whole - torch.log1p(-below.exp()))


def apply_activation(network: nn.Module, activation: str, outputs: int) -> nn.Module:
    """Return a network of L logits whose sigmoids are its probabilities.

    Args:
        network: maps (N, 3, h, w) to scores, (N, L).
        activation: what makes probabilities of the scores, `sigmoid` or `softmax`.
        outputs: L.

    Raises:
        CheckpointError: if it is the softmax of a single output, which is always 1.
    """
    if activation == "sigmoid":
        return network
    if outputs < 2:
        raise CheckpointError("expected at least 2 labels of a softmax network, got 1: give `activation` sigmoid")
    return SoftmaxLogits(network)
