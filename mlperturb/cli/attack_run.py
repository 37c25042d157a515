"""One run of `attack`: its journal, its progress bar, its report, and what it prints at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mlperturb import __version__
from mlperturb.attacks.methods import DEFAULT_METHOD
from mlperturb.cli.attack import JOURNAL
from mlperturb.cli.console import make_bar, print_error, print_note
from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import Source
from mlperturb.errors import StorageError
from mlperturb.files import is_remote, remove_temporary, writing
from mlperturb.interrupts import Interrupts
from mlperturb.jobs import Job, Settings
from mlperturb.journal import Journal
from mlperturb.report import Record, Summary, report_lines
from mlperturb.resume import Ledger, size_of
from mlperturb.runner import run_attack
from mlperturb.sharing import Share
from mlperturb.text import printable

if TYPE_CHECKING:
    from mlperturb.preprocess import Size

_SHOWN = 3  # photos at most, of a run that shows each of them
_LINES = 20  # notes, and errors, at most


@dataclass
class AttackRun:
    """One run, or one process's part of it."""

    source: Source
    settings: Settings
    jobs: list[Job]
    out: Path
    report: Path
    described: dict[str, Any]
    device: str
    share: Share
    html: bool
    json: bool
    quiet: bool
    silent: bool = False  # nothing on stdout
    summary: Summary = field(default_factory=Summary)  # of this process's photos
    lock: Lock = field(default_factory=Lock)  # of the summary: photos that are done already are found in threads

    def go(self, photos: str, existing: frozenset[str]) -> int:
        """Attack, report, print; return the exit code.

        Args:
            photos: a fingerprint of the jobs.
            existing: names of outputs that are there already.
        """
        started = time.perf_counter()
        classifier, description = self.source.load(self.device)
        key, share = self._key(description["sha256"]), self.share
        with Interrupts() as interrupts, Journal(self.out / JOURNAL, key, rank=share.rank, size=share.size) as journal:
            if journal.torn:
                self._note(f"the last line of {journal.path} was cut short, and is dropped")
            self.ledger = Ledger(journal, self.jobs, self.out)
            if share.first:
                self.ledger.begin(photos, existing)
            if share.size == 1:
                remove_temporary(self.out)
            if len(self.ledger) and share.first:
                self._note(
                    f"going on: {len(self.ledger)} of {len(self.jobs)} photos are in the journal; "
                    "what changed since is attacked again"
                )
            stopped: int | None = None
            self.bar = make_bar(quiet=self.quiet or not share.first)
            self.task = self.bar.add_task("loading", total=len(self.jobs))
            with self.bar:
                try:
                    run_attack(
                        classifier, self.jobs, self.out, self.settings, self._done, finished=self._finished,
                        claims=lambda count: share.claims("attack", count), hold=interrupts.hold, warn=self._note,
                    )  # fmt: skip
                    share.gather(warn=self._note)
                except KeyboardInterrupt:
                    stopped = 130
                except StorageError as error:
                    print_error(str(error))
                    stopped = 3
            if stopped is not None:
                with suppress(StorageError):
                    share.gather(patience=5)  # what the others have in hand is to be in the report
            if not share.first:
                return stopped or 0
            if stopped is not None and share.launched:  # it may be started again: one result on stdout is enough
                self.json, self.silent = False, True
            seconds = time.perf_counter() - started
            if stopped == 3:
                with suppress(StorageError):  # it has been told already
                    self._finish(description, seconds)
                return stopped
            code = self._finish(description, seconds)
        if stopped == 130:
            self._note(
                f"interrupted: {len(self.ledger)} of {len(self.jobs)} photos are done and reported; "
                "the same command goes on"
            )
        return code if stopped is None else stopped

    def _key(self, checkpoint: str) -> dict[str, Any]:
        """Return everything that decides what the results are, but for the photos themselves."""
        key = {"version": __version__, "checkpoint": checkpoint, **self.described}
        region = self.settings.region
        if region is not None and region.mask is not None:
            key["region"] = sha256(region.mask.tobytes()).hexdigest()
        return {**key, "device": self.device.partition(":")[0]}

    def _note(self, message: str) -> None:
        if not self.quiet:
            print_note(message)

    def _finished(self, job: Job) -> Size | None:
        record = self.ledger.finished(job)
        if record is None:
            return None
        self._count([record])
        return size_of(record)

    def _done(self, records: list[Record]) -> None:
        self.ledger.write(records)
        self._count(records)

    def _count(self, records: list[Record]) -> None:
        """Move the bar on, by what all processes have done."""
        done = self.share.count("done", len(records))
        with self.lock:
            for record in records:
                self.summary.add(record)
            rate, rmsd = self.summary.success_rate, self.summary.mean_rmsd
            text = f"success {rate:.0%}" if rate is not None else "success -"
            text += f", mean RMSD {rmsd:.2f}" if rmsd is not None else ""
            self.bar.update(self.task, completed=done, description=text)

    def _finish(self, description: dict[str, Any], seconds: float) -> int:
        """Write the report from the journals of all processes, and print; return the exit code."""
        self.ledger.reload()
        if self.report.parent == self.out:
            out = "."
        elif is_remote(self.out) or is_remote(self.report):
            out = str(self.out)
        else:
            out = os.path.relpath(self.out, self.report.parent)
        settings = {**self.described, "cwd": str(Path.cwd()), "out": out}
        told = _Told(self.settings)
        with writing(self.report) as stream:
            for part in report_lines(settings, description, told.listen(self.ledger.records(self.jobs)), seconds):
                stream.write(part.encode())
        if self.html:
            from mlperturb.gallery import write_gallery
            from mlperturb.report import read_report

            write_gallery(read_report(self.report)[0], self.out, self.out / "index.html")
        if self.json:
            for part in report_lines(settings, description, self.ledger.records(self.jobs), seconds):
                print(part, end="")
            print()
        elif not self.quiet and not self.silent:
            self._print_tables(told, seconds)
        told.errors.print(print_error)
        code = self.share.exit_code(told.summary.exit_code)
        if code != told.summary.exit_code:
            self._note("the exit code is 0 all the same: torchrun would start the processes again")
        return code

    def _print_tables(self, told: _Told, seconds: float) -> None:
        from mlperturb.tables import image_line, image_table, summary_table

        if len(told.first) <= _SHOWN:
            for record in told.first:
                stdout.print(image_line(record), soft_wrap=True)
                if record.probabilities:
                    stdout.print(image_table(record))
        else:
            stdout.print(summary_table(told.summary.to_dict(seconds)))
        told.notes.print(print_note)
        page = f", page {printable(str(self.out / 'index.html'))}" if self.html else ""
        stdout.print(f"files in {printable(str(self.out))}, report {printable(str(self.report))}{page}", soft_wrap=True)


@dataclass
class _Lines:
    """The first lines of many, and how many there are."""

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
class _Told:
    """What there is to say of records that go by: as much of it as is printed."""

    settings: Settings
    summary: Summary = field(default_factory=Summary)
    first: list[Record] = field(default_factory=list)
    notes: _Lines = field(default_factory=_Lines)
    errors: _Lines = field(default_factory=_Lines)

    def listen(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass records on."""
        for record in records:
            self.summary.add(record)
            if len(self.first) <= _SHOWN:
                self.first.append(record)
            for note in record.notes:
                self.notes.add(f"{record.source}: {note}")
            if record.error:
                self.errors.add(record.error["message"])
            elif record.status != "success":
                self.notes.add(f"{record.source}: {advice(record, self.settings)}")
            yield record


def advice(record: Record, settings: Settings) -> str:
    """Say in a line what fell short, and what may help."""
    constraints = record.constraints or {"held": 0, "total": 0, "violated": []}
    missing = constraints["total"] - constraints["held"]
    lost = [
        f"{name} ({', '.join(one['violated'][:3])})" for name, one in (record.survival or {}).items() if one["violated"]
    ]
    if lost and not missing:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        hint = "more --passes" if settings.passes else "--budget paper"
        return f"the PNG holds, but not after {', '.join(lost[:3])}{more}; try {hint} or fewer qualities"
    if record.ranking and record.ranking["satisfied"]:
        return (
            f"the ranking holds, but {missing} of {constraints['total']} decisions do not "
            "(ranking attacks do not see thresholds); try --between threshold"
        )
    both = (("--max-rmsd", settings.max_rmsd), ("--max-linf", settings.max_linf))
    hints, caps = [], [option for option, value in both if value is not None]
    if settings.method in ("fgs", "fg", "ml-dp"):
        hints.append(f"--method {DEFAULT_METHOD}")
    if settings.passes is not None:
        hints.append("more --passes")
    elif caps:
        hints += [f"a larger {option}" for option in caps]
    elif settings.budget != "paper":
        hints.append("--budget " + ("balanced" if settings.budget == "fast" else "paper"))
    written = "" if record.files["adversarial"] else ", and no label flipped: no file written"
    return (
        f"{missing} of {constraints['total']} constraints do not hold "
        f"({', '.join(constraints['violated'][:5])}){written}" + (f"; try {' or '.join(hints)}" if hints else "")
    )
