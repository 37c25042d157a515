"""`--settings`: the options of an earlier run, from its report; options that are given win."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from mlperturb.cli.source import Source, named_source
from mlperturb.errors import UsageError

_WORDS = ("flip", "keep", "add", "remove", "survive")
_NUMBERS = ("passes", "max_rmsd", "max_linf", "margin", "seed")
_TEXTS = ("method", "budget", "format", "region", "between", "solver", "rounding", "space", "diversity")


def recall(path: Path, given: dict[str, Any], context: typer.Context) -> tuple[dict[str, Any], Source | None]:
    """Return the options of `attack`, by parameter, and the classifier of the earlier run, unless another is given.

    An option that is on the command line keeps its value. The readers belong to the classifier. The folder of the
    outputs and the device are not those of the earlier run.

    Args:
        path: a report of `attack`, or its folder.
        given: the values of all the options that a report knows.
        context: tells which of them are on the command line.

    Raises:
        UsageError: if the file is not a report of `attack`, or its checkpoint is gone or has changed.
    """
    from mlperturb.run.report import read_report, readers_of, reading

    report, _ = read_report(path)
    names = ("checkpoint", "arch", "labels", "thresholds", "preprocess", "activation", "prompt")
    other = any(_is_given(context, name) for name in names)
    with reading(path):
        settings = report["settings"]
        found: dict[str, Any] = {name: _checked(settings.get(name, []), _is_words) for name in _WORDS}
        found |= {name: _checked(settings.get(name, given[name]), _is_text) for name in _TEXTS}
        found |= {name: _checked(settings.get(name, given[name]), _is_number) for name in _NUMBERS}
        found["batch_size"] = str(settings.get("batch_size", "auto"))
        found["strongest"] = settings.get("aim") == "strongest"
        found["keep_metadata"] = settings.get("keep_metadata") is True
        if not other and "members" in report["classifier"]:
            raise UsageError("expected a report of one classifier for --settings: name each --checkpoint")
        if not other:
            found["reader"] = _checked(list(readers_of(report)), _is_words)
        source = None if other else named_source(report["classifier"])
    return given | {name: value for name, value in found.items() if not _is_given(context, name)}, source


def _is_given(context: typer.Context, name: str) -> bool:
    """Say whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _checked(value: Any, fits: Callable[[Any], bool]) -> Any:
    if not fits(value):
        raise ValueError(f"unexpected {value!r:.60}")
    return value


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
