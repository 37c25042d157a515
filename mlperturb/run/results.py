"""The results of the Python interface: the 8-bit pixels are judged as the command line judges a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mlperturb.metrics import pixel_distortion
from mlperturb.model.classifier import Classifier
from mlperturb.model.ensemble import Ensemble, Victim, places_of
from mlperturb.photos.images import Photo, Pixels
from mlperturb.run.record import Status
from mlperturb.run.search import Found
from mlperturb.run.settings import Settings
from mlperturb.run.verdict import look


@dataclass(frozen=True)
class Verdict:
    """The probabilities and the success of one of several classifiers on N images.

    Attributes:
        success: whether every constraint on its labels holds in all of its readers, boolean, (N,).
        before: its probabilities of the images, (N, L_c).
        after: its probabilities of the adversarial images, (N, L_c).
        flip: the labels that it had to reverse, boolean, (N, L_c).
        keep: the labels that it had to keep, boolean, (N, L_c).
        labels: its L_c names.
    """

    success: Tensor
    before: Tensor
    after: Tensor
    flip: Tensor
    keep: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """The result of an attack on N images.

    Attributes:
        images: the adversarial images, in the form of the input: a batch (N, 3, H, W), or a list of tensors, arrays
            or PIL images (PIL images for paths too, with the colour profile). Floats are multiples of 1/255.
        success: whether every constraint holds on these 8-bit pixels, in every reader and after the compressions,
            boolean, (N,).
        readers: for each reader's name, whether every constraint holds in this reader, boolean, (N,).
        status: `success`; `unchanged`: the image was as asked already; `partial`: a label flipped, but some constraint
            does not hold; `failed`: no label flipped.
        before: probabilities of the images, (N, L).
        after: probabilities of the adversarial images, (N, L).
        rmsd: root mean square of the change of the 8-bit pixels, on the 0-255 scale, (N,).
        linf: largest change of a pixel, in grey levels, (N,).
        passes: all forward and backward passes of the network, (N,).
        flip: the set A, boolean, (N, L).
        keep: the set B, boolean, (N, L).
        labels: the L names. Of several classifiers, the labels that any of them has; each value above is then that of
            the first classifier that has the label.
        classifiers: for each of several classifiers, by name, its own values; empty for a single classifier.
    """

    images: Tensor | list[Tensor | npt.NDArray[np.generic] | Image.Image]
    success: Tensor
    readers: dict[str, Tensor]
    status: tuple[Status, ...]
    before: Tensor
    after: Tensor
    rmsd: Tensor
    linf: Tensor
    passes: Tensor
    flip: Tensor
    keep: Tensor
    labels: tuple[str, ...]
    classifiers: dict[str, Verdict] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.status)


@dataclass(frozen=True)
class Row:
    """The result of one image, with the columns of all classifiers, M.

    Attributes:
        pixels: the adversarial image, 8 bits, (H, W, 3).
        status: see `Result`.
        before: probabilities of the image in the first reader, (M,).
        after: probabilities of the adversarial image in the first reader, (M,).
        rmsd: see `Result`.
        linf: see `Result`.
        passes: forward and backward passes.
        flip: the set A, boolean, (M,).
        keep: the set B, boolean, (M,).
        held: for each reader's name, whether every constraint holds in this reader.
        holds: which constraints hold in every reader and after every compression, boolean, (M,).
    """

    pixels: Pixels
    status: Status
    before: Tensor
    after: Tensor
    rmsd: float
    linf: float
    passes: int
    flip: Tensor
    keep: Tensor
    held: dict[str, bool]
    holds: Tensor


def judge_pixels(classifier: Victim, photo: Photo, found: Found | None, settings: Settings) -> Row:
    """Judge the 8-bit pixels, as the command line judges the file."""
    count = len(classifier.boundary)
    if found is None:  # the network's outputs are not finite on the clean image
        nowhere, unknown = torch.zeros(count, dtype=torch.bool), torch.full((count,), torch.nan)
        held = {reader.name: False for reader in settings.readers}
        passes = settings.networks * len(held)
        return Row(photo.rgb, "failed", unknown, unknown, 0.0, 0.0, passes, nowhere, nowhere, held, nowhere)
    seen = look(classifier, found.pixels, photo.rgb, found, settings)
    moved = pixel_distortion(found.pixels, photo.rgb)
    return Row(
        found.pixels,
        seen.status,
        torch.sigmoid(found.before[0]),
        torch.sigmoid(seen.logits[0]),
        moved.rmsd,
        moved.linf,
        found.forward + found.backward + seen.passes,
        found.targets.flip[0],
        found.targets.keep[0],
        {name: bool(held.all()) for name, held in seen.readers.items()},
        torch.stack([seen.held[0], *(held[0] for held in seen.survival.values())]).all(0),
    )


def build_result(
    classifier: Victim,
    adversarial: list[Tensor | npt.NDArray[np.generic] | Image.Image],
    rows: Sequence[Row],
    *,
    readers: Sequence[str],
    batch: bool,
) -> Result:
    """Build the `Result` from the rows.

    Args:
        classifier: the classifier, or several.
        adversarial: the adversarial images, each in its image's form.
        rows: a row for each image.
        readers: the names of the readers.
        batch: the input was a batch, and so is the output.
    """
    first = [columns[0] for columns in places_of(classifier)]

    def stack(tensors: list[Tensor], columns: slice | list[int] = first) -> Tensor:
        return torch.stack(tensors)[:, columns] if tensors else torch.empty(0, len(classifier.boundary))[:, columns]

    def verdict(one: Classifier, columns: slice) -> Verdict:
        return Verdict(
            success=stack([row.holds for row in rows], columns).bool().all(1),
            before=stack([row.before for row in rows], columns),
            after=stack([row.after for row in rows], columns),
            flip=stack([row.flip for row in rows], columns).bool(),
            keep=stack([row.keep for row in rows], columns).bool(),
            labels=one.labels,
        )

    several = classifier if isinstance(classifier, Ensemble) else None
    tensors = [image for image in adversarial if isinstance(image, Tensor)]
    return Result(
        images=torch.stack(tensors) if batch and tensors else adversarial,
        success=torch.tensor([row.status in ("success", "unchanged") for row in rows], dtype=torch.bool),
        readers={name: torch.tensor([row.held[name] for row in rows], dtype=torch.bool) for name in readers},
        status=tuple(row.status for row in rows),
        before=stack([row.before for row in rows]),
        after=stack([row.after for row in rows]),
        rmsd=torch.tensor([row.rmsd for row in rows]),
        linf=torch.tensor([row.linf for row in rows]),
        passes=torch.tensor([row.passes for row in rows], dtype=torch.long),
        flip=stack([row.flip for row in rows]).bool(),
        keep=stack([row.keep for row in rows]).bool(),
        labels=classifier.labels,
        classifiers={}
        if several is None
        else {
            name: verdict(one, columns)
            for (name, one), columns in zip(several.members.items(), several.columns(), strict=True)
        },
    )
