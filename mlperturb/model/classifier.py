"""A classifier with its preprocessing: images in [0, 1] in, logits out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.labels import Categories, check_labels
from mlperturb.model.preprocess import LUMA, Preprocess, Resizer, Size, pad_batch


class Classifier(nn.Module):
    """Differentiable preprocessing, a network, label names and decision thresholds.

    The parameters are frozen and the network stays in evaluation mode, so a backward pass computes the gradient of
    the photo and nothing else.

    Args:
        network: maps (N, 3, h, w) to logits (N, L).
        labels: L distinct names.
        thresholds: t_j on the probabilities, each inside (0, 1); 0.5 for every label if None.
        preprocess: how a photo becomes network input.
        categories: of the labels, for requests such as `category:4`.

    Raises:
        UsageError: if `labels` is not a list of names, or `thresholds` not a list of numbers.
        CheckpointError: if names repeat, a threshold is outside (0, 1), or their numbers differ.
    """

    boundary: Tensor

    def __init__(
        self,
        network: nn.Module,
        labels: Sequence[str],
        thresholds: Sequence[float] | None = None,
        preprocess: Preprocess | None = None,
        categories: Categories | None = None,
    ) -> None:
        super().__init__()
        self.labels = check_labels(labels)
        self.thresholds = _check_thresholds(thresholds, len(self.labels))
        self.preprocess = preprocess or Preprocess()
        self.categories = categories or Categories()
        if len(set(self.labels)) != len(self.labels) or not self.labels:
            raise CheckpointError(f"expected distinct label names, got {list(self.labels)!r:.200}")
        if len(self.categories.of) not in (0, len(self.labels)):
            raise CheckpointError(f"expected {len(self.labels)} categories, got {len(self.categories.of)}")
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.tried = False  # whether `trial.try_network` has passed it
        self.register_buffer("boundary", torch.logit(torch.tensor(self.thresholds, dtype=torch.float32)))

    @property
    def device(self) -> torch.device:
        """The device of the classifier."""
        return self.boundary.device

    def train(self, mode: bool = True) -> Classifier:  # noqa: ARG002  # torch names it
        """Stay in evaluation mode: under an attack the batch statistics must not move."""
        return super().train(False)

    def bind(self, sizes: Sequence[Size]) -> BoundClassifier:
        """Return the classifier of a padded batch, (N, 3, H, W), of photos of these (height, width)."""
        resizer = self.preprocess.bind(sizes, self.device, self.boundary.dtype)
        return BoundClassifier(self, resizer)

    def network_logits(self, inputs: Tensor) -> Tensor:
        """Return the logits, (N, L), of network input in RGB order, (N, 3, h, w).

        Raises:
            CheckpointError: if the network gives something else.
        """
        logits = find_logits(self.network(self.arrange(inputs)))
        wanted = (len(inputs), len(self.labels))
        if logits.shape != wanted:
            raise CheckpointError(
                f"expected logits of shape {wanted}, a row for each photo and a column for each label, "
                f"got {tuple(logits.shape)}"
            )
        return logits

    def arrange(self, inputs: Tensor) -> Tensor:
        """Return network input in RGB order, (N, 3, h, w), with the network's own channels, (N, C, h, w)."""
        if self.preprocess.channels == "bgr":
            inputs = inputs.flip(1)
        elif self.preprocess.channels == "grey":
            inputs = torch.einsum("c,nchw->nhw", inputs.new_tensor(LUMA), inputs).unsqueeze(1)
        return inputs.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Return logits z(x), (N, L).

        Args:
            images: RGB in [0, 1]: one tensor (N, 3, H, W), or N tensors (3, H_i, W_i) of any sizes.

        Raises:
            UsageError: if a batch is not (N, 3, H, W).
        """
        if isinstance(images, Tensor):
            if images.dim() != 4 or images.shape[1] != 3:
                raise UsageError(f"expected images (N, 3, H, W), got {tuple(images.shape)}")
            sizes: list[Size] = [(images.shape[2], images.shape[3])] * len(images)
        else:
            images, sizes = pad_batch(images)
        logits: Tensor = self.bind(sizes)(images)
        return logits


@dataclass(frozen=True)
class BoundClassifier:
    """A classifier bound to the photo sizes of a batch; attacks call it as their model."""

    classifier: Classifier
    resizer: Resizer

    def __call__(self, images: Tensor) -> Tensor:
        """Map padded photos in [0, 1], (N, 3, H, W), to logits, (N, L)."""
        return self.classifier.network_logits(self.resizer(images))

    def select(self, rows: Tensor) -> BoundClassifier:
        """Return the classifier of some photos of the batch."""
        return BoundClassifier(self.classifier, self.resizer.select(rows))


def find_logits(output: object) -> Tensor:
    """Return the logits in what a network gives: a tensor, a tuple of one, or `logits` of an object or a mapping.

    Raises:
        CheckpointError: if there are none, or it is unclear which they are.
    """
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, Tensor):
        return found
    got = type(output).__name__
    if isinstance(output, Mapping):
        got += f" with {', '.join(map(str, output))}"
    elif isinstance(output, tuple | list):
        got += f" of {len(output)}"
    raise CheckpointError(f"expected a tensor of logits, (N, L), from the network, got a {got:.200}: wrap the network")


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy, for evaluation, with every batch normalisation folded into the convolution before it.

    The logits change only by float rounding; a forward and backward pass of MobileNetV2 on the CPU takes a quarter
    less time. A network that torch.fx cannot trace is returned unchanged. timm's normalisations, which apply an
    activation too, leave the activation in their place.
    """
    network = network.eval()
    try:
        pairs = _find_pairs(network)
    except Exception:  # a network's own code may raise anything under tracing
        return network
    folded = copy.deepcopy(network)
    for convolution_name, norm_name in pairs:
        convolution, norm = folded.get_submodule(convolution_name), folded.get_submodule(norm_name)
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if convolution.out_channels != norm.num_features:  # a network that fails when it is called
            return network
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        parent, _, name = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), name, nn.Sequential(*norm.children()))
    return folded


class _Tracer(fx.Tracer):
    """Traces down to the convolutions and normalisations, a library's own kinds too."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Say whether the module is traced as one step."""
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _find_pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Return the names of the convolutions and of the normalisations that alone get what they give, each used once."""
    steps = [node for node in _Tracer().trace(network).nodes if node.op == "call_module"]
    used = Counter(str(node.target) for node in steps)
    modules = dict(network.named_modules())
    pairs = []
    for node in steps:
        before, norm = node.args[0] if node.args else None, modules[str(node.target)]
        if not isinstance(norm, nn.BatchNorm2d) or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        names = str(before.target), str(node.target)
        alone = len(before.users) == 1 and all(used[name] == 1 for name in names)
        if alone and isinstance(modules[names[0]], nn.Conv2d) and norm.running_mean is not None:
            pairs.append(names)
    return pairs


def _check_thresholds(thresholds: object, count: int) -> tuple[float, ...]:
    """Return the thresholds of this number of labels, .5 by default.

    Raises:
        UsageError: if they are not a list of numbers.
        CheckpointError: if they are too few or too many, or not inside (0, 1).
    """
    if thresholds is None:
        return (0.5,) * count
    try:
        values = list(thresholds)  # type: ignore[call-overload]
    except TypeError as error:
        raise UsageError(f"expected a list of numbers for `thresholds`, got {thresholds!r:.60}") from error
    if len(values) != count:
        raise CheckpointError(f"expected {count} thresholds, got {len(values)}")
    wrong = next((value for value in values if not hasattr(value, "__float__") or isinstance(value, bool)), None)
    if wrong is not None:
        raise UsageError(f"expected numbers for `thresholds`, got {wrong!r:.60}")
    if not all(0 < value < 1 for value in values):
        raise CheckpointError("expected thresholds inside (0, 1), got " + repr(values)[:200])
    return tuple(values)
