"""What `mlperturb train` shows of its epochs and of its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from mlperturb.model.metadata import Metadata
    from mlperturb.training.fitter import Progress


class Printer:
    """A progress bar on a terminal; elsewhere, four lines an epoch for a log."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        from mlperturb.cli.console import err

        self.terminal = err.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=err, disable=not self.terminal)
        self.task = self.bar.add_task("training")
        self.bar.start()

    def __call__(self, progress: Progress) -> None:
        """Show a step, or what was measured after an epoch."""
        text = f"epoch {progress.epoch}/{progress.epochs}"
        done = (progress.epoch - 1) * progress.steps + progress.step
        if progress.validation is not None:
            figures = ", ".join(
                f"{name} {_figure(progress.validation[name])}" for name in ("hamming", "micro_f1", "map")
            )
            if self.terminal:
                self.bar.print(f"{text}: validation {figures}")
            else:
                typer.echo(f"{text}: validation {figures}", err=True)
        else:
            self.bar.update(
                self.task,
                completed=done,
                total=progress.epochs * progress.steps,
                description=f"{text}, loss {progress.loss:.4f}",
            )
            if not self.terminal and progress.step % max(1, progress.steps // 4) == 0:
                typer.echo(f"{text} step {progress.step}/{progress.steps}: loss {progress.loss:.4f}", err=True)
        if done == progress.epochs * progress.steps and progress.validation is None:
            self.bar.stop()


def print_trained(metadata: Metadata, out: Path) -> None:
    """Print what was chosen on held-out photos, and the figures."""
    chosen, words = metadata.provenance, []
    if probe := chosen.get("probe"):
        words.append(f"weight decay of the last layer {probe['decay']:g}")
    if blend := chosen.get("blend"):
        words.append(f"share of the trained weights {blend['share']:g}")
    if words:
        typer.echo(f"chosen on held-out photos: {', '.join(words)}")
    if metadata.metrics:
        from mlperturb.cli.console import out as stdout
        from mlperturb.show.grids import classifier_grid
        from mlperturb.show.tables import show

        stdout.print(show(classifier_grid(metadata.metrics)))
    typer.echo(f"checkpoint: {out}")


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
