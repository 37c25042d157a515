"""`mlperturb convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import (
    HERE,
    Arch,
    Checkpoint,
    Labels,
    Overwrite,
    PreprocessFile,
    Quiet,
    Thresholds,
)
from mlperturb.cli.source import find_source
from mlperturb.errors import UsageError
from mlperturb.system.text import printable


def convert(
    out: Annotated[Path, typer.Option(**HERE, help="The .safetensors file to write.", show_default=False)],
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    thresholds: Thresholds = None,
    preprocess: PreprocessFile = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a folder, or plain weights, as one file of ours, with labels, thresholds and preprocessing in it."""
    if out.suffix != ".safetensors":
        raise UsageError(f"expected --out to end in .safetensors, got {out}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists: give --overwrite to replace it")
    source = find_source(checkpoint, arch, labels, thresholds, preprocess)

    from mlperturb.model.convert import convert

    metadata = convert(source.path, out, **source.said)
    if not quiet:
        known = f"{metadata.architecture}, {len(metadata.labels)} labels"
        stdout.print(printable(f"{out}: {known}, checked against {source.path}"), soft_wrap=True)
