"""The photos of a run, and the names of their outputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlperturb.labels import Request

_LONGEST = 230  # bytes of a photo's name that the names of its outputs keep; file systems allow 255


@dataclass(frozen=True)
class Job:
    """A photo, the names of its two output files in the output folder, and its own request.

    `request` is None for a photo with the request of the settings.
    """

    source: Path
    adversarial: str
    map: str
    request: Request | None = None


def plan_outputs(sources: Sequence[Path]) -> list[Job]:
    """Name the outputs: `NAME.adv.png` and `NAME.map.png`, numbered where photos share a name.

    Names that differ only in upper and lower case count as the same name: some file systems cannot tell them apart.
    A name that is too long for our endings is cut.
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
