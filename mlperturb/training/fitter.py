"""One training, epoch by epoch: learning rates, moving average, mixed precision, resuming."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from mlperturb.errors import CheckpointError, DatasetError, OutputError, UsageError
from mlperturb.model.checkpoints import read_metadata, read_tensors
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import Dataset
from mlperturb.system.files import write_file
from mlperturb.system.processes import Share
from mlperturb.training.adversarial import Threat, perturb
from mlperturb.training.loading import PhotoDataset, augmentation, mixed_precision, to_device
from mlperturb.training.losses import cross_entropy, eq12_loss
from mlperturb.training.probe import find_head
from mlperturb.training.recipe import Recipe
from mlperturb.training.stem import cut, has_moving_statistics, pick


@dataclass(frozen=True)
class Progress:
    """The progress that training reports after a step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    validation: dict[str, object] | None = None


Reporter = Callable[[Progress], None]


_MAY_DIFFER = ("epochs", "workers")  # between a training and what goes on from it


@dataclass
class Fitter:
    """The state of one training: network, moving average, optimiser, and the epoch to do next."""

    recipe: Recipe
    network: nn.Module
    training: Dataset
    preprocess: Preprocess
    device: str
    given: frozenset[str] = frozenset()  # tensors that the last initial file gave
    share: Share = field(default_factory=Share)
    teacher: Tensor | None = None  # logits of the teachers for every training photo, (N, L)
    notes: dict[str, Any] = field(default_factory=dict)  # of how it began, for the checkpoint's provenance
    epoch: int = 0
    averaged: nn.Module = field(init=False)
    start: dict[str, Tensor] = field(init=False)  # the weights that training began from, if they are to be blended
    features: Tensor = field(init=False)  # what the head gets, (N, F), if only the head is trained
    below: nn.Module | None = field(init=False, default=None)  # the frozen first layers, if their word is kept
    views: Tensor = field(init=False)  # what they give, (V, N, C, h, w)
    optimiser: torch.optim.Optimizer = field(init=False)
    threat: Threat | None = field(init=False)

    def __post_init__(self) -> None:
        if len(self.training) < self.recipe.batch_size:
            raise DatasetError(
                f"expected at least {self.recipe.batch_size} training photos, a batch, got {len(self.training)}"
            )
        if self.recipe.batch_size % self.share.size:
            raise DatasetError(
                f"expected a batch size that {self.share.size} processes can share, got {self.recipe.batch_size}"
            )
        self.threat = Threat.parse(self.recipe.adversarial) if self.recipe.adversarial else None
        self._choose_parameters()
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.start = copy.deepcopy(self.averaged.state_dict()) if self.recipe.blend else {}
        self.optimiser = torch.optim.AdamW(self._group_parameters(), self.recipe.learning_rate)
        self.scaler = torch.amp.GradScaler(enabled=self.device.startswith("cuda"))
        self.steps = len(self.training) // self.recipe.batch_size
        self.trained = find_head(self.network)[1] if self.recipe.head_only else self.network
        if self.recipe.views and not self.recipe.head_only:
            if has_moving_statistics(self.network, self.recipe.norm_momentum):
                raise UsageError("expected `views` with `norm_momentum` 0: what the frozen layers give must not change")
            self.below, self.trained = cut(self.network)
        if self.share.size > 1:
            if self.device.startswith("cuda"):
                self.trained = nn.SyncBatchNorm.convert_sync_batchnorm(self.trained)  # type: ignore[no-untyped-call]
            self.trained = nn.parallel.DistributedDataParallel(self.trained)

    @property
    def amp(self) -> bool:
        """Whether the network computes with 16 bits."""
        return self.recipe.amp or self.device.startswith("cuda")

    def run_epoch(self, epoch: int, report: Reporter | None) -> None:
        """Pass once over the training set."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed * 100_003 + epoch)  # so that a resumed run shuffles and crops as an unbroken one
        self._set_mode()
        for step, (rows, inputs) in enumerate(self._batches()):
            self._set_learning_rate(epoch * self.steps + step)
            self.optimiser.zero_grad(set_to_none=True)
            loss = self._loss(to_device(inputs, self.device), rows)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self.scaler.step(self.optimiser)
            self.scaler.update()
            self._average(epoch * self.steps + step)
            if report:
                report(Progress(epoch + 1, recipe.epochs, step + 1, self.steps, float(loss.detach())))
        self.epoch = epoch + 1

    def _choose_parameters(self) -> None:
        """Switch off the gradients of parameters that are not trained.

        Raises:
            CheckpointError: if a pattern of `freeze` fits no parameter, or all are frozen.
        """
        if self.recipe.head_only:
            self.network.requires_grad_(False)
            find_head(self.network)[1].requires_grad_(True)
        parameters = dict(self.network.named_parameters())
        for pattern in self.recipe.freeze:
            matched = [value for name, value in parameters.items() if fnmatchcase(name, pattern)]
            if not matched:
                raise CheckpointError(
                    f"no parameter to freeze is called {pattern}, expected such as {next(iter(parameters))}"
                )
            for value in matched:
                value.requires_grad_(False)
        if not any(value.requires_grad for value in parameters.values()):
            raise CheckpointError("every parameter is frozen: expected some to train")

    def _group_parameters(self) -> list[dict[str, Any]]:
        """Return the optimiser's groups: matrices decay, biases do not; each block has the rate of its depth."""
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        depths = block_depths([name for name, _ in self.network.named_parameters()])
        for name, value in self.network.named_parameters():
            if value.requires_grad:
                decays = value.dim() > 1
                factor = (1.0 if name in self.given else self.recipe.fresh_rate) * self.recipe.layer_decay ** depths[
                    name
                ]
                group = groups.setdefault((decays, factor), {"params": [], "factor": factor})
                group["params"].append(value)
                group["weight_decay"] = self.recipe.weight_decay if decays else 0.0
        return list(groups.values())

    def _set_mode(self) -> None:
        """Put the network into training mode; batch normalisation as the recipe says."""
        momentum = self.recipe.norm_momentum
        if not self.recipe.head_only:
            self.trained.train()
        else:
            self.network.eval()
        for module in self.trained.modules():
            if isinstance(module, _BatchNorm) and momentum is not None:
                module.momentum = momentum
                module.train(momentum > 0)

    def _loss(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of photos, (N, 3, h, w), or features, (N, F), and of their numbers in the data set, (N,)."""
        other, share = rows, 1.0
        if self.recipe.mixup:
            beta = torch.distributions.Beta(self.recipe.mixup, self.recipe.mixup)
            order, share = torch.randperm(len(rows)), float(beta.sample())
            other, inputs = rows[order], torch.lerp(inputs[order.to(inputs.device)], inputs, share)
        if self.threat is not None:
            inputs = self._perturb(inputs, rows, other, share)
        return self._mixed_loss(self.trained, inputs, rows, other, share)

    def _mixed_loss(self, network: nn.Module, inputs: Tensor, rows: Tensor, other: Tensor, share: float) -> Tensor:
        """Return the loss against the truths of two photos each, the first of which counts `share`."""
        with mixed_precision(self.device, self.amp):
            logits = network(inputs)
        logits = logits.float()
        loss = self._compare(logits, rows)
        return loss if share == 1 else share * loss + (1 - share) * self._compare(logits, other)

    def _perturb(self, inputs: Tensor, rows: Tensor, other: Tensor, share: float) -> Tensor:
        """Return a batch, (N, 3, h, w), whose first photos are clean and whose others raise the training loss."""
        assert self.threat is not None
        clean = round(self.recipe.clean_share * len(rows))
        if clean == len(rows):
            return inputs
        self.network.eval()  # the statistics of batch normalisation are those of training alone

        def loss(images: Tensor) -> Tensor:
            return len(rows) * self._mixed_loss(self.network, images, rows[clean:], other[clean:], share)

        worst = perturb(loss, inputs[clean:], self.threat, self.preprocess, self.recipe.adversarial_steps)
        self._set_mode()
        return torch.cat([inputs[:clean], worst])

    def _compare(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of logits, (N, L), against the annotations and the teachers' word on these photos."""
        recipe = self.recipe
        truth = torch.from_numpy(self.training.truth)[rows].to(self.device)
        loss = eq12_loss(logits, truth, recipe.instance_weight)
        if recipe.calibration_weight:
            teacher = None if self.teacher is None else self.teacher[rows].to(self.device)
            loss = loss + recipe.calibration_weight * cross_entropy(logits, truth, teacher, recipe.teacher_weight)
        return loss

    def save(self, path: Path) -> None:
        """Write the state that a resumed run needs.

        Raises:
            OutputError: if the file cannot be written.
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
            "start": self.start,
            "notes": self.notes,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        write_file(path, stream.getvalue())

    def load(self, path: Path) -> None:
        """Resume from the state that `save` wrote under the same recipe; epochs and workers may differ.

        Raises:
            CheckpointError: if the file cannot be read, has another recipe or data set, or has too many epochs.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self._compare_recipe(path, dict(state["recipe"]), state["data"])
        except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise CheckpointError(f"cannot resume from {path}: {reason}") from error
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            self.start, self.notes = state["start"], state["notes"]
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch = state["epoch"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this network and data set: {error!s:.200}") from error
        self._begin_again(path)

    def load_trained(self, path: Path) -> None:
        """Go on from the checkpoint of a training under the same recipe that is done; the optimiser starts afresh.

        Raises:
            CheckpointError: if it is not such a checkpoint, or has another recipe or data set, or too many epochs.
        """
        try:
            provenance = read_metadata(path).provenance
            recipe = provenance["recipe"]
            self._compare_recipe(path, recipe, recipe.get("training set", self.training.fingerprint))
            tensors = read_tensors(path)
            for network in (self.network, self.averaged):
                network.load_state_dict(tensors)
            self.epoch = int(recipe["epochs"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot resume from {path}: {error!s:.200}") from error
        self.start = copy.deepcopy(self.averaged.state_dict()) if self.recipe.blend else {}
        self.notes = {name: provenance[name] for name in ("probe",) if name in provenance}
        self._begin_again(path)

    def _compare_recipe(self, path: Path, recipe: dict[str, Any], data: str) -> None:
        """Refuse a state of another recipe or training set.

        Raises:
            CheckpointError: if it has one.
        """
        ours = {**asdict(self.recipe), "training set": self.training.fingerprint}
        theirs = {
            **asdict(Recipe()),
            **recipe,
            "freeze": tuple(recipe.get("freeze", ())),
            "training set": data,
        }  # of any version
        changed = [name for name in ours if theirs.get(name) != ours[name] and name not in _MAY_DIFFER]
        if changed:
            raise CheckpointError(f"{path} was written with another {', '.join(changed)}: expected the same to resume")

    def _begin_again(self, path: Path) -> None:
        """Prepare the next epoch after weights were read.

        Raises:
            CheckpointError: if there are more epochs behind than the recipe asks for.
        """
        if self.below is not None:
            self.below = cut(self.network)[0]
        if self.epoch > self.recipe.epochs:
            raise CheckpointError(f"{path} has {self.epoch} epochs done, expected at most {self.recipe.epochs}")

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the numbers of this process's photos of each step, (N,), and their pixels or features."""
        recipe = self.recipe
        order = torch.randperm(len(self.training))[: self.steps * recipe.batch_size]  # the same in all processes
        rows = order.view(self.steps, self.share.size, -1)[:, self.share.rank]
        if recipe.head_only:
            yield from ((batch, self.features[batch]) for batch in rows)
            return
        if self.below is not None:
            yield from ((batch, pick(self.views, batch)) for batch in rows)
            return
        photos = self.random_crops(self.training)
        if self.share.size > 1:
            torch.manual_seed(torch.initial_seed() + 7919 * self.share.rank)  # crops of their own
        loader = DataLoader(photos, batch_sampler=rows.tolist(), num_workers=recipe.workers)
        yield from ((batch, images) for batch, (images, _) in zip(rows, loader, strict=True))

    def random_crops(self, dataset: Dataset) -> PhotoDataset:
        """Return photos as they are trained on: cropped, flipped and coloured at random."""
        size = (self.recipe.train_size,) * 2 if self.recipe.train_size else self.preprocess.output_size
        return PhotoDataset(dataset, augmentation(self.preprocess, size, self.recipe.least_crop))

    @torch.inference_mode()
    def look(self, dataset: Dataset) -> Tensor:
        """Return what the frozen first layers give for a random crop of each photo, (N, C, h, w); bfloat16 if `amp`."""
        assert self.below is not None
        loader = DataLoader(self.random_crops(dataset), 64, num_workers=self.recipe.workers)
        kept = []
        with mixed_precision(self.device, self.amp):
            for images, _ in loader:
                given = self.below(to_device(images, self.device)).cpu()
                kept.append(given.to(torch.bfloat16) if self.amp else given)
        return torch.cat(kept).clone()

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


def block_depths(names: Sequence[str]) -> dict[str, int]:
    """Return how many blocks lie between each parameter and the last one's block.

    A block is what shares a name up to its first part that ends in a digit, such as `features.3`, `layer2` or
    `blocks.4`; elsewhere, the first part. Blocks count in the order in which the network registers them.

    Args:
        names: of the network's parameters, in its order.
    """
    blocks: dict[str, int] = {}
    for name in names:
        blocks.setdefault(_block(name), len(blocks))
    return {name: len(blocks) - 1 - blocks[_block(name)] for name in names}


def _block(name: str) -> str:
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part[-1:].isdigit()), 0)
    return ".".join(parts[: numbered + 1])
