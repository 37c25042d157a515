"""What a user says of a checkpoint that its files do not record: label names, categories, thresholds, preprocessing.

Files and values are read here without torch, so that a wrong file is reported at once.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.labels import Categories, check_labels
from mlperturb.limits import is_number
from mlperturb.model.metadata import ACTIVATIONS, Metadata
from mlperturb.model.prompts import check_prompts

if TYPE_CHECKING:
    from mlperturb.model.preprocess import Preprocess

DEFAULT_THRESHOLD = 0.5
DEFAULT_FIELDS: dict[str, object] = {  # of `Preprocess`, fields that a checkpoint need not have
    "fit": "stretch",
    "square": False,
    "fill": (255, 255, 255),
    "channels": "rgb",
    "alpha": None,
    "corner": "even",
}
_MAX_BYTES = 100_000_000  # of a file
_REST = "*"  # names every label that a table of thresholds does not name


@dataclass(frozen=True)
class Thresholds:
    """Decision thresholds on the probabilities, inside (0, 1), as a user or a folder gives them.

    Attributes:
        source: where they come from, in words.
        single: the threshold of every label that the tables do not name; None without such a threshold.
        labels: thresholds by label.
        categories: thresholds by category; used for labels that `labels` does not name.
        names: names of categories, by category.
        ordered: a threshold for each label, in the order of the labels; None unless given so.
    """

    source: str
    single: float | None = None
    labels: Mapping[str, float] = field(default_factory=dict)
    categories: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    ordered: tuple[float, ...] | None = None

    def of(self, labels: Sequence[str], categories: Categories) -> tuple[float, ...]:
        """Return the thresholds of these L labels, in their order.

        Raises:
            UsageError: if a label has no threshold, or the thresholds name a label that is not among these.
        """
        if self.ordered is not None:
            if len(self.ordered) != len(labels):
                raise UsageError(f"expected {len(labels)} `thresholds`, got {len(self.ordered)}")
            return self.ordered
        unknown = sorted(self.labels.keys() - set(labels))
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UsageError(
                f"expected `thresholds` of the classifier's labels, got {unknown[0]!r}{more}, {self.source}"
            )
        if self.categories and not categories.of:
            raise UsageError(f"expected labels with categories for thresholds by category, {self.source}")
        found: list[float] = []
        for number, label in enumerate(labels):
            category = categories.of[number] if categories.of else ""
            value = self.labels.get(label, self.categories.get(category, self.single))
            if value is None:
                missing = f"category {category!r}" if self.categories else f"label {label!r}"
                raise UsageError(f"expected a threshold for every label, got none for {missing}, {self.source}")
            found.append(value)
        return tuple(found)


@dataclass(frozen=True)
class Given:
    """What a user says of a checkpoint.

    Attributes:
        labels: L names; None for those of the checkpoint.
        categories: of these labels.
        thresholds: in place of those of the checkpoint; None for those.
        preprocess: in place of that of the checkpoint, or some of its fields; None for that.
        activation: in place of that of the checkpoint, see `mlperturb.model.softmax`; None for that.
        prompts: of a model of images and texts, see `mlperturb.model.prompts`; None for the default.
    """

    labels: tuple[str, ...] | None = None
    categories: Categories | None = None
    thresholds: Thresholds | None = None
    preprocess: Preprocess | Mapping[str, Any] | None = None
    activation: str | None = None
    prompts: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        labels: Sequence[str] | Path | None,
        thresholds: object,
        preprocess: Preprocess | Mapping[str, Any] | Path | None,
        activation: str | None = None,
        prompt: str | Sequence[str] | None = None,
    ) -> Given:
        """Read what a user gives: label names or a file; thresholds, see `read_thresholds`; fields or a JSON file.

        Raises:
            UsageError: if a file or a value cannot be read, there is no such activation, or a prompt has no place for
                the label.
        """
        names, categories = read_label_names(labels)
        return cls(
            names,
            categories if categories.of else None,
            None if thresholds is None else read_thresholds(thresholds),
            read_preprocess(preprocess) if isinstance(preprocess, Path) else preprocess,
            None if activation is None else check_activation(activation),
            None if prompt is None else check_prompts(prompt),
        )

    @property
    def readers(self) -> str:
        """Where the readers come from, if the checkpoint names none."""
        named = self.preprocess is not None and (
            not isinstance(self.preprocess, Mapping) or "readers" in self.preprocess
        )
        return "given" if named else "the default"

    def merge(self, base: Callable[[], Preprocess], source: str) -> tuple[Preprocess, str]:
        """Return the preprocessing, and in words where it comes from.

        Args:
            base: returns that of the checkpoint.
            source: where that comes from.

        Raises:
            CheckpointError: if a field is unknown or out of its range, or the checkpoint's own is needed and unusable.
        """
        from mlperturb.model.preprocess import Preprocess

        if self.preprocess is None:
            return base(), source
        if not isinstance(self.preprocess, Mapping):
            return self.preprocess, "given"
        fields = dict(self.preprocess)
        Preprocess.check_fields(fields)
        try:
            recorded = base().to_dict()
        except CheckpointError:
            if not Preprocess.is_complete(fields):
                raise
            return Preprocess.from_dict(fields), "given"
        left = recorded.keys() - fields.keys()
        words = f"given: {', '.join(sorted(fields)) or 'nothing'}" + (f"; the rest: {source}" if left else "")
        return Preprocess.from_dict({**recorded, **fields}), words

    def complete(self, metadata: Metadata) -> Metadata:
        """Return a checkpoint's metadata with the thresholds and preprocessing of the user.

        Raises:
            CheckpointError: see `merge`.
            UsageError: if the thresholds do not fit the labels.
        """
        origin = dict(metadata.origin)
        if self.thresholds is not None:
            values = self.thresholds.of(metadata.labels, metadata.categories)
            metadata, origin["thresholds"] = replace(metadata, thresholds=values), self.thresholds.source
        if self.preprocess is not None:
            from mlperturb.model.preprocess import Preprocess

            own = metadata.preprocess
            origin |= {"readers": self.readers} if self.readers == "given" or "readers" not in own else {}
            read, origin["preprocess"] = self.merge(lambda: Preprocess.from_dict(own), "the checkpoint")
            metadata = replace(metadata, preprocess=read.to_dict())
        if self.activation is not None:
            metadata, origin["activation"] = replace(metadata, activation=self.activation), "given"
        if origin == metadata.origin:
            return metadata
        return replace(metadata, provenance={**metadata.provenance, "origin": origin})


def check_activation(activation: object) -> str:
    """Return the name of an activation.

    Raises:
        UsageError: if it is neither sigmoid nor softmax.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"expected `activation` {' or '.join(ACTIVATIONS)}, got {activation!r:.60}")
    return str(activation)


def read_thresholds(value: object) -> Thresholds:
    """Return thresholds that a user gives: a number for all labels, a CSV table, or in Python a mapping or a sequence.

    A table has the columns `name` and `threshold`, or `category` and `threshold` (a column `name` beside them names
    the categories). A row whose name or category is `*` speaks for all that the table does not name.

    Args:
        value: a number, as text too; the path of a CSV table; numbers by label; or a number for each label, in order.

    Raises:
        UsageError: if a threshold is not inside (0, 1), or the table cannot be read.
    """
    if isinstance(value, Mapping):
        return Thresholds("given", labels={str(name): _threshold(one, "given") for name, one in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return Thresholds("given", ordered=tuple(_threshold(one, "given") for one in value))
    if isinstance(value, str | Path):
        number = _to_number(str(value))
        if number is None:
            return read_threshold_table(Path(value))
        value = number
    return Thresholds("given", single=_threshold(value, "given"))


def read_threshold_table(path: Path) -> Thresholds:
    """Read a CSV table of thresholds, see `read_thresholds`.

    Raises:
        UsageError: if the table cannot be read, or a threshold is not inside (0, 1).
    """
    rows = read_table(path)
    head = rows[0]
    column = next((name for name in ("threshold", "best_threshold") if name in head), None)
    if column is None or not {"name", "category"} & head.keys():
        raise UsageError(f"expected a table with the columns `threshold` and `name` or `category` in {path}")
    groups = [row.get("category") or "" for row in rows]
    by_category = "category" in head and ("name" not in head or len(set(groups)) == len(groups))
    key = "category" if by_category else "name"
    values: dict[str, float] = {}
    for row in rows:
        name = row.get(key) or ""
        if not name or name in values:
            raise UsageError(f"expected a {key} once in each row of {path}, got {name!r}")
        values[name] = _threshold(_to_number(row[column] or ""), f"for {name!r} in {path}", row[column])
    single = values.pop(_REST, None)
    if not by_category:
        return Thresholds(f"{path.name}, by label", single, labels=values)
    names = {row["category"]: row["name"] for row in rows if row.get("name")}
    return Thresholds(f"{path.name}, by category", single, categories=values, names=names)


def _threshold(value: object, where: str, shown: object = None) -> float:
    if not is_number(value) or not 0 < float(value) < 1:  # type: ignore[arg-type]
        raise UsageError(f"expected `thresholds` inside (0, 1), got {shown or value!r:.60} {where}")
    return float(value)  # type: ignore[arg-type]


def _to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def read_label_file(path: Path) -> tuple[tuple[str, ...], Categories]:
    """Read label names: of a text, one on each line; of a CSV table with a column `name`, and `category` if it has one.

    Raises:
        UsageError: if the file cannot be read, or the names are not distinct.
    """
    categories = Categories()
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = read_table(path)
        if "name" not in rows[0]:
            raise UsageError(f"expected a table with a column `name` in {path}, got {', '.join(rows[0])!r:.80}")
        names = tuple((row["name"] or "").strip() for row in rows)
        if "category" in rows[0]:
            categories = Categories(tuple(row["category"] or "" for row in rows))
    else:
        lines = (line.strip().strip("\ufeff") for line in _read_text(path).splitlines())  # a BOM cannot be seen
        names = tuple(line for line in lines if line)
    if not names or not all(names) or len(set(names)) != len(names):
        raise UsageError(f"expected distinct label names, one in each line, in {path}")
    return names, categories


def read_label_names(labels: Sequence[str] | Path | None) -> tuple[tuple[str, ...] | None, Categories]:
    """Return the label names that a user gives as a list or as a file, and their categories.

    Raises:
        UsageError: if they are not distinct names, or the file cannot be read.
    """
    if labels is None:
        return None, Categories()
    return read_label_file(labels) if isinstance(labels, Path) else (check_labels(labels), Categories())


def read_preprocess(path: Path) -> dict[str, Any]:
    """Read the fields of a `Preprocess` from a JSON file; which fields there are is checked where they are used.

    Raises:
        UsageError: if the file is not a JSON object.
    """
    try:
        found = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"expected a JSON object in {path}, got no JSON") from error
    if not isinstance(found, dict):
        raise UsageError(f"expected a JSON object in {path}, got {type(found).__name__}")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV (or, by its suffix, TSV) table by column; at least one row.

    Raises:
        UsageError: if the table cannot be read, or has no rows.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        rows = list(csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not rows:
        raise UsageError(f"expected a table with at least one row in {path}")
    return rows


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise UsageError(f"no such file: {path}")
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"expected at most {_MAX_BYTES} bytes in {path}, got {path.stat().st_size}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
