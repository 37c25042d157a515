"""`mlperturb figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.cli.console import out as stdout
from mlperturb.cli.console import print_error, print_note, printable
from mlperturb.cli.options import Overwrite, make_folder
from mlperturb.errors import ImageError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("case", "histogram", "jpeg", "all")


def figures(
    reports: Annotated[
        list[Path],
        typer.Argument(help="Reports of `attack`, jpeg-defence.json, or their folders.", show_default=False),
    ],
    kind: Annotated[str, typer.Option(help="case (Figure 2), histogram (Figure 1), jpeg (Figure 3), or all.")] = "all",
    format: Annotated[str, typer.Option(help="png, pdf or svg.")] = "png",
    label: Annotated[
        list[str] | None, typer.Option(help="Of the histograms; by default those attacked on the most images.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default `figures` beside the first report.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw the paper's figures: a case study for each image, histograms over all, the JPEG defence."""
    from mlperturb.figures import FORMATS, save_figure
    from mlperturb.report import reading

    if kind not in KINDS:
        raise UsageError(f"unknown --kind {kind!r}: expected {', '.join(KINDS)}")
    if format not in FORMATS:
        raise UsageError(f"unknown --format {format!r}: expected {', '.join(FORMATS)}")
    attacks, defences = _read(reports, kind)
    first = reports[0] if reports[0].is_dir() else reports[0].parent
    folder = out or first / "figures"
    make_folder(folder)
    errors = count = 0
    with reading(reports[0]):
        for name, figure in _draw(attacks, defences, kind, label or []):
            if isinstance(figure, ImageError):
                print_error(str(figure))
                errors += 1
                continue
            path = folder / f"{name}.{format}"
            if path.exists() and not overwrite:
                raise UsageError(f"{path} exists already: give --overwrite or another --out")
            save_figure(figure, path)
            count += 1
    stdout.print(f"{count} figures in {printable(str(folder))}", soft_wrap=True)
    raise typer.Exit(int(errors > 0))


def _read(paths: list[Path], kind: str) -> tuple[list[tuple[Path, dict[str, Any]]], list[dict[str, Any]]]:
    """Return the reports of `attack` with their folders, and the results of `jpeg-defend`."""
    from mlperturb.defence import SCHEMA
    from mlperturb.report import read_report

    attacks, defences = [], []
    for path in paths:
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and (path / "jpeg-defence.json").is_file():
            defences.append(path / "jpeg-defence.json")
        if path.is_file():
            try:
                is_defence = json.loads(path.read_text(encoding="utf-8")).get("schema") == SCHEMA
            except (OSError, ValueError, AttributeError):
                is_defence = False
            if is_defence:
                defences.append(path)
                continue
        if kind == "jpeg" and path.is_dir() and defences:
            continue
        attacks.append((folder, read_report(path)))
    if kind == "jpeg" and not defences:
        raise UsageError("no jpeg-defence.json there: run `mlperturb jpeg-defend` first")
    if kind in ("case", "histogram") and not attacks:
        raise UsageError(f"--kind {kind} needs a report of `attack`")
    return attacks, [json.loads(path.read_text(encoding="utf-8")) for path in defences]


def _draw(
    attacks: list[tuple[Path, dict[str, Any]]], defences: list[dict[str, Any]], kind: str, labels: list[str]
) -> Any:
    """Yield names and figures, or the error of a picture that cannot be read."""
    from mlperturb.figures import attacked_labels, draw_case, draw_histogram, draw_jpeg

    if kind in ("case", "all"):
        for number, (folder, report) in enumerate(attacks):
            described = report["classifier"]
            thresholds = dict(zip(described["labels"], described["thresholds"], strict=True))
            method = report["settings"]["method"]
            for image in report["images"]:
                name = image["files"]["adversarial"]
                if name is None or Path(name).name != name:
                    continue
                stem = name.removesuffix(".adv.png")
                prefix = f"case-{number + 1}-{method}" if len(attacks) > 1 else "case"
                try:
                    yield f"{prefix}-{stem}", draw_case(image, thresholds, folder, method)
                except ImageError as error:
                    yield stem, error
    if kind in ("histogram", "all") and attacks:
        reports = [report for _, report in attacks]
        chosen = labels or attacked_labels(reports)
        if not chosen:
            print_note("no label was attacked: no histogram")
        for label in chosen:
            yield f"histogram-{_slug(label)}", draw_histogram(reports, label)
    if kind in ("jpeg", "all"):
        for number, result in enumerate(defences):
            drawn: dict[str, Figure] = draw_jpeg(result)
            for name, figure in drawn.items():
                yield (f"{name}-{number + 1}" if len(defences) > 1 else name), figure


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)[:100]
