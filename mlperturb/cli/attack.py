"""`mlperturb attack`."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.attacks.methods import BUDGETS, DEFAULT_METHOD, METHODS, find_method
from mlperturb.cli.console import print_note
from mlperturb.cli.options import (
    ANYWHERE,
    Arch,
    BatchSize,
    Checkpoint,
    Device,
    Json,
    Labels,
    Overwrite,
    Passes,
    Paths,
    Quiet,
    Recursive,
    Seed,
    Source,
    find_source,
    make_folder,
    parse_batch_size,
)
from mlperturb.errors import UsageError
from mlperturb.files import is_remote
from mlperturb.labels import Request, parse_request

if TYPE_CHECKING:
    from mlperturb.jobs import Job

JOURNAL = "journal.jsonl"  # in the output folder


def attack(
    paths: Paths,
    flip: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Labels to reverse: repeatable, comma-separated; `all`, or `any` one."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Labels to leave as they are; `rest`: all others. Without it, none."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Labels to be present: kept where they are, flipped where they are not."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Labels to be absent: flipped where they are present, else kept absent."),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(METHODS)}; see `mlperturb methods`.")
    ] = DEFAULT_METHOD,
    budget: Annotated[str, typer.Option(help=f"How long to search: {', '.join(BUDGETS)}.")] = "balanced",
    passes: Passes = None,
    max_rmsd: Annotated[
        float | None,
        typer.Option(min=0, help="Go no further than this RMSD, 0-255 scale, of the float result or the PNG."),
    ] = None,
    max_linf: Annotated[
        int | None, typer.Option(metavar="LEVELS", help="Change no pixel by more than so many grey levels, 1 to 255.")
    ] = None,
    survive: Annotated[
        list[str] | None,
        typer.Option(metavar="jpeg:Q", help="Hold after JPEG compression too: jpeg:75, jpeg:60-95; repeatable."),
    ] = None,
    region: Annotated[
        str | None, typer.Option(metavar="X,Y,W,H|MASK", help="Change only this rectangle, or where MASK is not black.")
    ] = None,
    between: Annotated[
        str | None,
        typer.Option(
            help="rank-1, rank-2: which labels lie between: rest, rest-positive, rest-negative, none, "
            "or the decision `threshold` in their place."
        ),
    ] = None,
    solver: Annotated[str | None, typer.Option(help="ml-dp: pinv (the paper's equalities) or nnls (exact).")] = None,
    rounding: Annotated[str | None, typer.Option(help="ml-ddn: to 8 bits inside its loop, or after it.")] = None,
    space: Annotated[str | None, typer.Option(help="All but fgs, fg: constraints on logit or probability.")] = None,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    out: Annotated[Path, typer.Option(**ANYWHERE, help="Folder, or URL, for the PNGs and report.json.")] = Path(
        "mlperturb-out"
    ),
    report: Annotated[
        Path | None,
        typer.Option(**ANYWHERE, help="Write the report there, not to OUT/report.json."),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Make OUT/index.html too, a page of the results.")] = False,
    overwrite: Overwrite = False,
    recursive: Recursive = False,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write adversarial PNGs on which the --flip labels are reversed and the --keep labels are not.

    Beside each NAME.adv.png lies NAME.map.png, the magnified perturbation, and for all of them report.json.
    """
    source = find_source(checkpoint, arch, labels)
    request = parse_request(source.labels, flip=flip or (), keep=keep or (), add=add or (), remove=remove or ())
    options = {"between": between, "solver": solver, "rounding": rounding, "space": space}
    find_method(method).tuning(budget, **options)
    names = {"flip": flip or [], "keep": keep or [], "add": add or [], "remove": remove or []}
    raise typer.Exit(
        run(
            source, paths, request, names, method=method, budget=budget, passes=passes, max_rmsd=max_rmsd,
            max_linf=max_linf, survive=survive, region=region, options=options, out=out, report=report, html=html,
            overwrite=overwrite, recursive=recursive, batch_size=parse_batch_size(batch_size), device=device, seed=seed,
            json=json, quiet=quiet,
        )
    )  # fmt: skip


def run(
    source: Source,
    paths: list[Path],
    request: Request,
    names: dict[str, list[str]],
    *,
    method: str = DEFAULT_METHOD,
    budget: str = "balanced",
    passes: int | None = None,
    max_rmsd: float | None = None,
    max_linf: int | None = None,
    survive: list[str] | None = None,
    region: str | None = None,
    options: dict[str, str | None] | None = None,
    out: Path,
    report: Path | None = None,
    html: bool = False,
    overwrite: bool = False,
    recursive: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
    json: bool = False,
    quiet: bool = False,
) -> int:
    """Run an attack whose labels have been checked; return the exit code."""
    from mlperturb.cli.attack_run import AttackRun
    from mlperturb.images import find_photos
    from mlperturb.jobs import Settings, plan_outputs
    from mlperturb.purify import parse_survival
    from mlperturb.regions import parse_region
    from mlperturb.sharing import join, local_device

    settings = Settings(
        method,
        budget,
        request,
        passes,
        batch_size,
        max_rmsd=max_rmsd,
        max_linf=max_linf,
        survive=parse_survival(survive or ()),
        region=None if region is None else parse_region(region),
        options=options or {},
    )
    jobs = plan_outputs(find_photos(paths, recursive=recursive))
    report = report or out / "report.json"
    share, existing = join(), frozenset[str]()
    overwrite = overwrite and not share.any_restarted()  # what was to be replaced is gone: go on
    if share.first:
        existing = prepare_folder(out, report, jobs, overwrite=overwrite, page=out / "index.html" if html else None)
        renamed = [job for job in jobs if job.adversarial != f"{job.source.stem}.adv.png"]
        if renamed and not quiet:
            first = renamed[0]
            print_note(f"{len(renamed)} photos share another's name; {first.source} becomes {first.adversarial}")
    photos = fingerprint([(str(job.source), job.adversarial) for job in jobs])
    share.agree(photos, "photos")

    from mlperturb.devices import prepare

    name = prepare(local_device(device), seed)
    described: dict[str, Any] = {
        "method": method,
        "budget": budget,
        **names,
        "seed": seed,
        "device": name if share.size == 1 else name.partition(":")[0],
        "passes": passes,
        "max_rmsd": max_rmsd,
        "max_linf": max_linf,
        "survive": survive or [],
        "region": region,
        "batch_size": batch_size or "auto",
        "margin": settings.margin,
        **{key: value for key, value in settings.options.items() if value is not None},
    }
    return AttackRun(source, settings, jobs, out, report, described, name, share, html, json, quiet).go(
        photos, existing
    )


def prepare_folder(out: Path, report: Path, jobs: list[Job], *, overwrite: bool, page: Path | None) -> frozenset[str]:
    """Make the output folder; refuse outputs that exist, unless a run goes on there or they may be replaced.

    Returns:
        The names of outputs that exist, if a run goes on.

    Raises:
        UsageError: if the folder cannot be made or written, or something is there already.
        StorageError: if the journal of the run to be replaced cannot be deleted.
    """
    from mlperturb.files import list_names, reaching
    from mlperturb.journal import find_journal, remove_journal

    make_folder(out)
    make_folder(report.parent)
    with reaching(report):
        if report.exists() and not report.is_file():
            raise UsageError(f"expected a file for --report, got {report}, which is none")
        taken_report = report.is_symlink() or report.exists()
    there, journal = list_names(out), out / JOURNAL
    targets = {name for job in jobs for name in (job.adversarial, job.map)} | ({page.name} if page else set())
    if report.name in targets | {JOURNAL} and same_folder(report.parent, out):
        raise UsageError(f"the report would replace another file of the run: choose another --report than {report}")
    existing = [out / name for name in sorted(targets & there)] + ([report] if taken_report else [])
    outputs = {identity(target) for target in existing} - {None}
    taken = [job for job in jobs if job.source in existing or outputs and identity(job.source) in outputs]
    if taken:
        raise UsageError(f"an output would replace the photo {taken[0].source}: choose another --out than {out}")
    if existing and not overwrite and not find_journal(journal):
        raise UsageError(
            f"{existing[0]} and {len(existing) - 1} more outputs exist already: give --overwrite or another --out"
        )
    if overwrite:
        remove_journal(journal)
        return frozenset()
    return frozenset(targets & there)


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells whether two paths are one file, links followed; None if there is none."""
    if is_remote(path):
        return None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def same_folder(one: Path, other: Path) -> bool:
    """Say whether two paths are one folder."""
    return one == other or (identity(one) is not None and identity(one) == identity(other))


def fingerprint(value: object) -> str:
    """Return a short text that two processes have alike if they have the same value."""
    return sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()
