"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlperturb.attacks.methods import BUDGETS
from mlperturb.cli.complete import complete_budget, complete_device, complete_readers
from mlperturb.errors import UsageError
from mlperturb.model.prompts import DEFAULT_PROMPT
from mlperturb.system.files import parse_local, parse_path

ANYWHERE: dict[str, Any] = {"parser": parse_path, "metavar": "PATH"}  # a path of this machine, or a URL
HERE: dict[str, Any] = {"parser": parse_local, "metavar": "PATH"}  # a path of this machine

# The panels of the help, for **options.
WHAT: dict[str, Any] = {"rich_help_panel": "What"}
HOW: dict[str, Any] = {"rich_help_panel": "How"}
LIMITS: dict[str, Any] = {"rich_help_panel": "Limits"}
CLASSIFIER: dict[str, Any] = {"rich_help_panel": "Classifier"}
OUTPUT: dict[str, Any] = {"rich_help_panel": "Output"}
MACHINE: dict[str, Any] = {"rich_help_panel": "Machine"}


def _check_seed(seed: int) -> int:
    """Return a seed of random numbers, from 0 to 2**32 - 1.

    Raises:
        UsageError: if it is out of this range.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"expected --seed from 0 to {2**32 - 1}, got {str(seed)[:20]}")
    return seed


Paths = Annotated[
    list[Path], typer.Argument(**ANYWHERE, help="Photos or folders of photos; paths or URLs.", show_default=False)
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", metavar="", help="Search subfolders too.", **WHAT)]
CHECKPOINT_HELP = (
    "A .safetensors checkpoint of mlperturb, the folder of a timm or a transformers model (config.json, "
    "model.safetensors), hf:OWNER/NAME[@REVISION] of the Hugging Face Hub, a program with NAME.json beside it "
    "(.pt2 of torch.export, .onnx), plain weights with --arch and --labels, or a bundled one: "
    "efficientnet-lite2, the default, mobilenet-v2, robust, paper."
)
Checkpoint = Annotated[Path | None, typer.Option(**HERE, **CLASSIFIER, help=CHECKPOINT_HELP)]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Architecture of plain weights, of torchvision, or of timm as timm/NAME.", **CLASSIFIER
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAMES",
        **CLASSIFIER,
        help="File with the label names of plain weights, or of a folder that has none: one per line, or a CSV table "
        "with the columns `name` and, optionally, `category`. For CLIP and SigLIP also the names to look for, "
        "separated by commas.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        **CLASSIFIER,
        help=f"For CLIP and SigLIP: the text for each label, with {{}} in place of its name; repeatable, then the "
        f"embeddings are averaged. Default: {DEFAULT_PROMPT}.",
    ),
]
Thresholds = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|FILE",
        **CLASSIFIER,
        help="Decision thresholds in place of the checkpoint's: a number for all labels, or a CSV table with the "
        "columns `name` or `category`, and `threshold`.",
    ),
]
PreprocessFile = Annotated[
    Path | None,
    typer.Option(
        "--preprocess",
        **HERE,
        **CLASSIFIER,
        help="JSON file with fields of the preprocessing, in place of what the checkpoint says: how a photo becomes "
        "network input.",
    ),
]
Activation = Annotated[
    str | None,
    typer.Option(
        metavar="sigmoid|softmax",
        help="What makes probabilities of the network's scores, in place of what the checkpoint says: softmax where a "
        "photo has one label.",
        **CLASSIFIER,
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="NAME", autocompletion=complete_device, help="auto, cpu, cuda, cuda:N or mps.", **MACHINE),
]
Seed = Annotated[int, typer.Option(metavar="N", callback=_check_seed, help="Seed of all random numbers.", **MACHINE)]
Passes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Largest sum of forward and backward passes for a photo.", **LIMITS),
]
Readers = Annotated[
    list[str] | None,
    typer.Option(
        "--reader",
        metavar="NAME",
        autocompletion=complete_readers,
        **WHAT,
        help="Program in which the result must hold: float, pillow, torchvision, opencv, with or without :FILTER; "
        "repeatable. By default the readers of the checkpoint.",
    ),
]
Margin = Annotated[
    float,
    typer.Option(
        metavar="X",
        **WHAT,
        help="By how much each logit must clear its threshold: safety in readers that are not named.",
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        autocompletion=complete_budget,
        help=f"How long to search: {', '.join(BUDGETS)}.",
        **HOW,
    ),
]
BatchSize = Annotated[str, typer.Option(metavar="N", help="Number of photos in a batch, or auto.", **MACHINE)]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace existing outputs.", **OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", metavar="", help="Print nothing but errors.", **OUTPUT)]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, and only JSON, on stdout.", **OUTPUT)]

DATA: dict[str, Any] = {"rich_help_panel": "Data"}
Voc = Annotated[Path | None, typer.Option(**HERE, **DATA, help="A VOCdevkit folder.")]
Year = Annotated[
    list[str] | None,
    typer.Option(metavar="YEAR", help="Year of the VOCdevkit; repeatable, comma-separated.", **DATA),
]
PhotoFolder = Annotated[
    Path | None, typer.Option(**ANYWHERE, **DATA, help="A folder of photos, with --csv or --coco, in place of --voc.")
]
LabelTable = Annotated[
    Path | None, typer.Option(**HERE, **DATA, help="Table `image,LABEL,...`: 1, 0, or -1 for difficult.")
]
Coco = Annotated[
    Path | None,
    typer.Option(**HERE, **DATA, help="COCO's instances_*.json; the labels are the names of its categories."),
]


def check_data(
    voc: Path | None, year: list[str] | None, photos: Path | None, csv: Path | None, coco: Path | None
) -> None:
    """Check the options that name a data set.

    Raises:
        UsageError: unless either --voc with --year, or --photos with --csv or --coco, is given.
    """
    tables = (csv is not None) + (coco is not None)
    if (voc is None) == (photos is None) or (photos is not None) != (tables == 1):
        raise UsageError("expected either --voc with --year, or --photos with --csv or --coco")
    if (voc is not None) != bool(year):
        raise UsageError("expected both --year and --voc, or neither")


def parse_batch_size(value: str) -> int | None:
    """Return the batch size, None for `auto`.

    Raises:
        UsageError: if the value is neither `auto` nor a whole number of at least 1.
    """
    if value == "auto":
        return None
    if not (value.isascii() and value.isdecimal()) or int(value) < 1:
        raise UsageError(f"expected --batch-size auto or a number of at least 1, got {value!r}")
    return int(value)
