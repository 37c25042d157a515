"""Make tables and lines for the terminal, from records, results and grids."""

from __future__ import annotations

import re
from dataclasses import replace
from heapq import nlargest
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mlperturb.labels import present_labels
from mlperturb.run.record import MANY, REST, Record
from mlperturb.show.grids import Grid
from mlperturb.system.text import counted, listed, printable

_ROWS = 30  # labels of a photo that are shown
_MOVED = 5  # labels to keep that changed most, of many labels


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table


def clean(text: str) -> Text:
    """Return untrusted text without markup, its control characters as escapes."""
    return Text(printable(text))


def image_line(record: Record) -> Text:
    """Return one line on one photo: status, RMSD, passes, compressions survived."""
    line = f"{clean(record.source).plain}: {record.status}"
    if record.distortion:
        line += f", RMSD {record.distortion.rmsd:.3f}"
        if record.distortion_float and record.success_float:
            line += f" (float {record.distortion_float.rmsd:.3f})"
        line += f", {int(record.cost['forward'])} forward + {int(record.cost['backward'])} backward passes"
    if record.classifiers is not None:
        fooled = [name for name, one in record.classifiers.items() if not one["violated"]]
        line += f"; fools {len(fooled)} of {len(record.classifiers)} classifiers"
    lost = [name for name, reader in (record.readers or {}).items() if reader["violated"]]
    if lost:
        line += f"; does not hold in {', '.join(lost)}"
    return Text(line + _survival(record.survival or {}))


def _survival(survival: dict[str, dict[str, Any]]) -> str:
    """Return the words on the compressions after which a file holds, and on those after which it does not."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, one in survival.items():
        parts[not one["violated"]].append(name)
    words = {True: "holds after", False: "does not hold after"}
    few = len(survival) <= 4
    return "".join(
        f"; {words[held]} {', '.join(names) if few else f'{len(names)} of {len(survival)} compressions'}"
        for held, names in parts.items()
        if names
    )


def image_table(record: Record) -> Table:
    """Show one photo: labels to flip, and labels to keep that are present or violated, before and after.

    Of more than `_ROWS` such labels, it shows those that changed most. Of a classifier of many labels, it shows the
    labels to keep that changed most too.
    """
    table = _table("label", "wanted", "before", "after", "")
    if record.probabilities is None or record.constraints is None or record.truth is None:
        return table
    before, after = record.probabilities["before"] or {}, record.probabilities["after"] or {}
    violated, flipped = set(record.constraints["violated"]), set(record.flip)
    change = {label: abs(value - before.get(label, value)) for label, value in after.items()}
    everything = record.keep == [REST] and REST not in record.truth
    kept = [label for label in before if label not in flipped] if everything else record.keep
    shown = [*record.flip, *(label for label in kept if record.truth.get(label) or label in violated)]
    if len(shown) > _ROWS:
        shown = nlargest(_ROWS, shown, key=lambda label: (label in violated, change.get(label, 0.0)))
    elif record.constraints["total"] > MANY:
        quiet = set(kept) - set(shown)
        shown += nlargest(_MOVED, (label for label in before if label in quiet), key=lambda one: change.get(one, 0.0))
    for label in shown:
        wanted = ("absent" if record.truth.get(label) else "present") if label in flipped else "keep"
        mark = "does not hold" if label in violated else ""
        values = [f"{values[label]:.3f}" if label in values else "-" for values in (before, after)]
        table.add_row(clean(label), wanted, *values, mark)
    others = record.constraints["total"] - len(shown)
    if others:
        missing = len(violated.difference(shown))
        lost = f"{missing} {'does' if missing == 1 else 'do'} not hold" if missing else ""
        table.add_row(counted(others, "other"), "keep" if flipped <= set(shown) else "", "", "", lost)
    return table


def classifier_tables(record: Record) -> list[Table]:
    """Show one photo: a table for the classifier, or one for each of several; none without probabilities."""
    if record.probabilities is None:
        return []
    if record.classifiers is None:
        return [image_table(record)]
    tables = []
    for name, one in record.classifiers.items():
        own = replace(
            record,
            **{field: one[field] for field in ("truth", "flip", "keep")},
            probabilities={"before": one["before"], "float": None, "after": one["after"]},
            constraints={field: one[field] for field in ("held", "total", "violated")},
        )
        table = image_table(own)
        table.title, table.title_justify = clean(f"{name}: {'fooled' if not one['violated'] else 'not fooled'}"), "left"
        tables.append(table)
    return tables


def summary_table(summary: dict[str, Any]) -> Table:
    """Show the summary of a run."""
    table = _table("", "photos")
    for status in ("success", "unchanged", "partial", "failed", "unreadable"):
        table.add_row(status, str(summary[status]))
    table.add_row("all", str(summary["images"]))
    rmsd, passes = summary["rmsd"], summary["passes"]
    if rmsd["mean"] is not None:
        table.add_row("RMSD mean, median", f"{rmsd['mean']:.3f}, {rmsd['median']:.3f}")
    for name, share in _reader_shares(summary).items():
        table.add_row(f"hold in {name}", share)
    if passes is not None:
        table.add_row("passes an attacked photo", f"{passes['forward']:.0f} + {passes['backward']:.0f}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    return table


def readers_line(summary: dict[str, Any]) -> Text | None:
    """Return one line on the share of the attacked photos that holds in each reader; None for a single reader."""
    shares = _reader_shares(summary)
    return Text("hold in " + ", ".join(f"{name} {share}" for name, share in shares.items())) if shares else None


def _reader_shares(summary: dict[str, Any]) -> dict[str, str]:
    """Return the share of the attacked photos that holds in each reader; empty for a single reader or no such photo."""
    shares: dict[str, float | None] = summary["readers"]
    return {name: f"{share:.0%}" for name, share in shares.items() if share is not None and len(shares) > 1}


def plan_line(image: dict[str, Any], *, rest: bool) -> Text:
    """Return one line on what an attack would do to a photo: the labels that it has, those to flip and to keep.

    With `any`, which label is the nearest is not known yet, nor which labels are the `rest` to keep.
    """
    flip = "the nearest label" if image["any"] else listed(image["flip"], 5)
    kept = "the rest" if image["any"] and rest else len(image["keep"])
    what = f"would flip {flip}, keep {kept}" if flip else "is as asked already"
    size = f"{image['width']} x {image['height']} pixels"
    return clean(f"{image['source']}: {size}; has {listed(image['labels'], 5) or 'no label'}; {what}")


def prediction_table(probabilities: dict[str, float], thresholds: dict[str, float]) -> Table:
    """Show the labels that are present, and the most probable of the others: at least three."""
    ranked = sorted(probabilities, key=lambda label: -probabilities[label])
    table = _table("label", "probability", "")
    present = present_labels({label: probabilities[label] for label in ranked}, thresholds)
    there = set(present)
    absent = [label for label in ranked if label not in there]
    for label in present[:_ROWS]:
        table.add_row(clean(label), f"{probabilities[label]:.3f}", "present")
    if len(present) > _ROWS:
        table.add_row(counted(len(present) - _ROWS, "other"), "", "present")
    for label in absent[: max(3, 5 - len(present))]:
        table.add_row(clean(label), f"{probabilities[label]:.3f}", "")
    return table


def defence_table(result: dict[str, Any]) -> Table:
    """Show the labels that each purification recovered and damaged; mark the best purification."""
    table = _table("defence", "recovered", "damaged", "restored", "clean damaged", "KB", "")
    best = result["best"] and (result["best"]["defence"], result["best"]["quality"])
    for row in result["qualities"]:
        name = f"{row['defence']} {row['quality']}"
        shares = [_share(row[key]["labels"], row[key]["total"]) for key in ("recovered", "damaged")]
        shares.append(_share(row["restored_images"], row["flipped_images"]))
        shares.append(_share(row["clean_damaged"]["labels"], row["clean_damaged"]["total"]))
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1000:.0f}"
        table.add_row(name, *shares, size, "best" if (row["defence"], row["quality"]) == best else "")
    return table


def best_line(result: dict[str, Any]) -> Text:
    """Return one line on the best setting of `jpeg-defend`, or why there is none, and on the readers that decided."""
    best, rows = result["best"], result["qualities"]
    readers = "; decided in " + ", ".join(result["readers"]) if len(result["readers"]) > 1 else ""
    if best:
        equals = f"; equal: {', '.join(best['equals'])}" if best["equals"] else ""
        text = f"best: {best['defence']} {best['quality']} ({best['score']:.3f}: {best['criterion']}{equals})"
    elif not any(row["recovered"]["total"] for row in rows):
        text = "best: none, no label was flipped"
    elif not any(row["recovered"]["labels"] for row in rows):
        text = "best: none, no flipped label came back"
    else:
        text = "best: none, no setting recovers more than it breaks"
    return Text(text + readers)


def adaptive_table(result: dict[str, Any]) -> Table:
    """Show the files that hold after each defence, their mean RMSD and passes: of the plain and the adaptive attack."""
    table = _table("defence", "plain holds", "RMSD", "passes", "adaptive holds", "RMSD", "passes")
    for row in result["qualities"]:
        cells = [f"{row['defence']} {row['quality']}"]
        for which in ("plain", "adaptive"):
            rmsd = row[which]["rmsd"]
            passes = [row[which][name] for name in ("forward", "backward")]
            cells += [
                _share(row[which]["successes"], row[which]["images"]),
                "-" if rmsd is None else f"{rmsd:.3f}",
                "-" if None in passes else f"{passes[0]:.0f} + {passes[1]:.0f}",
            ]
        table.add_row(*cells)
    return table


def _share(count: int, total: int) -> str:
    return f"{count}/{total} {count / total:4.0%}" if total else "-"


def show(grid: Grid) -> Group:
    """Return a grid for the terminal: a table for each value of the columns that name a row, except the last."""
    groups = grid.keys - 1
    tables: dict[tuple[str, ...], Table] = {}
    for number, cells in enumerate(grid.rows):
        head = tuple(cells[:groups])
        if head not in tables:
            tables[head] = _grid_table(grid, groups, clean(", ".join(head)))
        styles = ["bold" if (number, column) in grid.best else "" for column in range(len(cells))]
        texts = [Text(clean(text).plain, style=style) for text, style in zip(cells, styles, strict=True)]
        texts[groups].plain = _fold(texts[groups].plain)
        tables[head].add_row(*texts[groups:])
    return Group(Text(grid.title, style="bold"), *tables.values())


def _grid_table(grid: Grid, groups: int, heading: Text) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=heading if heading else None)
    table.title_justify, table.title_style = "left", "italic"
    for number, column in enumerate(grid.columns[groups:]):
        if not number:
            table.add_column(column, overflow="fold")
            continue
        words = column.split()
        widths = [len(text) for text in (*words, *(cells[groups + number] for cells in grid.rows))]
        table.add_column("\n".join(words), justify="right", min_width=max(widths))
    return table


def _fold(name: str, width: int = 18) -> str:
    """Break the name of a method after its colons into lines of at most `width` characters, where that can be."""
    lines = [""]
    for part in re.findall(r"[^:]*:?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
