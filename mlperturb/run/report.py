"""Write records to `report.json`, and read a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

from mlperturb import __version__
from mlperturb.errors import UsageError
from mlperturb.run.pictures import find_folder
from mlperturb.run.record import Record, Summary
from mlperturb.system.files import reaching, read_regular

SCHEMA = "mlperturb.report/2"
_MOST = 1 << 32  # bytes of a report
EARLIER = ("mlperturb.report/1",)  # schemas that are read too


def report_lines(
    settings: dict[str, Any], classifier: dict[str, Any], records: Iterable[Record], seconds: float
) -> Iterator[str]:
    """Yield the text of a report piece by piece, one record at a time: so a run of any length fits in memory."""
    head = {"schema": SCHEMA, "version": __version__, "settings": settings, "classifier": classifier}
    yield to_json(head).removesuffix("\n}") + ',\n  "images": ['
    summary, between = Summary(), "\n"
    for record in records:
        summary.add(record)
        yield between + indent(to_json(asdict(record)), "    ")
        between = ",\n"
    yield "]" if between == "\n" else "\n  ]"
    yield ',\n  "summary": ' + indent(to_json(summary.to_dict(seconds)), "  ").lstrip() + "\n}"


def read_schema(name: str = SCHEMA) -> dict[str, Any]:
    """Return the JSON Schema of this name, such as `mlperturb.curves/1`; by default that of `report.json`."""
    file = name.removeprefix("mlperturb.").replace("/", "-") + ".json"
    schema: dict[str, Any] = json.loads((files("mlperturb") / "schemas" / file).read_text())
    return schema


def read_json(path: Path, schema: str, *earlier: str) -> dict[str, Any]:
    """Read one of our JSON files, of a schema or of an earlier schema.

    Raises:
        UsageError: if the file is not JSON of this schema.
        StorageError: if a store fails.
    """
    try:
        found = json.loads(read_regular(path, _MOST).decode(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UsageError(f"no such report: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the report {path}: {error!s:.100}") from error
    if not isinstance(found, dict) or found.get("schema") not in (schema, *earlier):
        raise UsageError(f"expected a file of schema {schema}, got {path}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def read_report(path: Path) -> tuple[dict[str, Any], Path]:
    """Read a report of `attack`, given as its file or its folder; return it and the folder of its PNGs.

    Raises:
        UsageError: if the file is not a report of `attack`.
    """
    with reaching(path):
        path = path / "report.json" if path.is_dir() else path
    report = read_json(path, SCHEMA, *EARLIER)
    with reading(path):
        return report, find_folder(path, report["settings"])


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors to which a damaged report leads into one line.

    Raises:
        UsageError: if such an error occurs inside; the message names the file.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
        raise UsageError(f"the report {path} does not follow its schema: {error!r:.120}") from error


def readers_of(report: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the readers of a report's run; before version 2 there was the float reader alone."""
    return ("float",) if report["schema"] in EARLIER else tuple(report["settings"]["readers"])


def is_unchanged(image: dict[str, Any]) -> bool:
    """Say whether a photo was as asked already, so that no pixel was changed; version 1 calls it a success."""
    untouched = image["distortion"] is not None and not image["distortion"]["rmsd"]
    return image["status"] == "unchanged" or (untouched and not image["flip"])


def thresholds_of(classifier: dict[str, Any]) -> dict[str, float]:
    """Return the thresholds by label of the classifier that a report describes."""
    return dict(zip(classifier["labels"], classifier["thresholds"], strict=True))


def to_json(value: object) -> str:
    """Return a value as JSON in ASCII.

    Raises:
        ValueError: if it holds NaN or infinity, which JSON does not have.
    """
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=True)
