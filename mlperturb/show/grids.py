"""Lay out rows of numbers as tables of text, and write them in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlperturb.system.text import printable


@dataclass(frozen=True)
class Grid:
    """A table of text cells, which the functions below write in several formats, and `tables.show` in the terminal.

    Attributes:
        title: the title.
        columns: the headings; the first `keys` columns name the row.
        rows: the cells.
        best: (row, column) of the best cell of each group, printed bold.
        keys: number of columns that name the row.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    keys: int = 1


_METRICS = (  # key, heading, +1 if higher is better
    ("rmsd", "RMSD", -1),
    ("hamming_a", "Hamm. (A)", -1),
    ("hamming_b", "Hamm. (B)", -1),
    ("f1", "F1", 1),
    ("ranking_loss", "rank. loss", -1),
    ("map", "mAP", 1),
    ("auc", "AUC", 1),
    ("kendall_tau", "tau_b", 1),
)


def evaluation_grid(rows: Sequence[dict[str, Any]], which: str, *, digits: int = 4) -> Grid:
    """Lay out rows of `tabulate` as Tables IV and V; `which` result is `float` or `saved`."""
    success = "success_rate" if which == "saved" else "success_rate_float"
    titles = {"saved": "8-bit PNG, as read back", "float": "float result, before rounding (the paper's convention)"}
    columns = ("case", "images", "method", *(heading for _, heading, _ in _METRICS), "succ.", "passes")
    cells, best = [], set()
    for number, row in enumerate(rows):
        values = [row[which][key] for key, _, _ in _METRICS]
        numbers = [_number(value, digits) for value in values]
        names = [row["case"], str(row["images"]), row["method"]]
        cells.append([*names, *numbers, _percent(row[success]), f"{row['passes']:.0f}"])
        for column, (key, _, sign) in enumerate(_METRICS):
            group = [sign * other[which][key] for other in rows if _comparable(other, row, which, key)]
            if _comparable(row, row, which, key) and sign * values[column] >= max(group) - 5e-5:
                best.add((number, 3 + column))
    return Grid(titles[which], columns, cells, frozenset(best), keys=3)


def _comparable(other: dict[str, Any], row: dict[str, Any], which: str, key: str) -> bool:
    """Say whether `other` competes with `row` for the best value of the case; for RMSD, only if most of A flipped."""
    if other["case"] != row["case"] or other[which][key] is None:
        return False
    return bool(key != "rmsd" or other[which]["hamming_a"] < 0.5)


_CURVE = (("rmsd_50", "RMSD 50%"), ("rmsd_90", "RMSD 90%"), ("area", "area"))


def curve_grid(rows: Sequence[dict[str, Any]], *, digits: int = 4) -> Grid:
    """Lay out success against RMSD: the RMSD within which half and nine tenths succeed, the area, passes apart."""
    headings = [f"{heading}{end}" for end in ("", " float") for _, heading in _CURVE]
    columns = ("case", "images", "method", *headings, "forward", "backward")
    cells = []
    for row in rows:
        values = [row["curve"][which][key] for which in ("saved", "float") for key, _ in _CURVE]
        texts = ["-" if value is None else _number(value, digits) for value in values]
        passes = [f"{row[name]:.0f}" for name in ("forward", "backward")]
        cells.append([row["case"], str(row["images"]), row["method"], *texts, *passes])
    return Grid("success against RMSD, a failure as infinite: of the PNG, of the float result", columns, cells, keys=3)


def classifier_grid(metrics: dict[str, dict[str, Any]]) -> Grid:
    """Lay out the `metrics.classifier_metrics` of data sets as Table III."""
    names = ("images", "hamming", "macro_f1", "micro_f1", "ranking_loss", "map")
    headings = ("data", "images", "Hamming", "macro-F1", "micro-F1", "rank. loss", "mAP")
    rows = [[data, *(_number(values[name]) for name in names)] for data, values in metrics.items()]
    return Grid("Table III: the classifier's own figures", headings, rows)


def to_markdown(grids: Sequence[Grid]) -> str:
    """Return grids as Markdown, the best of each group bold."""
    parts = []
    for grid in grids:
        lines = [f"**{_escape_markdown(grid.title)}**", "", "| " + " | ".join(grid.columns) + " |"]
        lines.append("|" + "---|" * grid.keys + "---:|" * (len(grid.columns) - grid.keys))
        for number, cells in enumerate(grid.rows):
            texts = [_escape_markdown(cell) for cell in cells]
            marked = [f"**{t}**" if (number, column) in grid.best else t for column, t in enumerate(texts)]
            lines.append("| " + " | ".join(marked) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def to_latex(grids: Sequence[Grid]) -> str:
    """Return grids as LaTeX tables (packages booktabs and graphicx), the best of each group bold."""
    parts = []
    for grid in grids:
        align = "l" * grid.keys + "r" * (len(grid.columns) - grid.keys)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape_latex(grid.title)}}}"]
        lines += [r"\resizebox{\linewidth}{!}{%", rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
        lines += [" & ".join(map(_escape_latex, grid.columns)) + r" \\", r"\midrule"]
        for number, cells in enumerate(grid.rows):
            if number and grid.keys > 1 and cells[0] != grid.rows[number - 1][0]:
                lines.append(r"\midrule")
            texts = [_escape_latex(cell) for cell in cells]
            marked = [rf"\textbf{{{t}}}" if (number, column) in grid.best else t for column, t in enumerate(texts)]
            lines.append(" & ".join(marked) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _harmless(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of Tables IV and V in full precision, with intervals: one line per case, method and result."""
    stream = io.StringIO()
    keys = [key for key, _, _ in _METRICS]
    writer = csv.writer(stream, lineterminator="\n")
    curve = [key for key, _ in _CURVE]
    wanted = ("success_rate", "passes", *keys, *curve, "forward", "backward")
    names = [f"{key}{end}" for key in wanted for end in ("", "_low", "_high")]
    writer.writerow(["case", "method", "result", "images", *names])
    for row in rows:
        for which, success in (("float", "success_rate_float"), ("saved", "success_rate")):
            means, intervals = (
                [part[success], part["passes"], *(part[which][key] for key in keys)]
                + [part["curve"][which][key] for key in curve]
                + [part["forward"], part["backward"]]
                for part in (row, row["intervals"])
            )
            line = [_harmless(row["case"]), _harmless(row["method"]), which, row["images"]]
            for mean, interval in zip(means, intervals, strict=True):
                line += [mean, *(interval or (None, None))]
            writer.writerow(line)
    return stream.getvalue()


def curves_csv(curves: Sequence[dict[str, Any]]) -> str:
    """Return the steps of curves of success against RMSD, a line each."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    keys = ("rmsd", "success", "low", "high")
    writer.writerow(["case", "method", "result", "images", *keys])
    for curve in curves:
        names = [curve[key] for key in ("case", "method", "result", "images")]
        writer.writerows([*names, *step] for step in zip(*(curve[key] for key in keys), strict=True))
    return stream.getvalue()


def _number(value: float | int | None, digits: int = 4) -> str:
    return "N.A." if value is None else str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "N.A." if value is None else f"{value:.0%}"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", printable(text))


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: "\\" + c for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in printable(text))
