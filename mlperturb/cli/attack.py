"""`mlperturb attack`."""

from __future__ import annotations

import os
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb import __version__
from mlperturb.attacks import BUDGETS, DEFAULT_METHOD, METHODS, find_method
from mlperturb.cli.console import make_bar, print_error, print_note
from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import (
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
from mlperturb.errors import StorageError, UsageError
from mlperturb.labels import Request, parse_request
from mlperturb.text import printable

if TYPE_CHECKING:
    from mlperturb.jobs import Job, Settings
    from mlperturb.journal import Journal
    from mlperturb.report import Record

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
    out: Annotated[Path, typer.Option(help="Folder for the PNGs and report.json.")] = Path("mlperturb-out"),
    report: Annotated[Path | None, typer.Option(help="Write the report there, not to OUT/report.json.")] = None,
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
            survive=survive, region=region, options=options, out=out, report=report, html=html,
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
    from mlperturb.images import find_photos
    from mlperturb.jobs import Settings, plan_outputs
    from mlperturb.purify import parse_survival
    from mlperturb.regions import parse_region

    settings = Settings(
        method,
        budget,
        request,
        passes,
        batch_size,
        max_rmsd=max_rmsd,
        survive=parse_survival(survive or ()),
        region=None if region is None else parse_region(region),
        options=options or {},
    )
    jobs = plan_outputs(find_photos(paths, recursive=recursive))
    report = report or out / "report.json"
    journal = out / JOURNAL
    page = out / "index.html" if html else None
    _prepare_folder(out, report, jobs, overwrite=overwrite or journal.exists(), page=page)
    if overwrite:
        journal.unlink(missing_ok=True)
    renamed = [job for job in jobs if job.adversarial != f"{job.source.stem}.adv.png"]
    if renamed:
        print_note(f"{len(renamed)} photos share another's name; {renamed[0].source} becomes {renamed[0].adversarial}")

    from mlperturb.devices import prepare

    name = prepare(device, seed)
    described: dict[str, Any] = {
        "method": method,
        "budget": budget,
        **names,
        "seed": seed,
        "device": name,
        "passes": passes,
        "max_rmsd": max_rmsd,
        "survive": survive or [],
        "region": region,
        "batch_size": batch_size or "auto",
        "margin": settings.margin,
        **{key: value for key, value in settings.options.items() if value is not None},
    }
    return _Run(source, settings, jobs, out, report, described, name, html=html, json=json, quiet=quiet).go()


class _Run:
    """One run: its records, its progress bar, and what it prints at the end."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        jobs: list[Job],
        out: Path,
        report: Path,
        described: dict[str, Any],
        device: str,
        *,
        html: bool,
        json: bool,
        quiet: bool,
    ) -> None:
        self.source, self.settings, self.jobs, self.out, self.report = source, settings, jobs, out, report
        self.described, self.device, self.html, self.json, self.quiet = described, device, html, json, quiet
        self.records: list[Record] = []
        self.journal: Journal

    def go(self) -> int:
        """Attack, report, print; return the exit code."""
        from mlperturb.interrupts import Interrupts
        from mlperturb.journal import Journal
        from mlperturb.report import exit_code, make_report, to_json
        from mlperturb.runner import run_attack

        started = time.perf_counter()
        classifier, description = self.source.load(self.device)
        stopped: int | None = None
        with Interrupts() as interrupts, Journal(self.out / JOURNAL, self._key(description["sha256"])) as journal:
            self.journal = journal
            finished = self._read_journal()
            self._start_bar()
            try:
                run_attack(
                    classifier, self.jobs, self.out, self.settings, self._done,
                    finished=finished, hold=interrupts.hold, warn=print_note,
                )  # fmt: skip
            except KeyboardInterrupt:
                stopped = 130
            except StorageError as error:
                print_error(str(error))
                stopped = 3
            finally:
                self.bar.stop()
        order = {str(job.source): place for place, job in enumerate(self.jobs)}
        self.records.sort(key=lambda record: order[record.source])
        settings = {**self.described, "cwd": str(Path.cwd()), "out": os.path.relpath(self.out, self.report.parent)}
        result = make_report(settings, description, self.records, time.perf_counter() - started)
        self._write_report(to_json(result))
        if self.html:
            from mlperturb.gallery import write_gallery

            write_gallery(result, self.out, self.out / "index.html")
        if self.json:
            print(to_json(result))
        elif not self.quiet:
            self._print_tables(result)
        for record in self.records:
            if record.error:
                print_error(record.error["message"])
        if stopped == 130:
            print_note(
                f"interrupted: {len(self.records)} of {len(self.jobs)} photos are done and reported; "
                "the same command goes on"
            )
        return exit_code(self.records) if stopped is None else stopped

    def _key(self, checkpoint: str) -> dict[str, Any]:
        """Return everything that decides what the results are, but for the photos themselves."""
        key = {"version": __version__, "checkpoint": checkpoint, **self.described}
        region = self.settings.region
        if region is not None and region.mask is not None:
            key["region"] = sha256(region.mask.tobytes()).hexdigest()
        return {**key, "device": self.device.partition(":")[0]}

    def _read_journal(self) -> dict[Path, tuple[int, int]]:
        """Take over what the journal says is done and the files bear out; return the photos' (height, width).

        Raises:
            UsageError: if a photo's outputs have other names now.
        """
        from mlperturb.resume import read_finished

        if self.journal.torn:
            print_note(f"the last line of {self.journal.path} was cut short, and is dropped")
        records = read_finished(self.journal, self.jobs, self.out)
        self.records += records
        if records:
            print_note(f"going on: {len(records)} of {len(self.jobs)} photos are done already")
        return {Path(record.source): (record.height or 0, record.width or 0) for record in records}

    def _write_report(self, text: str) -> None:
        from mlperturb.files import write_file

        write_file(self.report, text.encode())

    def _print_tables(self, result: dict[str, Any]) -> None:
        from mlperturb.tables import image_line, image_table, summary_table

        if len(self.records) <= 3:
            for record in self.records:
                stdout.print(image_line(record), soft_wrap=True)
                if record.probabilities:
                    stdout.print(image_table(record))
        else:
            stdout.print(summary_table(result["summary"]))
        for record in self.records:
            for note in record.notes:
                print_note(f"{record.source}: {note}")
            if not record.error and record.status != "success":
                print_note(f"{record.source}: {advice(record, self.settings)}")
        page = f", page {printable(str(self.out / 'index.html'))}" if self.html else ""
        stdout.print(f"files in {printable(str(self.out))}, report {printable(str(self.report))}{page}", soft_wrap=True)

    def _start_bar(self) -> None:
        self.bar = make_bar(quiet=self.quiet)
        self.task = self.bar.add_task("loading", total=len(self.jobs), completed=len(self.records))
        self.bar.start()

    def _done(self, records: list[Record]) -> None:
        from mlperturb.report import summarise
        from mlperturb.resume import write_records

        write_records(self.journal, records, self.out)
        self.records += records
        summary = summarise(self.records, 0.0)
        rate, rmsd = summary["success_rate"], summary["rmsd"]["mean"]
        text = f"success {rate:.0%}" if rate is not None else "success -"
        text += f", mean RMSD {rmsd:.2f}" if rmsd is not None else ""
        self.bar.update(self.task, advance=len(records), description=text)


def advice(record: Record, settings: Settings) -> str:
    """Say in a line what fell short, and what may help."""
    constraints = record.constraints or {"held": 0, "total": 0, "violated": []}
    missing = constraints["total"] - constraints["held"]
    lost = [
        f"{name} ({', '.join(one['violated'][:3])})" for name, one in (record.survival or {}).items() if one["violated"]
    ]
    if lost and not missing:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        hint = "more --passes" if settings.passes else "--budget paper"
        return f"the PNG holds, but not after {', '.join(lost[:3])}{more}; try {hint} or fewer qualities"
    if record.ranking and record.ranking["satisfied"]:
        return (
            f"the ranking holds, but {missing} of {constraints['total']} decisions do not "
            "(ranking attacks do not see thresholds); try --between threshold"
        )
    hints = []
    if settings.method in ("fgs", "fg", "ml-dp"):
        hints.append(f"--method {DEFAULT_METHOD}")
    if settings.passes is not None:
        hints.append("more --passes")
    elif settings.max_rmsd is not None:
        hints.append("a larger --max-rmsd")
    elif settings.budget != "paper":
        hints.append("--budget " + ("balanced" if settings.budget == "fast" else "paper"))
    written = "" if record.files["adversarial"] else ", and no label flipped: no file written"
    return (
        f"{missing} of {constraints['total']} constraints do not hold "
        f"({', '.join(constraints['violated'][:5])}){written}" + (f"; try {' or '.join(hints)}" if hints else "")
    )


def _prepare_folder(out: Path, report: Path, jobs: list[Job], *, overwrite: bool, page: Path | None) -> None:
    """Make the output folder; refuse outputs that exist, unless they may be replaced.

    Raises:
        UsageError: if the folder cannot be made or written, or something is there already.
    """
    make_folder(out)
    make_folder(report.parent)
    if report.is_dir():
        raise UsageError(f"expected a file for --report, got the folder {report}")
    pages = [page] if page else []
    targets = [report, *pages, *(out / name for job in jobs for name in (job.adversarial, job.map))]
    if report.resolve() in {target.resolve() for target in targets[1:]}:
        raise UsageError(f"the report would replace another file of the run: choose another --report than {report}")
    sources = {job.source.resolve() for job in jobs}
    if any(target.resolve() in sources for target in targets):
        raise UsageError(f"an output would replace its own photo: choose another --out than {out}")
    existing = [target for target in targets if os.path.lexists(target)]
    if existing and not overwrite:
        raise UsageError(
            f"{existing[0]} and {len(existing) - 1} more outputs exist already: give --overwrite or another --out"
        )
