"""The settings of a run: they are checked, and described as a report has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

from mlperturb.attacks.methods import DEFAULT_METHOD, RANKING, find_method
from mlperturb.errors import UsageError
from mlperturb.labels import Categories, Request, parse_request
from mlperturb.limits import MARGIN, Limits, is_number
from mlperturb.model.readers import DEFAULT_READERS, Reader, parse_readers
from mlperturb.photos.jpeg import load_jpeglib
from mlperturb.photos.kinds import FileFormat, parse_format
from mlperturb.photos.purify import Purification, parse_survival
from mlperturb.photos.regions import Region, parse_region


@dataclass(frozen=True)
class Words:
    """The user's own words, as given and as a report has them.

    Attributes:
        flip: labels to reverse, `all` or `any`; `parse_request` reads these four lists.
        keep: labels whose decisions must stay, `rest` or `present`.
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
    """The settings that hold for every photo.

    Attributes:
        method: a name of `attacks.METHODS`.
        budget: a name of `attacks.BUDGETS`.
        request: the labels to flip, keep, add and remove.
        limits: the limits on passes and distortion.
        batch_size: number of photos in a batch; None to choose it by device and photo size.
        margin: by how much a logit must clear its threshold during the search, see `Targets`.
        survive: compressions that the result is to survive: first the compressions that the attack sees, then the
            compressions at which the PNG is checked.
        readers: readers in which the result must hold; the first reader decides which labels a photo has now.
        region: the part of each photo that may change; None for all of it.
        format: the format of the adversarial photos.
        keep_metadata: whether the files keep the photos' EXIF data, GPS included, XMP and text.
        keep_failed: write the files of a photo even where no label of A flipped.
        options: options of the method, see `attacks.CHOICES`.
        words: the texts from which `request`, `survive` and `region` were read; empty if they were not read.
        networks: how many classifiers a file must fool at once.

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
    format: FileFormat = FileFormat()
    keep_metadata: bool = False
    keep_failed: bool = False
    options: dict[str, str | None] = field(default_factory=dict)
    words: Words = field(default_factory=Words)
    networks: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Limits):
            raise UsageError(
                f"expected `limits` such as Limits(passes=100, rmsd=2.0), got a {type(self.limits).__name__}"
            )
        _check_aim(find_method(self.method).tuning(self.budget, **self.options), self.limits)
        if self.networks > 1 and self.method in RANKING:
            raise UsageError(f"expected a `method` other than {self.method}, which ranks the labels of one classifier")
        seen = self.networks * (1 + len(self.survive[0]))  # passes of a look: the photo, and each compressed photo
        passes, least = self.limits.passes, self.looks + len(self.readers) * seen + 4 * seen
        if passes is not None and passes < least:
            raise UsageError(
                f"expected at least {least} `passes`, got {passes}: each reader and each compression needs its own"
            )
        if not is_number(self.margin) or not 0 <= self.margin < float("inf"):
            raise UsageError(f"expected a `margin` of at least 0, got {self.margin!r:.60}")

    def check_files(self, names: Iterable[str]) -> None:
        """Refuse settings with which JPEGs, if there are any among these names of files, cannot be made.

        Raises:
            UsageError: if there are, and the method does not search among coefficients, or pixels are limited.
        """
        if not any(name.endswith(".jpg") for name in names):
            return
        load_jpeglib()
        method = find_method(self.method)
        if not method.writes_lattice(method.tuning(self.budget, **self.options)):
            raise UsageError(
                f"expected `method` {DEFAULT_METHOD}, with `rounding` inside, for files in `format` jpeg: "
                "other methods search among pixels"
            )
        if self.limits.linf is not None:
            raise UsageError(
                "expected no `linf` for files in `format` jpeg, whose coefficients change by whole steps: limit `rmsd`"
            )

    @property
    def looks(self) -> int:
        """Forward passes of the decision on a file: every classifier, in every reader, of file and compressions."""
        return self.networks * len(self.readers) * (1 + len(self.survive[1]))

    def describe(self, *, seed: int, device: str) -> dict[str, Any]:
        """Return the `settings` of a report.

        Args:
            seed: the seed of all random numbers.
            device: the device of the run.
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
            "format": self.format.name,
            "keep_metadata": self.keep_metadata,
            "readers": [reader.name for reader in self.readers],
            **{name: value for name, value in self.options.items() if value is not None},
        }


def _check_aim(tuning: Mapping[str, Any], limits: Limits) -> None:
    """Refuse settings with which the strongest file cannot be made, and its own options without `aim` strongest.

    Raises:
        UsageError: if there are such settings or options.
    """
    if tuning.get("aim") != "strongest":
        if tuning.get("diversity", "none") != "none":
            raise UsageError("expected `aim` strongest with `diversity`: the least perturbation has nothing to spare")
        return
    if limits.rmsd is None and limits.linf is None:
        raise UsageError("expected `rmsd` or `linf` with `aim` strongest: without a limit no file is the strongest")
    if tuning.get("rounding") != "inside":
        raise UsageError("expected `rounding` inside with `aim` strongest")


def check_seed(seed: object) -> int:
    """Return a seed of random numbers.

    Raises:
        UsageError: if it is not a whole number from 0 to 2**32 - 1.
    """
    if not is_number(seed, Integral) or not 0 <= int(seed) < 2**32:  # type: ignore[call-overload]
        raise UsageError(f"expected a whole number from 0 to 2**32 - 1 for `seed`, got {seed!r:.60}")
    return int(seed)  # type: ignore[call-overload, no-any-return]


def read_settings(
    words: Words,
    labels: Sequence[str],
    *,
    method: str = DEFAULT_METHOD,
    budget: str = "balanced",
    limits: Limits = Limits(),
    batch_size: int | None = None,
    margin: float = MARGIN,
    readers: Sequence[str] = DEFAULT_READERS,
    format: str = "png",
    keep_metadata: bool = False,
    options: dict[str, str | None] | None = None,
    categories: Categories | None = None,
    networks: int = 1,
) -> Settings:
    """Read the settings from the user's words.

    Args:
        words: the user's words.
        labels: the classifier's L label names.
        method: a name of `attacks.METHODS`.
        budget: a name of `attacks.BUDGETS`.
        limits: the limits on passes and distortion; by default no limits.
        batch_size: number of photos in a batch; None to choose it.
        margin: by how much a logit must clear its threshold during the search.
        readers: names of the checkpoint's readers, used if the words name none.
        format: the format of the adversarial photos, see `parse_format`.
        keep_metadata: see `Settings`.
        options: options of the method, see `attacks.CHOICES`.
        categories: of the labels, if they have any.
        networks: how many classifiers a file must fool at once; `labels` are those of all of them.

    Raises:
        LabelError: if a label is unknown, or is named in two sets.
        UsageError: if another setting cannot be read or carried out.
    """
    request = parse_request(
        labels, flip=words.flip, keep=words.keep, add=words.add, remove=words.remove, categories=categories
    )
    return Settings(
        method,
        budget,
        request,
        limits,
        batch_size,
        margin,
        survive=parse_survival(words.survive),
        readers=parse_readers(words.reader or readers),
        region=None if words.region is None else parse_region(words.region),
        format=parse_format(format),
        keep_metadata=keep_metadata,
        options=options or {},
        words=words,
        networks=networks,
    )
