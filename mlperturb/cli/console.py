"""What every command prints with: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import sys

from rich.console import Console

out = Console(highlight=False, emoji=False, markup=False)
err = Console(stderr=True, highlight=False, emoji=False, markup=False)


def printable(text: str) -> str:
    """Return untrusted text on one line, with control characters (terminal escapes) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def print_error(message: str) -> None:
    """Print one line on stderr."""
    print(f"mlperturb: error: {printable(message)}", file=sys.stderr)


def print_note(message: str) -> None:
    """Print one line on stderr."""
    print(f"mlperturb: {printable(message)}", file=sys.stderr)
