"""The run: photos in, adversarial PNGs and records out. A bad photo gets a record with its error; the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from mlperturb.attacks.problem import Meter
from mlperturb.errors import ImageError, OutputError
from mlperturb.model.ensemble import Victim, alpha_of, check_size
from mlperturb.model.preprocess import Size
from mlperturb.photos.formats import open_photo
from mlperturb.photos.images import Photo, Pixels
from mlperturb.photos.kinds import FileFormat
from mlperturb.run.forecast import most_passes
from mlperturb.run.jobs import Job
from mlperturb.run.record import NOT_FINITE, Failure, Record
from mlperturb.run.search import Found, Searcher, fits
from mlperturb.run.settings import Settings
from mlperturb.run.verdict import facts_of, judge, save
from mlperturb.system.threads import Behind, ahead, count_workers

Pair = tuple[Job, Photo]

_WAITING = 50_000_000  # pixels, 3 bytes each, that wait decoded for the device


@dataclass
class Waits:
    """How the thread that attacks spent its time, in seconds.

    Attributes:
        total: time from the first photo to the last file.
        reading: time spent waiting for photos to be decoded.
        writing: time spent waiting for files to be written and judged.
    """

    total: float = 0.0
    reading: float = 0.0
    writing: float = 0.0


def run_attack(
    classifier: Victim,
    jobs: Sequence[Job],
    out: Path,
    settings: Settings,
    done: Callable[[list[Record]], None],
    *,
    finished: Callable[[Job], Size | None] = lambda _: None,
    claims: Callable[[int], Iterable[int]] = range,
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    warn: Callable[[str], None] = lambda _: None,
    check: Callable[[], None] = lambda: None,
    watch: Callable[[Meter, int], None] = lambda *_: None,
    filled: bool = True,
) -> Waits:
    """Attack every photo, write its files to `out`, and hand the records of each batch to `done` once they are final.

    The photos are divided, in order, into units of the largest batch size, and the processes share the units out. A
    batch never has photos of two units, so the results of a photo depend neither on the units that this process gets
    nor on the photos that were finished before. While a batch is attacked, other threads decode the next batch, and
    encode, write, read back and judge the previous batch.

    Args:
        classifier: to attack, or several.
        jobs: the photos.
        out: folder of the outputs.
        settings: method, budget, request and limits.
        done: called with the records of every batch, in a thread of its own.
        finished: returns the (height, width) of a photo that is done already, else None; called in threads. The other
            photos are attacked in the same batches as if no photo were done, so that their results are the same to
            the last bit, unless `filled` is False. A batch whose photos are all done is not attacked.
        claims: takes the number of units, yields the numbers of the units that this process is to attack.
        hold: a context entered at the end, or on an interruption, while the last batches are written.
        warn: called once if the device runs out of memory and the run goes on with smaller batches.
        check: called before each file is written; an error that it raises stops the run.
        watch: called when the search of a batch begins, with its meter, which counts on, and about the most passes
            for a photo.
        filled: whether the photos that are done fill the batches of the others.

    Returns:
        How long the device waited.

    Raises:
        StorageError: if nothing can be written to `out` any more.
    """
    waits, started = Waits(), time.perf_counter()
    most = most_passes(settings, len(classifier.labels), jobs[0].request if jobs else None)
    searcher = Searcher(classifier, settings, warn, lambda meter: watch(meter, most))
    read = partial(read_job, settings=settings, classifier=classifier)
    units = [jobs[start : start + searcher.together] for start in range(0, len(jobs), searcher.together)]
    writer = _Writer(classifier, out, settings, done, check, waits)
    try:
        for batch in _timed(_batches(units, claims, finished, read, searcher.pixels, filled=filled), waits):
            for pairs, found, lost in _attack(searcher, batch):
                writer.submit(pairs, found, lost)
    finally:
        with _waiting(waits), hold():
            writer.finish()
        waits.total = time.perf_counter() - started
    return waits


@contextmanager
def _waiting(waits: Waits) -> Iterator[None]:
    """Add the time that the block takes to the time spent waiting for files."""
    before = time.perf_counter()
    try:
        yield
    finally:
        waits.writing += time.perf_counter() - before


class _Writer:
    """Writes, reads back and judges the adversarial photos, in threads beside the thread that attacks."""

    def __init__(
        self,
        classifier: Victim,
        out: Path,
        settings: Settings,
        done: Callable[[list[Record]], None],
        check: Callable[[], None],
        waits: Waits,
    ) -> None:
        self._classifier, self._out, self._settings, self._waits = classifier, out, settings, waits
        self._done, self._check = done, check
        self._behind = Behind()
        self._behind.submit(partial(torch.set_num_threads, torch.get_num_threads()))  # the same sums as in this thread
        self._encoders = ThreadPoolExecutor(count_workers(), "encode")

    def submit(self, pairs: list[Pair], found: list[Found], lost: list[Record]) -> None:
        """Write photos once the previous batch is written; hand their records, and the `lost` records, to `done`."""
        with _waiting(self._waits):
            self._behind.submit(partial(self._write, pairs, found, lost))

    def finish(self) -> None:
        """Wait until all files are written; nothing is written afterwards."""
        try:
            self._behind.finish()
        finally:
            self._encoders.shutdown()

    def _write(self, pairs: list[Pair], found: list[Found], lost: list[Record]) -> None:
        out, settings = self._out, self._settings
        tasks = [self._encoders.submit(self._save, *pair, one) for pair, one in zip(pairs, found, strict=True)]
        saved = [task.result() for task in tasks]
        self._check()  # the files of failures are deleted below
        records = [
            judge(self._classifier, *pair, one, pixels, out, settings)
            for pair, one, pixels in zip(pairs, found, saved, strict=True)
        ]
        self._done(records + lost)

    def _save(self, job: Job, photo: Photo, found: Found) -> Pixels | OutputError | ImageError:
        self._check()
        return save(job, photo, found, self._out, self._settings)


@dataclass
class _Batch:
    """Photos to attack together, and the records of those that cannot be attacked.

    Attributes:
        members: the jobs and their photos; None in place of a finished photo.
        sizes: the photos' (height, width).
        lost: records of the photos that cannot be attacked.
    """

    members: list[tuple[Job, Photo | None]] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    lost: list[Record] = field(default_factory=list)

    def takes(self, size: Size, pixels: float) -> bool:
        """Say whether the batch with one more photo, padded to the largest, has at most so many pixels."""
        return fits([*self.sizes, size], pixels)

    def pairs(self, form: FileFormat) -> list[Pair]:
        """Return all photos; finished photos are read again, so the batch is the same. Empty if all are finished."""
        if not self.wanted():
            return []
        return [
            (job, open_photo(job.source, job.adversarial, form) if photo is None else photo)
            for job, photo in self.members
        ]

    def wanted(self) -> set[Path]:
        """Return the photos that are not finished."""
        return {job.source for job, photo in self.members if photo is not None}


def _batches(
    units: Sequence[Sequence[Job]],
    claims: Callable[[int], Iterable[int]],
    finished: Callable[[Job], Size | None],
    read: Callable[[Job, Callable[[int], None]], Photo | Record],
    pixels: float,
    *,
    filled: bool,
) -> Iterator[_Batch]:
    """Decode photos, at most a unit and `_WAITING` pixels ahead, and group them, with the finished ones if `filled`."""

    def look(job: Job | None, room: Callable[[int], None]) -> tuple[Job, Photo | Record | Size] | None:
        return None if job is None else (job, finished(job) or read(job, room))

    def items() -> Iterator[Job | None]:
        for number in claims(len(units)):
            yield from units[number]
            yield None  # the end of a unit

    batch = _Batch()
    for got in ahead(look, items(), window=max(map(len, units), default=1), most=_WAITING):
        if got is None:
            yield batch
            batch = _Batch()
            continue
        job, photo = got
        if isinstance(photo, Record):
            batch.lost.append(photo)
            continue
        if not isinstance(photo, Photo) and not filled:
            continue
        size = (photo.rgb.shape[0], photo.rgb.shape[1]) if isinstance(photo, Photo) else photo
        if not batch.takes(size, pixels):
            yield batch
            batch = _Batch()
        batch.sizes.append(size)
        batch.members.append((job, photo if isinstance(photo, Photo) else None))


def read_job(job: Job, room: Callable[[int], None], *, settings: Settings, classifier: Victim) -> Photo | Record:
    """Decode a photo; return a record with the error if it cannot be decoded or resized, or the region misses it."""
    try:
        photo = open_photo(job.source, job.adversarial, settings.format, alpha_of(classifier), room)
    except ImageError as error:
        return Record(source=str(job.source), error=Failure.of(error))
    try:
        check_size(classifier, photo.rgb.shape[:2])
        if settings.region:
            settings.region.inside(*photo.rgb.shape[:2])
    except ImageError as error:
        named = ImageError(f"{job.source}: {error}")
        return Record(**facts_of(job, photo), status="failed", error=Failure.of(named))
    return photo


def _timed(batches: Iterator[_Batch], waits: Waits) -> Iterator[_Batch]:
    """Pass batches on, and add up the time spent waiting for them."""
    while True:
        before = time.perf_counter()
        batch = next(batches, None)
        waits.reading += time.perf_counter() - before
        if batch is None:
            return
        yield batch


def _attack(searcher: Searcher, batch: _Batch) -> Iterator[tuple[list[Pair], list[Found], list[Record]]]:
    """Search a batch; yield the photos found, part by part, with the records of the photos that failed."""
    pairs, lost, wanted = batch.pairs(searcher.settings.format), batch.lost, batch.wanted()
    requests = [job.request or searcher.settings.request for job, _ in pairs]
    for start, stop, found in searcher.parts([photo for _, photo in pairs], requests):
        if found is None:
            for job, photo in [pair for pair in pairs[start:stop] if pair[0].source in wanted]:
                error = Failure("MemoryError", f"{job.source}: too large for the device's memory")
                lost.append(Record(**facts_of(job, photo), status="failed", error=error))
            continue
        both = [(pair, one) for pair, one in zip(pairs[start:stop], found, strict=True) if pair[0].source in wanted]
        lost += [Record(**facts_of(*pair), status="failed", error=NOT_FINITE) for pair, one in both if one is None]
        good = [(pair, one) for pair, one in both if one is not None]
        yield [pair for pair, _ in good], [one for _, one in good], lost
        lost = []
    if lost:
        yield [], [], lost
