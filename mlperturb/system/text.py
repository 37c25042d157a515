"""Make untrusted text (file names, label names, metadata) harmless to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text on one line, with control characters (terminal escapes) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shorten(text: str, most: int) -> str:
    """Return at most `most` characters; the last is an ellipsis if the text is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def file_stem(text: str, most: int = 200) -> str:
    """Return a file name of at most `most` bytes: the text with `-` for all but letters, digits, dots, `_` and `-`."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
    return safe.encode("utf-8", "ignore")[:most].decode("utf-8", "ignore").lstrip(".") or "-"
