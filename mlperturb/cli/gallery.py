"""`mlperturb gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlperturb.cli.console import make_bar, print_error
from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import ANYWHERE, OUTPUT, Overwrite, Quiet
from mlperturb.errors import UsageError
from mlperturb.run.outputs import folder_of, make_folder, page_paths, refuse_existing
from mlperturb.system.text import printable


def gallery(
    report: Annotated[
        Path, typer.Argument(**ANYWHERE, help="A report of `attack`, or its folder.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(**ANYWHERE, help="File of the page; default: index.html beside the report.", **OUTPUT)
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a report as one self-contained page, or pages of 200 photos: photos, maps, probabilities, reasons."""
    from mlperturb.run.report import read_report, reading
    from mlperturb.show.gallery import write_gallery

    result, folder = read_report(report)
    path = out or folder_of(report) / "index.html"
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(f"expected --out to be a file that ends in .html, got {path}")
    with reading(report):
        pages = page_paths(path, len(result["images"]))
    refuse_existing(pages, overwrite=overwrite)
    make_folder(path.parent)
    missing = []
    with reading(report), make_bar(quiet=quiet) as bar:
        task = bar.add_task("making thumbnails", total=len(result["images"]))

        def done(problem: str | None) -> None:
            bar.update(task, advance=1)
            if problem:
                missing.append(problem)

        write_gallery(result, folder, path, done)
    for problem in missing:
        print_error(problem)
    if not quiet:
        more = f" to {pages[-1].name}" if len(pages) > 1 else ""
        stdout.print(f"page {printable(str(path))}{printable(more)}", soft_wrap=True)
    raise typer.Exit(int(bool(missing)))
