"""Common parts of the long commands: notes, journal, progress bar, interruption, exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from mlperturb import __version__
from mlperturb.cli.console import make_bar, print_error, print_note
from mlperturb.errors import StorageError
from mlperturb.system.interrupts import Interrupts
from mlperturb.system.journal import Journal
from mlperturb.system.processes import Share, local_device

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mlperturb.attacks.problem import Meter


_BEAT, _LINE = 0.25, 60.0  # seconds between two looks of the bar, and between two lines of a log


class LongRun:
    """One run of a long command, or the part of it that this process does.

    Args:
        share: the part of the run that this process does.
        quiet: print nothing but errors.

    Attributes:
        share: as given.
        quiet: as given.
        device: the device of the run; of several processes, without the number of this process's device.
        stopped: the exit code of a stopped run: 130 after a signal, 3 after a failure to write; None for a run that
            was not stopped.
    """

    def __init__(self, share: Share, *, quiet: bool) -> None:
        self.share, self.quiet = share, quiet
        self.device = ""
        self.stopped: int | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase, self._had = "", 0
        self._text, self._shown = "", 0.0
        self._watched: tuple[Meter, int] | None = None
        self._done = 0

    def note(self, message: str) -> None:
        """Print a line on stderr, unless the run is quiet."""
        if not self.quiet:
            print_note(message)

    def starts_again(self, overwrite: bool) -> bool:
        """Return `overwrite`; but False if torchrun has restarted a process, which must resume its own run."""
        return overwrite and not self.share.any_restarted()

    def prepare(self, device: str, seed: int) -> str:
        """Choose the device of this process and seed all random numbers; return the device.

        Raises:
            UsageError: if there is no such device.
        """
        from mlperturb.system.devices import prepare

        name = prepare(local_device(device), seed)
        self.device = name if self.share.size == 1 else name.partition(":")[0]
        return name

    def key(self, checkpoint: str, **more: Any) -> dict[str, Any]:
        """Return the key of the journal: everything that decides the results.

        Args:
            checkpoint: the SHA-256 of the checkpoint's file.
            more: further values of the command.
        """
        return {"version": __version__, "checkpoint": checkpoint, **more, "device": self.device.partition(":")[0]}

    @contextmanager
    def journal(self, path: Path, key: dict[str, Any]) -> Iterator[tuple[Journal, Interrupts]]:
        """Open the journal at `path`; signals wait until files are written.

        Raises:
            UsageError: if the journal was written under another key, or another run has it open.
            StorageError: if the journal cannot be read or written.
        """
        share = self.share
        with Interrupts() as interrupts, Journal(path, key, rank=share.rank, size=share.size) as journal:
            if journal.torn:
                self.note(
                    f"the last line of {path} is incomplete or damaged and is dropped: its photos are attacked again"
                )
            yield journal, interrupts

    @contextmanager
    def bar(self, phase: str, total: int, text: str) -> Iterator[None]:
        """Show a progress bar in the first process; for the arguments see `begin`."""
        with make_bar(quiet=self.quiet or not self.share.first) as self._bar:
            self._task = self._bar.add_task(text, total=total)
            self._phase, self._had, self._done, self._text, self._watched, self._shown = phase, 0, 0, text, None, 0.0
            with self._pulse():
                yield

    @contextmanager
    def _pulse(self) -> Iterator[None]:
        """Show the batch that is being attacked: a bar, some times a second, or without a terminal a line a minute."""
        assert self._bar is not None
        if self.quiet or not self.share.first:
            yield
            return
        show, pause = (self._say, _LINE) if self._bar.disable else (self._show, _BEAT)
        ended = Event()

        def beat() -> None:
            while not ended.wait(pause):
                show()

        thread = Thread(target=beat, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def watch(self, meter: Meter, most: int) -> None:
        """Follow a batch whose search begins.

        Args:
            meter: counts the passes of the batch.
            most: about the most passes for a photo.
        """
        self._watched = meter, most
        if self._done == self._had:
            self._text = ""  # what came before the first search

    def _show(self) -> None:
        """Show what is done, and a share of each photo of the batch being attacked, so that time can be told."""
        assert self._bar is not None
        assert self._task is not None
        begun = 0.0
        if self._watched is not None:
            meter, most = self._watched
            begun = sum(min(count / most, 1.0) for count in meter.spent.tolist()) * 0.99
        self._shown = max(self._shown, self._done + begun)
        total = self._bar.tasks[0].total
        self._bar.update(self._task, completed=min(self._shown, total or self._shown), description=self._describe())

    def _say(self) -> None:
        """Print what is done, and the passes of the batch being attacked, for a log."""
        assert self._bar is not None
        text = self._describe()
        self.note(f"{self._done} of {self._bar.tasks[0].total:.0f} {self._phase}" + (f": {text}" if text else ""))

    def _describe(self) -> str:
        """Return the text beside the bar, and the passes of the batch being attacked."""
        words = [self._text] if self._text else []
        if self._watched is not None:
            meter, most = self._watched
            spent = max(meter.spent.tolist())
            words.append(f"searching, pass {spent} of at most {max(most, spent)}")
        return "; ".join(words)

    def begin(self, phase: str, total: int, had: int, text: str) -> None:
        """Restart the bar.

        Args:
            phase: the name under which all processes count together.
            total: number of items to do.
            had: number of items that were done before.
            text: the text beside the bar.
        """
        assert self._bar is not None
        assert self._task is not None
        self._phase, self._had, self._done, self._text, self._watched, self._shown = phase, had, had, text, None, had
        self._bar.reset(self._task, total=total, completed=had, description=text)

    def advance(self, count: int, text: str | None = None) -> None:
        """Add `count` items of this process; the bar shows the sum over all processes."""
        self._done = self._had + self.share.count(self._phase, count)
        self._text = self._text if text is None else text
        if self._bar is not None and self._task is not None:
            self._show()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """End the block on a signal or a failure to write, and set `stopped`."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = 130
        except StorageError as error:
            print_error(str(error))
            self.stopped = 3

    def gather(self) -> None:
        """Wait until all processes have finished; after a stop, at most 5 seconds."""
        if self.stopped is None:
            self.share.gather(warn=self.note)
            return
        with suppress(StorageError):
            self.share.gather(patience=5)

    def exit_code(self, code: int) -> int:
        """Return the exit code of a finished run; print a note if torchrun must get 0 in place of `code`."""
        shown = self.share.exit_code(code)
        if shown != code:
            self.note("the exit code is 0 all the same: torchrun would start the processes again")
        return shown
