"""What a run has done, in its journal: written batch by batch, and read when the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlperturb.errors import StorageError, UsageError
from mlperturb.files import file_sha256, is_file_of
from mlperturb.jobs import Job
from mlperturb.journal import Journal
from mlperturb.metrics import Distortion
from mlperturb.report import Record


def write_records(journal: Journal, records: Sequence[Record], out: Path) -> None:
    """Add a batch to the journal, with the SHA-256 of its files; a photo with an error is to be tried again.

    Raises:
        StorageError: if it cannot be written.
    """
    kept = [record for record in records if record.error is None]
    names = [name for record in kept for name in record.files.values() if name]
    try:
        hashes = {name: file_sha256(out / name) for name in names}
    except OSError as error:
        raise StorageError(f"cannot read back from {out}: {error.strerror or error}") from error
    if kept:
        journal.append({"records": [asdict(record) for record in kept], "hashes": hashes})


def read_finished(journal: Journal, jobs: Sequence[Job], out: Path) -> list[Record]:
    """Return the records of the photos that are done: the same photo, its files there as they were written.

    Raises:
        UsageError: if a photo's outputs have other names now.
        StorageError: if the journal is damaged.
    """
    named = {str(job.source): job for job in jobs}
    found: dict[str, Record] = {}
    for entry in journal.entries():
        try:
            for values in entry["records"]:
                job = named.get(values["source"])
                if job is None:
                    continue
                record = _read_record(values)
                names = [name for name in record.files.values() if name]
                if not set(names) <= {job.adversarial, job.map}:
                    raise UsageError(
                        f"{record.source} was written as {names[0]}, and with these photos would be {job.adversarial}: "
                        "give another --out, or --overwrite"
                    )
                whole = is_file_of(job.source, record.sha256)
                whole = whole and all(is_file_of(out / name, entry["hashes"][name]) for name in names)
                found.pop(record.source, None)
                if whole:
                    found[record.source] = record
        except (KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{journal.path} has a damaged record; --overwrite starts again") from error
    return list(found.values())


def _read_record(values: dict[str, Any]) -> Record:
    """Make a record of its JSON."""
    sizes = {name: Distortion(**values[name]) for name in ("distortion", "distortion_float") if values[name]}
    return Record(**{**values, **sizes})
