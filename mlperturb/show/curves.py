"""The picture of an evaluation's case: success against RMSD, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from mlperturb.show.figures import COLOURS, STYLE
from mlperturb.system.text import printable, shorten

_DASHES = ("-", "--", ":")  # for more methods than colours
_SIZE = (4.6, 2.9)  # inches
_RANGE = (0.1, 10.0)  # where no method succeeds


def draw_curves(case: str, curves: Sequence[dict[str, Any]]) -> Figure:
    """Draw the share of photos on which each method succeeds within an RMSD, with its bootstrap band.

    Args:
        case: the name of the case.
        curves: of `experiment.curves.read_curves`, of this case and of a single result.
    """
    reached = [size for curve in curves for size in curve["rmsd"] if size > 0]
    least, most = (0.8 * min(reached), 1.25 * max(reached)) if reached else _RANGE
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            colour, dashes = COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]
            sizes = [least, *(max(size, least) for size in curve["rmsd"]), most]
            shares, low, high = ([0.0, *curve[key], (curve[key] or [0.0])[-1]] for key in ("success", "low", "high"))
            axes.fill_between(sizes, low, high, step="post", color=colour, alpha=0.12, linewidth=0)
            label = shorten(printable(curve["method"]), 24)
            axes.step(sizes, shares, where="post", color=colour, linestyle=dashes, linewidth=1.3, label=label)
        axes.set(xscale="log", xlim=(least, most), ylim=(-0.02, 1.02), xlabel="RMSD of the file, 0 to 255 scale")
        axes.set_ylabel("photos on which the method succeeds")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        narrow = most < 4 * least
        axes.xaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25, linewidth=0.5)
        photos = max(curve["images"] for curve in curves)
        axes.set_title(f"{shorten(printable(case), 40)}: {photos} photo{'' if photos == 1 else 's'}")
        figure.legend(loc="outside right upper")
    return figure
