"""A trial of a network, before it is attacked: can attacks work on it?

It calls the network itself, so that no pass of the trial is counted in a report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.errors import CheckpointError, MlperturbError
from mlperturb.system.devices import free_memory
from mlperturb.system.memory import limited_memory

if TYPE_CHECKING:
    from mlperturb.model.classifier import Classifier

_TOLERANCE = 5e-3  # of a logit, beside 1 and the largest logit: other kernels for another batch, TF32
_SIDE = 8  # pixels of the smooth photos, before they are made larger
_ADVICE = "expected a network that is differentiable in its input"


def try_network(classifier: Classifier, *, trusted: bool = True) -> None:
    """Refuse a network that attacks cannot work on; a network that passed is not tried again.

    Two forward passes and a backward pass: of two photos, and of one of them alone.

    Args:
        classifier: with the network.
        trusted: whether its code is the user's; a network from a file may not take much memory.

    Raises:
        CheckpointError: if the network is not in the classifier's precision; fails; gives logits that are not (N, L) or
            not finite; depends on who shares the batch, or is random; or no gradient reaches the photo.
    """
    if classifier.tried:
        return
    _check_precision(classifier)
    devices = [classifier.device] if classifier.device.type == "cuda" else []
    limits = nullcontext() if trusted else bounded()
    with torch.random.fork_rng(devices), limits, _reported(classifier):
        generator = torch.Generator().manual_seed(0)
        _try_batch(classifier, *_try_gradient(classifier, generator))
    classifier.tried = True


@torch.no_grad()
def look_once(classifier: Classifier, folder: Path) -> None:
    """Refuse a network of a library's make, with the settings of a folder, that fails on a photo: a forward pass.

    Raises:
        CheckpointError: if the network fails, or its logits are not (1, L).
    """
    try:
        classifier.network_logits(torch.zeros(1, 3, *classifier.preprocess.output_size))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except Exception as error:  # a network's own code may raise anything, at memory's end too
        raise CheckpointError(f"{folder}: {_failure(classifier, error)}") from error


def _check_precision(classifier: Classifier) -> None:
    wanted = classifier.boundary.dtype
    for name, tensor in classifier.network.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != wanted:
            got, expected = (str(one).removeprefix("torch.") for one in (tensor.dtype, wanted))
            raise CheckpointError(
                f"expected a network in {expected}, in which a small gradient is not lost, got {got} ({name}): "
                f"call network.{'float' if wanted == torch.float32 else 'double'}()"
            )


def _try_gradient(classifier: Classifier, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Refuse a network that is not differentiable in the photo, or whose logits are not finite.

    Returns the inputs, (2, 3, h, w), and the logits, (2, L).
    """
    reason = ""
    for smooth in (True, False):
        inputs = _photos(classifier, generator, smooth=smooth).requires_grad_(True)
        with torch.enable_grad():
            logits = classifier.network_logits(inputs)
            if not logits.isfinite().all():
                raise CheckpointError("the network's logits are not finite")
            if not logits.requires_grad:
                raise CheckpointError(
                    f"no gradient reaches the photo: {_ADVICE}; a program may have been exported under torch.no_grad, "
                    "or rounds its input"
                )
            weights = torch.rand(logits.shape, generator=generator).to(logits) + 0.5
            (gradient,) = torch.autograd.grad((logits * weights).sum(), inputs, allow_unused=True)
        if gradient is None:
            reason = f"no gradient reaches the photo: {_ADVICE}"
        elif not gradient.isfinite().all():
            reason = f"the gradient of the photo is not finite: {_ADVICE}"
        elif not gradient.any():
            reason = f"the gradient of the photo is zero everywhere: {_ADVICE}"
        else:
            return inputs.detach(), logits.detach()
    raise CheckpointError(reason)


@torch.no_grad()
def _try_batch(classifier: Classifier, inputs: Tensor, together: Tensor) -> None:
    """Refuse a network whose logits, (2, L), depend on the other photo of the batch, or on chance."""
    alone = classifier.network_logits(inputs[:1])
    if agree(together[:1], alone):
        return
    if agree(together, classifier.network_logits(inputs)):
        raise CheckpointError("the logits of a photo depend on the others in its batch: expected each row for itself")
    raise CheckpointError("the logits of a photo change from pass to pass: expected no dropout or noise")


def agree(first: Tensor, second: Tensor) -> bool:
    """Say whether logits are equal but for the rounding of another kernel."""
    return bool((first - second).abs().max() <= _TOLERANCE * (1 + first.abs().max()))


def sample_inputs(classifier: Classifier, *, seed: int = 1) -> Tensor:
    """Return two network inputs, (2, 3, h, w), of smooth photos."""
    return _photos(classifier, torch.Generator().manual_seed(seed), smooth=True)


def _photos(classifier: Classifier, generator: torch.Generator, *, smooth: bool) -> Tensor:
    """Return two network inputs, (2, 3, h, w): smooth as photos are, or noise."""
    preprocess = classifier.preprocess
    size = preprocess.output_size
    photos = torch.rand(2, 3, *((_SIDE, _SIDE) if smooth else size), generator=generator)
    photos = functional.interpolate(photos, size=size, mode="bilinear") if smooth else photos
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return ((photos - mean) / std).to(classifier.device, classifier.boundary.dtype)


@contextmanager
def _reported(classifier: Classifier) -> Iterator[None]:
    """Turn what the network's code raises into an error of a line."""
    try:
        yield
    except (MlperturbError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise CheckpointError(_failure(classifier, error)) from error


def _failure(classifier: Classifier, error: Exception) -> str:
    """Return what to say of a network that raised an error, on one line."""
    height, width = classifier.preprocess.output_size
    reason = str(error).strip().partition("\n")[0]
    return f"the network fails on photos of {width} x {height}: {type(error).__name__}: {reason:.300}"


@contextmanager
def bounded() -> Iterator[None]:
    """Refuse what a file makes libraries do in the block, if it would take much of the memory.

    Raises:
        CheckpointError: before the memory is taken.
    """
    try:
        with limited_memory(free_memory(torch.device("cpu"))):
            yield
    except MemoryError as error:
        raise CheckpointError("the program would take too much memory") from error
