"""Make untrusted text (file names, label names, metadata) harmless to show."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """Return text on one line, with control characters (terminal escapes) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shorten(text: str, most: int) -> str:
    """Return at most `most` characters; the last is an ellipsis if the text is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, in the plural unless the number is 1: `1 photo`, `2 photos`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def share_of(number: int, total: int, noun: str) -> str:
    """Return a part of a total as the subject of a sentence, with its verb: `1 of 3 photos is`, `2 of 3 photos are`."""
    return f"{number} of {counted(total, noun)} {'is' if 1 in (number, total) else 'are'}"


def listed(names: Sequence[str], most: int) -> str:
    """Return at most `most` names, with commas; what is left out shows as `...`."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def file_stem(text: str, most: int = 200) -> str:
    """Return a file name of at most `most` bytes: the text with `-` for all but letters, digits, dots, `_` and `-`."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
    return safe.encode("utf-8", "ignore")[:most].decode("utf-8", "ignore").lstrip(".") or "-"
