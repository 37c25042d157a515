"""What every command prints with: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from mlperturb.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

out = Console(highlight=False, emoji=False, markup=False)
err = Console(stderr=True, highlight=False, emoji=False, markup=False)


def print_error(message: str) -> None:
    """Print one line on stderr."""
    print(f"mlperturb: error: {printable(message)}", file=sys.stderr)


def print_note(message: str) -> None:
    """Print one line on stderr."""
    print(f"mlperturb: {printable(message)}", file=sys.stderr)


def make_bar(*, quiet: bool) -> Progress:
    """Return a progress bar on stderr, which vanishes at the end; hidden where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
