"""Photos for a run, and the run's outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from support.models import TINY_PIXELS


def write_photos(folder: Path, count: int) -> Path:
    """Write photos of several sizes, named by number, and a file that is not a photo."""
    folder.mkdir()
    for number in range(count):
        pixels = np.roll(TINY_PIXELS, number, 1)[: 30 - number % 3, : 36 - number % 2]
        Image.fromarray(pixels).save(folder / f"{number:0{len(str(count - 1))}}.png")
    (folder / "broken.png").write_bytes(b"nonsense")
    return folder


def contents(out: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Return the PNGs, and the records of the report without their times."""
    records = json.loads((out / "report.json").read_text())["images"]
    for record in records:
        record["cost"].pop("seconds")
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}, records


def attacked(out: Path) -> list[str]:
    """Return the photos of every finished attack, in the order of the journal."""
    entries = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [r["source"] for entry in entries for r in entry.get("records", ()) if r["error"] is None]


def said(err: str) -> list[str]:
    """Return the lines on stderr, without the line for the file that is not a photo."""
    assert "Traceback" not in err
    return [line for line in err.splitlines() if "broken.png" not in line]
