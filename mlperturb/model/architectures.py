"""The networks that a checkpoint may name: torchvision's classification models, and timm's as `timm/NAME`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlperturb.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from mlperturb.model.preprocess import Preprocess

TIMM = "timm/"  # prefix of timm's architectures
_REPEATED = ("inception_v3", "googlenet")  # torchvision's weights switch `transform_input` on, see default_preprocess


def build_network(architecture: str, outputs: int, *, meta: bool = False) -> nn.Module:
    """Return a classification model with `outputs` logits and no auxiliary head.

    Args:
        architecture: the torchvision name, such as `mobilenet_v2` or `inception_v3`, or `timm/` and the timm name, such
            as `timm/tf_efficientnet_lite2`.
        outputs: L, the number of labels.
        meta: leave the tensors unallocated, to be filled from a file.

    Raises:
        CheckpointError: if the architecture is unknown, or timm cannot build it.
    """
    import torch

    check_architecture(architecture)
    with torch.device("meta" if meta else "cpu"):
        if architecture.startswith(TIMM):
            return create_timm(architecture.removeprefix(TIMM), outputs)
        from torchvision import models

        options: dict[str, Any] = {"num_classes": outputs}
        if architecture in _REPEATED:
            options |= {"aux_logits": False, "transform_input": False, "init_weights": False}
        network: nn.Module = models.get_model(architecture, weights=None, **options)
    return network


def check_architecture(architecture: str) -> None:
    """Check that torchvision has a classification model of this name or, after `timm/`, that timm has a model.

    Raises:
        CheckpointError: if the name is unknown; the message lists close matches.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if architecture in known:
        return
    import timm

    known += [TIMM + name for name in timm.list_models()]
    if architecture in known:
        return
    import difflib

    named = [TIMM + architecture] if TIMM + architecture in known else []
    close = named or difflib.get_close_matches(architecture, known, n=3) or ["mobilenet_v2", "resnet50", "inception_v3"]
    raise CheckpointError(f"unknown architecture {architecture!r}: did you mean {' or '.join(close)}?")


def default_preprocess(architecture: str) -> Preprocess:
    """Return the preprocessing of the model's own ImageNet weights.

    With those weights, torchvision's Inception v3 and GoogLeNet turn their input, normalised with ImageNet's mean and
    std, into input with mean and std .5 (`transform_input`). No state dict records that; `build_network` leaves the
    step out, and the preprocessing here does it.

    Raises:
        CheckpointError: if the library has none for this model.
    """
    from mlperturb.model.preprocess import Preprocess

    if architecture.startswith(TIMM):
        return _timm_preprocess(architecture)
    from torchvision import models

    try:
        transforms = models.get_model_weights(architecture).DEFAULT.transforms()
        resize, crop = transforms.resize_size[0], transforms.crop_size[0]
        mean, std = tuple(transforms.mean), tuple(transforms.std)
        if architecture in _REPEATED:
            mean = std = (0.5, 0.5, 0.5)
        return Preprocess(max(resize, crop), (crop, crop), mean, std, transforms.interpolation.value)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"torchvision names no preprocessing for architecture {architecture!r}") from error


def create_timm(name: str, outputs: int, **options: Any) -> nn.Module:
    """Return a model of timm with random weights; nothing is downloaded.

    Args:
        name: of the model, without `timm/`.
        outputs: the number of outputs.
        options: further arguments of the model.

    Raises:
        CheckpointError: if timm cannot build it.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(name, **{**options, "pretrained": False, "num_classes": outputs})
    except Exception as error:  # the code of timm's thousand models may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"timm cannot build {TIMM}{name}: {reason:.200}") from error
    return network


def _timm_preprocess(architecture: str) -> Preprocess:
    """Return the preprocessing that timm names for the model's default weights.

    Raises:
        CheckpointError: if timm names none, or `Preprocess` cannot express it.
    """
    import timm

    from mlperturb.model.preprocess import Preprocess

    named = timm.get_pretrained_cfg(architecture.removeprefix(TIMM))
    if named is None:
        raise CheckpointError(f"timm names no preprocessing for architecture {architecture!r}")
    _, height, width = named.input_size
    interpolation = named.interpolation if named.interpolation == "bilinear" else "bicubic"
    if height != width or named.crop_mode == "squash":
        resize: int | tuple[int, int] = (round(height / named.crop_pct), round(width / named.crop_pct))
    else:
        resize = int(height / named.crop_pct)
    mean, std = (tuple(map(float, values)) for values in (named.mean, named.std))
    return Preprocess.from_dict(
        {"resize": resize, "crop": (height, width), "mean": mean, "std": std, "interpolation": interpolation}
    )
