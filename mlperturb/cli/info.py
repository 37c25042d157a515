"""`mlperturb labels` and `mlperturb methods`."""

from __future__ import annotations

from rich.table import Table

from mlperturb.attacks.methods import METHODS
from mlperturb.cli.console import out
from mlperturb.cli.options import Arch, Checkpoint, Json, Labels, find_source
from mlperturb.system.text import printable


def labels(checkpoint: Checkpoint = None, arch: Arch = None, labels: Labels = None, json: Json = False) -> None:
    """Show the label names, thresholds and metadata of a checkpoint."""
    from mlperturb.model.checkpoints import check_architecture, describe_folder, read_metadata
    from mlperturb.run.report import to_json

    source = find_source(checkpoint, arch, labels)
    if source.architecture is not None:
        check_architecture(source.architecture)
        thresholds, details = (0.5,) * len(source.labels), {"architecture": source.architecture}
    else:
        folder = source.path.is_dir()
        metadata = describe_folder(source.path, source.names) if folder else read_metadata(source.path)
        thresholds = metadata.thresholds
        names = ("architecture", "preprocess", "provenance", "metrics")
        details = {name: getattr(metadata, name) for name in names}
    if json:
        described = dict(zip(source.labels, thresholds, strict=True))
        print(to_json({"checkpoint": str(source.path), "thresholds": described, **details}))
        return
    table = Table("label", "threshold", box=None, pad_edge=False)
    for label, threshold in zip(source.labels, thresholds, strict=True):
        table.add_row(printable(label), f"{threshold:.3f}")
    out.print(table)
    for name, value in details.items():
        if not isinstance(value, dict):
            out.print(f"{name}: {printable(str(value))}", soft_wrap=True)
            continue
        out.print(f"{name}:")
        for key, inner in value.items():
            out.print(f"  {printable(str(key))}: {printable(_line(inner))}", soft_wrap=True)
    out.print(f"checkpoint: {printable(str(source.path))}", soft_wrap=True)


def _line(value: object) -> str:
    """Return a value as one line, without nested tables, which only --json shows."""
    if not isinstance(value, dict):
        return str(value)
    shown = {key: inner for key, inner in value.items() if not isinstance(inner, dict)}
    return ", ".join(
        f"{key} {inner:.4g}" if isinstance(inner, float) else f"{key} {inner}" for key, inner in shown.items()
    )


def methods() -> None:
    """Show the attacks: name, summary, equation in the paper, options."""
    table = Table("method", "what it does", "paper", "options", box=None, pad_edge=False)
    for name, method in METHODS.items():
        table.add_row(name, method.summary, method.equation, ", ".join(f"--{option}" for option in method.options))
    out.print(table)
