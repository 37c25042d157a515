"""What a run has done, in the journal of its processes: written batch by batch, read where the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlperturb.errors import StorageError, UsageError
from mlperturb.model.preprocess import Size
from mlperturb.run.jobs import Job
from mlperturb.run.record import Record
from mlperturb.system.files import file_sha256, is_file_of
from mlperturb.system.journal import Journal, Place

Key = tuple[str | None, str | None, str | int]  # of a record: case, method, and the photo's path or row


@dataclass(frozen=True)
class Part:
    """Photos of a run that are attacked alike, and where their files are.

    Attributes:
        jobs: the photos.
        folder: of the PNGs and maps.
        case: of an evaluation, the name of the case.
        method: of an evaluation, the name of the method.
    """

    jobs: Sequence[Job]
    folder: Path
    case: str | None = None
    method: str | None = None


class Ledger:
    """The records of a run, on disk; in memory there is only where in the journal the latest one of each photo is.

    A photo is done once its latest record has no error. An attack goes by the files: a photo that changed since, or
    the PNG or map of which did, is not done. An evaluation measures photos that must stay as they are, and its files
    may go: a photo that changed since is refused.

    Args:
        journal: open.
        parts: of the run; an attack has one.
        data: of an evaluation, the photos of the data set: records name them by row.

    Raises:
        UsageError: if a photo's outputs have other names now, or a photo of an evaluation changed.
        StorageError: if the journal is damaged or cannot be read.
    """

    def __init__(self, journal: Journal, parts: Sequence[Part], data: Sequence[Path] | None = None) -> None:
        self._journal, self._data = journal, data
        self._rows = {str(path): row for row, path in enumerate(data or ())}
        self._jobs = {self._key(part, job): job for part in parts for job in part.jobs}
        self._places: dict[Key, tuple[Place, int]] = {}
        self._failed: set[Key] = set()
        self._lists: set[str] = set()  # fingerprints of the photos of each start
        self._photos: dict[int, str | None] = {}  # by row of the data set, the SHA-256 of the photo
        self._read = lru_cache(maxsize=8)(journal.read)  # a line has the records of a batch
        self.reload()
        if data is not None:
            self._refuse_changed(data)

    def __len__(self) -> int:
        """Return how many photos, of all parts, have a record without an error."""
        return len(self._places) - len(self._failed)

    def reload(self) -> None:
        """Read where the records are that any process has written since."""
        for place in self._journal.places():
            entry = self._journal.read(place)
            if "photos" in entry:
                self._lists.add(str(entry["photos"]))
                continue
            try:
                hashes = entry["hashes"] if self._data is None else None
                for number, record, key in self._records_of(entry):
                    if isinstance(key[2], int):
                        self._compare(key[2], record)
                    job = self._jobs.get(key)
                    if job is not None:
                        _check_names(record, hashes, job)
                        self._places[key] = (place, number)
                        self._failed.discard(key)
                        if record.error is not None:
                            self._failed.add(key)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise StorageError(
                    f"{self._journal.path} has a damaged record ({error!r:.80}); `overwrite` starts again"
                ) from error

    def begin(self, photos: str, part: Part, existing: Set[str]) -> None:
        """Note which photos are attacked, unless they were so before; refuse to replace what is not theirs.

        A run of the same photos may have been killed before its journal knew of a file; what another photo's
        attack, or somebody else, wrote under the same name is left alone.

        Args:
            photos: a fingerprint of them.
            part: the photos.
            existing: names of the outputs that are there already.

        Raises:
            UsageError: if one of these is not of the photo that has its name now.
        """
        if photos in self._lists:
            return
        for job in part.jobs if existing else ():
            taken = {job.adversarial, job.map} & existing
            if taken and self._key(part, job) not in self._places:
                raise UsageError(
                    f"{part.folder / min(taken)} exists already and was not made of {job.source}: "
                    "give another `out`, or `overwrite`"
                )
        self._journal.append({"photos": photos})

    def write(self, records: Sequence[Record], part: Part) -> None:
        """Add a batch to the journal; that of an attack with the SHA-256 of its files.

        Raises:
            StorageError: if it cannot be written.
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
        """Return the record of a photo that is done; None if it is not."""
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
        """Read the latest record of each photo that has one, in the order of the photos, one at a time."""
        for job in part.jobs:
            found = self._find(job, part)
            if found is not None:
                yield found[0]

    def _key(self, part: Part, job: Job) -> Key:
        source = str(job.source)
        return part.case, part.method, source if self._data is None else self._rows[source]

    def _records_of(self, entry: dict[str, Any]) -> Iterator[tuple[int, Record, Key]]:
        """Read the records of a line of the journal: the number in the line, the record, and whose it is."""
        records = [Record.from_dict(values) for values in entry["records"]]
        if self._data is None:
            yield from ((number, record, (None, None, record.source)) for number, record in enumerate(records))
            return
        for number, (row, record) in enumerate(zip(entry["rows"], records, strict=True)):
            if not (isinstance(row, int) and 0 <= row < len(self._data)):
                raise IndexError(f"row {row} is outside the data")
            yield number, record, (entry["case"], entry["method"], row)

    def _compare(self, row: int, record: Record) -> None:
        """Remember which photo of the data set a result is of.

        Raises:
            UsageError: if another result is of another photo.
        """
        assert self._data is not None
        if record.error is None and self._photos.setdefault(row, record.sha256) != record.sha256:
            raise UsageError(
                f"{self._data[row]} changed while {self._journal.path} was written: give `overwrite` or another `out`"
            )

    def _refuse_changed(self, data: Sequence[Path]) -> None:
        """Refuse to go on with photos that are not the photos they were.

        Raises:
            UsageError: that names the first photo that changed.
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
        return Record.from_dict(entry["records"][number]), entry.get("hashes", {})


def size_of(record: Record) -> Size:
    """Return the (height, width) of a photo that could be read."""
    return (record.height or 0, record.width or 0)


def _check_names(record: Record, hashes: dict[str, str] | None, job: Job) -> None:
    names = [name for name in record.files.values() if name]
    if not set(names) <= {job.adversarial, job.map}:
        raise UsageError(
            f"{record.source} was written as {names[0]}, and with these photos would be {job.adversarial}: "
            "give another `out`, or `overwrite`"
        )
    if hashes is not None and not hashes.keys() >= set(names):
        raise KeyError(names)
