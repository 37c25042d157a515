"""The end of `evaluate` with several checkpoints: the files made on each, judged on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.cli.console import make_bar, print_error
from mlperturb.cli.console import out as stdout
from mlperturb.system.text import printable

if TYPE_CHECKING:
    from mlperturb.model.classifier import Classifier


def write_matrix(
    out: Path,
    classifiers: Mapping[str, tuple[Classifier, dict[str, Any]]],
    readers: Sequence[str],
    *,
    json: bool,
    quiet: bool,
) -> int:
    """Judge the files of the evaluations in the subfolders of `out`; write and print; return the exit code.

    Args:
        out: its subfolders have the names of the classifiers.
        classifiers: the classifiers with their descriptions.
        readers: readers of all classifiers; empty for the own readers of each classifier.
        json: print JSON.
        quiet: print nothing but errors.
    """
    from mlperturb.experiment.matrix import MATRIX, judge_each
    from mlperturb.run.report import to_json
    from mlperturb.show.figures import save_figure
    from mlperturb.show.grids import to_latex, to_markdown
    from mlperturb.show.tables import show
    from mlperturb.show.transfers import draw_transfer, matrix_grid
    from mlperturb.system.files import write_file

    errors: list[str] = []
    bar = make_bar(quiet=quiet or json)
    task = bar.add_task("judging", total=None)

    def done(error: str | None) -> None:
        bar.update(task, advance=1)
        if error:
            errors.append(error)

    with bar:
        result = judge_each(
            {name: out / name for name in classifiers},
            {name: one for name, (one, _) in classifiers.items()},
            readers=readers,
            begin=lambda total: bar.update(task, total=total),
            done=done,
        )
    result["classifiers"] = {name: described for name, (_, described) in classifiers.items()}
    grid = matrix_grid(result["rows"])
    stem = Path(MATRIX).stem
    write_file(out / MATRIX, (to_json(result) + "\n").encode())
    write_file(out / f"{stem}.md", to_markdown([grid]).encode())
    write_file(out / f"{stem}.tex", to_latex([grid]).encode())
    rows = [{**row, "source": f"{row['source']}\n{row['case']}, {row['method']}"} for row in result["rows"]]
    if rows:
        save_figure(draw_transfer(rows), out / f"{stem}.png")
    if json:
        print(to_json(result))
    elif not quiet:
        stdout.print(show(grid))
        stdout.print(f"matrix in {printable(str(out))}: {stem}.json, .md, .tex, .png", soft_wrap=True)
    for error in errors:
        print_error(error)
    return int(bool(errors))
