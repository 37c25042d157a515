"""Train a multi-label classifier: Eq. 12, fitting, calibration (Section IV-B)."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlperturb.checkpoints import (
    Metadata,
    build_network,
    default_preprocess,
    read_tensors,
    save_checkpoint,
)
from mlperturb.errors import CheckpointError, DatasetError, OutputError
from mlperturb.files import write_file
from mlperturb.loading import PhotoDataset, augmentation, predict_dataset, to_device
from mlperturb.losses import calibrate, cross_entropy, eq12_loss
from mlperturb.metrics import classifier_metrics
from mlperturb.preprocess import Preprocess
from mlperturb.sharing import Share
from mlperturb.voc import Dataset


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        architecture: a torchvision classification model.
        epochs: passes over the training set.
        batch_size: photos a step, of all processes together; the paper's is 100.
        learning_rate: AdamW's peak, after a warm-up, before a cosine decay to zero.
        fresh_rate: how many times that rate the tensors get which the last initial file did not give: a new head must
            move far, a backbone that knows the task little.
        weight_decay: AdamW's.
        instance_weight: lambda of Eq. 12, the weight of its instance-wise term.
        calibration_weight: weight of a binary cross-entropy beside Eq. 12, which alone is blind to a constant added
            to a label's logits; 0 is the paper's pure ranking loss.
        head_only: train the last layer on cached features, the paper's partial retraining.
        size: side of the square network input, stretched; 0 for torchvision's preprocessing of the architecture.
        train_size: side of the random crops trained on; 0 for that of the network input. A crop magnifies, so a
            smaller side shows objects at the size that whole photos will show them, and is cheaper.
        average: decay a step of the exponential moving average of the weights that is kept; 0 for none.
        seed: of shuffling and augmentation.
        workers: processes that decode photos.
    """

    architecture: str = "mobilenet_v2"
    epochs: int = 10
    batch_size: int = 100
    learning_rate: float = 5e-4
    fresh_rate: float = 1.0
    weight_decay: float = 1e-2
    instance_weight: float = 0.5
    calibration_weight: float = 1.0
    head_only: bool = False
    size: int = 224
    train_size: int = 0
    average: float = 0.99
    seed: int = 0
    workers: int = 0


@dataclass(frozen=True)
class Progress:
    """What training tells its caller after a step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    validation: dict[str, object] | None = None


Reporter = Callable[[Progress], None]


def initialise(network: nn.Module, files: Sequence[Path]) -> dict[str, frozenset[str]]:
    """Copy every tensor that fits by name and shape from each file in turn; return the names that each gave.

    Raises:
        CheckpointError: if a file gives nothing.
    """
    own = network.state_dict()
    names = {}
    for path in files:
        given = {
            name: tensor.to(own[name].dtype)
            for name, tensor in read_tensors(path).items()
            if name in own and own[name].shape == tensor.shape
        }
        if not given:
            raise CheckpointError(f"{path} has no tensor that fits the network by name and shape")
        network.load_state_dict(given, strict=False)
        names[path.name] = frozenset(given)
    return names


def find_head(network: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and module of the last linear layer.

    Raises:
        CheckpointError: if the network has none.
    """
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise CheckpointError("the network's head is no linear layer: expected one, to calibrate or retrain it")
    return linear[-1]


def train(
    recipe: Recipe,
    training: Dataset,
    validation: Dataset,
    tests: dict[str, Dataset],
    *,
    output: Path,
    initial: Sequence[Path] = (),
    pretrained: bool = False,
    device: str = "cpu",
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
    report: Reporter | None = None,
    share: Share | None = None,
) -> Metadata | None:
    """Train, calibrate on `validation`, measure on `tests`, and write the checkpoint to `output`.

    Several processes share each step's photos (`DistributedDataParallel`); each must see the same files.

    Args:
        recipe: how.
        training: photos to fit.
        validation: photos to calibrate on, and to watch.
        tests: photos that nothing is tuned on, by name.
        output: the `.safetensors` file; beside it a `.resume.pt` is written each epoch.
        initial: weight files to start from, each overriding those before it.
        pretrained: start from torchvision's own weights, which it downloads.
        device: where to train.
        resume: go on from `.resume.pt`.
        provenance: what to say in the checkpoint's metadata.
        report: called after every step.
        share: what this process does of it; all if None.

    Returns:
        The checkpoint's metadata; None in a process that is not the first.

    Raises:
        DatasetError: if the data sets have different labels, a batch is larger than the training set, or cannot be
            shared out evenly among the processes.
        CheckpointError: if the initial weights or the resumed state do not fit, or the head is no linear layer.
        OutputError: if the checkpoint, or the state to resume from, cannot be written.
    """
    for dataset in (validation, *tests.values()):
        if dataset.labels != training.labels:
            raise DatasetError(f"expected the labels {training.labels}, got {dataset.labels}")
    share = share or Share()
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.architecture, len(training.labels))
    find_head(network)  # calibration needs it: better told now than after the last epoch
    if not share.first:
        share.agree("", "weights")  # rank 0 downloads them; the others find them on the disk
    given = _load_pretrained(network, recipe.architecture) if pretrained else frozenset()
    if share.first:
        share.agree("", "weights")
    for names in initialise(network, initial).values():
        given = names
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocess = Preprocess((recipe.size, recipe.size)) if recipe.size else default_preprocess(recipe.architecture)
    state = Path(f"{output}.resume.pt")
    with share.process_group(device):
        fitter = _Fitter(recipe, network, training, preprocess, device, given, share)
        restarted = share.any_restarted()
        if resume or restarted and state.exists():
            fitter.load(state)
        elif share.size > 1 and share.first and state.exists():
            state.replace(f"{output}.resume.old.pt")  # of an earlier training: a restart must not take it for its own
        if recipe.head_only:
            fitter.features = _cache_features(fitter)
        for epoch in range(fitter.epoch, recipe.epochs):
            fitter.run_epoch(epoch, report)
            if share.first:
                fitter.save(state)
                if report and (epoch + 1) % 2 == 0 and epoch + 1 < recipe.epochs:
                    report(_validate(fitter, epoch, validation))
    if not share.first:
        return None
    metadata = _calibrate_and_measure(fitter, validation, tests, provenance or {})
    save_checkpoint(output, fitter.averaged.state_dict(), metadata)
    return metadata


@dataclass
class _Fitter:
    """The state of one training: network, moving average, optimiser, and the epoch to do next."""

    recipe: Recipe
    network: nn.Module
    training: Dataset
    preprocess: Preprocess
    device: str
    given: frozenset[str] = frozenset()  # tensors that the last initial file gave
    share: Share = field(default_factory=Share)
    epoch: int = 0
    averaged: nn.Module = field(init=False)
    features: Tensor = field(init=False)  # what the head gets, (N, F), if only the head is trained
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        if len(self.training) < self.recipe.batch_size:
            raise DatasetError(f"{len(self.training)} training photos, expected a batch of {self.recipe.batch_size}")
        if self.recipe.batch_size % self.share.size:
            raise DatasetError(
                f"expected a batch size that {self.share.size} processes can share, got {self.recipe.batch_size}"
            )
        if self.recipe.head_only:
            self.network.requires_grad_(False)
            find_head(self.network)[1].requires_grad_(True)
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        for name, value in self.network.named_parameters():
            if value.requires_grad:
                decays, known = value.dim() > 1, name in self.given
                group = groups.setdefault(
                    (decays, known), {"params": [], "factor": 1 if known else self.recipe.fresh_rate}
                )
                group["params"].append(value)
                group["weight_decay"] = self.recipe.weight_decay if decays else 0.0
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(list(groups.values()), self.recipe.learning_rate)
        self.scaler = torch.amp.GradScaler(enabled=self.device.startswith("cuda"))
        self.steps = len(self.training) // self.recipe.batch_size
        self.trained = find_head(self.network)[1] if self.recipe.head_only else self.network
        if self.share.size > 1:
            if self.device.startswith("cuda"):
                self.trained = nn.SyncBatchNorm.convert_sync_batchnorm(self.trained)  # type: ignore[no-untyped-call]
            self.trained = nn.parallel.DistributedDataParallel(self.trained)

    def run_epoch(self, epoch: int, report: Reporter | None) -> None:
        """Pass once over the training set."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed * 100_003 + epoch)  # so that a resumed run shuffles and crops as an unbroken one
        self.network.train(not recipe.head_only)
        for step, (inputs, truth) in enumerate(self._batches()):
            self._set_learning_rate(epoch * self.steps + step)
            self.optimiser.zero_grad(set_to_none=True)
            with torch.autocast(self.device.partition(":")[0], enabled=self.device.startswith("cuda")):
                logits = self.trained(to_device(inputs, self.device))
            logits, truth = logits.float(), truth.to(self.device)
            loss = eq12_loss(logits, truth, recipe.instance_weight)
            if recipe.calibration_weight:
                loss = loss + recipe.calibration_weight * cross_entropy(logits, truth)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self._average(epoch * self.steps + step)
            if report:
                report(Progress(epoch + 1, recipe.epochs, step + 1, self.steps, float(loss.detach())))
        self.epoch = epoch + 1

    def save(self, path: Path) -> None:
        """Write everything that a resumed run needs.

        Raises:
            OutputError: if it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        state = {
            "recipe": asdict(self.recipe),
            "data": self.training.fingerprint,
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        write_file(path, stream.getvalue())

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, under the same recipe.

        Raises:
            CheckpointError: if there is nothing to go on from, or another recipe wrote it.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            theirs = {**dict(state["recipe"]), "training set": state["data"]}
            ours = {**asdict(self.recipe), "training set": self.training.fingerprint}
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"cannot resume from {path}: {reason}") from error
        changed = [name for name in ours if theirs.get(name) != ours[name] and name != "workers"]
        if changed:
            raise CheckpointError(f"{path} was written with another {', '.join(changed)}: expected the same to resume")
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch = state["epoch"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this network and data set: {error!s:.200}") from error

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        recipe, truth = self.recipe, torch.from_numpy(self.training.truth)
        if recipe.head_only or self.share.size > 1:
            order = torch.randperm(len(self.training))[: self.steps * recipe.batch_size]  # the same in all processes
            rows = order.view(self.steps, self.share.size, -1)[:, self.share.rank]
        if recipe.head_only:
            yield from ((self.features[batch], truth[batch]) for batch in rows)
            return
        size = (recipe.train_size, recipe.train_size) if recipe.train_size else self.preprocess.output_size
        photos = PhotoDataset(self.training, augmentation(self.preprocess, size))
        if self.share.size > 1:
            torch.manual_seed(torch.initial_seed() + 7919 * self.share.rank)  # crops of their own
            yield from DataLoader(photos, batch_sampler=rows.tolist(), num_workers=recipe.workers)
        else:
            yield from DataLoader(photos, recipe.batch_size, shuffle=True, drop_last=True, num_workers=recipe.workers)

    def _set_learning_rate(self, step: int) -> None:
        total = self.recipe.epochs * self.steps
        warmup = max(1, min(total // 20, 200))
        cosine = (1 + math.cos(math.pi * step / total)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate * group["factor"] * min(1.0, (step + 1) / warmup) * cosine

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.recipe.average, (step + 1) / (step + 10))
        current = self.network.state_dict()
        for name, kept in self.averaged.state_dict().items():
            if kept.is_floating_point():
                kept.lerp_(current[name], 1 - decay)
            else:
                kept.copy_(current[name])


def _calibrate_and_measure(
    fitter: _Fitter, validation: Dataset, tests: dict[str, Dataset], provenance: dict[str, Any]
) -> Metadata:
    """Fit the bias of the averaged network's head on `validation`; return what its checkpoint says of it."""
    recipe, labels = fitter.recipe, fitter.training.labels
    boundary = torch.zeros(len(labels))
    bias = calibrate(_predict(fitter, validation), torch.from_numpy(validation.truth), boundary)
    head = find_head(fitter.averaged)[1]
    head.bias.data += bias.to(head.bias)
    metrics = {
        name: classifier_metrics(_predict(fitter, dataset), torch.from_numpy(dataset.truth), boundary, labels)
        for name, dataset in tests.items()
    }
    return Metadata(
        recipe.architecture,
        labels,
        (0.5,) * len(labels),
        fitter.preprocess.to_dict(),
        {**provenance, "recipe": asdict(recipe)},
        metrics,
    )


def _validate(fitter: _Fitter, epoch: int, validation: Dataset) -> Progress:
    truth, boundary = torch.from_numpy(validation.truth), torch.zeros(len(validation.labels))
    metrics = classifier_metrics(_predict(fitter, validation), truth, boundary, validation.labels)
    return Progress(epoch + 1, fitter.recipe.epochs, fitter.steps, fitter.steps, math.nan, metrics)


def _predict(fitter: _Fitter, dataset: Dataset) -> Tensor:
    """Return the averaged network's logits, (N, L)."""
    return predict_dataset(
        fitter.averaged, dataset, fitter.preprocess, device=fitter.device, workers=fitter.recipe.workers
    )


@torch.inference_mode()
def _cache_features(fitter: _Fitter) -> Tensor:
    """Return what the head gets for every training photo, (N, F), on the CPU."""
    kept: list[Tensor] = []
    handle = find_head(fitter.network)[1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].cpu()))
    try:
        predict_dataset(
            fitter.network, fitter.training, fitter.preprocess, device=fitter.device, workers=fitter.recipe.workers
        )
    finally:
        handle.remove()
    return torch.cat(kept).clone()


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
