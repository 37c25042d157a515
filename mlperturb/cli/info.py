"""`mlperturb labels` and `mlperturb methods`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mlperturb.attacks.methods import METHODS
from mlperturb.cli.complete import complete_categories, complete_labels
from mlperturb.cli.console import OPTIONS, out, print_note
from mlperturb.cli.options import Activation, Arch, Checkpoint, Json, Labels, PreprocessFile, Prompt, Thresholds
from mlperturb.cli.source import Source, find_source
from mlperturb.labels import Categories, find_like
from mlperturb.model.given import DEFAULT_FIELDS
from mlperturb.model.readers import DEFAULT_READERS
from mlperturb.system.text import printable

if TYPE_CHECKING:
    from mlperturb.model.metadata import Metadata

_SHOWN = 60  # at most so many labels are shown


def labels(
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    labels: Labels = None,
    thresholds: Thresholds = None,
    preprocess: PreprocessFile = None,
    activation: Activation = None,
    prompt: Prompt = None,
    find: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            autocompletion=complete_labels(),
            help="Show the labels with this text in their name, or like it.",
        ),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(metavar="NAME", autocompletion=complete_categories, help="Show the labels of this category."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the label names and thresholds of a checkpoint, all that is understood of it, and where that comes from."""
    from mlperturb.model.checkpoints import describe_checkpoint
    from mlperturb.run.report import to_json

    source = find_source(checkpoint, arch, labels, thresholds, preprocess, activation, prompt)
    metadata = describe_checkpoint(source.path, **source.said)
    if metadata.activation == "softmax" and not json:
        print_note(source.notes[0])
    chosen = range(len(metadata.labels)) if category is None else metadata.categories.find(category)
    if find is not None:
        chosen = find_like(find, metadata.labels, chosen)
    narrowed = find is not None or category is not None
    if json:
        print(to_json(_describe(source, metadata, chosen, narrowed=narrowed)))
        return
    _print_labels(metadata, chosen, narrowed=narrowed)
    if not narrowed:
        _print_understood(source, metadata)


def _describe(source: Source, metadata: Metadata, chosen: Sequence[int], *, narrowed: bool) -> dict[str, Any]:
    """Return the JSON of these labels, by number, and of all that is understood."""
    names = [metadata.labels[number] for number in chosen]
    described: dict[str, Any] = {
        "checkpoint": source.name,
        "thresholds": {name: metadata.thresholds[number] for name, number in zip(names, chosen, strict=True)},
    }
    if metadata.categories.of:
        described["categories"] = {
            name: metadata.categories.of[number] for name, number in zip(names, chosen, strict=True)
        }
    if narrowed:
        return {**described, "numbers": dict(zip(names, chosen, strict=True))}
    names = ["architecture", "activation", "preprocess", "provenance", "metrics"]
    names += ["prompts"] if metadata.prompts else []
    details = {name: getattr(metadata, name) for name in names}
    return {**described, **details, "origin": _origin(metadata)}


def _origin(metadata: Metadata) -> dict[str, str]:
    """Return where each thing that is understood comes from."""
    own = dict.fromkeys(("labels", "thresholds", "preprocess"), "the checkpoint") | metadata.origin
    return {"readers": "the checkpoint" if "readers" in metadata.preprocess else "the default", **own}


def _print_labels(metadata: Metadata, chosen: Sequence[int], *, narrowed: bool) -> None:
    """Print a table of labels, by number; of many labels the first."""
    categories, shown = metadata.categories, chosen if len(chosen) <= _SHOWN else chosen[: _SHOWN // 2]
    columns = ["label", "threshold"] + ["category"] * bool(categories.of) + ["number"] * narrowed
    table = Table(*columns, box=None, pad_edge=False)
    for number in shown:
        row = [printable(metadata.labels[number]), f"{metadata.thresholds[number]:.3f}"]
        row += [printable(_category(categories, number))] if categories.of else []
        table.add_row(*row, *([str(number)] if narrowed else []))
    out.print(table)
    left = len(chosen) - len(shown)
    if left:
        out.print(f"and {left} others: --find TEXT{', --category NAME' if categories.of else ''} or --json shows them")


def _category(categories: Categories, number: int) -> str:
    """Return the name of a label's category, or the category itself."""
    return categories.names.get(categories.of[number], categories.of[number])


def _print_understood(source: Source, metadata: Metadata) -> None:
    """Print all that is understood of a checkpoint beside its labels, and where it comes from."""
    groups = metadata.categories.describe()
    counted = ", ".join(f"{name}: {count}" for name, count in groups.items())
    out.print(f"labels: {len(metadata.labels)}" + (f", by category {printable(counted)}" if groups else ""))
    provenance = {name: value for name, value in metadata.provenance.items() if name != "origin"}
    details = {
        "architecture": metadata.architecture,
        "activation": metadata.activation,
        **({"prompts": ", ".join(metadata.prompts)} if metadata.prompts else {}),
        "preprocess": {"readers": list(DEFAULT_READERS), **DEFAULT_FIELDS, **metadata.preprocess},
        "from": _origin(metadata),
        "provenance": provenance,
        "metrics": metadata.metrics,
    }
    for name, value in details.items():
        if not isinstance(value, dict):
            out.print(f"{name}: {printable(str(value))}", soft_wrap=True)
        elif value:
            out.print(f"{name}:")
            for key, inner in value.items():
                out.print(f"  {printable(str(key))}: {printable(_line(inner))}", soft_wrap=True)
    out.print(f"checkpoint: {printable(source.name)}", soft_wrap=True)


def _line(value: object) -> str:
    """Return a value as one line, without nested tables, which only --json shows."""
    if not isinstance(value, dict):
        return str(value)
    shown = {key: inner for key, inner in value.items() if not isinstance(inner, dict)}
    return ", ".join(
        f"{key} {inner:.4g}" if isinstance(inner, float) else f"{key} {inner}" for key, inner in shown.items()
    )


def methods() -> None:
    """Show the attacks: name, summary, equation in the paper, options."""
    table = Table("method", "what it does", box=None, pad_edge=False)
    for name, method in METHODS.items():
        options = "; options " + ", ".join(OPTIONS[option] for option in method.options) if method.options else ""
        table.add_row(name, Text(method.summary + "\n").append(method.equation + options, style="dim"))
    out.print(table)
