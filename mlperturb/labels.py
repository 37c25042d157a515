"""Label names -> label numbers. Pure Python, so that a wrong name is reported before torch is loaded."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
        keep_present: keep every label that a photo has and the request does not name.
        any_label: non-targeted (Section II): flip the label outside `keep` that is nearest to its threshold.
    """

    flip: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    add: tuple[int, ...] = ()
    remove: tuple[int, ...] = ()
    keep_rest: bool = False
    any_label: bool = False
    keep_present: bool = False

    @property
    def named(self) -> tuple[int, ...]:
        """The labels of all four sets."""
        return (*self.flip, *self.keep, *self.add, *self.remove)


@dataclass(frozen=True)
class Categories:
    """The categories of L labels, such as those of a tagger: `0` general, `4` character.

    Attributes:
        of: the category of each label, (L,); empty if the labels have no categories.
        names: names of categories, by category, as far as they are known.
    """

    of: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> list[int]:
        """Return the numbers of the labels of a category, given by itself or by its name.

        Raises:
            LabelError: if the labels have no such category.
        """
        wanted = name.casefold()
        members = [
            number
            for number, category in enumerate(self.of)
            if wanted in (category.casefold(), self.names.get(category, category).casefold())
        ]
        if not members:
            known = ", ".join(self.describe()) or "none: the labels have no categories"
            raise LabelError(f"unknown category {name!r}: expected {known:.400}")
        return members

    def describe(self) -> dict[str, int]:
        """Return how many labels each category has, by category and, where known, its name: `0 (general)`."""
        shown = {one: f"{one} ({self.names[one]})" if self.names.get(one, one) != one else one for one in set(self.of)}
        return {shown[one]: count for one, count in sorted(Counter(self.of).items())}


def join_categories(labels: Sequence[str], parts: Iterable[tuple[Sequence[str], Categories]]) -> Categories:
    """Return the categories of labels of several classifiers; each label has that of the first that has the label.

    Args:
        labels: the L names.
        parts: for each classifier, its labels and their categories.
    """
    of: dict[str, str] = {}
    names: dict[str, str] = {}
    for own, categories in parts:
        if categories.of:
            of = dict(zip(own, categories.of, strict=True)) | of
            names = {**categories.names, **names}
    return Categories(tuple(of.get(label, "") for label in labels), names) if of else Categories()


def present_labels(probabilities: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    """Return the labels that are present, f_j >= t_j, in the order of `probabilities`."""
    return [label for label, value in probabilities.items() if value >= thresholds[label]]


_SETS = ("flip", "keep", "add", "remove")
_WORDS = {
    "all": "`flip`; `keep` rest keeps all the others", "any": "`flip`", "rest": "`keep`", "present": "`keep`",
}  # fmt: skip
CATEGORY = "category:"  # before the name of a category, in place of a label


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
        LabelError: if no label has this name, or several have it that differ in upper and lower case; the message lists
            those, close matches, or some labels.
    """
    lowered = {label.casefold(): number for number, label in reversed(list(enumerate(labels)))}
    if name in labels:
        return labels.index(name)
    same = [number for number, label in enumerate(labels) if label.casefold() == name.casefold()]
    if len(same) > 1:
        raise LabelError(f"{name!r} is several labels: expected {' or '.join(labels[number] for number in same[:5])}")
    if same:
        return same[0]
    if name.casefold() in _WORDS:
        raise LabelError(f"{name!r} is not a label: expected it only in {_WORDS[name.casefold()]}")
    close = difflib.get_close_matches(name.casefold(), list(lowered), n=3)
    shown = [labels[lowered[match]] for match in close]
    if shown:
        hint = f"did you mean {' or '.join(shown)}?"
    else:
        hint = f"expected one of {', '.join(labels[:25])}{', ...' if len(labels) > 25 else ''}"
    raise LabelError(f"unknown label {name!r}: {hint}")


def find_like(text: str, labels: Sequence[str], among: Sequence[int]) -> list[int]:
    """Return the numbers of the labels that have this text in their names, or else of those with names like it.

    The label of exactly this name comes first, then names that begin with the text; otherwise the order is that of
    `among`. Upper and lower case count as equal.

    Args:
        text: to look for.
        labels: L names.
        among: the numbers of the labels to look at.

    Raises:
        LabelError: if no name is like it.
    """
    wanted = text.casefold()
    names = {number: labels[number].casefold() for number in among}
    found = [number for number, name in names.items() if wanted in name]
    if found:
        return sorted(found, key=lambda number: (names[number] != wanted, not names[number].startswith(wanted)))
    close = difflib.get_close_matches(wanted, list(names.values()), n=10, cutoff=0.6)
    if not close:
        raise LabelError(f"no label is like {text!r}, among {len(names)}")
    return sorted((number for number, name in names.items() if name in close), key=lambda one: close.index(names[one]))


def parse_request(
    labels: Sequence[str],
    *,
    flip: Iterable[str] = (),
    keep: Iterable[str] = (),
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    categories: Categories | None = None,
) -> Request:
    """Turn label names into a `Request`.

    In all four sets, `category:NAME` stands for the labels of a category that are not named elsewhere.

    Args:
        labels: the classifier's L label names.
        flip: names, `all` (every label not named elsewhere) or `any` (non-targeted).
        keep: names, `rest` (every label not named elsewhere) or `present` (those of them that a photo has).
        add: names of labels to be present afterwards.
        remove: names of labels to be absent afterwards.
        categories: of the labels, if they have any.

    Raises:
        LabelError: for an unknown label or category, or a label in two sets.
        UsageError: if no label is to change, or `all`, `any`, `rest` and `present` contradict each other.
    """
    flips, keeps = split_names(flip, labels), split_names(keep, labels)
    any_label, flip_all = _take_word("any", flips, labels), _take_word("all", flips, labels)
    keep_rest, keep_present = _take_word("rest", keeps, labels), _take_word("present", keeps, labels)
    if any_label and (flip_all or flips):
        raise UsageError("expected `flip` any alone, got further labels to flip")
    if flip_all and (keep_rest or keep_present):
        raise UsageError(f"expected `flip` all or `keep` {'rest' if keep_rest else 'present'}, got both")
    sets = {"flip": flips, "keep": keeps, "add": split_names(add, labels), "remove": split_names(remove, labels)}
    chosen, taken = _find_sets(sets, labels, categories or Categories())
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
        **{name: tuple(numbers) for name, numbers in chosen.items()},
        keep_rest=keep_rest,
        any_label=any_label,
        keep_present=keep_present,
    )


def _find_sets(
    sets: Mapping[str, Sequence[str]], labels: Sequence[str], categories: Categories
) -> tuple[dict[str, list[int]], dict[int, str]]:
    """Return the numbers of each set, and the set of each number; a label that is named goes before its category.

    Raises:
        LabelError: for an unknown label or category, or a label in two sets.
    """
    known = {label: number for number, label in reversed(list(enumerate(labels)))}
    chosen: dict[str, dict[int, None]] = {option: {} for option in sets}  # in the order given
    taken: dict[int, str] = {}
    groups: list[tuple[str, str]] = []
    for option, names in sets.items():
        for name in names:
            if name not in known and name.casefold().startswith(CATEGORY):
                groups.append((option, name[len(CATEGORY) :]))
                continue
            number = known[name] if name in known else find_label(name, labels)
            _take(number, option, taken, labels)
            chosen[option][number] = None
    named = frozenset(taken)
    for option, group in groups:
        for number in categories.find(group):
            if number not in named:
                _take(number, option, taken, labels)
                chosen[option][number] = None
    return {option: list(numbers) for option, numbers in chosen.items()}, taken


def _take(number: int, option: str, taken: dict[int, str], labels: Sequence[str]) -> None:
    """Note that a label is in this set.

    Raises:
        LabelError: if it is in another set already.
    """
    if taken.setdefault(number, option) != option:
        raise LabelError(
            f"expected a label in one set, got {labels[number]!r} in both `{taken[number]}` and `{option}`"
        )


def _take_word(word: str, names: list[str], labels: Sequence[str]) -> bool:
    """Take a key word out of `names`, unless the classifier has a label of that name."""
    if word in (label.casefold() for label in labels):
        return False
    found = [name for name in names if name.casefold() == word]
    for name in found:
        names.remove(name)
    return bool(found)
