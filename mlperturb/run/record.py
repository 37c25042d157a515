"""The record of one attacked photo, and the summary of many records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from heapq import nlargest
from typing import Any, Literal, get_args

from mlperturb.metrics import Distortion

MANY = 200  # labels up to which a report says all about each
REST = "rest"  # as the keep of a record: every label that is not to flip
_TELLING = 50

Status = Literal["success", "unchanged", "partial", "failed", "unreadable"]


@dataclass(frozen=True)
class Failure:
    """The reason why a photo has no result, in the form of the JSON.

    Attributes:
        type: the name of the error's class, or of the kind of failure.
        message: a text of one line.
    """

    type: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return an error in the form of the JSON."""
        return cls(type(error).__name__, str(error))


NOT_FINITE = Failure("NumericalError", "the network's outputs are not finite")


@dataclass(frozen=True)
class Record:
    """One image of a report, in the form of the JSON; see `schemas/report-2.json`.

    Attributes:
        source: the photo's path, as given.
        sha256: the SHA-256 of the photo's file.
        width: of the upright photo, in pixels.
        height: of the upright photo, in pixels.
        status: `success` if every constraint holds on the PNG as read back, in every reader and after the compressions
            to survive, `unchanged` if the photo was as asked already and no pixel was changed, `partial` if some label
            of A flipped, `failed` if no label of A flipped (no file is written), `unreadable` if the photo could not
            be decoded.
        truth: y, the classifier's decisions on the photo.
        flip: the labels of A.
        keep: the labels of B; in a report on many labels `rest`, see `condense`.
        probabilities: `before` of the photo, `float` of the attack's float result, `after` of the PNG as read back.
        constraints: `held`, `total` and the labels `violated`.
        distortion: of the PNG, on the 0-255 scale.
        distortion_float: of the attack's float result.
        success_float: whether every constraint holds on the float result.
        readers: for each reader, the constraints `held`, `total` and `violated`, and the probabilities `before` and
            `after`; None without a file.
        classifiers: for each of several classifiers, its own `truth`, `flip` and `keep`, the constraints `held`,
            `total` and `violated` in all of its readers, the probabilities `before` and `after`, and its `readers`; the
            labels above are then those of all, each as the first classifier that has it sees it. None for one
            classifier, or without a file.
        survival: for each compression that the attack was to survive, the constraints `held`, `total` and `violated`;
            None without such compressions.
        ranking: for a ranking attack, whether its constraints hold on the PNG, and Kendall's tau_b.
        cost: `forward` and `backward` passes, and `seconds`.
        files: names relative to the output folder.
        hashes: the SHA-256 of each of these files; in the journal they stand beside the records.
        notes: changes made to the photo on reading, such as a rotation.
        error: why the photo could not be read, attacked or written; None without an error.
    """

    source: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    status: Status = "unreadable"
    truth: dict[str, bool] | None = None
    flip: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    probabilities: dict[str, dict[str, float] | None] | None = None
    constraints: dict[str, Any] | None = None
    distortion: Distortion | None = None
    distortion_float: Distortion | None = None
    success_float: bool | None = None
    readers: dict[str, dict[str, Any]] | None = None
    classifiers: dict[str, dict[str, Any]] | None = None
    survival: dict[str, dict[str, Any]] | None = None
    ranking: dict[str, Any] | None = None
    cost: dict[str, float] = field(default_factory=lambda: {"forward": 0, "backward": 0, "seconds": 0.0})
    files: dict[str, str | None] = field(default_factory=lambda: {"adversarial": None, "map": None})
    hashes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: Failure | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """Return the record from which `dataclasses.asdict` made these values.

        Raises:
            KeyError: if a value is missing.
            TypeError: if there is an unknown value, or a value has the wrong type.
        """
        missing = (
            {field.name for field in fields(cls)} - values.keys() - {"hashes", "classifiers"}
        )  # earlier journals have none
        if missing:
            raise KeyError(min(missing))
        kinds: dict[str, type[Distortion] | type[Failure]] = {
            "distortion": Distortion,
            "distortion_float": Distortion,
            "error": Failure,
        }
        made = {name: kind(**values[name]) for name, kind in kinds.items() if values[name] is not None}
        return cls(**{**values, **made})


def condense(record: Record) -> Record:
    """Return a record as a report has it: of more than `MANY` labels, only those that tell something.

    The probabilities are then those of the labels to flip, of violated labels, and of the `_TELLING` that changed most
    and that were most probable before and after; `truth` has these and all that are present, so that a label that it
    lacks is absent; `keep` is `rest` where every label that is not to flip is kept.
    """
    if record.truth is None or len(record.truth) <= MANY:
        return record
    told = _telling(record)
    truth = {label: there for label, there in record.truth.items() if there or label in told}
    everything = len(record.flip) + len(record.keep) == len(record.truth) and REST not in record.truth

    def part(values: dict[str, float] | None) -> dict[str, float] | None:
        return values and {label: value for label, value in values.items() if label in told}

    probabilities = record.probabilities and {when: part(one) for when, one in record.probabilities.items()}
    readers = record.readers and {
        name: {**reader, "before": part(reader["before"]), "after": part(reader["after"])}
        for name, reader in record.readers.items()
    }
    classifiers = record.classifiers and {name: _condense_part(one, told) for name, one in record.classifiers.items()}
    return replace(
        record,
        truth=truth,
        probabilities=probabilities,
        readers=readers,
        classifiers=classifiers,
        keep=[REST] if everything else record.keep,
    )


def _condense_part(one: dict[str, Any], told: set[str]) -> dict[str, Any]:
    """Return one of several classifiers of a record as a report on many labels has it, see `condense`."""

    def part(values: dict[str, float]) -> dict[str, float]:
        return {label: value for label, value in values.items() if label in told}

    everything = len(one["flip"]) + len(one["keep"]) == len(one["truth"]) and REST not in one["truth"]
    readers = {
        name: {**reader, "before": part(reader["before"]), "after": part(reader["after"])}
        for name, reader in one["readers"].items()
    }
    return {
        **one,
        "truth": {label: there for label, there in one["truth"].items() if there or label in told},
        "keep": [REST] if everything else one["keep"],
        "before": part(one["before"]),
        "after": part(one["after"]),
        "readers": readers,
    }


def _telling(record: Record) -> set[str]:
    """Return the labels of which a report says the probabilities."""
    told = set(record.flip)
    for held in (record.constraints, *(record.readers or {}).values(), *(record.survival or {}).values()):
        told.update(held["violated"] if held else ())
    probabilities = record.probabilities or {}
    before, after = probabilities.get("before") or {}, probabilities.get("after") or {}
    for values in (before, after, {label: abs(value - before.get(label, value)) for label, value in after.items()}):
        told.update(nlargest(_TELLING, values, key=values.__getitem__))
    return told


def kept_labels(image: dict[str, Any], labels: Sequence[str]) -> list[str]:
    """Return the labels of B of a report's image, for a classifier with these labels, see `condense`."""
    if image["keep"] != [REST] or REST in labels:
        return list(image["keep"])
    flipped = set(image["flip"])
    return [label for label in labels if label not in flipped]


@dataclass
class Summary:
    """Counts of statuses and costs, and the RMSD of the successes, gathered from records one at a time.

    Photos that were as asked already count in neither the success rate nor the means of RMSD and passes.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Status), 0))
    errors: int = 0
    sizes: list[float] = field(default_factory=list)
    readers: dict[str, int] = field(default_factory=dict)  # photos whose constraints all hold, by reader
    forward: int = 0
    backward: int = 0
    spent: list[int] = field(default_factory=lambda: [0, 0])  # forward and backward passes for the attacked photos

    def add(self, record: Record) -> None:
        """Count a record."""
        self.counts[record.status] += 1
        self.errors += record.error is not None
        self.forward += int(record.cost["forward"])
        self.backward += int(record.cost["backward"])
        if record.status not in ("unreadable", "unchanged"):
            self.spent[0] += int(record.cost["forward"])
            self.spent[1] += int(record.cost["backward"])
        for name, reader in (record.readers or {}).items():
            holds = record.status != "unchanged" and not reader["violated"]
            self.readers[name] = self.readers.get(name, 0) + holds
        if record.status == "success" and record.distortion is not None:
            self.sizes.append(record.distortion.rmsd)

    @property
    def attacked(self) -> int:
        """How many photos were attacked: they could be read, and were not as asked already."""
        return sum(self.counts.values()) - self.counts["unreadable"] - self.counts["unchanged"]

    @property
    def success_rate(self) -> float | None:
        """The successes as a share, in [0, 1], of the attacked photos; None without such photos."""
        return self.counts["success"] / self.attacked if self.attacked else None

    @property
    def mean_rmsd(self) -> float | None:
        """The mean RMSD of the successes, on the 0-255 scale; None without a success."""
        return statistics.fmean(self.sizes) if self.sizes else None

    @property
    def mean_passes(self) -> tuple[float, float] | None:
        """The mean forward and backward passes of the attacked photos; None without such photos."""
        return (self.spent[0] / self.attacked, self.spent[1] / self.attacked) if self.attacked else None

    @property
    def exit_code(self) -> int:
        """0 if every image was processed, 1 if an image could not be read, classified or written."""
        return int(self.errors > 0)

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """Return the `summary` of a report."""
        passes = self.mean_passes
        return {
            "images": sum(self.counts.values()),
            **self.counts,
            "success_rate": self.success_rate,
            "rmsd": {"mean": self.mean_rmsd, "median": statistics.median(self.sizes) if self.sizes else None},
            "forward": self.forward,
            "backward": self.backward,
            "passes": None if passes is None else {"forward": passes[0], "backward": passes[1]},
            "seconds": round(seconds, 3),
            "readers": {name: count / self.attacked if self.attacked else None for name, count in self.readers.items()},
        }
