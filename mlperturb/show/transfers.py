"""Lay out and draw what files made on one classifier do to others: `transfer`, and the matrix of `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mlperturb.show.figures import PAGE, STYLE
from mlperturb.show.grids import Grid
from mlperturb.system.text import printable, shorten

_MOST = 8  # labels of a pair that are shown by name
_SHARES = ("fooled", "and all kept", "flips hold", "kept broken")


def transfer_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """Lay out the pairs of `transfer`: files that fool, flips that hold, kept labels that break, labels that lack."""
    cells = []
    for row in rows:
        lacks = list(row["missing"])
        missing = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
        cells.append([row["source"], row["target"], *_shares(row), missing or "-"])
    return Grid("files before other classifiers", ("made on", "judged on", *_SHARES, "lacks"), cells, keys=2)


def label_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """Lay out, for each pair of `transfer`, the labels that flipped or broke most often."""
    cells = []
    for row in rows:
        shown = [name for name, one in row["labels"].items() if one["flips"]["total"] or one["broken"]["labels"]]
        often = {name: sum(row["labels"][name][key]["labels"] for key in ("flips", "broken")) for name in shown}
        shown.sort(key=often.__getitem__, reverse=True)
        for name in shown[:_MOST]:
            one = row["labels"][name]
            shares = [_share(one[key]["labels"], one[key]["total"]) for key in ("flips", "broken")]
            cells.append([row["source"], row["target"], name, *shares])
        if len(shown) > _MOST:
            cells.append([row["source"], row["target"], f"{len(shown) - _MOST} others", "-", "-"])
    return Grid("by label", ("made on", "judged on", "label", *_SHARES[2:]), cells, keys=3)


def matrix_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """Lay out the counts of `experiment.matrix`."""
    columns = ("case", "method", "made on", "judged on", "images", *_SHARES)
    cells = [
        [row["case"], row["method"], row["source"], row["target"], str(row["images"]), *_shares(row)] for row in rows
    ]
    return Grid("files made on each classifier, judged on each", columns, cells, keys=4)


def draw_transfer(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the pairs as heat maps, source by target: flips that hold, and files with every label as asked."""
    sources, targets = (list(dict.fromkeys(row[key] for row in rows)) for key in ("source", "target"))
    shares = np.full((2, len(sources), len(targets)), np.nan)
    for row in rows:
        pairs = (row["flips"]["labels"], row["flips"]["total"]), (row["successes"], row["images"])
        place = sources.index(row["source"]), targets.index(row["target"])
        for number, (part, whole) in enumerate(pairs):
            shares[(number, *place)] = part / whole if whole else np.nan
    size = (PAGE, 1.4 + 0.4 * min(len(sources), 40))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, values, title in zip(panels, shares, ("flips that hold", "every label as asked"), strict=True):
            axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                text, colour = "-" if np.isnan(value) else f"{value:.0%}", "white" if value < 0.6 else "black"
                axes.text(column, row, text, ha="center", va="center", color=colour)
            axes.set_xticks(range(len(targets)), [shorten(printable(name), 22) for name in targets], rotation=20)
            axes.set_yticks(range(len(sources)), [_lines(name) for name in sources])
            axes.set(xlabel="judged on", title=title)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("made on")
    return figure


def _lines(name: str) -> str:
    """Return a name for an axis, each of its lines shortened."""
    return "\n".join(shorten(printable(line), 34) for line in name.split("\n"))


def _shares(row: dict[str, Any]) -> list[str]:
    """Return the cells of `_SHARES`."""
    pairs = [(row[key], row["images"]) for key in ("fooled", "successes")]
    pairs += [(row[key]["labels"], row[key]["total"]) for key in ("flips", "broken")]
    return [_share(*pair) for pair in pairs]


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} {part / whole:.0%}" if whole else "-"
