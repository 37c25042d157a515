"""What a run has done, in the journal of its processes: written batch by batch, read where the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from mlperturb.errors import StorageError, UsageError
from mlperturb.files import file_sha256, is_file_of
from mlperturb.jobs import Job
from mlperturb.journal import Journal, Place
from mlperturb.preprocess import Size
from mlperturb.record import Record


class Ledger:
    """The records of a run, on disk; in memory there is only where in the journal the latest one of each photo is.

    Args:
        journal: open.
        jobs: the photos of the run.
        out: where its files are.

    Raises:
        UsageError: if a photo's outputs have other names now.
        StorageError: if the journal is damaged or cannot be read.
    """

    def __init__(self, journal: Journal, jobs: Sequence[Job], out: Path) -> None:
        self._journal, self._out = journal, out
        self._named = {str(job.source): job for job in jobs}
        self._places: dict[str, tuple[Place, int]] = {}
        self._failed: set[str] = set()
        self._lists: set[str] = set()  # fingerprints of the photos of each start
        self._read = lru_cache(maxsize=8)(journal.read)  # a line has the records of a batch
        self.reload()

    def __len__(self) -> int:
        """Return how many photos have a record without an error."""
        return len(self._places) - len(self._failed)

    def reload(self) -> None:
        """Read where the records are that any process has written since."""
        for place in self._journal.places():
            entry = self._journal.read(place)
            if "photos" in entry:
                self._lists.add(entry["photos"])
                continue
            try:
                for row, values in enumerate(entry["records"]):
                    job = self._named.get(values["source"])
                    if job is not None:
                        _check_names(Record.from_dict(values), entry["hashes"], job)
                        self._places[values["source"]] = (place, row)
                        self._failed.discard(values["source"])
                        if values["error"] is not None:
                            self._failed.add(values["source"])
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise StorageError(f"{self._journal.path} has a damaged record; --overwrite starts again") from error

    def begin(self, photos: str, existing: Set[str]) -> None:
        """Note which photos are attacked, unless they were so before; refuse to replace what is not theirs.

        A run of the same photos may have been killed before its journal knew of a file; what another photo's
        attack, or somebody else, wrote under the same name is left alone.

        Args:
            photos: a fingerprint of them.
            existing: names of the outputs that are there already.

        Raises:
            UsageError: if one of these is not of the photo that has its name now.
        """
        if photos in self._lists:
            return
        for job in self._named.values() if existing else ():
            taken = {job.adversarial, job.map} & existing
            if taken and str(job.source) not in self._places:
                raise UsageError(
                    f"{self._out / min(taken)} exists already and was not made of {job.source}: "
                    "give another --out, or --overwrite"
                )
        self._journal.append({"photos": photos})

    def write(self, records: Sequence[Record]) -> None:
        """Add a batch to the journal, with the SHA-256 of its files.

        Raises:
            StorageError: if it cannot be written.
        """
        names = [name for record in records for name in record.files.values() if name]
        try:
            hashes = {name: file_sha256(self._out / name) for name in names}
        except OSError as error:
            raise StorageError(f"cannot read back from {self._out}: {error.strerror or error}") from error
        self._journal.append({"records": [asdict(record) for record in records], "hashes": hashes})

    def finished(self, job: Job) -> Record | None:
        """Return the record of a photo that is done: no error, the same photo, its files there as they were written."""
        found = self._find(job)
        if found is None:
            return None
        record, hashes = found
        names = [name for name in record.files.values() if name]
        whole = record.error is None and is_file_of(job.source, record.sha256)
        return record if whole and all(is_file_of(self._out / name, hashes[name]) for name in names) else None

    def records(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """Read the latest record of each photo that has one, in the order of the photos, one at a time."""
        for job in jobs:
            found = self._find(job)
            if found is not None:
                yield found[0]

    def _find(self, job: Job) -> tuple[Record, dict[str, str]] | None:
        held = self._places.get(str(job.source))
        if held is None:
            return None
        place, row = held
        entry = self._read(place)
        return Record.from_dict(entry["records"][row]), entry["hashes"]


def size_of(record: Record) -> Size:
    """Return the (height, width) of a photo that could be read."""
    return (record.height or 0, record.width or 0)


def _check_names(record: Record, hashes: dict[str, str], job: Job) -> None:
    names = [name for name in record.files.values() if name]
    if not set(names) <= {job.adversarial, job.map}:
        raise UsageError(
            f"{record.source} was written as {names[0]}, and with these photos would be {job.adversarial}: "
            "give another --out, or --overwrite"
        )
    if not hashes.keys() >= set(names):
        raise KeyError(names)
