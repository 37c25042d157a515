"""One run of `attack`: journal, progress bar, report and printed tables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mlperturb.cli.advice import SHOWN, Told
from mlperturb.cli.console import out as stdout
from mlperturb.cli.longrun import LongRun
from mlperturb.cli.source import Source, classifier_key
from mlperturb.cli.sources import Sources
from mlperturb.errors import StorageError
from mlperturb.run.jobs import Job
from mlperturb.run.ledger import Ledger, Part, broke_off, size_of
from mlperturb.run.outputs import JOURNAL, Anchor, Outputs, subfolders
from mlperturb.run.record import Record, Summary, condense
from mlperturb.run.report import report_lines
from mlperturb.run.runner import run_attack
from mlperturb.run.settings import Settings
from mlperturb.system.files import is_remote, remove_temporary, writing
from mlperturb.system.interrupts import Interrupts
from mlperturb.system.journal import find_journal
from mlperturb.system.text import printable, share_of

if TYPE_CHECKING:
    from mlperturb.model.ensemble import Victim
    from mlperturb.model.preprocess import Size


@dataclass
class AttackRun:
    """One run of `attack`, or the part of it that this process does."""

    long: LongRun
    source: Source | Sources
    settings: Settings
    jobs: list[Job]
    outputs: Outputs
    described: dict[str, Any]
    json: bool
    strict: bool = False  # a photo on which the attack fell short is an error too
    silent: bool = False  # print nothing on stdout
    overwrite: bool = False  # replace what is there, unless it is of this very run, which was stopped
    notes: Sequence[str] = ()  # to print once the classifier is loaded, so that an error of loading it is the only line
    loaded: tuple[Victim, dict[str, Any]] | None = None  # and its description
    summary: Summary = field(default_factory=Summary)  # of the photos of this process
    lock: Lock = field(default_factory=Lock)  # guards the summary: threads count the photos that are done already

    def load(self, device: str) -> None:
        """Load the classifier, unless it is loaded.

        Args:
            device: the device of this process.
        """
        if self.loaded is None:
            self.loaded = self.source.load(device)

    def broke_off(self, device: str, photos: str) -> bool:
        """Say whether this very run, with `overwrite`, was begun before and not finished: then it goes on.

        Args:
            device: the device of this process.
            photos: a fingerprint of the jobs and their batches.
        """
        journal = self.outputs.folder / JOURNAL
        if not find_journal(journal):
            return False
        self.load(device)
        assert self.loaded is not None
        return broke_off(journal, self._key(self.loaded[1]), photos)

    def go(self, device: str, photos: str, existing: frozenset[str]) -> int:
        """Attack, write the report, print; return the exit code.

        Args:
            device: the device of this process.
            photos: a fingerprint of the jobs and their batches.
            existing: names of outputs that exist already.
        """
        started = time.perf_counter()
        self.anchor = Anchor(self.outputs.folder, self.outputs.report.parent)
        with self.long.bar("done", len(self.jobs), "loading the network"):
            self.load(device)
        assert self.loaded is not None
        (classifier, description), long = self.loaded, self.long
        for note in self.notes if long.share.first else ():
            long.note(note)
        with self._ledger(description, photos, existing) as interrupts:
            with long.bar("done", len(self.jobs), "reading photos"), long.stoppable():
                run_attack(
                    classifier, self.jobs, self.outputs.folder, self.settings, self._done, finished=self._finished,
                    claims=lambda count: long.share.claims("attack", count), hold=interrupts.hold, warn=long.note,
                    check=self.anchor.check, watch=long.watch, filled=self.filled,
                )  # fmt: skip
                long.gather()
            if long.stopped is not None:
                long.gather()  # wait for the other processes' last batches, which belong in the report
            if not long.share.first:
                return long.stopped or 0
            if long.stopped is not None and long.share.launched:
                self.json, self.silent = False, True  # torchrun may start it again: only the last start prints a result
            seconds = time.perf_counter() - started
            if long.stopped == 3:
                with suppress(StorageError):  # the error has been printed already
                    self._finish(description, seconds)
                return 3
            code = self._finish(description, seconds)
            if long.stopped is None:
                self.ledger.finish(photos)
                return code
        long.note(
            f"interrupted: {share_of(len(self.ledger), len(self.jobs), 'photo')} done and reported; "
            "the same command goes on"
        )
        return long.stopped

    @contextmanager
    def _ledger(self, classifier: dict[str, Any], photos: str, existing: frozenset[str]) -> Iterator[Interrupts]:
        """Open the ledger, with the records of an earlier start; signals wait until files are written.

        Args:
            classifier: its description.
            photos: a fingerprint of the jobs and their batches.
            existing: names of outputs that exist already.
        """
        out, long = self.outputs.folder, self.long
        self.part = Part(self.jobs, out)
        with long.journal(out / JOURNAL, self._key(classifier)) as (journal, interrupts):
            self.ledger = Ledger(journal, [self.part])
            if long.share.first:
                self.filled = self.ledger.begin(photos, self.part, existing, overwrite=self.overwrite)
                long.share.tell("filled", str(self.filled))
            else:
                self.filled = long.share.ask("filled") == "True"
            if long.share.size == 1:
                for folder in subfolders(job.adversarial for job in self.jobs):
                    remove_temporary(out / folder)
            if len(self.ledger) and long.share.first:
                long.note(
                    f"going on: {share_of(len(self.ledger), len(self.jobs), 'photo')} in the journal; "
                    "what changed since is attacked again"
                )
            yield interrupts

    def _key(self, classifier: dict[str, Any]) -> dict[str, Any]:
        """Return everything that decides the results, except the photos themselves and their batches."""
        key, region = {**self.described, **classifier_key(classifier)}, self.settings.region
        del key["batch_size"]
        if region is not None and region.mask is not None:
            key["region"] = sha256(region.mask.tobytes()).hexdigest()
        return self.long.key(classifier["sha256"], **key)

    def _finished(self, job: Job) -> Size | None:
        record = self.ledger.finished(job, self.part)
        if record is None:
            return None
        self._count([record])
        return size_of(record)

    def _done(self, records: list[Record]) -> None:
        records = [condense(record) for record in records]
        self.ledger.write(records, self.part)
        self._count(records)

    def _count(self, records: list[Record]) -> None:
        """Advance the progress bar by the photos that all processes have done."""
        with self.lock:
            for record in records:
                self.summary.add(record)
            rate, rmsd = self.summary.success_rate, self.summary.mean_rmsd
            text = f"success {rate:.0%}" if rate is not None else "success -"
            text += f", mean RMSD {rmsd:.2f}" if rmsd is not None else ""
            self.long.advance(len(records), text)

    def _finish(self, description: dict[str, Any], seconds: float) -> int:
        """Write the report from the journals of all processes, and print; return the exit code."""
        self.anchor.check()
        self.ledger.reload()
        folder, report = self.outputs.folder, self.outputs.report
        settings = {**self.described, "cwd": str(Path.cwd()), "out": self._folder_from_report()}
        told = Told(self.settings)
        with writing(report) as stream:
            for part in report_lines(settings, description, told.listen(self.ledger.records(self.part)), seconds):
                stream.write(part.encode())
        if self.outputs.page is not None:
            from mlperturb.run.report import read_report
            from mlperturb.show.gallery import write_gallery

            write_gallery(read_report(report)[0], folder, self.outputs.page)
        if self.json:
            for part in report_lines(settings, description, self.ledger.records(self.part), seconds):
                print(part, end="")
            print()
        elif not self.long.quiet and not self.silent:
            self._print_tables(told, seconds)
        told.print_errors()
        short = self.strict and told.summary.attacked > told.summary.counts["success"]
        return self.long.exit_code(max(told.summary.exit_code, int(short)))

    def _folder_from_report(self) -> str:
        """Return the output folder as the report names it: relative to the report's folder, or a URL as given."""
        folder, report = self.outputs.folder, self.outputs.report
        if report.parent == folder:
            return "."
        if is_remote(folder) or is_remote(report):
            return str(folder)
        return os.path.relpath(folder, report.parent)

    def _print_tables(self, told: Told, seconds: float) -> None:
        from mlperturb.show.tables import classifier_tables, image_line, readers_line, summary_table

        summary = told.summary.to_dict(seconds)
        if len(told.first) <= SHOWN:
            for record in told.first:
                stdout.print(image_line(record), soft_wrap=True)
                for table in classifier_tables(record):
                    stdout.print(table)
            if (line := readers_line(summary)) is not None:
                stdout.print(line, soft_wrap=True)
        else:
            stdout.print(summary_table(summary))
        told.print_notes()
        page = f", page {printable(str(self.outputs.page))}" if self.outputs.page else ""
        folder, report = printable(str(self.outputs.folder)), printable(str(self.outputs.report))
        stdout.print(f"files in {folder}, report {report}{page}", soft_wrap=True)
