"""One run of `evaluate`: the attacks or the measurement of one checkpoint, its files and printed tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperturb.cli.console import out as stdout
from mlperturb.cli.console import print_error
from mlperturb.cli.longrun import LongRun
from mlperturb.cli.source import Source, classifier_key
from mlperturb.errors import UsageError
from mlperturb.system.text import printable, share_of

if TYPE_CHECKING:
    from mlperturb.experiment.cases import Protocol
    from mlperturb.experiment.evaluate import Results
    from mlperturb.photos.datasets import Dataset
    from mlperturb.show.grids import Grid


@dataclass
class EvaluationRun:
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
        from mlperturb.show.grids import classifier_grid

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
            results, failures = self._attack(dataset, path)
        except UsageError:
            if overwrite and long.share.first and find_journal(old):  # a refused command must not lose the old journal
                move_journal(old, path)
            raise
        if long.stopped is not None:
            if long.stopped == 130:
                long.note(f"interrupted: the same command goes on from what {self.out} holds")
            return long.stopped
        if results is None:  # another process than the first
            return 0
        if overwrite:
            self._drop_old_images(old, path)
        self._drop_pictures(old, path)
        remove_journal(old)
        self._report(results.rows)
        self._draw(results)
        for line in failures:
            print_error(line)
        return long.exit_code(int(bool(failures)))

    def _attack(self, dataset: Dataset, path: Path) -> tuple[Results | None, list[str]]:
        """Attack; return the results, and a line for each photo that could not be attacked."""
        from mlperturb.experiment.evaluate import run as run_evaluation
        from mlperturb.experiment.records import failures

        long = self.long
        with (
            long.journal(path, self._key(dataset)) as (journal, interrupts),
            long.bar("classified", len(dataset), "classifying"),
            long.stoppable(),
        ):
            results = run_evaluation(
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
            return results, failures(journal)
        return None, []

    def _report(self, rows: list[dict[str, Any]]) -> None:
        """Write the tables, and print them."""
        from mlperturb.show.grids import curve_grid, evaluation_grid, to_csv

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

    def _draw(self, results: Results) -> None:
        """Write success against RMSD, with a picture for each case, and Figure 1 for each case that flips one label."""
        from mlperturb import __version__
        from mlperturb.experiment.curves import SCHEMA, by_case
        from mlperturb.experiment.records import slug
        from mlperturb.run.outputs import CURVE, CURVES, HISTOGRAM
        from mlperturb.run.report import to_json
        from mlperturb.show.curves import draw_curves
        from mlperturb.show.figures import draw_distribution, save_figure
        from mlperturb.show.grids import curves_csv

        curves = results.curves
        self._write(CURVES, to_json({"schema": SCHEMA, "version": __version__, "curves": curves}) + "\n")
        self._write("curves.csv", curves_csv(curves))
        pictures = {f"{CURVE}{slug(case)}.png": (case, mine) for case, mine in by_case(curves, "saved")}
        for name, (case, mine) in pictures.items():
            save_figure(draw_curves(case, mine), self.out / name)
        histograms = {f"{HISTOGRAM}{slug(one.case)}.png": one for one in results.distributions}
        for name, one in histograms.items():
            label, threshold = self.classifier.labels[one.label], self.classifier.thresholds[one.label]
            save_figure(draw_distribution(one.series, label, threshold), self.out / name)
        if not self.json and not self.long.quiet:
            stdout.print(f"success against RMSD: {CURVES}, curves.csv, {', '.join(pictures)}", soft_wrap=True)
            if histograms:
                stdout.print(f"probabilities of the flipped label: {', '.join(histograms)}", soft_wrap=True)

    def _drop_pictures(self, *journals: Path) -> None:
        """Delete the pictures of earlier runs here, of the cases that these journals have; `_draw` draws today's."""
        from mlperturb.experiment.records import kept_cases, slug
        from mlperturb.run.outputs import CURVE, HISTOGRAM, is_own
        from mlperturb.system.files import list_names, remove_file

        there = {name for name in list_names(self.out) if name.startswith((CURVE, HISTOGRAM))}
        if not there:
            return  # the journals may be large
        cases = {slug(case) for journal in journals for case in kept_cases(journal)}
        for name in there & {f"{kind}{case}.png" for kind in (CURVE, HISTOGRAM) for case in cases}:
            if is_own(self.out / name):
                remove_file(self.out / name)

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
        from mlperturb.show.grids import to_latex, to_markdown
        from mlperturb.show.tables import show

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
