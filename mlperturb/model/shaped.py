"""The form of the input that a program was exported for, and the network that gives it its input so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError

if TYPE_CHECKING:
    from mlperturb.model.preprocess import Preprocess


@dataclass(frozen=True)
class Form:
    """The input and the output of a program.

    Attributes:
        sizes: of the input: N, C, h, w or N, h, w, C; None for a size that is free.
        activation: `sigmoid` or `softmax` if the program ended in it; the logits are what it got. None if it did not.
    """

    sizes: tuple[int | None, ...]
    activation: str | None = None

    def with_activation(self, activation: str | None) -> Form:
        """Return the form of a program that ended in this activation."""
        return replace(self, activation=activation)

    @property
    def channels_last(self) -> bool:
        """Whether the input is (N, h, w, C)."""
        return len(self.sizes) == 4 and self.sizes[3] in (1, 3) and self.sizes[1] not in (1, 3)

    def check(self, preprocess: Preprocess, path: Path) -> None:
        """Refuse a form that photos after `preprocess` do not have.

        Raises:
            CheckpointError: if the batch is fixed to several photos, or the height and width are fixed to others.
        """
        if len(self.sizes) != 4:
            shape = " x ".join(str(size or "N") for size in self.sizes)
            raise CheckpointError(f"{path}: expected an input of N x 3 x height x width, got {shape:.80}")
        batch, *rest = self.sizes
        if self.channels_last:
            rest = [rest[2], *rest[:2]]
        channels = 1 if preprocess.channels == "grey" else 3
        if rest[0] not in (channels, None):
            raise CheckpointError(f"{path}: expected an input of {channels} channels by `preprocess`, got {rest[0]}")
        if batch not in (1, None):
            raise CheckpointError(
                f"{path} was exported for {batch} photos at a time, expected a free batch: see docs/checkpoints.md"
            )
        fixed = preprocess.crop is not None or not isinstance(preprocess.resize, int)
        given = preprocess.output_size
        if any(size is not None and (size != side or not fixed) for size, side in zip(rest[1:], given, strict=True)):
            wanted = " x ".join("any" if size is None else str(size) for size in rest[1:])
            got = f"{given[0]} x {given[1]}" if fixed else f"a shorter side of {given[0]}"
            raise CheckpointError(
                f"{path}: expected `preprocess` to give photos of {wanted} (height x width), got {got}"
            )


class Shaped(nn.Module):
    """A program with its form: takes (N, C, h, w) whatever the program takes.

    Args:
        program: maps input of the form to logits, (N, L).
        form: of the input.
    """

    def __init__(self, program: nn.Module, form: Form) -> None:
        super().__init__()
        self.program, self.form = program, form

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, (N, L); a program for one photo is called for each."""
        if self.form.channels_last:
            inputs = inputs.permute(0, 2, 3, 1)
        if self.form.sizes[0] == 1 and len(inputs) != 1:
            return torch.cat([self.program(one) for one in torch.split(inputs, 1)])
        logits: Tensor = self.program(inputs)
        return logits
