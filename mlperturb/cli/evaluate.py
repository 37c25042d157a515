"""`mlperturb evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlperturb import __version__
from mlperturb.attacks.methods import BUDGETS
from mlperturb.cli.console import make_bar, print_error, print_note
from mlperturb.cli.console import out as stdout
from mlperturb.cli.options import (
    ANYWHERE,
    Arch,
    BatchSize,
    Checkpoint,
    Device,
    Json,
    Labels,
    LabelTable,
    Overwrite,
    Passes,
    PhotoFolder,
    Quiet,
    Seed,
    Source,
    Voc,
    Year,
    check_data,
    find_source,
    make_folder,
    parse_batch_size,
)
from mlperturb.errors import UsageError
from mlperturb.text import printable

if TYPE_CHECKING:
    from mlperturb.cases import Protocol
    from mlperturb.tables import Grid
    from mlperturb.voc import Dataset

_CASES = ("random", "extreme", "person", "sheep")


def evaluate(
    voc: Voc = None,
    year: Year = None,
    split: Annotated[str | None, typer.Option(help="SPLIT of every year (test), or YEAR:SPLIT,... of several.")] = None,
    photos: PhotoFolder = None,
    csv: LabelTable = None,
    clean: Annotated[bool, typer.Option("--clean", help="Attack nothing: the classifier's own figures.")] = False,
    cases: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(_CASES)}; repeatable, comma-separated. All, unless labels are named below."),
    ] = None,
    reduce: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="A case like person: the label flipped where it is seen.")
    ] = None,
    augment: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="A case like sheep: the label flipped where it is not.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="`all`, or methods, with options as in ml-dp:solver=pinv.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Photos a case, at most.")] = 1000,
    max_rmsd: Annotated[float, typer.Option(help="The cap that all methods share; 0 for none.", min=0)] = 10.0,
    max_linf: Annotated[
        int | None,
        typer.Option(metavar="LEVELS", help="The bound on a pixel's change that all share, in grey levels, 1 to 255."),
    ] = None,
    budget: Annotated[str, typer.Option(help=f"How long to search: {', '.join(BUDGETS)}.")] = "balanced",
    passes: Passes = None,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    out: Annotated[
        Path,
        typer.Option(**ANYWHERE, help="Folder, or URL, for records and tables; a run goes on from it."),
    ] = Path("mlperturb-evaluation"),
    overwrite: Overwrite = False,
    keep_images: Annotated[bool, typer.Option("--keep-images", help="Keep the PNGs and maps, in OUT/images.")] = False,
    batch_size: BatchSize = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the paper's experiment on a data set: Tables IV and V, or with --clean Table III.

    Photos every label of which the classifier gets right are attacked, by case and method. Stopped at any moment,
    the same command goes on where it was.
    """
    check_data(voc, year, photos, csv)
    if photos is not None and split is not None:
        raise UsageError("--split goes with --voc: with --photos, the --csv is the split")
    if clean and (cases or reduce or augment or methods):
        raise UsageError("--clean attacks nothing: it goes without --cases, --reduce, --augment and --methods")
    source = find_source(checkpoint, arch, labels)

    from mlperturb.cases import Protocol, align, parse_cases, parse_variants
    from mlperturb.evaluation import make_settings
    from mlperturb.voc import read_csv, read_splits

    if cases is None and not reduce and not augment:
        cases = list(_CASES)
    protocol = Protocol(
        () if clean else parse_cases(cases or (), reduce or (), augment or (), source.labels),
        parse_variants(methods or ["all"], budget),
        images, budget, max_rmsd or None, max_linf, passes, parse_batch_size(batch_size), seed, keep_images,
    )  # fmt: skip
    for variant in () if clean else protocol.variants:
        make_settings(protocol, variant)  # refuses what cannot be, before anything is read or written
    if voc is not None:
        parts = read_splits(voc, [name for value in year or () for name in value.split(",")], split or "test")
    else:
        assert photos is not None and csv is not None
        parts = {csv.name: read_csv(photos, csv)}
    parts = {name: align(part, source.labels) for name, part in parts.items()}
    make_folder(out)
    run = _Run(source, protocol, parts, out, device, json=json, quiet=quiet)
    try:
        code = run.clean() if clean else run.go(overwrite=overwrite)
    except KeyboardInterrupt:
        print_note("interrupted" + ("" if clean else f": the same command goes on from what {out} holds"))
        code = 130
    raise typer.Exit(code)


class _Run:
    """One evaluation: its progress bar, and what it prints and writes."""

    def __init__(
        self,
        source: Source,
        protocol: Protocol,
        parts: dict[str, Dataset],
        out: Path,
        device: str,
        *,
        json: bool,
        quiet: bool,
    ) -> None:
        from mlperturb.devices import prepare
        from mlperturb.sharing import join, local_device

        self.share = join()
        self.protocol, self.parts, self.out = protocol, parts, out
        self.json, self.quiet = json, quiet or not self.share.first
        device = prepare(local_device(device), protocol.seed)
        self.classifier, self.description = source.load(device)
        self.device = device if self.share.size == 1 else device.partition(":")[0]

    def clean(self) -> int:
        """Measure the classifier itself: Table III. Of several processes one does it."""
        import torch

        from mlperturb.evaluation import predict_photos
        from mlperturb.metrics import classifier_metrics
        from mlperturb.tables import classifier_grid

        if not self.share.first:
            return 0
        metrics: dict[str, dict[str, Any]] = {}
        unread: list[Path] = []
        with self._bar(sum(map(len, self.parts.values()))) as advance:
            for name, part in self.parts.items():
                logits = predict_photos(self.classifier, part, advance)
                read = logits.isfinite().all(1)
                unread += [part.paths[row] for row in (~read).nonzero().flatten().tolist()]
                metrics[name] = classifier_metrics(
                    logits[read], torch.from_numpy(part.truth)[read], self.classifier.boundary.cpu(), part.labels
                )
        self._finish("table3", metrics, [classifier_grid(metrics)])
        for path in unread:
            print_error(f"{path}: could not be read or classified, and is left out")
        return self.share.exit_code(int(bool(unread)))

    def go(self, *, overwrite: bool) -> int:
        """Attack, and write the tables; return the exit code."""
        from mlperturb import evaluation
        from mlperturb.interrupts import Interrupts
        from mlperturb.journal import Journal, find_journal, move_journal, remove_journal
        from mlperturb.tables import evaluation_grid, to_csv
        from mlperturb.voc import join

        dataset, share = join(self.parts.values()), self.share
        path, old = self.out / "records.jsonl", self.out / "records.old.jsonl"
        overwrite = overwrite and not share.any_restarted()  # what was to be replaced is gone: go on
        if overwrite and share.first:
            move_journal(path, old)
        share.agree(dataset.fingerprint, "photos")
        key = self._key(dataset)
        try:
            with Interrupts() as interrupts, Journal(path, key, rank=share.rank, size=share.size) as journal:
                if journal.torn:
                    self._note(f"the last line of {path} was cut short, and is dropped: its photos are attacked again")
                with self._bar(len(dataset)) as advance:
                    rows = evaluation.run(
                        self.classifier,
                        dataset,
                        self.protocol,
                        journal,
                        share=share,
                        scanned=advance,
                        planned=self._planned,
                        done=lambda case, variant, records: self._advance(len(records), f"{case.name}, {variant.name}"),
                        hold=interrupts.hold,
                    )
                failures = evaluation.failures(journal)
        except UsageError:
            if overwrite and share.first and find_journal(old):  # nothing is lost by a command that is refused
                move_journal(old, path)
            raise
        if not share.first:
            return 0
        if overwrite:
            self._drop_old_images(old, path)
        remove_journal(old)
        for case in self.protocol.cases:
            if not any(row["case"] == case.name for row in rows):
                self._note(f"case {case.name}: no photo that the classifier gets right has the labels for it")
        self._write("tables.csv", to_csv(rows))
        shown = [evaluation_grid(rows, which, digits=3) for which in ("float", "saved")]
        self._finish("tables", rows, [evaluation_grid(rows, which) for which in ("float", "saved")], shown)
        for line in failures:
            print_error(line)
        return share.exit_code(int(bool(failures)))

    def _drop_old_images(self, old: Path, new: Path) -> None:
        """Delete the images that the replaced run kept and this one did not write again."""
        from mlperturb.evaluation import kept_images

        current = kept_images(new) if self.protocol.keep_images else set()
        for name in kept_images(old) - current:
            (self.out / name).unlink(missing_ok=True)

    def _note(self, message: str) -> None:
        if not self.quiet:
            print_note(message)

    def _key(self, dataset: Dataset) -> dict[str, Any]:
        """Return everything that decides what the record of a photo, a case and a method is."""
        protocol = self.protocol
        return {
            "version": __version__,
            "checkpoint": self.description["sha256"],
            "architecture": self.description["architecture"],
            "labels": self.description["labels"],
            "data": dataset.fingerprint,
            "images": protocol.images,
            "budget": protocol.budget,
            "max_rmsd": protocol.max_rmsd,
            "max_linf": protocol.max_linf,
            "passes": protocol.passes,
            "batch_size": protocol.batch_size,
            "seed": protocol.seed,
            "keep_images": protocol.keep_images,
            "device": self.device,
        }

    def _finish(self, name: str, values: Any, grids: list[Grid], shown: list[Grid] | None = None) -> None:
        from mlperturb.report import to_json
        from mlperturb.tables import show, to_latex, to_markdown

        self._write(f"{name}.json", to_json(values) + "\n")
        self._write(f"{name}.md", to_markdown(grids))
        self._write(f"{name}.tex", to_latex(grids))
        if self.json:
            print(to_json(values))
        elif not self.quiet:
            for grid in shown or grids:
                stdout.print(show(grid))
            forms = ".json, .md, .tex, .csv" if name == "tables" else ".json, .md, .tex"
            stdout.print(f"tables in {printable(str(self.out))}: {name}{forms}", soft_wrap=True)

    def _write(self, name: str, text: str) -> None:
        from mlperturb.files import write_file

        write_file(self.out / name, text.encode())

    @contextmanager
    def _bar(self, photos: int) -> Iterator[Callable[[int], None]]:
        with make_bar(quiet=self.quiet) as self.bar:
            self.task, self.phase, self.had = self.bar.add_task("classifying", total=photos), "classified", 0
            yield self._advance

    def _planned(self, total: int, had: int) -> None:
        if had:
            self._note(f"going on: {had} of {total} attacks are done already")
        self.phase, self.had = "attacked", had
        self.bar.reset(self.task, total=total, completed=had, description="attacking")

    def _advance(self, count: int, text: str | None = None) -> None:
        """Move the bar on, by what all processes have done."""
        self.bar.update(self.task, completed=self.had + self.share.count(self.phase, count), description=text)
