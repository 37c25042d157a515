"""The matrix of an evaluation of several classifiers: the files made on each, judged on each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperturb import __version__
from mlperturb.errors import StorageError
from mlperturb.experiment.defence import Attacked
from mlperturb.experiment.records import slug
from mlperturb.experiment.transfer import Made, transfer
from mlperturb.model.classifier import Classifier
from mlperturb.system.journal import find_journal

SCHEMA = "mlperturb.matrix/1"
MATRIX = "matrix.json"  # of `evaluate` with several checkpoints


def read_files(records: Path) -> dict[tuple[str, str], list[Attacked]]:
    """Return the files that an evaluation kept, by case and method, each with its photo.

    Args:
        records: the journal of the evaluation; the files lie beside it.

    Raises:
        StorageError: if the journal is damaged.
    """
    latest: dict[tuple[str, str], dict[int, Attacked | None]] = {}
    for file in find_journal(records):
        for line in file.read_text("utf-8", "replace").splitlines():
            try:
                entry = json.loads(line)
                for row, record in zip(entry.get("rows", ()), entry.get("records", ()), strict=True):
                    folder = records.parent / "images" / slug(entry["case"]) / slug(entry["method"])
                    name = record["files"]["adversarial"]
                    one = name and Attacked(
                        folder / name, Path(record["source"]), tuple(record["flip"]), tuple(record["keep"]),
                        record["truth"],
                    )  # fmt: skip
                    latest.setdefault((entry["case"], entry["method"]), {})[row] = one or None
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise StorageError(f"{file} has a damaged record ({error!r:.80}); `overwrite` starts again") from error
    return {key: [one for _, one in sorted(rows.items()) if one is not None] for key, rows in latest.items()}


def judge_each(
    folders: Mapping[str, Path],
    classifiers: Mapping[str, Classifier],
    *,
    readers: Sequence[str] = (),
    begin: Callable[[int], None] = lambda _: None,
    done: Callable[[str | None], None] = lambda _: None,
) -> dict[str, Any]:
    """Show the files made on each classifier to every classifier.

    Args:
        folders: the folder of the evaluation of each classifier.
        classifiers: the classifiers, by the same names.
        readers: readers of all classifiers; empty for the own readers of each classifier.
        begin: called with the number of files.
        done: called after each file, with the error if it could not be read, else with None.

    Returns:
        The counts of each case, method, classifier that the files were made on, and classifier that judged them.
    """
    parts = [
        (case, method, Made(name, attacked))
        for name, folder in folders.items()
        for (case, method), attacked in read_files(folder / "records.jsonl").items()
    ]
    begin(sum(len(made.attacked) for _, _, made in parts))
    rows: list[dict[str, Any]] = []
    for case, method, made in parts:
        found = transfer([made], classifiers, readers=readers, done=done)
        rows += [{"case": case, "method": method, **row} for row in found["pairs"]]
    return {"schema": SCHEMA, "version": __version__, "rows": rows}
