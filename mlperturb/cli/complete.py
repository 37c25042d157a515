"""What the shell offers after Tab: label names of the checkpoint, methods, readers and other words, without torch.

`mlperturb --install-completion` puts the script of the shell in place; the shell then calls mlperturb with the words of
the line. A value may be a comma list: the last part is completed. Labels are those of the `--checkpoint` (and
`--labels`) that stand before the cursor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

from mlperturb.attacks.methods import BUDGETS, CHOICES, METHODS
from mlperturb.errors import MlperturbError
from mlperturb.labels import CATEGORY, Categories
from mlperturb.model.readers import FILTERS

Complete = Callable[[typer.Context, str], list[str]]

_HELD = "_MLPERTURB_HELD"  # a variable of the environment
_MOST = 500  # names that are offered
_QUOTED = re.compile(r"[^\w@%+=:,./-]")  # characters that bash would read as its own


def complete_labels(*words: str) -> Complete:
    """Return the completion of label names, of `category:NAME` and of these words, in a comma list."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        labels, categories = _labels_of(context)
        groups = [CATEGORY + name for name in _names_of(categories)] if words else []
        return offer([*words, *labels, *groups], incomplete)

    return complete


def complete_categories(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a category of the checkpoint's labels."""
    return offer(_names_of(_labels_of(context)[1]), incomplete, many=False)


def complete_words(words: Iterable[str], *, many: bool = False) -> Callable[[str], list[str]]:
    """Return the completion of one of these words, or with `many` of a comma list of them."""
    known = list(words)

    def complete(incomplete: str) -> list[str]:
        return offer(known, incomplete, many=many)

    return complete


def _labels_of(context: typer.Context) -> tuple[tuple[str, ...], Categories]:
    """Return the labels of the checkpoints that the line names, or of the bundled one; none of one that is unreadable.

    The categories are those of the first checkpoint.
    """
    from mlperturb.cli.source import find_source
    from mlperturb.model.hub import is_hub

    given = {name: context.params.get(name) for name in ("checkpoint", "arch", "labels")}
    named: Any = given["checkpoint"]
    several = list(named) if isinstance(named, list | tuple) else [named]
    labels: dict[str, None] = {}
    categories = Categories()
    for number, checkpoint in enumerate(several or [None]):
        path = None if checkpoint is None else Path(str(checkpoint))
        if is_hub(path):  # a completion fetches nothing
            continue
        try:
            source = find_source(path, given["arch"], given["labels"])
        except (MlperturbError, OSError):
            continue
        labels |= dict.fromkeys(source.labels)
        categories = categories if number else source.categories
    return tuple(labels), categories


def _names_of(categories: Categories) -> list[str]:
    """Return the names of the categories, or the categories themselves."""
    return sorted({categories.names.get(one, one) for one in categories.of})


def offer(words: Sequence[str], incomplete: str, *, many: bool = True) -> list[str]:
    """Return the words that begin as the last part of a value does, with the parts before it.

    Args:
        words: all words.
        incomplete: the value so far.
        many: the value may be a comma list.
    """
    place = incomplete.rfind(",") + 1 if many and not any(word.startswith(incomplete) for word in words) else 0
    head, last = incomplete[:place], incomplete[place:].lstrip()
    before = {name.strip() for name in head.split(",")}
    found = [head + word for word in words if word.startswith(last) and word not in before]
    if not found:
        found = [head + word for word in words if word.casefold().startswith(last.casefold()) and word not in before]
    return [_Offered(_quote(value).removeprefix(os.environ.get(_HELD, ""))) for value in found[:_MOST]]


class _Offered(str):
    """A value to insert, chosen already: Typer offers only those that begin as the value so far does, unquoted."""

    __slots__ = ()

    def startswith(self, *_: object) -> bool:
        """Return True."""
        return True


def join_at_colons() -> None:
    """Join the words of the line that bash has split at colons, as in `category:4`, before the line is parsed.

    Bash replaces only the last of the split words by what is offered, so `_HELD` has the part before it.
    """
    words, place = _bash()
    joined: list[str] = []
    for number, word in enumerate(words):
        glued = bool(joined) and number > 1 and (word == ":" or joined[-1].endswith(":"))
        held = joined.pop() if glued else ""
        joined.append(held + word)
        if number == place:
            os.environ |= {"COMP_CWORD": str(len(joined) - 1), _HELD: held}
    if words:
        os.environ["COMP_WORDS"] = "\n".join(joined)


def _quote(value: str) -> str:
    """Return a value as bash must insert it, unless the user has begun a quotation."""
    line, place = _bash()
    typed = line[place] if place < len(line) else ""
    if not line or typed.startswith(("'", '"')):
        return value
    return _QUOTED.sub(lambda found: "\\" + found[0], value)


def _bash() -> tuple[list[str], int]:
    """Return bash's words of the line and the number of the word at the cursor; no words for another shell."""
    if not any(value == "complete_bash" for name, value in os.environ.items() if name.endswith("_COMPLETE")):
        return [], 0
    words, place = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    return words, int(place) if place.isdecimal() else 0


complete_method = complete_words(METHODS)
complete_variants = complete_words(["all", *METHODS], many=True)
complete_budget = complete_words(BUDGETS)
complete_device = complete_words(("auto", "cpu", "cuda", "mps"))
complete_readers = complete_words(
    [engine + end for engine, kernels in FILTERS.items() for end in ("", *(f":{kernel}" for kernel in kernels))],
    many=True,
)
complete_choice = {name: complete_words(values) for name, values in CHOICES.items()}
