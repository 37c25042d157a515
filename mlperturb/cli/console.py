"""Printing for every command: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from mlperturb.system.text import printable, shorten

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
    **{name: f"--{name}" for name in ("thresholds", "preprocess", "activation", "prompt")},
    **{
        name: f"--{name.replace('_', '-')}"
        for name in ("head_only", "adversarial_steps", "clean_share", "norm_momentum")
    },
    "rmsd": "--max-rmsd",
    "linf": "--max-linf",
    "architecture": "--arch",
    "initial": "--init",
    "qualities": "--quality",
    "years": "--year",
}
_LONGEST = 2000  # characters of a message: a label or a name in a file may have millions
_PARAMETER = re.compile(r"(?<![^\s(])`([a-z_]+)`(?![^\s),:;])")  # a word on its own, not part of a path or quoted text


class Forgiving(io.TextIOBase):
    """A stream for messages that are lost, without an error, where they cannot be written: on a full disk, say.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits, or lose it."""
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Say whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's number."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self._stream.encoding


def prepare_streams() -> None:
    """Escape characters that stdout cannot encode, and lose messages that stderr does not take."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is not None:
        sys.stderr = Forgiving(sys.stderr)


class Pipe:
    """Stdout of a process: if the reader of the pipe has gone, as with `| head -1`, the process ends in silence.

    The exit code is that of a process which SIGPIPE ended, as of other programs. The signal itself would also end a
    process whose connection to a store or to another process broke.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text."""
        with self._reader():
            return self._stream.write(text)
        return 0

    def flush(self) -> None:
        """Write what waits."""
        with self._reader():
            self._stream.flush()

    @contextmanager
    def _reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # what waits goes nowhere, and Python's last flush is at peace
            os.close(nowhere)
            raise SystemExit(128 + 13) from None


def print_error(message: str) -> None:
    """Print an error as one line on stderr, of some length; names of parameters become names of options."""
    print(f"mlperturb: error: {printable(shorten(name_options(message), _LONGEST))}", file=sys.stderr)


def name_options(message: str) -> str:
    """Replace each parameter in backquotes, as errors of the library name it, by its option, such as `--max-rmsd`."""
    return _PARAMETER.sub(lambda found: OPTIONS.get(found[1], found[0]), message)


def print_note(message: str) -> None:
    """Print a note as one line on stderr."""
    print(f"mlperturb: {printable(shorten(message, _LONGEST))}", file=sys.stderr)


def make_bar(*, quiet: bool) -> Progress:
    """Return a progress bar on stderr that vanishes at the end; it is hidden if stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal)
