"""What to do with every photo of a run: the settings, checked, and what a report says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlperturb.attacks.methods import DEFAULT_METHOD, find_method
from mlperturb.errors import UsageError
from mlperturb.labels import Request, parse_request
from mlperturb.limits import MARGIN, Limits
from mlperturb.model.readers import DEFAULT_READERS, Reader, parse_readers
from mlperturb.photos.purify import Purification, parse_survival
from mlperturb.photos.regions import Region, parse_region


@dataclass(frozen=True)
class Words:
    """What a user asks for, as the user writes it, and as a report has it.

    Attributes:
        flip: labels to reverse, `all` or `any`; see `parse_request` for these four.
        keep: labels to leave as they are, or `rest`.
        add: labels to be present.
        remove: labels to be absent.
        survive: compressions that the result is to survive, see `parse_survival`.
        reader: readers that the result is to hold in, see `parse_readers`; empty for those of the checkpoint.
        region: the part of each photo that may change, see `parse_region`.
    """

    flip: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    add: list[str] = field(default_factory=list)
    remove: list[str] = field(default_factory=list)
    survive: list[str] = field(default_factory=list)
    reader: list[str] = field(default_factory=list)
    region: str | None = None


@dataclass(frozen=True)
class Settings:
    """What to do with every photo.

    Attributes:
        method: a name of `attacks.METHODS`.
        budget: a name of `attacks.BUDGETS`.
        request: the labels to flip, keep, add and remove.
        limits: on passes and distortion.
        batch_size: photos at a time; None to choose by device and photo size.
        margin: by how much a logit must clear its threshold during the search, see `Targets`.
        survive: compressions that the result is to survive: those the attack sees, and those it is checked at.
        readers: how the programs read in which the result is to hold; the first reader decides what a photo has now.
        region: the part of each photo that may change; None for all of it.
        keep_failed: write the files of a photo even where no label of A flipped.
        options: of the method, see `attacks.CHOICES`.
        words: what `request`, `survive` and `region` were read from; empty where they were not read.

    Raises:
        UsageError: if the settings cannot be carried out.
    """

    method: str
    budget: str
    request: Request
    limits: Limits = Limits()
    batch_size: int | None = None
    margin: float = MARGIN
    survive: tuple[tuple[Purification, ...], tuple[Purification, ...]] = ((), ())
    readers: tuple[Reader, ...] = parse_readers(DEFAULT_READERS)
    region: Region | None = None
    keep_failed: bool = False
    options: dict[str, str | None] = field(default_factory=dict)
    words: Words = field(default_factory=Words)

    def __post_init__(self) -> None:
        find_method(self.method).tuning(self.budget, **self.options)
        passes, least = self.limits.passes, self.looks + len(self.readers) * (1 + len(self.survive[0])) + 4
        if passes is not None and passes < least:
            raise UsageError(
                f"expected at least {least} `passes`, got {passes}: each reader and each compression takes its own"
            )
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"expected a `margin` of at least 0, got {self.margin}")

    @property
    def looks(self) -> int:
        """Forward passes that the decision on a file takes: every reader, of the file and of each compression."""
        return len(self.readers) * (1 + len(self.survive[1]))

    def describe(self, *, seed: int, device: str) -> dict[str, Any]:
        """Return the `settings` of a report.

        Args:
            seed: of everything random.
            device: that the run takes.
        """
        words = asdict(self.words)
        del words["reader"]
        asked = {name: words.pop(name) for name in ("flip", "keep", "add", "remove")}
        return {
            "method": self.method,
            "budget": self.budget,
            **asked,
            "seed": seed,
            "device": device,
            **self.limits.describe(),
            **words,
            "batch_size": self.batch_size or "auto",
            "margin": self.margin,
            "readers": [reader.name for reader in self.readers],
            **{name: value for name, value in self.options.items() if value is not None},
        }


def read_settings(
    words: Words,
    labels: Sequence[str],
    *,
    method: str = DEFAULT_METHOD,
    budget: str = "balanced",
    limits: Limits | None = None,
    batch_size: int | None = None,
    margin: float = MARGIN,
    readers: Sequence[str] = DEFAULT_READERS,
    options: dict[str, str | None] | None = None,
) -> Settings:
    """Read what a user asks for.

    Args:
        words: what is asked for.
        labels: the classifier's L label names.
        method: a name of `attacks.METHODS`.
        budget: a name of `attacks.BUDGETS`.
        limits: on passes and distortion; None for none.
        batch_size: photos at a time; None to choose.
        margin: by how much a logit must clear its threshold during the search.
        readers: names of the checkpoint's own readers, where the words name none.
        options: of the method, see `attacks.CHOICES`.

    Raises:
        LabelError: for an unknown label, or one that stands in two sets.
        UsageError: if the rest cannot be read or carried out.
    """
    request = parse_request(labels, flip=words.flip, keep=words.keep, add=words.add, remove=words.remove)
    return Settings(
        method,
        budget,
        request,
        limits or Limits(),
        batch_size,
        margin,
        survive=parse_survival(words.survive),
        readers=parse_readers(words.reader or readers),
        region=None if words.region is None else parse_region(words.region),
        options=options or {},
        words=words,
    )
