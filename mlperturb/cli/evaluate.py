"""`mlperturb evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlperturb.cli.complete import complete_labels, complete_variants, complete_words
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
    Prompt,
    Quiet,
    Readers,
    Seed,
    Thresholds,
    Voc,
    Year,
    check_data,
    parse_batch_size,
)
from mlperturb.cli.source import Source
from mlperturb.cli.sources import Checkpoints, find_sources
from mlperturb.errors import UsageError
from mlperturb.limits import MARGIN, Limits

if TYPE_CHECKING:
    from mlperturb.cli.evaluate_run import EvaluationRun
    from mlperturb.experiment.cases import Protocol
    from mlperturb.photos.datasets import Dataset

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
    prompt: Prompt = None,
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
    """Run the paper's experiment on a data set: Tables IV and V and Figure 1, or with --clean Table III.

    For each case and method, it attacks the photos on which the classifier gets every label right. After a stop, the
    same command resumes; with more --images, it attacks the photos that are new.
    """
    check_data(voc, year, photos, csv, coco)
    if photos is not None and split is not None:
        raise UsageError("expected --split with --voc: with --photos, the --csv or --coco is the split")
    if clean and (cases or reduce or augment or methods):
        raise UsageError("expected --clean without --cases, --reduce, --augment and --methods: it attacks nothing")
    source = find_sources(checkpoint, arch, labels, thresholds, preprocess, activation, prompt)
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
        from mlperturb.cli.evaluate_run import EvaluationRun
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
        runs: dict[str, EvaluationRun] = {}
        codes: list[int] = []
        for name, source in self.sources.items():
            folder = self.out / name if name else self.out
            make_folder(folder)
            hidden = several and self.json and not self.clean  # the matrix alone is printed
            long = LongRun(share, quiet=self.quiet or hidden)
            run = EvaluationRun(long, self.protocols[name], aligned[name], folder, self.json and not hidden)
            run.load(source, device)
            for note in source.notes:  # after loading, so that an error is the only line
                long.note(note)
            codes.append(run.clean() if self.clean else run.go(overwrite=overwrite))
            if long.stopped is not None:
                return codes[-1]
            runs[name] = run
        if several and not self.clean:
            loaded = {name: (run.classifier, run.description) for name, run in runs.items()}
            codes.append(write_matrix(self.out, loaded, readers, json=self.json, quiet=self.quiet))
        return max(codes)
