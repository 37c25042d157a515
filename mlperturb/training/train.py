"""Train a multi-label classifier: initial weights, fitting, calibration, measurement (Section IV-B)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError, DatasetError
from mlperturb.metrics import average_precision, classifier_metrics
from mlperturb.model.checkpoints import (
    Metadata,
    default_preprocess,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)
from mlperturb.model.classifier import Classifier, fold_batch_norm
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import Dataset
from mlperturb.system.processes import Share
from mlperturb.training.fitter import Fitter, Progress, Reporter
from mlperturb.training.initial import fill_network
from mlperturb.training.loading import predict_dataset
from mlperturb.training.losses import calibrate
from mlperturb.training.probe import Probe, find_head, fit_probe, read_features
from mlperturb.training.recipe import Recipe

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the trained weights in a blend


def train(
    recipe: Recipe,
    training: Dataset,
    validation: Dataset,
    tests: dict[str, Dataset],
    *,
    output: Path,
    initial: Sequence[Path] = (),
    pretrained: bool = False,
    teachers: Sequence[Path] = (),
    half: bool = False,
    base: Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    provenance: dict[str, Any] | None = None,
    report: Reporter | None = None,
    share: Share | None = None,
) -> Metadata | None:
    """Train, calibrate on `validation`, measure on `tests`, and write the checkpoint to `output`.

    Several processes share each step's photos (`DistributedDataParallel`); each must see the same files.

    Args:
        recipe: the settings of the training.
        training: photos to train on.
        validation: photos to calibrate on, and to measure during training.
        tests: photos to measure at the end, by name; nothing is tuned on them.
        output: the `.safetensors` file; from the first epoch until it is there, a `.resume.pt` lies beside it.
        initial: files of initial weights; a later file overrides earlier files.
        pretrained: start from torchvision's own weights, which it downloads.
        teachers: checkpoints of ours whose probabilities on the training photos, averaged over them, are targets too.
        half: write matrices in float16, as they are then calibrated and measured too.
        base: write only the tensors that differ from this checkpoint, which must lie beside `output` to load it.
        device: the device to train on.
        resume: resume from `.resume.pt`; where that training is done, go on from its checkpoint, whose recipe may have
            had fewer epochs. The optimiser's moments are lost then. If no epoch is left, the checkpoint stays as it is.
        provenance: the provenance for the checkpoint's metadata.
        report: called after every step.
        share: the part of the training that this process does; None for the whole training.

    Returns:
        The checkpoint's metadata; None in a process that is not the first.

    Raises:
        DatasetError: if the data sets have different labels, a batch is larger than the training set, or cannot be
            shared out evenly among the processes.
        CheckpointError: if the initial weights or the resumed state do not fit, or the network has no linear layer.
        OutputError: if the checkpoint, or the state to resume from, cannot be written.
    """
    _check_labels(training, (validation, *tests.values()))
    share = share or Share()
    network, given = fill_network(recipe, len(training.labels), initial, pretrained, share)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    start = _Start(recipe, training, choose_preprocess(recipe), device, share)
    with share.process_group(device):
        fitter = start.make_fitter(network, validation, teachers, given, output, resume)
        if resume and is_done(output) and fitter.epoch == recipe.epochs:
            return read_metadata(output) if share.first else None
        _run_epochs(fitter, validation, output, report)
    return _finish(fitter, validation, tests, provenance or {}, output, half, base) if share.first else None


def _check_labels(training: Dataset, others: Iterable[Dataset]) -> None:
    """Refuse data sets with other labels than the training set.

    Raises:
        DatasetError: if there is such a data set.
    """
    for dataset in others:
        if dataset.labels != training.labels:
            raise DatasetError(f"expected the labels {training.labels}, got {dataset.labels}")


def resume_file(output: Path) -> Path:
    """Return the file of the state to resume from, beside the checkpoint; it exists while the training is not done."""
    return Path(f"{output}.resume.pt")


def is_done(output: Path) -> bool:
    """Say whether the training of a checkpoint is done: it is there, and no state to resume from."""
    return output.is_file() and not resume_file(output).exists()


def choose_preprocess(recipe: Recipe) -> Preprocess:
    """Return how photos become the network's input: stretched to a square, or as the architecture's own weights ask."""
    if not recipe.size:
        return default_preprocess(recipe.architecture)
    return Preprocess((recipe.size, recipe.size), mean=(recipe.mean,) * 3, std=(recipe.std,) * 3)


@dataclass(frozen=True)
class _Start:
    """The work before the first epoch; processes on CPUs share out the photos."""

    recipe: Recipe
    training: Dataset
    preprocess: Preprocess
    device: str
    share: Share

    def read_features(self, network: nn.Module, dataset: Dataset) -> Tensor:
        """Return the input of the head for every photo, (N, F), on the CPU."""
        options: dict[str, Any] = {"device": self.device, "workers": self.recipe.workers, "amp": self.recipe.amp}
        return self._share_out(lambda part: read_features(network, part, self.preprocess, **options), dataset)

    def ask_teachers(self, files: Sequence[Path]) -> Tensor:
        """Return the logit of the teachers' mean probability of every label of every training photo, (N, L).

        Raises:
            CheckpointError: if a teacher is not a checkpoint of mlperturb, or has other labels.
        """
        options: dict[str, Any] = {"device": self.device, "workers": self.recipe.workers, "amp": self.recipe.amp}
        total = torch.zeros(self.training.truth.shape)
        for path in files:
            teacher = load_checkpoint(path, device=self.device)[0]
            if teacher.labels != self.training.labels:
                raise CheckpointError(
                    f"the teacher {path} has other labels: expected {', '.join(self.training.labels)}"
                )

            def predict(part: Dataset, teacher: Classifier = teacher) -> Tensor:
                return predict_dataset(teacher.network, part, teacher.preprocess, **options)

            total += torch.sigmoid(self._share_out(predict, self.training) - teacher.boundary.cpu())
        return torch.logit(total / len(files), eps=1e-6)

    def look(self, fitter: Fitter) -> Tensor:
        """Return what the frozen first layers give for the recipe's number of random crops, (V, N, C, h, w)."""
        views = []
        for view in range(self.recipe.views):
            torch.manual_seed((self.recipe.seed * 100_003 + view) * 7919 + self.share.rank)
            views.append(self._share_out(fitter.look, self.training))
        return torch.stack(views)

    def fit_head(self, network: nn.Module, validation: Dataset, teacher: Tensor | None) -> Probe:
        """Fit the network's last layer alone, in place."""
        recipe = self.recipe
        pairs = [
            (self.read_features(network, dataset), torch.from_numpy(dataset.truth))
            for dataset in (self.training, validation)
        ]
        probe = fit_probe(
            pairs[0],
            pairs[1],
            instance_weight=recipe.instance_weight,
            calibration_weight=recipe.calibration_weight,
            teacher=teacher,
            teacher_weight=recipe.teacher_weight,
        )
        head = find_head(network)[1]
        with torch.no_grad():
            head.weight.copy_(probe.weight)
            head.bias.copy_(probe.bias)
        return probe

    def make_fitter(
        self,
        network: nn.Module,
        validation: Dataset,
        teachers: Sequence[Path],
        given: frozenset[str],
        output: Path,
        resume: bool,
    ) -> Fitter:
        """Return the fitter before its next epoch; its notes say how the training began."""
        recipe, share, state = self.recipe, self.share, resume_file(output)
        notes: dict[str, Any] = {}
        restarted = share.any_restarted()
        going_on = resume or (restarted and state.exists())
        teacher = self.ask_teachers(teachers) if teachers else None
        if recipe.probe and not going_on:
            probe = self.fit_head(network, validation, teacher)
            notes["probe"] = {"decay": probe.decay, "validation map": round(probe.mean_precision, 4)}
            given |= {f"{find_head(network)[0]}.{part}" for part in ("weight", "bias")}
        fitter = Fitter(recipe, network, self.training, self.preprocess, self.device, given, share, teacher, notes)
        if going_on and is_done(output):
            fitter.load_trained(output)
        elif going_on:
            fitter.load(state)
        elif share.size > 1 and share.first and state.exists():
            state.replace(f"{output}.resume.old.pt")  # of an earlier training: a restart must not take it for its own
        if recipe.head_only:
            fitter.features = self.read_features(network, self.training)
        elif recipe.views and fitter.epoch < recipe.epochs:
            fitter.views = self.look(fitter)
        return fitter

    def _share_out(self, read: Callable[[Dataset], Tensor], dataset: Dataset) -> Tensor:
        """Read every photo of a data set, (N, ...), each process its part."""
        size, rank = self.share.size, self.share.rank
        if size == 1 or self.device != "cpu":
            return read(dataset)
        import torch.distributed as dist

        parts: list[Any] = [None] * size
        dist.all_gather_object(
            parts, read(dataset.subset(range(rank, len(dataset), size))) if rank < len(dataset) else None
        )
        whole = torch.empty(len(dataset), *parts[0].shape[1:], dtype=parts[0].dtype)
        for place, part in enumerate(parts[: len(dataset)]):
            whole[place::size] = part
        return whole


def _run_epochs(fitter: Fitter, validation: Dataset, output: Path, report: Reporter | None) -> None:
    """Run the epochs that are left; the first process saves the state, and measures, after them."""
    epochs = fitter.recipe.epochs
    for epoch in range(fitter.epoch, epochs):
        fitter.run_epoch(epoch, report)
        if fitter.share.first:
            fitter.save(resume_file(output))
            if report and (epoch + 1) % 2 == 0 and epoch + 1 < epochs:
                report(_validate(fitter, epoch, validation))


def _finish(
    fitter: Fitter,
    validation: Dataset,
    tests: dict[str, Dataset],
    provenance: dict[str, Any],
    output: Path,
    half: bool,
    base: Path | None,
) -> Metadata:
    """Blend, calibrate and measure the averaged network, and write the checkpoint; return its metadata.

    The state to resume from is deleted once the checkpoint is there.
    """
    if fitter.recipe.blend:
        fitter.notes["blend"] = _blend(fitter, validation)
    if half:
        for value in fitter.averaged.parameters():
            value.data = _halve(value).float()
    metadata = _calibrate_and_measure(fitter, validation, tests, {**provenance, **fitter.notes})
    tensors = fitter.averaged.state_dict()
    if half:
        tensors = {name: _halve(value) for name, value in tensors.items()}
    save_checkpoint(output, tensors, metadata, base=base)
    resume_file(output).unlink(missing_ok=True)
    return metadata


def _halve(value: Tensor) -> Tensor:
    """Return matrices in float16, and vectors as they are."""
    return value.half() if value.dim() > 1 else value


def _blend(fitter: Fitter, validation: Dataset) -> dict[str, float]:
    """Mix the averaged weights with those that training began from; return the share taken, and mAP of each share.

    The interpolation of WiSE-FT (Wortsman et al., 2022), the share chosen by the mAP of `validation`.
    """
    ends = fitter.start, {name: value.clone() for name, value in fitter.averaged.state_dict().items()}
    found: dict[float, float] = {}

    def mix(share: float) -> None:
        for name, value in fitter.averaged.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.lerp(ends[0][name], ends[1][name], share))

    for share in _SHARES:
        mix(share)
        logits = _predict(fitter, validation, amp=fitter.recipe.amp)
        precision = float(average_precision(logits.T, torch.from_numpy(validation.truth).T).nanmean())
        found[share] = -1.0 if math.isnan(precision) else precision
    best = max(found, key=lambda share: (found[share], share))
    mix(best)
    return {"share": best} | {f"validation map at {share}": round(value, 4) for share, value in found.items()}


def _calibrate_and_measure(
    fitter: Fitter, validation: Dataset, tests: dict[str, Dataset], provenance: dict[str, Any]
) -> Metadata:
    """Fit the bias of the averaged network's head on `validation`; return what its checkpoint says of it."""
    recipe, labels = fitter.recipe, fitter.training.labels
    boundary = torch.zeros(len(labels))
    bias = calibrate(_predict(fitter, validation), torch.from_numpy(validation.truth), boundary, recipe.shift)
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
        {
            **provenance,
            "recipe": {**asdict(recipe), "training set": fitter.training.fingerprint, "freeze": list(recipe.freeze)},
        },
        metrics,
    )


def _validate(fitter: Fitter, epoch: int, validation: Dataset) -> Progress:
    truth, boundary = torch.from_numpy(validation.truth), torch.zeros(len(validation.labels))
    metrics = classifier_metrics(
        _predict(fitter, validation, amp=fitter.recipe.amp), truth, boundary, validation.labels
    )
    return Progress(epoch + 1, fitter.recipe.epochs, fitter.steps, fitter.steps, math.nan, metrics)


def _predict(fitter: Fitter, dataset: Dataset, *, amp: bool = False) -> Tensor:
    """Return the averaged network's logits, (N, L)."""
    workers, device = fitter.recipe.workers, fitter.device
    return predict_dataset(
        fold_batch_norm(fitter.averaged), dataset, fitter.preprocess, device=device, workers=workers, amp=amp
    )
