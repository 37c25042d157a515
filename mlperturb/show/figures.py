"""The paper's figures from reports: case study (Figure 2), histograms (Figure 1), JPEG (Figure 3)."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mlperturb.errors import UsageError
from mlperturb.labels import present_labels
from mlperturb.photos.images import Pixels, read_photo
from mlperturb.run.outputs import FIGURE_OF
from mlperturb.run.pictures import find_output, find_photo
from mlperturb.run.report import thresholds_of
from mlperturb.show.shown import Shown, choose_labels
from mlperturb.system.files import write_file
from mlperturb.system.text import counted, printable, shorten

Format = Literal["png", "pdf", "svg"]
FORMATS: tuple[str, ...] = get_args(Format)

# Okabe and Ito's colours, which the colour-blind can tell apart; red in place of their vermilion, which looks orange.
_GREY, _BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY = (
    "#999999",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#C8102E",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (_BLUE, _RED, _GREEN, _PURPLE, _ORANGE, _SKY, "black")
_MARKERS = "os^Dv"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "svg.hashsalt": "mlperturb",  # the same file each time
    "text.parse_math": False,  # a label may have a dollar sign
}
_COLUMN, PAGE = 3.4, 7.0  # widths in inches, for a paper of two columns
_BARS = 9  # labels that a case study shows
_LINES = {  # style and words of each share over quality
    "recovered": ("-", "flipped labels recovered"),
    "damaged": ("--", "kept labels damaged"),
    "clean_damaged": (":", "clean photo damaged"),
}
_BINS = [number / 20 for number in range(21)]


def draw_case(report: dict[str, Any], image: dict[str, Any], folder: Path) -> Figure:
    """Draw one attacked photo as Figure 2: photo, adversarial photo, map, probabilities before and after.

    Args:
        report: a report of `attack`.
        image: a record of the report that has files.
        folder: the folder of the files.

    Raises:
        ImageError: if a picture cannot be read.
    """
    thresholds = thresholds_of(report["classifier"])
    after = image["probabilities"]["after"]
    present = [label for label, there in image["truth"].items() if there]
    photo = find_photo(image, folder, report["settings"])
    pictures: list[tuple[str, Pixels | None]] = [
        (f"photo: {_listed(present)}", None if photo is None else read_photo(photo).rgb)
    ]
    rmsd, largest = image["distortion"]["rmsd"], image["distortion"]["linf"]
    now = _listed(present_labels(after, thresholds))
    title = f"{printable(report['settings']['method'])}, {image['status']}: {now}"
    for kind, words in (
        ("adversarial", title),
        ("map", f"change: RMSD {rmsd:.2f}, largest {largest:.0f} of 255"),
    ):
        path = find_output(image, kind, folder, report["settings"])
        assert path is not None
        pictures.append((words, read_photo(path).rgb))
    shown = choose_labels(image, thresholds, _BARS)
    with matplotlib.rc_context(STYLE):
        return _lay_out(pictures, shown, len(thresholds) - len(shown))


def _lay_out(pictures: Sequence[tuple[str, Pixels | None]], shown: list[Shown], hidden: int) -> Figure:
    """Draw pictures side by side, their titles in a row above, the probabilities below; sizes are in inches."""
    gap, line = 0.1, 0.125
    wide = (PAGE - gap * (len(pictures) + 1)) / len(pictures)
    titles = [_wrap(title, int(wide / 0.0585)) for title, _ in pictures]
    ratio = max(pixels.shape[0] / pixels.shape[1] for _, pixels in pictures if pixels is not None)
    high, top = wide * min(max(ratio, 0.3), 1.6), line * max(title.count("\n") + 1 for title in titles) + gap
    below = 0.17 * len(shown) + 0.5
    whole = top + high + below + gap
    figure = Figure(figsize=(PAGE, whole))
    for number, (title, (_, pixels)) in enumerate(zip(titles, pictures, strict=True)):
        left = gap + number * (wide + gap)
        figure.text(left / PAGE, 1 - (top - 0.4 * gap) / whole, title, fontsize=7, va="bottom", linespacing=1.15)
        panel = figure.add_axes((left / PAGE, 1 - (top + high) / whole, wide / PAGE, high / whole))
        panel.set_axis_off()
        panel.set_anchor("NW")  # under its title
        if pixels is None:
            panel.text(0, 1, "the photo is gone", fontsize=7, va="top", color=_GREY)
        else:
            panel.imshow(pixels)
    axes = figure.add_axes((1.35 / PAGE, 0.4 / whole, 3.75 / PAGE, (below - 0.4 - gap / 2) / whole))
    _draw_bars(axes, shown, hidden)
    return figure


def _draw_bars(axes: Axes, shown: list[Shown], hidden: int) -> None:
    """Draw the probabilities before and after of some labels, and say how many labels are left out."""
    colours = {"flip": _RED, "keep": _BLUE, "free": _GREY}
    places = np.arange(len(shown))
    painted = [colours[one.group] for one in shown]
    axes.barh(places - 0.2, [one.before for one in shown], 0.36, color=painted, alpha=0.4)
    axes.barh(places + 0.2, [one.after or 0.0 for one in shown], 0.36, color=painted)
    for place, one in zip(places, shown, strict=True):
        axes.plot([one.threshold] * 2, [place - 0.45, place + 0.45], color="black", linewidth=0.8)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5), xlabel="probability before (pale) and after")
    axes.set_yticks(places, [shorten(printable(one.label), 20) for one in shown])
    axes.tick_params("y", length=0)
    for tick, colour in zip(axes.get_yticklabels(), painted, strict=True):
        tick.set_color(colour)
    words = {"flip": "A: to flip", "keep": "B: to keep", "free": "neither"}
    groups = {one.group for one in shown}
    handles: list[Any] = [Patch(color=colours[name], label=text) for name, text in words.items() if name in groups]
    handles.append(Line2D([], [], color="black", linewidth=0.8, label="threshold"))
    title = f"{counted(hidden, 'more label')} not shown" if hidden else None
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, title=title,
                title_fontsize=7, alignment="left")  # fmt: skip


def attacked_labels(reports: Sequence[dict[str, Any]], most: int = 4) -> list[str]:
    """Return at most `most` labels, those to flip on most images first.

    A label to flip on a single image is left out, unless every label is.
    """
    counts = Counter(label for report in reports for image in report["images"] for label in image["flip"])
    common = [label for label, count in counts.most_common(most) if count > 1]
    return common or [label for label, _ in counts.most_common(1)]


def draw_histogram(reports: Sequence[dict[str, Any]], label: str) -> Figure:
    """Draw Figure 1: the distribution of a label's probability before the attack, and after each report's.

    Raises:
        UsageError: if the label was not to flip on any image.
    """
    clean: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for report in reports:
        name = str(report["settings"]["method"])
        if [other["settings"]["method"] for other in reports].count(name) > 1:
            name += f", {report['settings']['budget']}"
        if name in series:
            name = f"{name} ({len(series) + 1})"
        for image in report["images"]:
            if label in image["flip"] and image["probabilities"]:
                clean[image["source"]] = image["probabilities"]["before"][label]
                last = image["probabilities"]["after"] or image["probabilities"]["before"]  # failed: no file
                series.setdefault(name, []).append(last[label])
    if not clean:
        raise UsageError(f"no image of these reports was asked to flip {label!r}")
    threshold = thresholds_of(reports[0]["classifier"])[label]
    return draw_distribution({"clean": list(clean.values()), **series}, label, threshold)


def draw_distribution(series: Mapping[str, Sequence[float]], label: str, threshold: float) -> Figure:
    """Draw histograms of a label's probability: the first series filled grey, and the other series over it.

    Args:
        series: probabilities by name, such as those of the clean photos, then those after each method.
        label: the name of the label.
        threshold: the probability from which the label is present, drawn as a dashed line.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_COLUMN, 2.3), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(series.items()):
            colour = COLOURS[(number - 1) % len(COLOURS)] if number else _GREY
            face = to_rgba(colour, 0.15 if number else 0.6)
            axes.hist(
                values, _BINS, histtype="stepfilled", facecolor=face, edgecolor=colour, lw=1.2, label=printable(name)
            )
        axes.axvline(threshold, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlim=(0, 1), xlabel=f"probability of {shorten(printable(label), 30)}", ylabel="images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=3 if len(series) == 3 else 2)
    return figure


def draw_jpeg_histogram(result: dict[str, Any]) -> Figure:
    """Draw Figure 3 from `jpeg-defend`: the label flipped most often, on clean, attacked and defended photos.

    The defence is the best setting, or the last setting if none is best; the probabilities are the first reader's.
    """
    chosen = result["best"] or result["qualities"][-1]
    best = f"{chosen['defence']}:{chosen['quality']}"
    images = [image for image in result["images"] if "probabilities" in image]
    thresholds = thresholds_of(result["classifier"])
    flips: Counter[str] = Counter()
    for image in images:
        now = image["probabilities"]["adversarial"]
        there = set(present_labels(now, thresholds))
        flips.update(dict.fromkeys(image["flip"], 0))
        flips.update(label for label in image["flip"] if (label in there) != image["truth"][label])
    label = flips.most_common(1)[0][0] if flips else next(iter(thresholds))
    series: dict[str, list[float]] = {"clean": [], "adversarial PNG": [], best: []}
    for image in images:
        probabilities = image["probabilities"]
        if label not in image["flip"]:
            continue
        if probabilities["clean"]:
            series["clean"].append(probabilities["clean"][label])
        series["adversarial PNG"].append(probabilities["adversarial"][label])
        series[best].append(probabilities["defended"][best][label])
    return draw_distribution(series, label, thresholds[label])


def draw_curve(result: dict[str, Any]) -> Figure:
    """Draw the counts of `jpeg-defend`: shares over quality, and recovered against damaged for every setting."""
    rows = result["qualities"]

    def share(row: dict[str, Any], key: str) -> float:
        return row[key]["labels"] / row[key]["total"] if row[key]["total"] else float("nan")

    kinds = list(dict.fromkeys(row["defence"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        handles = []
        for number, kind in enumerate(kinds):
            mine = sorted((row for row in rows if row["defence"] == kind), key=lambda row: int(row["quality"]))
            colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)]
            if kind in ("jpeg", "webp"):
                for key, (style, _) in _LINES.items():
                    values = [share(row, key) for row in mine]
                    left.plot([row["quality"] for row in mine], values, style, color=colour, marker=marker, ms=3)
            points: dict[tuple[float, float], list[str]] = {}
            for row in mine:
                points.setdefault((share(row, "damaged"), share(row, "recovered")), []).append(str(row["quality"]))
            handles += right.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, lw=0.8, label=kind)
            for point, names in points.items():
                text = ", ".join(names) if len(names) < 4 else f"{names[0]}, ..., {names[-1]}"
                place = (3, 3 + 6 * (number % 3))
                right.annotate(text, point, textcoords="offset points", xytext=place, fontsize=6, color=colour)
        left.set(xlabel="quality", ylabel="share of labels", ylim=(-0.03, 1.03))
        right.set(xlabel="kept labels damaged", ylabel="flipped labels recovered", ylim=(-0.03, 1.12))
        if left.lines:
            handles += [left.plot([], [], style, color="black", label=words)[0] for style, words in _LINES.values()]
        else:
            left.set_visible(False)
        if not any(row["damaged"]["total"] for row in rows):
            right.set_visible(False)
        figure.legend(handles=handles, loc="outside upper center", ncols=4, handlelength=3)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's ending: .png, .pdf or .svg.

    Raises:
        OutputError: if the file cannot be written.
    """
    stream = io.BytesIO()
    kind = path.suffix[1:]
    data: dict[str, dict[str, str | None]] = {
        "png": {"Software": FIGURE_OF},  # by which a search for photos knows it
        "pdf": {"CreationDate": None},
        "svg": {"Date": None},
    }
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings on glyphs that the font lacks
        figure.savefig(stream, format=kind, dpi=200, metadata=data[kind])
    write_file(path, stream.getvalue())


def _listed(labels: Sequence[str]) -> str:
    names = [shorten(printable(label), 20) for label in labels[:4]]
    return ", ".join(names) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "") or "no label"


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
