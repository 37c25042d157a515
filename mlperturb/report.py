"""Records of images -> `report.json`, its summary and the exit code."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, get_args

from mlperturb import __version__
from mlperturb.errors import ImageError, UsageError
from mlperturb.files import is_file_of, is_remote, parse_path
from mlperturb.metrics import Distortion
from mlperturb.text import printable

SCHEMA = "mlperturb.report/1"

Status = Literal["success", "partial", "failed", "unreadable"]


@dataclass(frozen=True)
class Record:
    """One image of a report, as the JSON has it; see `schemas/report-1.json`.

    Attributes:
        source: the photo's path, as given.
        sha256: of the photo's file.
        width: in pixels, upright.
        height: in pixels, upright.
        status: `success` if every constraint holds on the PNG as read back, and after the compressions to survive,
            `partial` if some label of A flipped, `failed` if none did (no file is written), `unreadable` if the photo
            could not be decoded.
        truth: y, the classifier's decisions on the photo.
        flip: A.
        keep: B.
        probabilities: `before` of the photo, `float` of the attack's float result, `after` of the PNG as read back.
        constraints: `held`, `total` and the labels `violated`.
        distortion: of the PNG, on the 0-255 scale.
        distortion_float: of the attack's float result.
        success_float: whether every constraint holds on the float result.
        survival: by compression that the attack was to survive, the constraints `held`, `total` and `violated`; None
            if there was none.
        ranking: for a ranking attack, whether its constraints hold on the PNG, and Kendall's tau_b.
        cost: passes and seconds.
        files: names relative to the report's folder.
        notes: what was done to the photo on reading.
        error: its type and message.
    """

    source: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    status: Status = "unreadable"
    truth: dict[str, bool] | None = None
    flip: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    probabilities: dict[str, dict[str, float] | None] | None = None
    constraints: dict[str, Any] | None = None
    distortion: Distortion | None = None
    distortion_float: Distortion | None = None
    success_float: bool | None = None
    survival: dict[str, dict[str, Any]] | None = None
    ranking: dict[str, Any] | None = None
    cost: dict[str, float] = field(default_factory=lambda: {"forward": 0, "backward": 0, "seconds": 0.0})
    files: dict[str, str | None] = field(default_factory=lambda: {"adversarial": None, "map": None})
    notes: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None


@dataclass
class Summary:
    """Counts of statuses and costs, and the RMSD of the successes: what is kept of records that have gone by."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Status), 0))
    errors: int = 0
    sizes: list[float] = field(default_factory=list)
    forward: int = 0
    backward: int = 0

    def add(self, record: Record) -> None:
        """Count a record."""
        self.counts[record.status] += 1
        self.errors += record.error is not None
        self.forward += int(record.cost["forward"])
        self.backward += int(record.cost["backward"])
        if record.status == "success" and record.distortion is not None:
            self.sizes.append(record.distortion.rmsd)

    @property
    def success_rate(self) -> float | None:
        """The share of the photos that could be read; None if there was none."""
        attacked = sum(self.counts.values()) - self.counts["unreadable"]
        return self.counts["success"] / attacked if attacked else None

    @property
    def mean_rmsd(self) -> float | None:
        """Of the successes; None if there was none."""
        return statistics.fmean(self.sizes) if self.sizes else None

    @property
    def exit_code(self) -> int:
        """0 if every image was processed, 1 if one could not be read, classified or written."""
        return int(self.errors > 0)

    def to_dict(self, seconds: float) -> dict[str, Any]:
        """Return the `summary` of a report."""
        return {
            "images": sum(self.counts.values()),
            **self.counts,
            "success_rate": self.success_rate,
            "rmsd": {"mean": self.mean_rmsd, "median": statistics.median(self.sizes) if self.sizes else None},
            "forward": self.forward,
            "backward": self.backward,
            "seconds": round(seconds, 3),
        }


def report_lines(
    settings: dict[str, Any], classifier: dict[str, Any], records: Iterable[Record], seconds: float
) -> Iterator[str]:
    """Yield the text of a report piece by piece, one record at a time: a run of any length fits in memory."""
    head = {"schema": SCHEMA, "version": __version__, "settings": settings, "classifier": classifier}
    yield to_json(head).removesuffix("\n}") + ',\n  "images": ['
    summary, between = Summary(), "\n"
    for record in records:
        summary.add(record)
        yield between + indent(to_json(asdict(record)), "    ")
        between = ",\n"
    yield "]" if between == "\n" else "\n  ]"
    yield ',\n  "summary": ' + indent(to_json(summary.to_dict(seconds)), "  ").lstrip() + "\n}"


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema of `report.json`."""
    schema: dict[str, Any] = json.loads((files("mlperturb") / "schemas" / "report-1.json").read_text())
    return schema


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """Read one of our JSON files.

    Raises:
        UsageError: if it is none, or of another schema.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe may wait for ever
            raise UsageError(f"cannot read {path}: it is no regular file")
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UsageError(f"no such report: {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read the report {path}: {str(error):.100}") from error
    if not isinstance(found, dict) or found.get("schema") != schema:
        raise UsageError(f"expected a file of schema {schema}, got {path}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_report(path: Path) -> tuple[dict[str, Any], Path]:
    """Read a report of `attack`, given as its file or its folder; return it and the folder of its PNGs.

    Raises:
        UsageError: if it is none.
    """
    path = path / "report.json" if path.is_dir() else path
    report = read_json(path, SCHEMA)
    with reading(path):
        out = report["settings"].get("out", ".")
        return report, path.parent if out == "." else path.parent / out


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a report that is not as its schema says leads to into one line.

    Raises:
        UsageError: that names the file.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
        raise UsageError(f"the report {path} is not as `attack` writes it: {error!r:.120}") from error


def find_output(image: dict[str, Any], kind: str, folder: Path) -> Path | None:
    """Return an image's `adversarial` PNG or `map` in its folder; None if it has none.

    Raises:
        ImageError: if the name is not that of a file in the folder: a report is data, and names no file elsewhere.
    """
    name = image["files"][kind]
    if name is not None and (Path(name).name != name or "\0" in name):
        raise ImageError(f"{printable(name)!r:.100} is not the name of a file beside its report")
    return None if name is None else folder / name


def find_photo(
    image: dict[str, Any], folder: Path, settings: dict[str, Any], photos: Path | None = None
) -> Path | None:
    """Return the photo that an image was made of, wherever it lies now; None if it is not found.

    It is looked for in `photos`, as the report names it, from the folder in which the attack was started, and beside
    the report; only a file of the same SHA-256 will do.
    """
    if "://" in image["source"]:  # a report is data: it opens no address elsewhere than where it lies itself
        source = parse_path(image["source"])
        within = is_remote(folder) and type(source) is type(folder)
        return source if within and is_file_of(source, image["sha256"]) else None
    source = Path(image["source"])
    places = [source, Path(settings.get("cwd", ".")) / source, folder / source, folder / source.name]
    if photos is not None:
        places.insert(0, photos / source.name)
    return next((place for place in places if is_file_of(place, image["sha256"])), None)


def thresholds_of(classifier: dict[str, Any]) -> dict[str, float]:
    """Return the thresholds by label of a classifier as a report describes it."""
    return dict(zip(classifier["labels"], classifier["thresholds"], strict=True))


def to_json(value: object) -> str:
    """Return JSON that any reader takes: no NaN or infinity, no raw control character."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=True)
