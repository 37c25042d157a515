"""The frozen first layers of a network, cut off: what they give is kept for a few random views of each photo.

Fine-tuning the layers above alone is a partial retraining, as the paper's is of the last; with the layers below kept
out of each step it takes less than half of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlperturb.errors import CheckpointError
from mlperturb.model.classifier import fold_batch_norm


def cut(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Split a network after the first layers, in order, that have no parameter to train.

    Args:
        network: maps (N, 3, h, w) to logits, (N, L); what is frozen has no `requires_grad`.

    Returns:
        What maps photos to activations, for evaluation, and what maps these to logits; the latter shares its tensors
        with the network.

    Raises:
        CheckpointError: if the first layer is trained, or the network is not a chain of its parts up to that place.
    """
    names = []
    for name, module in _chain(network, ""):
        if any(value.requires_grad for value in module.parameters()):
            break
        names.append(name)
    if not any(True for name in names for _ in network.get_submodule(name).parameters()):
        raise CheckpointError("the network's first layer is trained: expected it frozen, to keep what it gives")
    below = nn.Sequential(*(copy.deepcopy(network.get_submodule(name)) for name in names)).eval()
    shared: dict[int, object] = {id(value): value for value in (*network.parameters(), *network.buffers())}
    above = copy.deepcopy(network, shared)
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(above.get_submodule(parent), own, nn.Identity())
    _check(network, below, above)
    return fold_batch_norm(below), above


def _chain(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a module in the order of their registration, those of an `nn.Sequential` one by one."""
    for name, part in module.named_children():
        if isinstance(part, nn.Sequential):
            yield from _chain(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


@torch.no_grad()
def _check(network: nn.Module, below: nn.Module, above: nn.Module) -> None:
    """Refuse a cut that changes what the network says of an image of noise."""
    training = network.training
    value = next(network.parameters())
    image = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(value)
    try:
        whole, parts = network.eval()(image), above.eval()(below(image))
        same = torch.allclose(whole, parts, atol=1e-4 * float(whole.abs().max()), rtol=1e-4)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"the network cannot be cut after its frozen layers: {error!s:.200}") from error
    network.train(training)
    if not same:
        raise CheckpointError("the network cannot be cut after its frozen layers: it is not a chain of its parts there")


def has_moving_statistics(network: nn.Module, momentum: float | None) -> bool:
    """Say whether batch normalisation of frozen layers would move its statistics in training."""
    return momentum != 0 and any(isinstance(module, _BatchNorm) for module in network.modules())


def pick(views: Tensor, rows: Tensor) -> Tensor:
    """Return a random view of each of these photos, (N, C, h, w), of all views, (V, photos, C, h, w)."""
    return views[torch.randint(len(views), rows.shape), rows].float()
