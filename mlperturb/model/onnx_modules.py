"""Modules in place of two of onnx2pytorch's, which index a tensor with a list; PyTorch means to end that."""

from __future__ import annotations

from typing import Any, TypeAlias

from onnx2pytorch.operations import Gather, Slice
from torch import Tensor, nn

Ends: TypeAlias = Any  # a tensor, a list of numbers, or None


def replace_modules(converted: nn.Module) -> None:
    """Replace the modules that index with a list, in what `onnx2pytorch.ConvertModel` made."""
    for name, module in list(converted.named_children()):
        if isinstance(module, Slice):
            setattr(converted, name, _Slice(module))
        elif isinstance(module, Gather):
            setattr(converted, name, _Gather(module.dim))


class _Gather(nn.Module):
    """ONNX's Gather: parts of a tensor along a dimension, by number.

    Args:
        dim: the dimension.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, data: Tensor, numbers: Tensor) -> Tensor:
        """Return the parts; a number below 0 counts from the end."""
        dim, size = self.dim % data.dim(), data.shape[self.dim]
        numbers = numbers.to(data.device).long()
        found = data.index_select(dim, (numbers + size * (numbers < 0)).flatten())
        return found.reshape((*data.shape[:dim], *numbers.shape, *data.shape[dim + 1 :]))


class _Slice(nn.Module):
    """ONNX's Slice.

    Args:
        given: that of onnx2pytorch.
    """

    def __init__(self, given: nn.Module) -> None:
        super().__init__()
        self.given = given

    def forward(
        self, data: Tensor, starts: Ends = None, ends: Ends = None, axes: Ends = None, steps: Ends = None
    ) -> Tensor:
        """Return part of a tensor."""
        given: list[Ends] = [getattr(self.given, name) for name in ("starts", "ends", "dim", "steps")]
        called = (starts, ends, axes, steps)
        first, last, along, by = (
            None if one is None else [int(value) for value in one]
            for one in (own if call is None else call for own, call in zip(given, called, strict=True))
        )
        if first is None or last is None or (by is not None and min(by) < 0):
            backwards: Tensor = self.given(data, starts, ends, axes, steps)
            return backwards
        parts = [slice(None)] * data.dim()
        for place, (start, end) in enumerate(zip(first, last, strict=True)):
            parts[along[place] if along else place] = slice(start, end, by[place] if by else 1)
        return data[tuple(parts)]
