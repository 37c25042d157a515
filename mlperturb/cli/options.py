"""Options that several commands have, defined once, and the classifier they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from mlperturb.classifier import Classifier

Paths = Annotated[list[Path], typer.Argument(help="Photos, and folders of photos.", show_default=False)]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Search folders to their depths.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="A .safetensors of ours, or plain weights with --arch and --labels.")
]
Arch = Annotated[str | None, typer.Option(help="Torchvision architecture of plain weights.")]
Labels = Annotated[Path | None, typer.Option(help="Label names of plain weights, one a line.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]


@dataclass(frozen=True)
class Source:
    """A checkpoint as named on the command line, its labels known before torch is loaded."""

    path: Path
    architecture: str | None
    names: tuple[str, ...] | None
    labels: tuple[str, ...]

    def load(self, device: str) -> tuple[Classifier, dict[str, Any]]:
        """Load the classifier, and describe it as a report does."""
        from mlperturb.checkpoints import load_checkpoint
        from mlperturb.files import file_sha256

        classifier, metadata = load_checkpoint(
            self.path, architecture=self.architecture, labels=self.names, device=device
        )
        return classifier, {
            "checkpoint": str(self.path),
            "sha256": file_sha256(self.path),
            "architecture": metadata.architecture,
            "labels": list(metadata.labels),
            "thresholds": list(metadata.thresholds),
        }


def find_source(checkpoint: Path | None, arch: str | None, labels: Path | None) -> Source:
    """Find the checkpoint, the bundled one by default, and read its label names.

    Raises:
        CheckpointError: if it is missing or no checkpoint.
        UsageError: if --arch and --labels do not come together, or the label file is unreadable.
    """
    from mlperturb.checkpoints import bundled_checkpoint, read_metadata

    if (arch is None) != (labels is None) or (arch is not None and checkpoint is None):
        raise UsageError("plain weights need --checkpoint, --arch and --labels together")
    path = checkpoint or bundled_checkpoint()
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    if labels is None:
        if path.suffix != ".safetensors":
            raise UsageError(f"{path} is no .safetensors file of ours: for plain weights give --arch and --labels")
        return Source(path, None, None, read_metadata(path).labels)
    try:
        names = tuple(line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read label names from {labels}: {error}") from error
    if not names or len(set(names)) != len(names):
        raise UsageError(f"{labels}: expected distinct label names, one a line")
    return Source(path, arch, names, names)
