"""The lines that `attack` prints about its records: notes, errors, and advice for photos that fell short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mlperturb.attacks.methods import DEFAULT_METHOD
from mlperturb.cli.console import print_error, print_note
from mlperturb.run.record import NOT_FINITE, Record, Summary
from mlperturb.run.settings import Settings
from mlperturb.system.text import counted, listed

SHOWN = 3  # a run of at most this many photos shows each photo
VISIBLE = 8.0  # RMSD in grey levels, about 30 dB of PSNR, above which the change of a photo is plain to see
_LINES = 20  # at most this many notes, and as many errors


@dataclass
class _Lines:
    """The first lines, and the number of all lines."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= _LINES:
            self.first.append(line)

    def print(self, show: Callable[[str], None]) -> None:
        for line in self.first:
            show(line)
        if self.count > _LINES:
            print_note(f"and {self.count - _LINES} more like these: see the report")


@dataclass
class Told:
    """The lines to print about the records of a run, gathered while the records are passed on."""

    settings: Settings
    summary: Summary = field(default_factory=Summary)
    first: list[Record] = field(default_factory=list)
    notes: _Lines = field(default_factory=_Lines)
    errors: _Lines = field(default_factory=_Lines)
    visible: list[tuple[float, str]] = field(default_factory=list)  # RMSD and photo, where the change is plain to see
    unclear: list[str] = field(default_factory=list)  # photos on which the network's outputs are not finite

    def listen(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass records on, and gather their lines."""
        for record in records:
            self.summary.add(record)
            if len(self.first) <= SHOWN:
                self.first.append(record)
            for note in record.notes:
                self.notes.add(f"{record.source}: {note}")
            if record.error == NOT_FINITE:
                self.unclear.append(record.source)
            elif record.error:
                self.errors.add(record.error.message)
            elif record.status not in ("success", "unchanged"):
                self.notes.add(f"{record.source}: {advice(record, self.settings)}")
            if record.distortion is not None and record.distortion.rmsd > VISIBLE:
                self.visible.append((record.distortion.rmsd, record.source))
            yield record

    def print_notes(self) -> None:
        """Print the notes on the photos; last, whether changes are plain to see."""
        self.notes.print(print_note)
        if self.visible:
            rmsd, source = max(self.visible)
            many = len(self.visible) > 1
            which = f"{len(self.visible)} photos are changed" if many else f"{source} is changed"
            size = f"by up to {rmsd:.1f} grey levels" if many else f"by {rmsd:.1f} grey levels"
            other = "" if self.settings.method == DEFAULT_METHOD else f" or --method {DEFAULT_METHOD}"
            print_note(
                f"{which} plainly: {size} (RMSD), and above {VISIBLE:.0f} anybody sees it; "
                f"try --max-rmsd {VISIBLE:.0f}{other}"
            )

    def print_errors(self) -> None:
        """Print the errors; an error of the network itself once, not once for each photo."""
        self.errors.print(print_error)
        if self.unclear:
            print_error(describe_unclear(self.unclear))


def describe_unclear(sources: Sequence[str]) -> str:
    """Return a line on the photos on which the network's outputs are not finite."""
    if len(sources) == 1:
        return f"{sources[0]}: {NOT_FINITE.message}"
    return f"{NOT_FINITE.message} on {len(sources)} photos, such as {sources[0]}"


def advice(record: Record, settings: Settings) -> str:
    """Return a line that says which constraints do not hold, and which options may help."""
    constraints = record.constraints or {"held": 0, "total": 0, "violated": []}
    missing = constraints["total"] - constraints["held"]
    lost = [
        f"{name} ({listed(one['violated'], 3)})" for name, one in (record.survival or {}).items() if one["violated"]
    ]
    spared = [name for name, one in (record.classifiers or {}).items() if one["violated"]]
    if 0 < len(spared) < len(record.classifiers or {}):
        hint = "more --passes" if settings.limits.passes else "--budget paper"
        return f"the file fools some classifiers, but not {', '.join(spared)}; try {hint}"
    elsewhere = [name for name, reader in (record.readers or {}).items() if reader["violated"]]
    if 0 < len(elsewhere) < len(record.readers or {}):
        hint = "more --passes" if settings.limits.passes else "--margin 0.3"
        return f"the file holds in some readers, but not in {', '.join(elsewhere)}; try {hint}"
    if lost and not missing:
        more = f" and {counted(len(lost) - 3, 'more compression')}" if len(lost) > 3 else ""
        hint = "more --passes" if settings.limits.passes else "--budget paper"
        return f"the PNG holds, but not after {', '.join(lost[:3])}{more}; try {hint} or fewer qualities"
    verb = "does" if missing == 1 else "do"
    if record.ranking and record.ranking["satisfied"]:
        return (
            f"the ranking holds, but {missing} of {counted(constraints['total'], 'decision')} {verb} not "
            "(ranking attacks do not see thresholds); try --between threshold"
        )
    both = (("--max-rmsd", settings.limits.rmsd), ("--max-linf", settings.limits.linf))
    hints, caps = [], [option for option, value in both if value is not None]
    if settings.method in ("fgs", "fg", "ml-dp"):
        hints.append(f"--method {DEFAULT_METHOD}")
    if settings.limits.passes is not None:
        hints.append("more --passes")
    elif caps:
        hints += [f"a larger {option}" for option in caps]
    elif settings.budget != "paper":
        hints.append("--budget " + ("balanced" if settings.budget == "fast" else "paper"))
    written = "" if record.files["adversarial"] else ", and no label flipped: no file written"
    count = f"{missing} of {constraints['total']} constraints" if constraints["total"] > 1 else "the constraint"
    return f"{count} {verb} not hold ({listed(constraints['violated'], 5)}){written}" + (
        f"; try {' or '.join(hints)}" if hints else ""
    )
