"""`mlperturb jpeg-defend`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.cli.complete import complete_labels
from mlperturb.cli.console import make_bar, print_error, print_note
from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import (
    ANYWHERE,
    HOW,
    OUTPUT,
    WHAT,
    Activation,
    Arch,
    Checkpoint,
    Device,
    Json,
    Labels,
    Overwrite,
    PreprocessFile,
    Prompt,
    Quiet,
    Thresholds,
)
from mlperturb.cli.source import Source, check_attacked, find_source, named_source
from mlperturb.errors import UsageError
from mlperturb.labels import parse_request
from mlperturb.run.outputs import CHARTS, DEFENCE, folder_of, make_folder, refuse_existing
from mlperturb.system.text import printable, share_of

if TYPE_CHECKING:
    from mlperturb.experiment.defence import Attacked
    from mlperturb.model.readers import Reader
    from mlperturb.photos.purify import Purification

_SAME = ("sha256", "labels", "thresholds", "preprocess", "prompts")  # of the descriptions of one classifier
OUTPUTS = (DEFENCE, *CHARTS)


def jpeg_defend(
    paths: Annotated[
        list[Path],
        typer.Argument(
            **ANYWHERE, help="Output folders or reports of `attack`; or PNGs, with --flip.", show_default=False
        ),
    ],
    quality: Annotated[
        list[str] | None,
        typer.Option(metavar="Q", help="JPEG and WebP qualities, comma-separated; default: 30,50,70,80,90,95.", **HOW),
    ] = None,
    defence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="jpeg (default), webp, median, bits, resize; or KIND:SETTING for a single setting.",
            **HOW,
        ),
    ] = None,
    subsampling: Annotated[
        str, typer.Option(help="JPEG's chroma subsampling: 4:2:0, 4:2:2 or 4:4:4.", metavar="NAME", **HOW)
    ] = "4:2:0",
    flip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels(),
            help="For PNGs without a report: the labels to flip that were given to the attack.",
            **WHAT,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels(),
            help="For PNGs without a report: the labels to keep, or `rest`.",
            **WHAT,
        ),
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(**ANYWHERE, help="Folder of the clean photos, if they have moved.", **WHAT)
    ] = None,
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive",
            metavar="",
            help="Attack the photos again for each defence, so that the result survives it.",
            **HOW,
        ),
    ] = False,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Program in which a decision must hold, as for `attack`; repeatable. "
            "Default: the readers of the report; of PNGs without a report, those of the checkpoint.",
            **WHAT,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    thresholds: Thresholds = None,
    preprocess: PreprocessFile = None,
    activation: Activation = None,
    prompt: Prompt = None,
    out: Annotated[
        Path | None,
        typer.Option(**ANYWHERE, help="Folder for the results; default: the folder of the report.", **OUTPUT),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress adversarial PNGs, and their photos as a control, and count the labels that are recovered.

    It writes jpeg-defence.json, jpeg-histogram.png (the paper's Figure 3) and jpeg-curve.png.
    """
    from mlperturb.model.readers import parse_readers
    from mlperturb.photos.purify import QUALITIES, parse_purifications, parse_qualities

    qualities = parse_qualities(quality) if quality is not None else QUALITIES
    purifications = parse_purifications(["jpeg"] if defence is None else defence, qualities, subsampling)
    if photos is not None and not photos.is_dir():
        raise UsageError(f"no such folder of photos: {photos}")
    by_hand = bool(flip) or bool(keep)
    if by_hand:
        source = find_source(checkpoint, arch, labels, thresholds, preprocess, activation, prompt)
        attacked, names = _name_attacked(source, paths, flip or [], keep or [], photos), source.readers
        asked: list[dict[str, Any]] = []
    else:
        source, attacked, names, asked = _read_reports(
            paths,
            partial(find_source, checkpoint, arch, labels, thresholds, preprocess, activation, prompt)
            if checkpoint
            else None,
            photos,
            chosen=bool(reader),
        )
    for note in source.notes:
        print_note(note)
    readers = parse_readers(reader or names)
    attacked = list({one.adversarial.resolve(): one for one in attacked}.values())
    folder = out or (Path("mlperturb-defence") if by_hand else folder_of(paths[0]))
    make_folder(folder)
    refuse_existing((folder / name for name in OUTPUTS), overwrite=overwrite)
    missing = sum(one.clean is None for one in attacked)
    if missing:
        print_note(
            f"{share_of(missing, len(attacked), 'clean photo')} missing or changed, so there is no control: "
            "give the folder of the photos as --photos"
        )
    task = _Defence(source, attacked, purifications, readers, folder, paths, asked if adaptive else None)
    raise typer.Exit(_run(task, device=device, json=json, quiet=quiet))


@dataclass(frozen=True)
class _Defence:
    """What to try: the classifier, the PNGs, the purifications, the readers, and where the results go.

    For an adaptive attack, `asked` has the settings of the reports; it is None if none is wanted.
    """

    source: Source
    attacked: list[Attacked]
    purifications: tuple[Purification, ...]
    readers: tuple[Reader, ...]
    folder: Path
    paths: list[Path]
    asked: list[dict[str, Any]] | None


def _run(defence: _Defence, *, device: str, json: bool, quiet: bool) -> int:
    """Try every purification, write the results, print; return the exit code."""
    from mlperturb.experiment.adaptive import adapt, settings_of
    from mlperturb.experiment.defence import sweep
    from mlperturb.run.report import reading, to_json
    from mlperturb.show.figures import draw_curve, draw_jpeg_histogram, save_figure
    from mlperturb.show.tables import adaptive_table, best_line, defence_table
    from mlperturb.system.devices import prepare
    from mlperturb.system.files import write_file

    folder, paths, purifications = defence.folder, defence.paths, defence.purifications
    with reading(paths[0]):
        settings = None if defence.asked is None else settings_of(defence.asked, defence.readers)
    classifier, description = defence.source.load(prepare(device, 0))
    bar = make_bar(quiet=quiet)
    task = bar.add_task("compressing", total=len(defence.attacked))

    def done(error: str | None) -> None:
        bar.update(task, advance=1)
        if error:
            print_error(error)

    with bar, reading(paths[0]):
        result = sweep(classifier, defence.attacked, purifications, defence.readers, done)
        if settings is not None:
            bar.reset(task, description="attacking", total=len(defence.attacked) * len(purifications))
            again = adapt(
                classifier, defence.attacked, purifications, settings,
                done=lambda count: bar.update(task, advance=count),
            )  # fmt: skip
            for row, adapted in zip(result["qualities"], again, strict=True):
                row["adaptive"] = adapted
    said = {"inputs": list(map(str, paths)), "subsampling": purifications[0].subsampling}
    result = {**result, "settings": said, "classifier": description}
    save_figure(draw_jpeg_histogram(result), folder / OUTPUTS[1])
    save_figure(draw_curve(result), folder / OUTPUTS[2])
    write_file(folder / OUTPUTS[0], to_json(result).encode())
    if json:
        print(to_json(result))
    elif not quiet:
        stdout.print(defence_table(result))
        if settings is not None:
            stdout.print(adaptive_table(result))
        stdout.print(best_line(result), soft_wrap=True)
        stdout.print(f"{', '.join(OUTPUTS)} in {printable(str(folder))}", soft_wrap=True)
    return int(any("error" in image for image in result["images"]))


def _read_reports(
    paths: list[Path],
    find: Callable[[], Source] | None,
    photos: Path | None,
    *,
    chosen: bool,
) -> tuple[Source, list[Attacked], tuple[str, ...], list[dict[str, Any]]]:
    """Read the attacked images of reports, and the classifier and readers, which must be the same in all of them.

    Args:
        paths: of the reports.
        find: finds the classifier that the user names; None for that of the reports.
        photos: folder of the clean photos, if they have moved.
        chosen: the user names the readers, and the reports may have different readers.

    Returns:
        The classifier, the attacked images, the readers, and the settings of each report.
    """
    from mlperturb.experiment.defence import find_attacked
    from mlperturb.run.report import is_unchanged, read_report, readers_of, reading

    attacked: list[Attacked] = []
    described: dict[str, Any] = {}
    readers: tuple[str, ...] = ()
    asked: list[dict[str, Any]] = []
    unchanged = images = 0
    for path in paths:
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            raise UsageError(f"{path} does not say which labels were flipped: give --flip, or the folder of its report")
        report, folder = read_report(path)
        with reading(path):
            if described and any(described.get(name) != report["classifier"].get(name) for name in _SAME):
                raise UsageError(f"expected reports on the same classifier, got another classifier in {path}")
            described, own = report["classifier"], readers_of(report)
            if described.get("members"):
                raise UsageError(f"expected a report on one classifier, got several in {path}")
            if readers and not chosen and own != readers:
                raise UsageError(
                    f"expected reports on the same readers, got {', '.join(own)} in {path} and {', '.join(readers)} "
                    "before: give --reader"
                )
            readers = own
            attacked += find_attacked(report, folder, photos)
            asked.append(report["settings"])
            unchanged += sum(map(is_unchanged, report["images"]))
            images += len(report["images"])
    if not attacked:
        why = "every photo was as asked already" if unchanged == images else "no attack there wrote one"
        raise UsageError(f"no adversarial PNG in {', '.join(map(str, paths))}: {why}")
    if unchanged:
        print_note(f"{share_of(unchanged, images, 'photo')} as asked already, not attacked, and left out")
    with reading(paths[0]):
        if find is None:
            return named_source(described), attacked, readers, asked
        source = find()
    check_attacked(source.path, described["sha256"])
    return source, attacked, readers, asked


def _name_attacked(
    source: Source, paths: list[Path], flip: list[str], keep: list[str], photos: Path | None
) -> list[Attacked]:
    """Return adversarial photos without a report, with the labels named by hand; in folders, the files NAME.adv.*."""
    from mlperturb.experiment.defence import Attacked
    from mlperturb.photos.images import EXTENSIONS, is_output
    from mlperturb.photos.kinds import is_adversarial, strip_ending

    if not flip:
        raise UsageError("expected --flip with --keep for PNGs without a report, got --keep alone")
    request = parse_request(source.labels, flip=flip, keep=keep, categories=source.categories)
    if request.keep_present:
        raise UsageError("expected names of labels or rest for PNGs without a report, got --keep present")
    if request.any_label:
        raise UsageError("expected the name of the flipped label, got --flip any")
    files: dict[Path, str] = {}  # and the name of the photo, from the folder that was given
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if is_adversarial(file))
            files |= {file: strip_ending(file.relative_to(path).as_posix()) for file in inside}
        elif path.is_file():
            files[path] = strip_ending(path.name)
        else:
            raise UsageError(f"no such file or folder: {path}")
    if not files:
        raise UsageError(f"no NAME.adv.png, .webp or .jpg in {', '.join(map(str, paths))}")
    flipped, kept = (tuple(source.labels[number] for number in part) for part in (request.flip, request.keep))
    clean: dict[str, Path] = {}
    for photo in sorted(photos.rglob("*")) if photos is not None else ():
        if photo.suffix.lower() in EXTENSIONS and not is_output(photo):
            name = photo.relative_to(photos).as_posix() if photos is not None else photo.name
            clean.setdefault(name, photo)  # a name as `plan_outputs` gives it to photos of the same stem
            clean.setdefault(name.removesuffix(photo.suffix), photo)
    return [Attacked(file, clean.get(name), flipped, kept) for file, name in files.items()]
