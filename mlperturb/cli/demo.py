"""`mlperturb demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlperturb.cli import attack, predict
from mlperturb.cli.options import HERE, OUTPUT, Device
from mlperturb.cli.source import find_source
from mlperturb.errors import UsageError


def demo(
    out: Annotated[Path, typer.Option(**HERE, help="Folder for the PNGs and report.json.", **OUTPUT)] = Path(
        "mlperturb-demo"
    ),
    device: Device = "auto",
) -> None:
    """Attack the public-domain portrait that ships inside Matplotlib: flip `person`, keep the rest."""
    import matplotlib

    from mlperturb.run.jobs import plan_outputs
    from mlperturb.run.outputs import Outputs
    from mlperturb.run.settings import Words, read_settings

    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not portrait.is_file():
        raise UsageError(f"this Matplotlib has no sample photo: expected {portrait}")
    source = find_source(None, None, None)
    settings = read_settings(Words(flip=["person"], keep=["rest"]), source.labels, readers=source.readers)
    predict.run(source, [portrait], device=device)
    jobs, outputs = plan_outputs([portrait]), Outputs(out, out / "report.json")
    raise typer.Exit(attack.run(source, jobs, settings, outputs, overwrite=True, device=device))
