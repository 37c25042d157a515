"""The weights that training starts from: of files, of torchvision, or fresh."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from mlperturb.errors import CheckpointError
from mlperturb.model.checkpoints import build_network, read_tensors
from mlperturb.system.processes import Share
from mlperturb.training.probe import find_head
from mlperturb.training.recipe import Recipe


def fill_network(
    recipe: Recipe, outputs: int, initial: Sequence[Path], pretrained: bool, share: Share
) -> tuple[nn.Module, frozenset[str]]:
    """Return the network that training starts from, and the names of the tensors that the last file gave."""
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.architecture, outputs)
    head, _ = find_head(network)  # calibration needs it: better told now than after the last epoch
    if not share.first:
        share.agree("", "weights")  # rank 0 downloads them; the others find them on the disk
    given = _load_pretrained(network, recipe.architecture) if pretrained else frozenset()
    if share.first:
        share.agree("", "weights")
    fresh = (f"{head}.weight", f"{head}.bias") if recipe.fresh_head else ()
    for names in initialise(network, initial, fresh).values():
        given = names
    return network, given


def initialise(network: nn.Module, files: Sequence[Path], leave: Collection[str] = ()) -> dict[str, frozenset[str]]:
    """Copy every tensor that fits by name and shape from each file in turn; return the names that each gave.

    Args:
        network: to fill.
        files: of weights.
        leave: names of tensors that stay as they are.

    Raises:
        CheckpointError: if a file gives nothing.
    """
    own = network.state_dict()
    names = {}
    for path in files:
        given = {
            name: tensor.to(own[name].dtype)
            for name, tensor in read_tensors(path).items()
            if name in own and own[name].shape == tensor.shape and name not in leave
        }
        if not given:
            raise CheckpointError(f"{path} has no tensor that fits the network by name and shape")
        network.load_state_dict(given, strict=False)
        names[path.name] = frozenset(given)
    return names


def _load_pretrained(network: nn.Module, architecture: str) -> frozenset[str]:
    """Copy torchvision's own pretrained weights, all but the head, from the network; return the names given.

    Raises:
        CheckpointError: if they cannot be had.
    """
    from torchvision import models

    try:
        weights = models.get_model_weights(architecture).DEFAULT
        given = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot download torchvision's weights of {architecture}: {error}; give a local file as `initial`"
        ) from error
    own = network.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return frozenset(fitting)
