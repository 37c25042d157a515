"""The records of a run in the journal of its processes: written batch by batch, read again when the run resumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlperturb.errors import StorageError, UsageError
from mlperturb.model.preprocess import Size
from mlperturb.run.jobs import Job
from mlperturb.run.record import Record
from mlperturb.system.files import file_sha256, is_file_of
from mlperturb.system.journal import Journal, Place, glance

Key = tuple[str | None, str | None, str | int]  # of a record: case, method, and the photo's path or row


@dataclass(frozen=True)
class Part:
    """Photos of a run that are attacked in the same way, and the folder of their files.

    Attributes:
        jobs: the photos.
        folder: the folder of the PNGs and maps.
        case: the name of an evaluation's case; None in an attack.
        method: the name of an evaluation's method; None in an attack.
    """

    jobs: Sequence[Job]
    folder: Path
    case: str | None = None
    method: str | None = None


class Ledger:
    """The records of a run. They lie on disk; memory holds only the place of each photo's latest record in the journal.

    A photo is done if its latest record has no error, and its files have the names that they would have now. An attack
    also compares the files: if the photo, its adversarial photo or its map has changed since, the photo is not done. An
    evaluation refuses a photo that has changed since, and does not need its files any more.

    Args:
        journal: the open journal.
        parts: the parts of the run; an attack has one part.
        data: the photos of an evaluation's data set, which its records name by row; None in an attack.

    Raises:
        UsageError: if a photo of an evaluation has changed.
        StorageError: if the journal is damaged or cannot be read.
    """

    def __init__(self, journal: Journal, parts: Sequence[Part], data: Sequence[Path] | None = None) -> None:
        self._journal, self._data = journal, data
        self._rows = {str(path): row for row, path in enumerate(data or ())}
        self._jobs = {self._key(part, job): job for part in parts for job in part.jobs}
        self._places: dict[Key, tuple[Place, int]] = {}
        self._failed: set[Key] = set()
        self._any = False  # whether there is a record, of these photos or of others
        self._lists: dict[str, tuple[Place, bool]] = {}  # by the fingerprint of the photos of a start
        self._open: set[str] = set()  # the lists that were begun with `overwrite` and are not finished
        self._photos: dict[int, str | None] = {}  # by row of the data set, the SHA-256 of the photo
        self._read = lru_cache(maxsize=8)(journal.read)  # a line has the records of a batch
        self.reload()
        if data is not None:
            self._refuse_changed(data)

    def __len__(self) -> int:
        """Return the number of photos, over all parts, whose latest record has no error."""
        return len(self._places) - len(self._failed)

    def reload(self) -> None:
        """Find the records that any process has written since the last call."""
        for place in self._journal.places():
            entry = self._journal.read(place)
            if "photos" in entry:
                self._lists[str(entry["photos"])] = place, bool(entry.get("filled", True))
                if entry.get("overwrite"):
                    self._open.add(str(entry["photos"]))
                continue
            if "finished" in entry:
                self._open.discard(str(entry["finished"]))
                continue
            self._any = True
            try:
                hashes = entry["hashes"] if self._data is None else None
                for number, record, key in self._records_of(entry):
                    if isinstance(key[2], int):
                        self._compare(key[2], record)
                    job = self._jobs.get(key)
                    self._failed.discard(key)
                    if job is None or not _same_names(record, hashes, job):
                        self._places.pop(key, None)
                        continue
                    self._places[key] = (place, number)
                    if record.error is not None:
                        self._failed.add(key)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise StorageError(
                    f"{self._journal.path} has a damaged record ({error!r:.80}); `overwrite` starts again"
                ) from error

    def begin(self, photos: str, part: Part, existing: Set[str], *, overwrite: bool = False) -> bool:
        """Write the list of photos to the journal, unless it is there; refuse to replace files of other photos.

        An earlier start may have been killed after it wrote a file and before it wrote the record. So an existing file
        may be replaced if a list in the journal says that it is this photo's. Files from the attack of another photo,
        or from elsewhere, may not be replaced.

        Args:
            photos: a fingerprint of the photos and their batches.
            part: the photos.
            existing: names of the outputs that exist already.
            overwrite: whether this start was to replace what was there, see `broke_off`.

        Returns:
            Whether finished photos are to fill the batches of the other photos, so that these have the results of an
            undisturbed run to the last bit; not so if photos were finished in batches of another list.

        Raises:
            UsageError: if an existing output was not made of the photo that would now write it.
        """
        if photos in self._lists:
            return self._lists[photos][1]
        planned: dict[str, str] = {}  # the photo of each existing output
        for place, _ in self._lists.values() if existing else ():
            outputs = self._journal.read(place).get("outputs", {})
            planned |= {name: source for name, source in outputs.items() if name in existing}
        for job in part.jobs if existing else ():
            taken = {job.adversarial, job.map} & existing
            if taken and planned.get(job.adversarial) != str(job.source):
                raise UsageError(
                    f"{part.folder / min(taken)} exists already and was not made of {job.source}: "
                    "give another `out`, or `overwrite`"
                )
        outputs, filled = {job.adversarial: str(job.source) for job in part.jobs}, not self._any
        self._journal.append({"photos": photos, "filled": filled, "overwrite": overwrite, "outputs": outputs})
        if overwrite:
            self._open.add(photos)
        return filled

    def finish(self, photos: str) -> None:
        """Write to the journal that all photos of a list have been attacked and reported, if it says they were begun.

        Raises:
            StorageError: if the journal cannot be written.
        """
        if photos in self._open:
            self._journal.append({"finished": photos})

    def write(self, records: Sequence[Record], part: Part) -> None:
        """Add a batch to the journal; in an attack, with the SHA-256 of its files.

        Raises:
            StorageError: if the journal cannot be written.
        """
        values = [asdict(record) for record in records]
        if self._data is not None:
            rows = [self._rows[record.source] for record in records]
            self._journal.append({"case": part.case, "method": part.method, "rows": rows, "records": values})
            return
        names = [name for record in records for name in record.files.values() if name]
        try:
            hashes = {name: file_sha256(part.folder / name) for name in names}
        except OSError as error:
            raise StorageError(f"cannot read back from {part.folder}: {error.strerror or error}") from error
        self._journal.append({"records": values, "hashes": hashes})

    def finished(self, job: Job, part: Part) -> Record | None:
        """Return the record of a photo that is done; None for a photo that is not."""
        found = self._find(job, part)
        if found is None or found[0].error is not None:
            return None
        record, hashes = found
        if self._data is not None:
            return record
        names = [name for name in record.files.values() if name]
        whole = is_file_of(job.source, record.sha256)
        return record if whole and all(is_file_of(part.folder / name, hashes[name]) for name in names) else None

    def is_done(self, part: Part) -> bool:
        """Say whether every photo of a part has a record without an error."""
        keys = {self._key(part, job) for job in part.jobs}
        return keys <= self._places.keys() - self._failed

    def records(self, part: Part) -> Iterator[Record]:
        """Yield the latest record of each photo that has a record, in the order of the photos."""
        for job in part.jobs:
            found = self._find(job, part)
            if found is not None:
                yield found[0]

    def _key(self, part: Part, job: Job) -> Key:
        source = str(job.source)
        return part.case, part.method, source if self._data is None else self._rows[source]

    def _records_of(self, entry: dict[str, Any]) -> Iterator[tuple[int, Record, Key]]:
        """Yield the records of a line of the journal: the number in the line, the record, and its key."""
        records = [Record.from_dict(values) for values in entry["records"]]
        if self._data is None:
            yield from ((number, record, (None, None, record.source)) for number, record in enumerate(records))
            return
        for number, (row, record) in enumerate(zip(entry["rows"], records, strict=True)):
            if not (isinstance(row, int) and 0 <= row < len(self._data)):
                raise IndexError(f"row {row} is outside the data")
            yield number, record, (entry["case"], entry["method"], row)

    def _compare(self, row: int, record: Record) -> None:
        """Remember the SHA-256 of the photo that a record was made of.

        Raises:
            UsageError: if another record of this row was made of another photo.
        """
        assert self._data is not None
        if record.error is None and self._photos.setdefault(row, record.sha256) != record.sha256:
            raise UsageError(
                f"{self._data[row]} changed while {self._journal.path} was written: give `overwrite` or another `out`"
            )

    def _refuse_changed(self, data: Sequence[Path]) -> None:
        """Refuse photos that have changed since their records were written.

        Raises:
            UsageError: if a photo has changed; the message names the first.
        """
        for row, digest in self._photos.items():
            if not is_file_of(data[row], digest):
                raise UsageError(
                    f"{data[row]} changed since {self._journal.path} was written: give `overwrite` or another `out`"
                )

    def _find(self, job: Job, part: Part) -> tuple[Record, dict[str, str]] | None:
        held = self._places.get(self._key(part, job))
        if held is None:
            return None
        place, number = held
        entry = self._read(place)
        record, hashes = Record.from_dict(entry["records"][number]), entry.get("hashes", {})
        kinds = {kind: hashes[name] for kind, name in record.files.items() if name in hashes}
        return replace(record, hashes=kinds), hashes


def broke_off(path: Path, key: dict[str, Any], photos: str) -> bool:
    """Say whether a journal is of a start with `overwrite` of these very photos and settings, and was not finished.

    Args:
        path: the journal.
        key: the settings, see `Journal`.
        photos: a fingerprint of the photos and their batches.
    """
    begun = False
    try:
        for entry in glance(path, key):
            if entry.get("finished") == photos:
                return False
            begun |= entry.get("photos") == photos and entry.get("overwrite") is True
    except (UsageError, StorageError, OSError):  # of another run
        return False
    return begun


def size_of(record: Record) -> Size:
    """Return the (height, width) in pixels; (0, 0) for a photo that could not be read."""
    return (record.height or 0, record.width or 0)


def _same_names(record: Record, hashes: dict[str, str] | None, job: Job) -> bool:
    """Say whether the files of a record have the names that they would have now."""
    names = {name for name in record.files.values() if name}
    if hashes is not None and not hashes.keys() >= names:
        raise KeyError(names)
    return names <= {job.adversarial, job.map}
