"""A small network with code of its own, its exports, and corpora of bad programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.models import TINY_LABELS

SIZE = 16
PREPROCESS: dict[str, Any] = {
    "resize": [SIZE, SIZE], "crop": None, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35],
    "interpolation": "bilinear",
}  # fmt: skip
BESIDE: dict[str, Any] = {"labels": list(TINY_LABELS), "thresholds": [0.5, 0.4, 0.5, 0.6], "preprocess": PREPROCESS}


class Gated(nn.Module):
    """A network of an architecture that no library has: convolutions, a gate, and a statistic without a gradient."""

    scale: Tensor

    def __init__(self, *, probabilities: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
            self.gate, self.second, self.head = nn.Linear(8, 8), nn.Conv2d(8, 12, 3), nn.Linear(12, len(TINY_LABELS))
            self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5, persistent=False)
            with torch.no_grad():
                self.head.weight.mul_(6)
                self.head.bias.sub_(self._logits(torch.randn(64, 3, SIZE, SIZE)).mean(0))
        self.probabilities = probabilities
        self.eval()

    def forward(self, photos: Tensor) -> Tensor:
        """Return the logits, (N, 4)."""
        logits = self._logits(photos)
        return logits.sigmoid() if self.probabilities else logits

    def _logits(self, photos: Tensor) -> Tensor:
        with torch.no_grad():
            level = photos.mean((1, 2, 3), keepdim=True).clamp(-1, 1)
        found = nn.functional.relu(self.norm(self.first(photos)) * self.scale, inplace=True)
        gate = torch.sigmoid(self.gate(found.mean((2, 3)))).reshape(photos.shape[0], -1, 1, 1)
        found = torch.where(found > 2, 2 + 0.5 * (found - 2), found) * gate + 0.01 * level
        logits: Tensor = self.head(nn.functional.silu(self.second(found)).flatten(2).mean(2))
        return logits


def write_beside(path: Path, **changed: Any) -> None:
    """Write the JSON file beside a program; a field that is None is left out."""
    values = {name: value for name, value in {**BESIDE, **changed}.items() if value is not None}
    path.with_suffix(".json").write_text(json.dumps(values))


def export_program(path: Path, network: nn.Module, *, batch: int | None = None) -> Path:
    """Write a program with torch.export alone, for a free batch or a fixed one, and its JSON."""
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    example = torch.rand(batch or 2, 3, SIZE, SIZE)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), path)
    write_beside(path)
    return path


def export_onnx(path: Path, network: nn.Module, *, batch: int | None = None) -> Path:
    """Write an ONNX file with torch's older exporter, for a free batch or a fixed one, and its JSON."""
    axes = {"photos": {0: "batch"}} if batch is None else None
    example = torch.rand(batch or 2, 3, SIZE, SIZE)
    torch.onnx.export(network, (example,), path, dynamo=False, input_names=["photos"], dynamic_axes=axes)
    write_beside(path)
    return path
