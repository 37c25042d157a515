"""`mlperturb attack`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.attacks.methods import DEFAULT_METHOD, METHODS
from mlperturb.cli.complete import complete_choice, complete_labels, complete_method
from mlperturb.cli.options import (
    ANYWHERE,
    HOW,
    LIMITS,
    OUTPUT,
    WHAT,
    Activation,
    Arch,
    BatchSize,
    Budget,
    Device,
    Json,
    Labels,
    Margin,
    Overwrite,
    Passes,
    Paths,
    PreprocessFile,
    Prompt,
    Quiet,
    Readers,
    Recursive,
    Seed,
    Thresholds,
    parse_batch_size,
)
from mlperturb.cli.recall import recall
from mlperturb.cli.source import Source
from mlperturb.cli.sources import Checkpoints, Sources, find_sources
from mlperturb.errors import UsageError
from mlperturb.limits import MARGIN, Limits

if TYPE_CHECKING:
    from mlperturb.run.jobs import Job
    from mlperturb.run.outputs import Outputs
    from mlperturb.run.settings import Settings


def attack(
    context: typer.Context,
    paths: Paths,
    flip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels("all", "any"),
            help="Labels to reverse: repeatable, comma-separated; `all` labels, `any` label, or `category:NAME`.",
            **WHAT,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels("rest", "present"),
            help="Labels whose decisions must stay; `rest`: all other labels; `present`: those of them "
            "that a photo has; `category:NAME`. Default: none.",
            **WHAT,
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels("category:"),
            help="Labels to be present: flipped if absent, else kept present.",
            **WHAT,
        ),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels("category:"),
            help="Labels to be absent: flipped if present, else kept absent.",
            **WHAT,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_method,
            help=f"One of {', '.join(METHODS)}; see `mlperturb methods`.",
            **HOW,
        ),
    ] = DEFAULT_METHOD,
    budget: Budget = "balanced",
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--settings",
            **ANYWHERE,
            **HOW,
            help="A report.json, or its folder: the settings and classifier of that run; options that are given win.",
        ),
    ] = None,
    passes: Passes = None,
    max_rmsd: Annotated[
        float | None,
        typer.Option(
            help="Largest RMSD of the float result and of the file, on the 0-255 scale.", metavar="X", **LIMITS
        ),
    ] = None,
    max_linf: Annotated[
        int | None, typer.Option(metavar="LEVELS", help="Largest change of a pixel in grey levels, 1 to 255.", **LIMITS)
    ] = None,
    strongest: Annotated[
        bool,
        typer.Option(
            "--strongest",
            metavar="",
            help="ml-ddn: seek the largest margin within --max-rmsd or --max-linf, in place of the least distortion.",
            **HOW,
        ),
    ] = False,
    diversity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --strongest: see copies of the photo on the way: resize, shift, both, or none.",
            **HOW,
        ),
    ] = None,
    reader: Readers = None,
    margin: Margin = MARGIN,
    survive: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:SETTING",
            help="Succeed after a compression too: jpeg:QUALITY or a range such as jpeg:60-95, webp:QUALITY, "
            "resize:PERCENT, median:WIDTH, bits:N; repeatable.",
            **WHAT,
        ),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y,W,H|MASK", help="Change only this rectangle, or the pixels where MASK is not black.", **WHAT
        ),
    ] = None,
    between: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_choice["between"],
            help="rank-1, rank-2: the labels ranked between the two sets: rest, rest-positive, rest-negative, "
            "none; or `threshold`: the decision threshold in place of labels.",
            metavar="NAME",
            **HOW,
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_choice["solver"],
            help="ml-dp: pinv (the paper's equalities) or nnls (exact).",
            **HOW,
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_choice["rounding"],
            help="ml-ddn: round to 8 bits inside its loop, or after it.",
            **HOW,
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_choice["space"],
            help="All but fgs, fg: measure the constraints on logit or probability.",
            **HOW,
        ),
    ] = None,
    checkpoint: Checkpoints = None,
    arch: Arch = None,
    labels: Labels = None,
    thresholds: Thresholds = None,
    preprocess: PreprocessFile = None,
    activation: Activation = None,
    prompt: Prompt = None,
    out: Annotated[
        Path, typer.Option(**ANYWHERE, help="Folder, or URL, for the outputs and report.json.", **OUTPUT)
    ] = Path("mlperturb-out"),
    report: Annotated[
        Path | None,
        typer.Option(**ANYWHERE, help="File of the report; default: OUT/report.json.", **OUTPUT),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Format of the adversarial photos: png; webp, lossless and smaller; jpeg, or jpeg:Q for "
            "the quality of photos that are not JPEGs; same: as the photo.",
            **OUTPUT,
        ),
    ] = "png",
    keep_metadata: Annotated[
        bool,
        typer.Option(
            "--keep-metadata",
            metavar="",
            help="Keep EXIF data, GPS included, XMP and text; dropped by default.",
            **OUTPUT,
        ),
    ] = False,
    html: Annotated[
        bool, typer.Option("--html", metavar="", help="Write OUT/index.html too, a page of the results.", **OUTPUT)
    ] = False,
    overwrite: Overwrite = False,
    recursive: Recursive = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", metavar="", help="Exit with 1 too if an attack failed or reached only a part.", **OUTPUT
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar="",
            help="Write nothing: show what would be attacked, what the classifier sees now, and the cost.",
            **OUTPUT,
        ),
    ] = False,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write adversarial photos that reverse the --flip labels and keep the --keep labels.

    Each photo gives NAME.adv.png (.webp, .jpg) and NAME.map.png, the magnified perturbation, in the photo's subfolder;
    all photos together give report.json. The colour profile, alpha and a single channel of grey are kept.
    """
    from mlperturb.photos.images import describe_left_out, find_photos
    from mlperturb.run.jobs import plan_outputs
    from mlperturb.run.outputs import Outputs, is_own

    options: dict[str, Any] = {
        "flip": flip, "keep": keep, "add": add, "remove": remove, "survive": survive, "reader": reader,
        "region": region, "method": method, "budget": budget, "passes": passes, "max_rmsd": max_rmsd,
        "max_linf": max_linf, "margin": margin, "between": between, "solver": solver, "rounding": rounding,
        "space": space, "strongest": strongest, "diversity": diversity, "format": format,
        "keep_metadata": keep_metadata, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    recalled = None
    if earlier is not None:
        options, recalled = recall(earlier, options, context)
    source = recalled or find_sources(
        checkpoint, arch, labels, thresholds, preprocess, activation, prompt, readers=options["reader"] or ()
    )
    settings = _read(options, source)
    left_out: list[Path] = []
    photos = find_photos(paths, recursive=recursive, own=is_own, left_out=left_out)
    notes = [*source.notes, *([describe_left_out(left_out)] if left_out else [])]
    outputs = Outputs(out, report or out / "report.json", html)
    jobs = plan_outputs(photos, paths, settings.format)
    settings.check_files(job.adversarial for job in jobs)
    if dry_run:
        raise typer.Exit(show_plan(source, jobs, settings, notes, device=device, json=json))
    code = run(
        source, jobs, settings, outputs,
        overwrite=overwrite, device=device, seed=options["seed"], json=json, quiet=quiet, strict=strict, notes=notes,
    )  # fmt: skip
    raise typer.Exit(code)


def _read(options: dict[str, Any], source: Source | Sources) -> Settings:
    """Read the settings from the options."""
    from mlperturb.run.settings import Words, read_settings

    names = ("flip", "keep", "add", "remove", "survive", "reader")
    return read_settings(
        Words(**{name: options[name] or [] for name in names}, region=options["region"]),
        source.labels,
        method=options["method"],
        budget=options["budget"],
        limits=Limits(options["passes"], options["max_rmsd"], options["max_linf"]),
        batch_size=parse_batch_size(options["batch_size"]),
        margin=options["margin"],
        readers=source.readers,
        format=options["format"],
        keep_metadata=options["keep_metadata"],
        categories=source.categories,
        options={name: options[name] for name in ("between", "solver", "rounding", "space", "diversity")}
        | {"aim": "strongest" if options["strongest"] else None},
        networks=len(source.parts) if isinstance(source, Sources) else 1,
    )


def show_plan(
    source: Source | Sources, jobs: list[Job], settings: Settings, notes: Sequence[str], *, device: str, json: bool
) -> int:
    """Print what an attack would do, in the first process alone; return the exit code."""
    from mlperturb.cli.dry_run import dry_run
    from mlperturb.system.processes import join

    if isinstance(source, Sources):
        raise UsageError("expected --dry-run with a single --checkpoint")
    if not join().first:
        return 0
    return dry_run(source, jobs, settings, notes, device=device, json=json)


def run(
    source: Source | Sources,
    jobs: list[Job],
    settings: Settings,
    outputs: Outputs,
    *,
    overwrite: bool = False,
    device: str = "auto",
    seed: int = 0,
    json: bool = False,
    quiet: bool = False,
    strict: bool = False,
    notes: Sequence[str] = (),
) -> int:
    """Attack photos, and print notes on the checkpoint and on how the photos were found; return the exit code."""
    from mlperturb.cli.attack_run import AttackRun
    from mlperturb.cli.longrun import LongRun
    from mlperturb.run.outputs import fingerprint, prepare_folder
    from mlperturb.system.processes import join

    long, existing = LongRun(join(), quiet=quiet), frozenset[str]()
    planned = fingerprint([settings.batch_size, *((str(job.source), job.adversarial) for job in jobs)])
    place = long.prepare(device, seed)
    described = {**settings.describe(seed=seed, device=long.device), **source.origin}
    again = long.starts_again(overwrite)
    task = AttackRun(long, source, settings, jobs, outputs, described, json, strict, overwrite=again, notes=notes)
    if long.share.first:
        existing = prepare_folder(outputs, jobs, overwrite=task.overwrite and not task.broke_off(place, planned))
    long.share.agree(planned, "photos")
    return task.go(place, planned, existing)
