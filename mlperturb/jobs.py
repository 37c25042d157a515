"""What to do, and to which photos: the settings of a run, and the names of its outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlperturb.attacks.methods import find_method
from mlperturb.errors import UsageError
from mlperturb.labels import Request
from mlperturb.purify import Purification
from mlperturb.regions import Region

MIN_PASSES = 10
_LONGEST = 230  # bytes of a photo's name that its outputs' names take over; file systems allow 255 in all


@dataclass(frozen=True)
class Settings:
    """What to do with every photo.

    Attributes:
        method: a name of `attacks.METHODS`.
        budget: a name of `attacks.BUDGETS`.
        request: the labels to flip, keep, add and remove.
        passes: the most forward and backward passes, together, that a photo may cost; None for no cap.
        batch_size: photos at a time; None to choose by device and photo size.
        margin: by how much a logit must clear its threshold during the search, see `Targets`.
        max_rmsd: the largest RMSD allowed, on the 0-255 scale, of the float result and of the PNG; None for no cap.
        max_linf: by how many grey levels a pixel may change, in the float result and the PNG; None for no bound.
        survive: compressions that the result is to survive: those the attack sees, and those it is checked at.
        region: the part of each photo that may change; None for all of it.
        keep_failed: write the files of a photo even where no label of A flipped.
        options: of the method, see `attacks.CHOICES`.
    """

    method: str
    budget: str
    request: Request
    passes: int | None = None
    batch_size: int | None = None
    margin: float = 0.01
    max_rmsd: float | None = None
    max_linf: int | None = None
    survive: tuple[tuple[Purification, ...], tuple[Purification, ...]] = ((), ())
    region: Region | None = None
    keep_failed: bool = False
    options: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        find_method(self.method).tuning(self.budget, **self.options)
        if self.passes is not None and self.passes < MIN_PASSES:
            raise UsageError(f"expected --passes of at least {MIN_PASSES}, got {self.passes}")
        if self.passes is not None and self.passes < 5 * (1 + len(self.survive[0])) + len(self.survive[1]):
            raise UsageError(
                f"expected more --passes than {self.passes}: each quality to survive takes some of its own"
            )
        if self.max_rmsd is not None and not 0 < self.max_rmsd < float("inf"):
            raise UsageError(f"expected --max-rmsd above 0, got {self.max_rmsd}")
        if self.max_linf is not None and not 1 <= self.max_linf <= 255:
            raise UsageError(f"expected --max-linf from 1 to 255 grey levels, got {self.max_linf}")


@dataclass(frozen=True)
class Job:
    """A photo, the names of its two output files in the output folder, and a request of its own if it has one."""

    source: Path
    adversarial: str
    map: str
    request: Request | None = None


def plan_outputs(sources: Sequence[Path]) -> list[Job]:
    """Name the outputs: `NAME.adv.png` and `NAME.map.png`, numbered where two photos have one name.

    Names that differ in case alone count as one: some file systems cannot tell them apart. A name too long to take our
    endings is cut.
    """
    taken: set[str] = set()
    jobs = []
    for source in sources:
        stem = source.stem
        if len(os.fsencode(stem)) > _LONGEST:
            stem = os.fsencode(stem)[:_LONGEST].decode("utf-8", "ignore") or "photo"
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        jobs.append(Job(source, f"{name}.adv.png", f"{name}.map.png"))
    return jobs
