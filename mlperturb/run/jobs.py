"""The photos of a run, and the names of their outputs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from mlperturb.labels import Request
from mlperturb.photos.kinds import FileFormat

_LONGEST = 230  # bytes of a photo's name that the names of its outputs keep; file systems allow 255


@dataclass(frozen=True)
class Job:
    """A photo, the names of its two output files, and its own request.

    Attributes:
        source: the photo.
        adversarial: of the adversarial photo, relative to the output folder, with forward slashes.
        map: of the perturbation's map.
        request: None for a photo with the request of the settings.
    """

    source: Path
    adversarial: str
    map: str
    request: Request | None = None


def plan_outputs(sources: Sequence[Path], roots: Sequence[Path] = (), form: FileFormat = FileFormat()) -> list[Job]:
    """Name the outputs: `NAME.adv.png` and `NAME.map.png`, in the same subfolder as the photo in its root.

    A name does not depend on photos of other folders. Photos of a folder that differ only in the suffix keep the suffix
    in their names (`NAME.jpg.adv.png`); a photo of a later root whose name is taken goes into a folder with the name of
    its root; what is left is numbered. Names that differ only in upper and lower case count as the same name: some
    file systems cannot tell them apart. A name that is too long for our endings is cut.

    Args:
        sources: the photos.
        roots: the folders in which they were found; a photo of no root has no subfolder.
        form: the format of the adversarial photos.
    """
    alike = Counter((str(source.parent), source.stem.casefold()) for source in sources)
    taken: set[str] = set()
    jobs = []
    for source in sources:
        shared = alike[str(source.parent), source.stem.casefold()] > 1
        name = next(name for name in _names(source, roots, shared=shared) if name.casefold() not in taken)
        taken.add(name.casefold())
        jobs.append(Job(source, f"{name}.adv{form.suffix(source)}", f"{name}.map.png"))
    return jobs


def _names(source: Path, roots: Sequence[Path], *, shared: bool) -> Iterator[str]:
    """Yield the names that a photo's outputs may have, the best first."""
    folder, root = _place(source, roots)
    name = _cut(source.name if shared else source.stem)
    yield folder + name
    if root:
        yield f"{root}/{folder}{name}"
    yield from (f"{folder}{name}-{number}" for number in count(2))


def _place(source: Path, roots: Sequence[Path]) -> tuple[str, str]:
    """Return a photo's subfolder in its root, empty or with a slash at the end, and the name of its root."""
    for root in roots:
        if source != root and source.is_relative_to(root):
            parts = source.relative_to(root).parts[:-1]
            if ".." not in parts:
                return "".join(f"{part}/" for part in parts), root.name
    return "", source.parent.name


def _cut(name: str) -> str:
    """Return a name of at most `_LONGEST` bytes."""
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    return os.fsencode(name)[:_LONGEST].decode("utf-8", "ignore") or "photo"
