"""Records -> Rich tables."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from mlperturb.report import Record


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return table


def clean(text: str) -> Text:
    """Return untrusted text without markup, control characters shown as escapes."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def image_line(record: Record) -> Text:
    """Say in a line how one photo came out."""
    line = f"{clean(record.source).plain}: {record.status}"
    if record.distortion:
        line += f", RMSD {record.distortion.rmsd:.3f}"
        if record.distortion_float and record.success_float:
            line += f" (float {record.distortion_float.rmsd:.3f})"
        line += f", {int(record.cost['forward'])} forward + {int(record.cost['backward'])} backward passes"
    return Text(line)


def image_table(record: Record) -> Table:
    """Show one photo: the flipped labels and what else matters, before and after."""
    table = _table("label", "wanted", "before", "after", "")
    if record.probabilities is None or record.constraints is None or record.truth is None:
        return table
    before, after = record.probabilities["before"] or {}, record.probabilities["after"] or {}
    violated = set(record.constraints["violated"])
    flipped = set(record.flip)
    shown = [*record.flip, *(label for label in record.keep if record.truth[label] or label in violated)]
    for label in shown:
        wanted = ("absent" if record.truth[label] else "present") if label in flipped else "keep"
        mark = "does not hold" if label in violated else ""
        values = [f"{values[label]:.3f}" if label in values else "-" for values in (before, after)]
        table.add_row(clean(label), wanted, *values, mark)
    others = len(record.keep) - sum(label in record.keep for label in shown)
    if others:
        table.add_row(f"{others} others", "keep", "", "", "")
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """Show the summary of a run."""
    table = _table("", "photos")
    for status in ("success", "partial", "failed", "unreadable"):
        table.add_row(status, str(summary[status]))
    table.add_row("all", str(summary["images"]))
    rmsd, photos = summary["rmsd"], max(summary["images"] - summary["unreadable"], 1)
    if rmsd["mean"] is not None:
        table.add_row("RMSD mean, median", f"{rmsd['mean']:.3f}, {rmsd['median']:.3f}")
    table.add_row("passes a photo", f"{summary['forward'] / photos:.0f} + {summary['backward'] / photos:.0f}")
    table.add_row("seconds", f"{summary['seconds']:.1f}")
    return table


def prediction_table(probabilities: dict[str, float], thresholds: dict[str, float]) -> Table:
    """Show the labels present and the next three."""
    ranked = sorted(probabilities, key=lambda label: -probabilities[label])
    count = sum(probabilities[label] >= thresholds[label] for label in ranked)
    table = _table("label", "probability", "")
    present = [label for label in ranked if probabilities[label] >= thresholds[label]]
    absent = [label for label in ranked if probabilities[label] < thresholds[label]]
    for label in [*present, *absent[: max(3, 5 - count)]]:
        table.add_row(clean(label), f"{probabilities[label]:.3f}", "present" if label in present else "")
    return table
