"""The choices of an evaluation (Section IV-E): cases, methods with options, sample of photos. Without torch."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlperturb.attacks.methods import METHODS, find_method
from mlperturb.errors import UsageError
from mlperturb.labels import Request, find_label, split_names
from mlperturb.limits import MARGIN, Limits
from mlperturb.model.readers import DEFAULT_READERS, Reader, parse_readers
from mlperturb.photos.datasets import Dataset

Kind = Literal["random", "extreme", "reduce", "augment"]


@dataclass(frozen=True)
class Case:
    """Which labels are attacked (docs/methods.md, Cases).

    Attributes:
        name: the name in tables.
        kind: `random`: one positive and one negative label; `extreme`: all labels; `reduce`: one label, on photos with
            it and another label; `augment`: one label, on photos without it.
        label: number of the label to reduce or augment.
    """

    name: str
    kind: Kind
    label: int | None = None

    def eligible(self, truth: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
        """Say which photos have the labels for the case, boolean, (N,), by their annotations, (N, L)."""
        positives: npt.NDArray[np.int64] = (truth > 0).sum(1)
        if self.kind == "reduce":
            return (truth[:, self.label] > 0) & (positives >= 2)
        if self.kind == "augment":
            return truth[:, self.label] < 0
        if self.kind == "random":
            return (positives >= 1) & (truth < 0).any(1)
        return np.ones(len(truth), dtype=np.bool_)

    def request(self, truth: npt.NDArray[np.int8], generator: np.random.Generator) -> Request:
        """Return the request for one photo's annotations, (L,): A, and all other labels as B."""
        if self.kind == "extreme":
            flip = tuple(range(len(truth)))
        elif self.label is not None:
            flip = (self.label,)
        else:
            flip = tuple(int(generator.choice(np.flatnonzero(truth * sign > 0))) for sign in (1, -1))
        return Request(flip=flip, keep=tuple(sorted(set(range(len(truth))) - set(flip))))


@dataclass(frozen=True)
class Variant:
    """A method with its options, such as `ml-dp:solver=pinv`."""

    name: str
    method: str
    options: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """The settings of an evaluation.

    Attributes:
        cases: which labels are attacked.
        variants: the methods.
        images: largest number of photos for a case.
        budget: a name of `attacks.BUDGETS`.
        limits: the limits on passes and distortion, the same for all methods.
        batch_size: number of photos in a batch; None to choose it.
        seed: the seed of the sample of photos and of the Random case's labels.
        keep_images: keep the PNGs and maps, in folders by case and method.
        readers: readers in which a result must hold; the first decides whether the classifier gets a photo right.
        margin: by how much a logit must clear its threshold during the search.
    """

    cases: tuple[Case, ...]
    variants: tuple[Variant, ...]
    images: int = 1000
    budget: str = "balanced"
    limits: Limits = Limits()
    batch_size: int | None = None
    seed: int = 0
    keep_images: bool = False
    readers: tuple[Reader, ...] = parse_readers(DEFAULT_READERS)
    margin: float = MARGIN


def parse_cases(
    names: Iterable[str], reduce: Iterable[str], augment: Iterable[str], labels: Sequence[str]
) -> tuple[Case, ...]:
    """Read case names, and labels to reduce or augment; `person` (reduce) and `sheep` (augment) are the paper's cases.

    Raises:
        UsageError: if a case is unknown, or no case is given.
        LabelError: if a label is unknown.
    """
    cases: list[Case] = []
    for name in split_names(names):
        if name == "random":
            cases.append(Case(name, "random"))
        elif name == "extreme":
            cases.append(Case(name, "extreme"))
        elif name == "person":
            cases.append(Case(name, "reduce", find_label(name, labels)))
        elif name == "sheep":
            cases.append(Case(name, "augment", find_label(name, labels)))
        else:
            raise UsageError(f"unknown case {name!r}: expected random, extreme, person, sheep; or `reduce`, `augment`")
    named: tuple[tuple[Kind, Iterable[str]], ...] = (("reduce", reduce), ("augment", augment))
    for kind, values in named:
        for number in (find_label(name, labels) for name in split_names(values, labels)):
            cases.append(Case(f"{kind} {labels[number]}", kind, number))
    if not cases:
        raise UsageError("expected at least one case")
    return tuple({case.name: case for case in cases}.values())


def parse_variants(values: Iterable[str], budget: str) -> tuple[Variant, ...]:
    """Read method names, with or without options: `all`, `ml-cw`, `ml-dp:solver=pinv`.

    Raises:
        UsageError: if a method, option or value is unknown, or no method is given.
    """
    variants: list[Variant] = []
    for name in split_names(values):
        if name == "all":
            find_method("ml-cw").tuning(budget)
            variants += [Variant(method, method) for method in METHODS]
            continue
        method, *parts = name.split(":")
        pairs = [part.partition("=") for part in parts]
        if not all(equals and value for _, equals, value in pairs):
            raise UsageError(f"expected METHOD:OPTION=VALUE, got {name!r}")
        options: dict[str, str | None] = {option: value for option, _, value in pairs}
        find_method(method).tuning(budget, **options)
        variants.append(Variant(name, method, options))
    if not variants:
        raise UsageError("expected at least one method")
    return tuple({variant.name: variant for variant in variants}.values())


def align(dataset: Dataset, labels: Sequence[str]) -> Dataset:
    """Put a data set's labels in the classifier's order.

    Raises:
        UsageError: if the data set and the classifier have different labels.
    """
    missing = sorted(set(labels) - set(dataset.labels)) + sorted(set(dataset.labels) - set(labels))
    if missing:
        raise UsageError(
            f"expected a data set with the classifier's {len(labels)} labels, got {len(dataset.labels)}: "
            f"{missing[0]!r} is not in both"
        )
    order = [dataset.labels.index(label) for label in labels]
    return Dataset(dataset.paths, tuple(labels), dataset.truth[:, order])


def choose(case: Case, dataset: Dataset, correct: Sequence[int], protocol: Protocol) -> dict[int, Request]:
    """Draw a case's photos from X, the rows of the photos that the classifier gets right; return each row's request.

    The draw depends only on the seed and the case. A smaller sample is the beginning of a larger sample. The result is
    empty if no photo has the labels for the case.
    """
    generator = np.random.default_rng([protocol.seed, zlib.crc32(case.name.encode())])
    rows = np.asarray(correct, dtype=np.int64)
    rows = generator.permutation(rows[case.eligible(dataset.truth[rows])])[: protocol.images]
    return {int(row): case.request(dataset.truth[row], generator) for row in rows}
