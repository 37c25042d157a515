"""`mlperturb figures`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.cli.console import out as stdout
from mlperturb.cli.console import print_error, print_note
from mlperturb.cli.options import ANYWHERE, OUTPUT, WHAT, Overwrite
from mlperturb.errors import ImageError, UsageError
from mlperturb.labels import split_names
from mlperturb.run.outputs import DEFENCE, FIGURES, HISTOGRAM, folder_of, make_folder, refuse_existing
from mlperturb.system.text import counted, file_stem, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("case", "histogram", "jpeg", "all")


def figures(
    reports: Annotated[
        list[Path],
        typer.Argument(
            **ANYWHERE, help="Reports of `attack`, jpeg-defence.json, or their folders.", show_default=False
        ),
    ],
    kind: Annotated[
        str,
        typer.Option(help="case (Figure 2), histogram (Figure 1), jpeg (Figure 3), or all.", metavar="NAME", **WHAT),
    ] = "all",
    format: Annotated[str, typer.Option(help="png, pdf or svg.", metavar="NAME", **OUTPUT)] = "png",
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL", help="Labels of the histograms; default: the labels attacked on most images.", **WHAT
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(**ANYWHERE, help="Folder of the figures; default: `figures` beside the first report.", **OUTPUT),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw the paper's figures: a case study for each attacked image, histograms over all, the JPEG defence."""
    from mlperturb.show.figures import FORMATS, save_figure

    if kind not in KINDS:
        raise UsageError(f"unknown --kind {kind!r}: expected {', '.join(KINDS)}")
    if format not in FORMATS:
        raise UsageError(f"unknown --format {format!r}: expected {', '.join(FORMATS)}")
    attacks, defences = _read(reports, kind)
    chosen = split_names(label or ())
    known = {name for _, _, report in attacks for image in report["images"] for name in image["flip"]}
    if set(chosen) - known:
        raise UsageError(f"no image of these reports was asked to flip {sorted(set(chosen) - known)[0]!r}")
    folder = out or folder_of(reports[0]) / FIGURES
    make_folder(folder)
    planned: dict[Path, Callable[[], Figure]] = {}
    for stem, draw in _plan(attacks, defences, kind, chosen):
        path, number = folder / f"{file_stem(stem)}.{format}", 1
        while path in planned:
            number += 1
            path = folder / f"{file_stem(stem)}-{number}.{format}"
        planned[path] = draw
    refuse_existing(planned, overwrite=overwrite)
    errors = 0
    for path, draw in planned.items():
        try:
            save_figure(draw(), path)
        except ImageError as error:
            print_error(str(error))
            errors += 1
    count = len(planned) - errors
    stdout.print(f"{counted(count, 'figure')} in {printable(str(folder))}", soft_wrap=True)
    raise typer.Exit(int(errors > 0))


def _read(paths: list[Path], kind: str) -> tuple[list[tuple[Path, Path, dict[str, Any]]], list[dict[str, Any]]]:
    """Return the reports of `attack`, each with its path and the folder of its PNGs; and results of `jpeg-defend`."""
    from mlperturb.experiment.defence import EARLIER, SCHEMA
    from mlperturb.run.report import is_unchanged, read_json, read_report, reading

    attacks, defences = [], []
    for path in paths:
        beside = path / DEFENCE if path.is_dir() else path
        is_defence = beside.name == DEFENCE and beside.is_file()
        if is_defence:
            defences.append(read_json(beside, SCHEMA, *EARLIER))
        if path.is_dir() and is_defence and (kind == "jpeg" or not (path / "report.json").exists()):
            continue
        if path.is_dir() or not is_defence:
            report, folder = read_report(path)
            with reading(path):  # the names of the figures need these values
                for image in report["images"]:
                    image["files"]["adversarial"], report["settings"]["method"], [*image["flip"]], is_unchanged(image)
            attacks.append((path, folder, report))
    if kind == "jpeg" and not defences:
        raise UsageError("expected a jpeg-defence.json for --kind jpeg, got none: run `mlperturb jpeg-defend` first")
    if kind in ("case", "histogram") and not attacks:
        raise UsageError(f"expected a report of `attack` for --kind {kind}")
    return attacks, defences


def _plan(
    attacks: list[tuple[Path, Path, dict[str, Any]]], defences: list[dict[str, Any]], kind: str, labels: list[str]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield each figure's name and the function that draws it."""
    from mlperturb.photos.kinds import strip_ending
    from mlperturb.run.report import is_unchanged
    from mlperturb.show.figures import attacked_labels, draw_case, draw_curve, draw_histogram, draw_jpeg_histogram

    if kind in ("case", "all"):
        for path, folder, report in attacks:
            prefix = f"case-{report['settings']['method']}" if len(attacks) > 1 else "case"
            for image in report["images"]:
                if image["files"]["adversarial"] is not None and not is_unchanged(image):
                    name = strip_ending(str(image["files"]["adversarial"]))
                    yield f"{prefix}-{name}", _guarded(path, partial(draw_case, report, image, folder))
    if kind in ("histogram", "all") and attacks:
        reports = [report for _, _, report in attacks]
        chosen = labels or attacked_labels(reports)
        if not chosen:
            print_note("no label was attacked: no histogram")
        for label in chosen:
            yield f"{HISTOGRAM}{label}", _guarded(attacks[0][0], partial(draw_histogram, reports, label))
    if kind in ("jpeg", "all"):
        for result in defences:
            yield "jpeg-curve", _guarded(Path(DEFENCE), partial(draw_curve, result))
            yield "jpeg-histogram", _guarded(Path(DEFENCE), partial(draw_jpeg_histogram, result))


def _guarded(path: Path, draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Return a function that draws, and turns the errors of a damaged report into one line that names it."""
    from mlperturb.run.report import reading

    def call() -> Figure:
        with reading(path):
            return draw()

    return call
