"""`mlperturb train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlperturb.cli.console import print_note
from mlperturb.cli.options import (
    CLASSIFIER,
    DATA,
    HERE,
    HOW,
    MACHINE,
    OUTPUT,
    Coco,
    Device,
    LabelTable,
    PhotoFolder,
    Seed,
    Voc,
    Year,
    check_data,
)
from mlperturb.errors import UsageError
from mlperturb.system.files import parse_local
from mlperturb.system.text import counted

_LOSS: dict[str, Any] = {"rich_help_panel": "Loss"}
_CROPS: dict[str, Any] = {"rich_help_panel": "Crops"}
_ADVERSARIAL: dict[str, Any] = {"rich_help_panel": "Adversarial training"}


def train(
    out: Annotated[Path, typer.Option(**HERE, help="The checkpoint to write, .safetensors.", **OUTPUT)],
    voc: Voc = None,
    year: Year = None,
    train_split: Annotated[
        str, typer.Option(help="SPLIT of every year, or YEAR:SPLIT,... for several years.", metavar="SPLIT", **DATA)
    ] = "train",
    val_split: Annotated[
        str | None,
        typer.Option(
            help="Split for calibration; default: a tenth of the training photos, held out.", metavar="SPLIT", **DATA
        ),
    ] = None,
    test_split: Annotated[
        str | None, typer.Option(help="Split to measure on; nothing is tuned on it.", metavar="SPLIT", **DATA)
    ] = None,
    photos: PhotoFolder = None,
    csv: LabelTable = None,
    coco: Coco = None,
    test_csv: Annotated[
        Path | None, typer.Option(**HERE, help="Like --csv, for the photos to measure on.", **DATA)
    ] = None,
    arch: Annotated[
        str,
        typer.Option(
            help="A torchvision classification model, or timm/NAME for a model of timm.", metavar="NAME", **CLASSIFIER
        ),
    ] = "mobilenet_v2",
    init: Annotated[
        list[str] | None,
        typer.Option(
            help="Weights to start from: a file (repeatable, later ones override) or `torchvision`.",
            metavar="FILE",
            **CLASSIFIER,
        ),
    ] = None,
    head_only: Annotated[
        bool,
        typer.Option(
            "--head-only", metavar="", help="Train only the last layer, on cached features, as the paper does.", **HOW
        ),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            metavar="",
            help="First fit the last layer on cached features; choose its weight decay on held-out photos.",
            **HOW,
        ),
    ] = False,
    blend: Annotated[
        bool,
        typer.Option(
            "--blend",
            metavar="",
            help="At the end mix in the weights from before the epochs, in the best share on held-out photos.",
            **HOW,
        ),
    ] = False,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            **HERE, help="A checkpoint whose probabilities are targets too (repeatable: their mean).", **_LOSS
        ),
    ] = None,
    teacher_weight: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the teachers' probabilities in the targets.", metavar="X", **_LOSS),
    ] = 0.5,
    epochs: Annotated[
        int,
        typer.Option(
            min=0, help="Passes over the photos; 0: only the initial weights, or only --probe.", metavar="N", **HOW
        ),
    ] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Number of photos in a step.", metavar="N", **HOW)] = 100,
    lr: Annotated[float, typer.Option(min=0, help="AdamW's peak learning rate.", metavar="X", **HOW)] = 5e-4,
    fresh_rate: Annotated[
        float,
        typer.Option(
            min=0,
            help="Factor of --lr for tensors that are not in the last --init file, such as the head.",
            metavar="X",
            **HOW,
        ),
    ] = 1.0,
    layer_decay: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Factor of the learning rate, for each block further from the head.", metavar="X", **HOW
        ),
    ] = 1.0,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's weight decay.", metavar="X", **HOW)] = 1e-2,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Parameters to freeze, such as 'blocks.0.*' (repeatable).", metavar="NAME", **CLASSIFIER),
    ] = None,
    views: Annotated[
        int,
        typer.Option(
            min=0,
            help="Keep what the frozen first layers give for so many random crops a photo.",
            metavar="N",
            **_CROPS,
        ),
    ] = 0,
    norm_momentum: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Momentum of batch normalisation's statistics; 0 freezes them.", metavar="X", **HOW
        ),
    ] = None,
    mixup: Annotated[
        float,
        typer.Option(
            min=0,
            help="Mix each photo with a second photo, in a share drawn from Beta(MIXUP, MIXUP); 0: off.",
            metavar="X",
            **_LOSS,
        ),
    ] = 0.0,
    adversarial: Annotated[
        str,
        typer.Option(
            help="Train on perturbed photos: linf:RADIUS or l2:RMSD, on the 0-255 scale of the network input.",
            metavar="KIND:RADIUS",
            **_ADVERSARIAL,
        ),
    ] = "",
    adversarial_steps: Annotated[
        int,
        typer.Option(min=1, help="Steps of the gradient ascent that perturbs a batch.", metavar="N", **_ADVERSARIAL),
    ] = 1,
    clean_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="With --adversarial: the share of each batch that is not perturbed.",
            metavar="X",
            **_ADVERSARIAL,
        ),
    ] = 0.0,
    instance_weight: Annotated[float, typer.Option(min=0, help="Lambda of Eq. 12.", metavar="X", **_LOSS)] = 0.5,
    calibration_weight: Annotated[
        float,
        typer.Option(
            min=0, help="Weight of the cross-entropy beside Eq. 12; 0 for Eq. 12 alone.", metavar="X", **_LOSS
        ),
    ] = 1.0,
    size: Annotated[
        int,
        typer.Option(
            min=0,
            help="Side of the square network input in pixels; 0: the preprocessing of --arch.",
            metavar="N",
            **CLASSIFIER,
        ),
    ] = 224,
    mean: Annotated[
        float, typer.Option(help="With --size: the mean to subtract from pixels in [0, 1].", metavar="X", **CLASSIFIER)
    ] = 0.5,
    std: Annotated[
        float,
        typer.Option(min=1e-3, help="With --size: the standard deviation to divide by.", metavar="X", **CLASSIFIER),
    ] = 0.5,
    train_size: Annotated[
        int, typer.Option(min=0, help="Side of the training crops in pixels; 0: --size.", metavar="N", **_CROPS)
    ] = 0,
    least_crop: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Smallest share of a photo's area that a random crop keeps.", metavar="X", **_CROPS
        ),
    ] = 0.5,
    average: Annotated[
        float, typer.Option(min=0, max=0.9999, help="Decay of the moving average of the weights.", metavar="X", **HOW)
    ] = 0.99,
    amp: Annotated[
        bool,
        typer.Option(
            "--amp", metavar="", help="Compute in bfloat16 on the CPU; CUDA always computes in float16.", **MACHINE
        ),
    ] = False,
    half: Annotated[bool, typer.Option("--half", metavar="", help="Write matrices in float16.", **OUTPUT)] = False,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode photos.", metavar="N", **MACHINE)] = 0,
    seed: Seed = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            help="Resume from OUT.resume.pt; or, with more --epochs, from OUT, if it is done.",
            **OUTPUT,
        ),
    ] = False,
    fresh_head: Annotated[
        bool,
        typer.Option("--fresh-head", metavar="", help="Draw the last layer anew, even where --init has it.", **HOW),
    ] = False,
    shift: Annotated[
        str,
        typer.Option(
            help="What held-out photos add to the logits at the end: a bias for each label, one, or none.",
            metavar="NAME",
            **HOW,
        ),
    ] = "label",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace an existing OUT, or its state.", **OUTPUT)
    ] = False,
    over: Annotated[
        Path | None,
        typer.Option(**HERE, help="Write only what differs from this checkpoint, which must lie beside OUT.", **OUTPUT),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            help="Text on the data and initial weights, for the checkpoint's metadata.", metavar="TEXT", **OUTPUT
        ),
    ] = "",
) -> None:
    """Train a multi-label classifier with the paper's ranking loss, calibrate it, and measure it.

    After a stop, the same command with --resume goes on.
    """
    check_data(voc, year, photos, csv, coco)
    if out.suffix != ".safetensors":
        raise UsageError(f"expected --out to end in .safetensors, got {out}")
    files = [parse_local(name) for name in init or () if name != "torchvision"]

    from mlperturb.cli.epochs import Printer, print_trained
    from mlperturb.cli.splits import hold_out, read_tables, read_voc_splits
    from mlperturb.model.checkpoints import find_checkpoint
    from mlperturb.system.devices import prepare
    from mlperturb.system.processes import join as join_run
    from mlperturb.system.processes import local_device
    from mlperturb.training.recipe import Recipe
    from mlperturb.training.train import is_done, resume_file
    from mlperturb.training.train import train as run

    share, state = join_run(), resume_file(out)
    taken = next((path for path in (state, out) if path.exists()), None)
    if taken is not None and not (resume or overwrite or share.any_restarted()):
        raise UsageError(f"{taken} exists already: give --resume to go on, --overwrite or another --out")
    if voc is not None:
        training, validation, tests = read_voc_splits(voc, year or [], train_split, val_split, test_split)
    else:
        assert photos is not None
        training, validation, tests = read_tables(photos, csv, coco, test_csv)
    if validation is None:
        training, validation = hold_out(training, seed)
    recipe = Recipe(
        architecture=arch,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        fresh_rate=fresh_rate,
        weight_decay=weight_decay,
        instance_weight=instance_weight,
        calibration_weight=calibration_weight,
        head_only=head_only,
        fresh_head=fresh_head,
        shift=shift,
        probe=probe,
        blend=blend,
        layer_decay=layer_decay,
        freeze=tuple(freeze or ()),
        views=views,
        norm_momentum=norm_momentum,
        amp=amp,
        mixup=mixup,
        adversarial=adversarial,
        adversarial_steps=adversarial_steps,
        clean_share=clean_share,
        teacher_weight=teacher_weight,
        size=size,
        mean=mean,
        std=std,
        train_size=train_size,
        least_crop=least_crop,
        average=average,
        seed=seed,
        workers=workers,
    )
    provenance = {
        "command": shlex.join(["mlperturb", *sys.argv[1:]]),
        "source": source,
        "initial": [path.name for path in files] or list(init or ()),
        "teachers": [path.name for path in teacher or ()],
        "photos": {"training": len(training), "validation": len(validation)},
    }
    done = out.stat().st_mtime_ns if resume and is_done(out) else None  # when the training to go on from ended
    try:
        metadata = run(
            recipe,
            training,
            validation,
            tests,
            output=out,
            initial=files,
            pretrained="torchvision" in (init or ()),
            teachers=[find_checkpoint(path) for path in teacher or ()],
            half=half,
            base=over,
            device=prepare(local_device(device), seed),
            resume=resume,
            provenance=provenance,
            report=Printer() if share.first else None,
            share=share,
        )
    except KeyboardInterrupt:
        if share.first:
            on = f"with --resume the same command goes on from {state}" if state.exists() else "no epoch was done"
            print_note(f"interrupted: {on}")
        raise
    if metadata is None:  # another process than the first
        return
    if done is not None and out.stat().st_mtime_ns == done:
        print_note(f"{out} has had its {counted(epochs, 'epoch')} and stays as it is: give more --epochs to go on")
        return
    if done is not None:
        print_note(f"went on from {out}, whose training was done: the optimiser started afresh")
    print_trained(metadata, out)
