"""Label names -> label numbers. Pure Python, so that a wrong name is reported before torch is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlperturb.errors import LabelError, UsageError


@dataclass(frozen=True)
class Request:
    """The labels that the user asks for, by number.

    Attributes:
        flip: labels whose decision is to be reversed.
        keep: labels whose decision is to stay.
        add: labels that are to be present afterwards.
        remove: labels that are to be absent afterwards.
        keep_rest: keep every label that the request does not name; without `any_label`, `keep` lists these labels too.
        any_label: non-targeted (Section II): flip the label outside `keep` that is nearest to its threshold.
    """

    flip: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    add: tuple[int, ...] = ()
    remove: tuple[int, ...] = ()
    keep_rest: bool = False
    any_label: bool = False


def present_labels(probabilities: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    """Return the labels that are present, f_j >= t_j, in the order of `probabilities`."""
    return [label for label, value in probabilities.items() if value >= thresholds[label]]


_SETS = ("flip", "keep", "add", "remove")
_WORDS = {"all": "`flip`", "any": "`flip`", "rest": "`keep`"}


def split_names(values: Iterable[str], labels: Sequence[str] = ()) -> list[str]:
    """Split repeated, comma-separated values into names without surrounding space; a whole label stays whole."""
    parts = [[value] if value in labels else value.split(",") for value in values]
    return [name.strip() for names in parts for name in names if name.strip()]


def list_names(names: object, parameter: str) -> list[str]:
    """Return a name, or several names, as a list; a label is named, not numbered: its name may itself be a number.

    Raises:
        UsageError: if `names` is neither a text nor made of texts; the message names the parameter.
    """
    if isinstance(names, str):
        return [names]
    found: list[str] = []
    for name in names if isinstance(names, Iterable) and not isinstance(names, bytes) else [names]:
        if not isinstance(name, str):
            shown, wanted = f"{' '.join(repr(name).split())[:60]} ({type(name).__name__})", f"names for `{parameter}`"
            if parameter in _SETS:
                wanted = f"label {wanted}" + (f", such as labels[{name}]" if isinstance(name, int) else "")
            raise UsageError(f"expected {wanted}, got {shown}")
        found.append(name)
    return found


def check_labels(labels: object) -> tuple[str, ...]:
    """Return the label names of a classifier; a text alone is refused: its letters would be the names.

    Raises:
        UsageError: if `labels` is not a list of texts.
    """
    if isinstance(labels, str):
        raise UsageError(f"expected a list of names for `labels`, got the text {labels!r:.60}")
    return tuple(list_names(labels, "labels"))


def find_label(name: str, labels: Sequence[str]) -> int:
    """Return the number of the label called `name`; upper and lower case count as equal.

    Raises:
        LabelError: if no label has this name; the message lists close matches, or some labels.
    """
    lowered = {label.casefold(): number for number, label in reversed(list(enumerate(labels)))}
    if name in labels:
        return labels.index(name)
    if name.casefold() in lowered:
        return lowered[name.casefold()]
    if name.casefold() in _WORDS:
        raise LabelError(f"{name!r} is not a label: expected it only in {_WORDS[name.casefold()]}")
    close = difflib.get_close_matches(name.casefold(), list(lowered), n=3, cutoff=0.5)
    shown = [labels[lowered[match]] for match in close]
    if shown:
        hint = f"did you mean {' or '.join(shown)}?"
    else:
        hint = f"expected one of {', '.join(labels[:25])}{', ...' if len(labels) > 25 else ''}"
    raise LabelError(f"unknown label {name!r}: {hint}")


def parse_request(
    labels: Sequence[str],
    *,
    flip: Iterable[str] = (),
    keep: Iterable[str] = (),
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
) -> Request:
    """Turn label names into a `Request`.

    Args:
        labels: the classifier's L label names.
        flip: names, `all` (every label not named elsewhere) or `any` (non-targeted).
        keep: names, or `rest` (every label not named elsewhere).
        add: names of labels to be present afterwards.
        remove: names of labels to be absent afterwards.

    Raises:
        LabelError: for an unknown label, or a label in two sets.
        UsageError: if no label is to change, or `all`, `any` and `rest` contradict each other.
    """
    flips, keeps = split_names(flip, labels), split_names(keep, labels)
    any_label = _take_word("any", flips, labels)
    flip_all = _take_word("all", flips, labels)
    keep_rest = _take_word("rest", keeps, labels)
    if any_label and (flip_all or flips):
        raise UsageError("expected `flip` any alone, got further labels to flip")
    if flip_all and keep_rest:
        raise UsageError("expected `flip` all or `keep` rest, got both")
    sets = {"flip": flips, "keep": keeps, "add": split_names(add, labels), "remove": split_names(remove, labels)}
    chosen: dict[str, list[int]] = {}
    taken: dict[int, str] = {}
    for option, names in sets.items():
        chosen[option] = []
        for name in names:
            number = find_label(name, labels)
            if taken.setdefault(number, option) != option:
                raise LabelError(
                    f"expected a label in one set, got {labels[number]!r} in both `{taken[number]}` and `{option}`"
                )
            if number not in chosen[option]:
                chosen[option].append(number)
    rest = [number for number in range(len(labels)) if number not in taken]
    if flip_all:
        chosen["flip"] = sorted(chosen["flip"] + rest)
    if keep_rest and not any_label:
        chosen["keep"] = sorted(chosen["keep"] + rest)
    if any_label and not rest:
        raise UsageError("expected a label left for `flip` any, but every label is named elsewhere")
    if not (chosen["flip"] or chosen["add"] or chosen["remove"] or any_label):
        raise UsageError("nothing to change: expected at least one label in `flip`, `add` or `remove`")
    return Request(
        flip=tuple(chosen["flip"]),
        keep=tuple(chosen["keep"]),
        add=tuple(chosen["add"]),
        remove=tuple(chosen["remove"]),
        keep_rest=keep_rest,
        any_label=any_label,
    )


def _take_word(word: str, names: list[str], labels: Sequence[str]) -> bool:
    """Take a key word out of `names`, unless the classifier has a label of that name."""
    if word in (label.casefold() for label in labels):
        return False
    found = [name for name in names if name.casefold() == word]
    for name in found:
        names.remove(name)
    return bool(found)
