"""`mlperturb evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb.cli.complete import complete_labels, complete_variants, complete_words
from mlperturb.cli.console import out as stdout
from mlperturb.cli.console import print_error
from mlperturb.cli.options import (
    ANYWHERE,
    DATA,
    HOW,
    LIMITS,
    OUTPUT,
    WHAT,
    Activation,
    Arch,
    BatchSize,
    Budget,
    Coco,
    Device,
    Json,
    Labels,
    LabelTable,
    Margin,
    Overwrite,
    Passes,
    PhotoFolder,
    PreprocessFile,
    Quiet,
    Readers,
    Seed,
    Thresholds,
    Voc,
    Year,
    check_data,
    parse_batch_size,
)
from mlperturb.cli.source import Source, classifier_key
from mlperturb.cli.sources import Checkpoints, find_sources
from mlperturb.errors import UsageError
from mlperturb.limits import MARGIN, Limits
from mlperturb.system.text import printable, share_of

if TYPE_CHECKING:
    from mlperturb.cli.longrun import LongRun
    from mlperturb.experiment.cases import Protocol
    from mlperturb.photos.datasets import Dataset
    from mlperturb.show.tables import Grid

_CASES = ("random", "extreme", "person", "sheep")


def evaluate(
    voc: Voc = None,
    year: Year = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="SPLIT of every year (default: test), or YEAR:SPLIT,... for several years.", metavar="SPLIT", **DATA
        ),
    ] = None,
    photos: PhotoFolder = None,
    csv: LabelTable = None,
    coco: Coco = None,
    clean: Annotated[
        bool, typer.Option("--clean", metavar="", help="Measure the classifier without an attack.", **WHAT)
    ] = False,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_words(_CASES, many=True),
            help=f"{', '.join(_CASES)}; repeatable, comma-separated. Default: all, or none with --reduce or --augment.",
            **WHAT,
        ),
    ] = None,
    reduce: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels(),
            help="A case like person: flip the label on photos that have it and another.",
            **WHAT,
        ),
    ] = None,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            autocompletion=complete_labels(),
            help="A case like sheep: flip the label on photos that do not have it.",
            **WHAT,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_variants,
            help="`all`, or methods, with options as in ml-dp:solver=pinv.",
            **HOW,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Largest number of photos for a case.", metavar="N", **LIMITS)
    ] = 1000,
    max_rmsd: Annotated[
        float, typer.Option(help="Largest RMSD, for all methods; 0 for no limit.", min=0, metavar="X", **LIMITS)
    ] = 10.0,
    max_linf: Annotated[
        int | None,
        typer.Option(
            metavar="LEVELS", help="Largest change of a pixel, for all methods, in grey levels, 1 to 255.", **LIMITS
        ),
    ] = None,
    budget: Budget = "balanced",
    passes: Passes = None,
    reader: Readers = None,
    margin: Margin = MARGIN,
    checkpoint: Checkpoints = None,
    arch: Arch = None,
    labels: Labels = None,
    thresholds: Thresholds = None,
    preprocess: PreprocessFile = None,
    activation: Activation = None,
    out: Annotated[
        Path,
        typer.Option(
            **ANYWHERE, help="Folder, or URL, for records and tables; a stopped run resumes from it.", **OUTPUT
        ),
    ] = Path("mlperturb-evaluation"),
    overwrite: Overwrite = False,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", metavar="", help="Keep the PNGs and maps, in OUT/images.", **OUTPUT)
    ] = False,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the paper's experiment on a data set: Tables IV and V, or with --clean Table III.

    For each case and method, it attacks the photos on which the classifier gets every label right. After a stop, the
    same command resumes; with more --images, it attacks the photos that are new.
    """
    check_data(voc, year, photos, csv, coco)
    if photos is not None and split is not None:
        raise UsageError("expected --split with --voc: with --photos, the --csv or --coco is the split")
    if clean and (cases or reduce or augment or methods):
        raise UsageError("expected --clean without --cases, --reduce, --augment and --methods: it attacks nothing")
    source = find_sources(checkpoint, arch, labels, thresholds, preprocess, activation)
    sources = {"": source} if isinstance(source, Source) else source.parts

    from mlperturb.experiment.cases import Protocol, parse_cases, parse_variants
    from mlperturb.experiment.evaluate import make_settings
    from mlperturb.model.readers import parse_readers
    from mlperturb.photos.datasets import read_coco, read_csv, read_splits

    if cases is None and not reduce and not augment:
        cases = list(_CASES)
    protocols = {
        name: Protocol(
            () if clean else parse_cases(cases or (), reduce or (), augment or (), one.labels),
            parse_variants(methods or ["all"], budget),
            images, budget, Limits(passes, max_rmsd or None, max_linf), parse_batch_size(batch_size), seed,
            keep_images or len(sources) > 1, parse_readers(reader or one.readers), margin,
        )
        for name, one in sources.items()
    }  # fmt: skip
    for protocol in () if clean else protocols.values():
        for variant in protocol.variants:
            make_settings(protocol, variant)  # refuses what cannot be done before anything is read or written
    if voc is not None:
        parts = read_splits(voc, [name for value in year or () for name in value.split(",")], split or "test")
    else:
        assert photos is not None
        parts = {csv.name: read_csv(photos, csv)} if csv is not None else {}
        parts |= {coco.name: read_coco(photos, coco)} if coco is not None else {}
    task = _Task(sources, protocols, parts, out, json=json, quiet=quiet, clean=clean)
    raise typer.Exit(task.go(device=device, overwrite=overwrite, readers=reader or ()))


@dataclass
class _Task:
    """The evaluations of one command: one, or one for each of several checkpoints and then the matrix."""

    sources: dict[str, Source]
    protocols: dict[str, Protocol]
    parts: dict[str, Dataset]
    out: Path
    json: bool
    quiet: bool
    clean: bool

    def go(self, *, device: str, overwrite: bool, readers: Sequence[str]) -> int:
        """Run them; return the largest exit code."""
        from mlperturb.cli.longrun import LongRun
        from mlperturb.cli.matrix import write_matrix
        from mlperturb.experiment.cases import align
        from mlperturb.run.outputs import make_folder
        from mlperturb.system.processes import join

        several, share = len(self.sources) > 1, join()
        if several and self.clean and self.json:
            raise UsageError("expected --json with --clean for a single --checkpoint")
        if several and share.size > 1:
            raise UsageError("expected one process for several --checkpoint: evaluate them one by one")
        aligned = {
            name: {part: align(data, source.labels) for part, data in self.parts.items()}
            for name, source in self.sources.items()
        }
        runs: dict[str, _Run] = {}
        codes: list[int] = []
        for name, source in self.sources.items():
            folder = self.out / name if name else self.out
            make_folder(folder)
            hidden = several and self.json and not self.clean  # the matrix alone is printed
            long = LongRun(share, quiet=self.quiet or hidden)
            run = _Run(long, self.protocols[name], aligned[name], folder, self.json and not hidden)
            for note in source.notes:
                long.note(note)
            run.load(source, device)
            codes.append(run.clean() if self.clean else run.go(overwrite=overwrite))
            if long.stopped is not None:
                return codes[-1]
            runs[name] = run
        if several and not self.clean:
            loaded = {name: (run.classifier, run.description) for name, run in runs.items()}
            codes.append(write_matrix(self.out, loaded, readers, json=self.json, quiet=self.quiet))
        return max(codes)


@dataclass
class _Run:
    """One evaluation, or the part of it that this process does: its printed and written results."""

    long: LongRun
    protocol: Protocol
    parts: dict[str, Dataset]
    out: Path
    json: bool

    def load(self, source: Source, device: str) -> None:
        """Load the classifier."""
        self.classifier, self.description = source.load(self.long.prepare(device, self.protocol.seed))

    def clean(self) -> int:
        """Measure the classifier itself (Table III), in the first process alone; return the exit code."""
        import torch

        from mlperturb.cli.advice import describe_unclear
        from mlperturb.experiment.evaluate import predict_photos
        from mlperturb.metrics import classifier_metrics
        from mlperturb.show.tables import classifier_grid

        if not self.long.share.first:
            return 0
        metrics: dict[str, dict[str, Any]] = {}
        unread: list[Path] = []
        unclear: list[str] = []
        with self.long.bar("classified", sum(map(len, self.parts.values())), "classifying"):
            for name, part in self.parts.items():
                logits = predict_photos(self.classifier, part, self.long.advance, reader=self.protocol.readers[0])
                read = logits.isfinite().all(1)
                unread += [part.paths[row] for row in logits.isnan().all(1).nonzero().flatten().tolist()]
                unclear += [str(part.paths[row]) for row in logits.isinf().all(1).nonzero().flatten().tolist()]
                metrics[name] = classifier_metrics(
                    logits[read], torch.from_numpy(part.truth)[read], self.classifier.boundary.cpu(), part.labels
                )
        self._finish("table3", metrics, [classifier_grid(metrics)])
        for path in unread:
            print_error(f"{path}: could not be read, and is left out")
        if unclear:
            print_error(describe_unclear(unclear))
        return self.long.exit_code(int(bool(unread or unclear)))

    def go(self, *, overwrite: bool) -> int:
        """Attack, write the tables, print; return the exit code."""
        from mlperturb.photos.datasets import join
        from mlperturb.system.journal import find_journal, move_journal, remove_journal

        dataset, long = join(self.parts.values()), self.long
        path, old = self.out / "records.jsonl", self.out / "records.old.jsonl"
        overwrite = long.starts_again(overwrite)
        if overwrite and long.share.first:
            move_journal(path, old)
        long.share.agree(dataset.fingerprint, "photos")
        try:
            rows, curves, failures = self._attack(dataset, path)
        except UsageError:
            if overwrite and long.share.first and find_journal(old):  # a refused command must not lose the old journal
                move_journal(old, path)
            raise
        if long.stopped is not None:
            if long.stopped == 130:
                long.note(f"interrupted: the same command goes on from what {self.out} holds")
            return long.stopped
        if not long.share.first:
            return 0
        if overwrite:
            self._drop_old_images(old, path)
        remove_journal(old)
        self._report(rows)
        self._draw(curves)
        for line in failures:
            print_error(line)
        return long.exit_code(int(bool(failures)))

    def _attack(self, dataset: Dataset, path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
        """Attack; return the rows of the tables, the curves, and a line for each photo that could not be attacked."""
        from mlperturb.experiment.curves import read_curves
        from mlperturb.experiment.evaluate import run as run_evaluation
        from mlperturb.experiment.records import failures

        long = self.long
        with (
            long.journal(path, self._key(dataset)) as (journal, interrupts),
            long.bar("classified", len(dataset), "classifying"),
            long.stoppable(),
        ):
            rows = run_evaluation(
                self.classifier,
                dataset,
                self.protocol,
                journal,
                share=long.share,
                scanned=long.advance,
                planned=self._planned,
                done=lambda part, count: long.advance(count, f"{part.case}, {part.method}"),
                watch=long.watch,
                hold=interrupts.hold,
            )
            return rows, read_curves(journal, self.protocol) if rows else [], failures(journal)
        return [], [], []

    def _report(self, rows: list[dict[str, Any]]) -> None:
        """Write the tables, and print them."""
        from mlperturb.show.tables import curve_grid, evaluation_grid, to_csv

        for case in self.protocol.cases:
            if not any(row["case"] == case.name for row in rows):
                self.long.note(f"case {case.name}: no photo that the classifier gets right has the labels for it")
        self._write("tables.csv", to_csv(rows))
        grids, shown = (
            [
                *(evaluation_grid(rows, which, digits=digits) for which in ("float", "saved")),
                curve_grid(rows, digits=digits),
            ]
            for digits in (4, 3)
        )
        self._finish("tables", rows, grids, shown)

    def _draw(self, curves: list[dict[str, Any]]) -> None:
        """Write success against RMSD: the figures, and a picture for each case."""
        from mlperturb import __version__
        from mlperturb.experiment.curves import SCHEMA, by_case
        from mlperturb.experiment.records import slug
        from mlperturb.run.outputs import CURVE, CURVES
        from mlperturb.run.report import to_json
        from mlperturb.show.curves import draw_curves
        from mlperturb.show.figures import save_figure
        from mlperturb.show.tables import curves_csv

        self._write(CURVES, to_json({"schema": SCHEMA, "version": __version__, "curves": curves}) + "\n")
        self._write("curves.csv", curves_csv(curves))
        pictures = {f"{CURVE}{slug(case)}.png": (case, mine) for case, mine in by_case(curves, "saved")}
        for name, (case, mine) in pictures.items():
            save_figure(draw_curves(case, mine), self.out / name)
        if not self.json and not self.long.quiet:
            stdout.print(f"success against RMSD: {CURVES}, curves.csv, {', '.join(pictures)}", soft_wrap=True)

    def _drop_old_images(self, old: Path, new: Path) -> None:
        """Delete the images that the replaced run kept and this run did not write again."""
        from mlperturb.experiment.records import kept_images

        current = kept_images(new) if self.protocol.keep_images else set()
        for name in kept_images(old) - current:
            (self.out / name).unlink(missing_ok=True)

    def _key(self, dataset: Dataset) -> dict[str, Any]:
        """Return everything that decides the record of a photo, case and method; not how many photos there are."""
        protocol = self.protocol
        return self.long.key(
            self.description["sha256"],
            architecture=self.description["architecture"],
            **classifier_key(self.description),
            data=dataset.fingerprint,
            budget=protocol.budget,
            **protocol.limits.describe(),
            batch_size=protocol.batch_size,
            seed=protocol.seed,
            keep_images=protocol.keep_images,
            readers=[reader.name for reader in protocol.readers],
            margin=protocol.margin,
        )

    def _finish(self, name: str, values: Any, grids: list[Grid], shown: list[Grid] | None = None) -> None:
        from mlperturb.run.report import to_json
        from mlperturb.show.tables import show, to_latex, to_markdown

        self._write(f"{name}.json", to_json(values) + "\n")
        self._write(f"{name}.md", to_markdown(grids))
        self._write(f"{name}.tex", to_latex(grids))
        if self.json:
            print(to_json(values))
        elif not self.long.quiet:
            for grid in shown or grids:
                stdout.print(show(grid))
            forms = ".json, .md, .tex, .csv" if name == "tables" else ".json, .md, .tex"
            stdout.print(f"tables in {printable(str(self.out))}: {name}{forms}", soft_wrap=True)

    def _write(self, name: str, text: str) -> None:
        from mlperturb.system.files import write_file

        write_file(self.out / name, text.encode())

    def _planned(self, total: int, had: int) -> None:
        if had and self.long.share.first:
            self.long.note(f"going on: {share_of(had, total, 'attack')} done already")
        self.long.begin("attacked", total, had, "attacking")
