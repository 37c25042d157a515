"""Printing for every command: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from mlperturb.system.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

out = Console(highlight=False, emoji=False, markup=False)
err = Console(stderr=True, highlight=False, emoji=False, markup=False)

OPTIONS = {  # option of the command line by parameter of the library
    **{name: f"--{name}" for name in ("flip", "keep", "add", "remove", "passes", "survive", "region")},
    **{name: f"--{name}" for name in ("between", "solver", "rounding", "space", "reduce", "augment", "diversity")},
    **{name: f"--{name}" for name in ("labels", "out", "overwrite", "report", "subsampling", "margin")},
    **{name: f"--{name}" for name in ("format", "method")},
    **{name: f"--{name}" for name in ("adversarial", "views")},
    "aim": "--strongest",
    **{name: f"--{name}" for name in ("thresholds", "preprocess", "activation")},
    "head_only": "--head-only",
    "rmsd": "--max-rmsd",
    "linf": "--max-linf",
    "architecture": "--arch",
    "initial": "--init",
    "qualities": "--quality",
    "years": "--year",
}
_PARAMETER = re.compile(r"(?<![^\s(])`([a-z_]+)`(?![^\s),:;])")  # a word on its own, not part of a path or quoted text


def print_error(message: str) -> None:
    """Print an error as one line on stderr; names of parameters become names of options."""
    print(f"mlperturb: error: {printable(name_options(message))}", file=sys.stderr)


def name_options(message: str) -> str:
    """Replace each parameter in backquotes, as errors of the library name it, by its option, such as `--max-rmsd`."""
    return _PARAMETER.sub(lambda found: OPTIONS.get(found[1], found[0]), message)


def print_note(message: str) -> None:
    """Print a note as one line on stderr."""
    print(f"mlperturb: {printable(message)}", file=sys.stderr)


def make_bar(*, quiet: bool) -> Progress:
    """Return a progress bar on stderr that vanishes at the end; it is hidden if stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
