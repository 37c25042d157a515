"""Several checkpoints named on the command line, for files that must fool all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.cli.options import CHECKPOINT_HELP, CLASSIFIER, HERE
from mlperturb.cli.source import Source, find_source, takes_names
from mlperturb.errors import UsageError
from mlperturb.labels import Categories, join_categories
from mlperturb.model.hub import fetch, is_hub

if TYPE_CHECKING:
    from mlperturb.model.ensemble import Victim

Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(
        "--checkpoint",
        **HERE,
        **CLASSIFIER,
        help=f"{CHECKPOINT_HELP} Repeatable: then a file must fool all of them.",
    ),
]


@dataclass(frozen=True)
class Sources:
    """Several checkpoints, by name; their labels are known before torch is loaded.

    Attributes:
        parts: the checkpoints.
        chosen: readers that the user names for all checkpoints; empty for the own readers of each checkpoint.
    """

    parts: dict[str, Source]
    chosen: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label, in the order of the checkpoints."""
        return tuple(dict.fromkeys(label for one in self.parts.values() for label in one.labels))

    @property
    def readers(self) -> tuple[str, ...]:
        """Every reader that a checkpoint names, in the order of the checkpoints."""
        return tuple(dict.fromkeys(reader for one in self.parts.values() for reader in one.readers))

    @property
    def categories(self) -> Categories:
        """The categories of the labels, those of the first checkpoint that has each."""
        return join_categories(self.labels, [(one.labels, one.categories) for one in self.parts.values()])

    @property
    def notes(self) -> tuple[str, ...]:
        """What is assumed for want of a record, a line each."""
        return tuple(note for one in self.parts.values() for note in one.notes)

    @property
    def origin(self) -> dict[str, Any]:
        """What a report's settings say of the checkpoints: the commits of the hub, by name."""
        commits = {name: one.fetched.commit for name, one in self.parts.items() if one.fetched is not None}
        return {"commit": commits} if commits else {}

    def load(self, device: str) -> tuple[Victim, dict[str, Any]]:
        """Load the classifiers; return them with their description for a report."""
        from mlperturb.model.ensemble import Ensemble

        loaded = {name: one.load(device) for name, one in self.parts.items()}
        ensemble = Ensemble({name: classifier for name, (classifier, _) in loaded.items()}, self.chosen)
        members = [
            {"name": name, **described, "readers": list(readers)}
            for (name, (_, described)), readers in zip(loaded.items(), ensemble.readers, strict=True)
        ]
        return ensemble, {
            "checkpoint": ", ".join(one["checkpoint"] for one in members),
            "sha256": sha256(" ".join(one["sha256"] for one in members).encode()).hexdigest(),
            "architecture": ", ".join(one["architecture"] for one in members),
            "labels": list(ensemble.labels),
            "thresholds": list(ensemble.thresholds),
            "preprocess": {one["name"]: one["preprocess"] for one in members},
            "members": members,
        }


def find_sources(
    checkpoints: Sequence[Path] | None,
    arch: str | None,
    labels: str | None,
    thresholds: str | None = None,
    preprocess: Path | None = None,
    activation: str | None = None,
    prompt: Sequence[str] | None = None,
    *,
    readers: Sequence[str] = (),
) -> Source | Sources:
    """Find a checkpoint, the bundled one by default, or several.

    Raises:
        CheckpointError: if a file is missing or is not a checkpoint.
        UsageError: if the same file is named twice, or options that describe one file are given for several.
    """
    given = list(checkpoints or ())
    if len(given) < 2:
        return find_source(given[0] if given else None, arch, labels, thresholds, preprocess, activation, prompt)
    words = {"--arch": arch, "--thresholds": thresholds, "--preprocess": preprocess}
    words |= {"--activation": activation}
    said = next((option for option, value in words.items() if value is not None), None)
    if said is not None:
        raise UsageError(f"expected several --checkpoint without {said}: each must describe itself")
    return Sources(name_sources(find_each(given, labels, prompt)), tuple(readers))


def find_each(checkpoints: Sequence[Path], labels: str | None, prompt: Sequence[str] | None) -> list[Source]:
    """Find several checkpoints; label names and prompts are for those of images and texts alone.

    Raises:
        CheckpointError: if a file is missing or is not a checkpoint.
        UsageError: if there are names or prompts, and no checkpoint takes any.
    """
    if labels is None and not prompt:
        return [find_source(path) for path in checkpoints]
    takers = [takes_names(fetch(str(path)).folder if is_hub(path) else path) for path in checkpoints]
    if not any(takers):
        said = "--labels" if labels is not None else "--prompt"
        raise UsageError(f"expected several --checkpoint without {said}: each must describe itself")
    return [
        find_source(path, labels=labels if takes else None, prompt=prompt if takes else None)
        for path, takes in zip(checkpoints, takers, strict=True)
    ]


def name_sources(sources: Sequence[Source]) -> dict[str, Source]:
    """Return checkpoints by a name each: that of its file or folder, with a number where two have the same.

    Raises:
        UsageError: if a checkpoint is named twice.
    """
    named: dict[str, Source] = {}
    places: set[Path] = set()
    for source in sources:
        place = source.path.resolve()
        if place in places:
            raise UsageError(f"expected different checkpoints, got {source.path} twice")
        places.add(place)
        stem = place.name if place.is_dir() else place.stem
        name, number = stem, 1
        while name in named:
            number += 1
            name = f"{stem}-{number}"
        named[name] = source
    return named
