"""`mlperturb demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlperturb.cli import attack, predict
from mlperturb.cli.options import HERE, Device, find_source
from mlperturb.errors import UsageError
from mlperturb.labels import parse_request


def demo(
    out: Annotated[Path, typer.Option(**HERE, help="Folder for the PNGs and report.json.")] = Path("mlperturb-demo"),
    device: Device = "auto",
) -> None:
    """Attack the public-domain portrait that ships inside Matplotlib: flip `person`, keep the rest."""
    import matplotlib

    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not portrait.is_file():
        raise UsageError(f"this Matplotlib comes without its sample photo: expected {portrait}")
    source = find_source(None, None, None)
    request = parse_request(source.labels, flip=["person"], keep=["rest"])
    names: dict[str, list[str]] = {"flip": ["person"], "keep": ["rest"], "add": [], "remove": []}
    predict.run(source, [portrait], device=device)
    raise typer.Exit(attack.run(source, [portrait], request, names, out=out, overwrite=True, device=device))
