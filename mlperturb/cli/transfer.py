"""`mlperturb transfer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.cli.console import make_bar, print_error, print_note
from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import ANYWHERE, HERE, Device, Json, Labels, Overwrite, Prompt, Quiet
from mlperturb.cli.source import Source
from mlperturb.cli.sources import find_each, name_sources
from mlperturb.errors import UsageError
from mlperturb.run.outputs import TRANSFER, folder_of, make_folder, refuse_existing
from mlperturb.system.text import printable

if TYPE_CHECKING:
    from mlperturb.experiment.transfer import Made

OUTPUTS = (TRANSFER, "transfer.png")


def transfer(
    reports: Annotated[
        list[Path],
        typer.Argument(**ANYWHERE, help="Output folders or reports of `attack`.", show_default=False),
    ],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(**HERE, help="A classifier to show the files to, as for `attack`; repeatable."),
    ] = None,
    labels: Labels = None,
    prompt: Prompt = None,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Program in which a decision must hold, as for `attack`; repeatable. "
            "Default: each checkpoint's own readers.",
        ),
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(**ANYWHERE, help="Folder of the clean photos, if they have moved.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(**ANYWHERE, help="Folder for the results; default: the folder of the first report.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the files of attacks to other classifiers: which flips hold there, and which kept labels break.

    It writes transfer.json and transfer.png, a heat map of the classifiers attacked by the classifiers asked.
    """
    from mlperturb.model.readers import parse_readers

    if not checkpoint:
        raise UsageError("expected --checkpoint, a classifier to show the files to")
    if photos is not None and not photos.is_dir():
        raise UsageError(f"no such folder of photos: {photos}")
    chosen = tuple(one.name for one in parse_readers(reader)) if reader else ()
    targets = name_sources(find_each(checkpoint, labels, prompt))
    for note in dict.fromkeys(note for target in targets.values() for note in target.notes):
        print_note(note)
    made, described = read_made(reports, photos)
    folder = out or folder_of(reports[0])
    make_folder(folder)
    refuse_existing((folder / name for name in OUTPUTS), overwrite=overwrite)
    files = [one for part in made for one in part.attacked]
    missing = sum(one.clean is None for one in files)
    if missing:
        print_note(
            f"the photos of {missing} of {len(files)} files are missing or changed, so that their labels before the "
            "attack are not known: give the folder of the photos as --photos"
        )
    task = _Transfer(made, described, targets, chosen, folder, reports)
    raise typer.Exit(_run(task, device=device, json=json, quiet=quiet))


@dataclass(frozen=True)
class _Transfer:
    """What to show to which classifiers, and where the results go."""

    made: list[Made]
    described: dict[str, dict[str, str]]
    targets: dict[str, Source]
    readers: tuple[str, ...]
    folder: Path
    reports: list[Path]


def _run(task: _Transfer, *, device: str, json: bool, quiet: bool) -> int:
    """Show every file to every classifier, write the results, print; return the exit code."""
    from mlperturb.experiment.transfer import transfer as show_files
    from mlperturb.run.report import reading, to_json
    from mlperturb.show.figures import save_figure
    from mlperturb.show.tables import show
    from mlperturb.show.transfers import draw_transfer, label_grid, transfer_grid
    from mlperturb.system.devices import prepare
    from mlperturb.system.files import write_file

    place = prepare(device, 0)
    loaded = {name: source.load(place) for name, source in task.targets.items()}
    bar = make_bar(quiet=quiet)
    progress = bar.add_task("looking", total=sum(len(part.attacked) for part in task.made))

    def done(error: str | None) -> None:
        bar.update(progress, advance=1)
        if error:
            print_error(error)

    with bar, reading(task.reports[0]):
        result = show_files(
            task.made, {name: one for name, (one, _) in loaded.items()}, readers=task.readers, done=done
        )  # fmt: skip
    result |= {
        "settings": {"inputs": list(map(str, task.reports)), "device": place},
        "sources": task.described,
        "classifiers": {name: described for name, (_, described) in loaded.items()},
    }
    save_figure(draw_transfer(result["pairs"]), task.folder / OUTPUTS[1])
    write_file(task.folder / OUTPUTS[0], to_json(result).encode())
    if json:
        print(to_json(result))
    elif not quiet:
        stdout.print(show(transfer_grid(result["pairs"])))
        stdout.print(show(label_grid(result["pairs"])))
        stdout.print(f"{', '.join(OUTPUTS)} in {printable(str(task.folder))}", soft_wrap=True)
    return int(any(image["error"] for image in result["images"]))


def read_made(reports: list[Path], photos: Path | None) -> tuple[list[Made], dict[str, dict[str, str]]]:
    """Read the files of reports, by a name for each report, with what each report says of its classifier.

    The name is that of the checkpoint; where two reports have the same, the name of the report's folder is added.

    Raises:
        UsageError: if a file is not a report of `attack`, or no report has a file.
    """
    from mlperturb.experiment.defence import find_attacked
    from mlperturb.experiment.transfer import Made
    from mlperturb.run.report import read_report, reading

    read: list[tuple[str, Path, Any, dict[str, str]]] = []
    for path in reports:
        report, folder = read_report(path)
        with reading(path):
            classifier = report["classifier"]
            said = {"report": str(path), "checkpoint": classifier["checkpoint"], "sha256": classifier["sha256"]}
            if not all(isinstance(value, str) for value in said.values()):
                raise TypeError("the classifier is not described in words")
            stem = "+".join(Path(part).stem for part in said["checkpoint"].split(", ")) or "?"
            read.append((stem, path, find_attacked(report, folder, photos), said))
    if not any(attacked for _, _, attacked, _ in read):
        raise UsageError(f"no adversarial file in {', '.join(map(str, reports))}: no attack there wrote one")
    made: dict[str, Made] = {}
    described: dict[str, dict[str, str]] = {}
    for stem, path, attacked, said in read:
        shared = [other for other, *_ in read].count(stem) > 1
        name = base = f"{stem}, {folder_of(path).name}" if shared else stem
        number = 1
        while name in made:
            number += 1
            name = f"{base}-{number}"
        made[name], described[name] = Made(name, attacked), said
    return list(made.values()), described
