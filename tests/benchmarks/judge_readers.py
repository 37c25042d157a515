"""Judge the files of a report in the programs people run, with no code of ours.

    python tests/benchmarks/judge_readers.py OUT/report.json --checkpoint weights/voc-mobilenet-v2.safetensors
    mlperturb evaluate --voc ../shared/voc --year 2012 --split val --cases random,person --methods ml-ddn --images 64 \
        --seed 3 --passes 100 --keep-images --out v100
    python tests/benchmarks/judge_readers.py v100/records.jsonl --beside f100/records.jsonl --checkpoint ...

The checkpoint is read with `safetensors` and `json`, the network is torchvision's or timm's own, and each PNG is
opened with Pillow and read as five programs do: torchvision's transforms of the PIL image, of uint8 tensors and of
float tensors, `Image.resize` with NumPy, and the same as Pillow had it before version 13 (the width first). Files
whose status is `success` are judged, or with --all every file. The exit code is 1 if one of them fails in a reader of
--require. With --beside, the mean ratio of the RMSDs of each photo is printed too, over the photos that hold in all
of --require.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torchvision import models
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional


def load(path: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return the network and the metadata of a checkpoint."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    facts = {name: json.loads(metadata[name]) for name in ("labels", "thresholds", "preprocess")}
    name, count = metadata["architecture"], len(facts["labels"])
    if name.startswith("timm/"):
        network = timm.create_model(name.removeprefix("timm/"), num_classes=count)
    else:
        network = models.get_model(name, weights=None, num_classes=count)
    network.load_state_dict(state)
    return network.eval(), facts


def readers(preprocess: dict[str, Any]) -> dict[str, Callable[[Image.Image], torch.Tensor]]:
    """Return functions from a PIL image to network input, (3, h, w), by name."""
    resize, crop, kernel = preprocess["resize"], preprocess["crop"], preprocess["interpolation"]
    mode = InterpolationMode(kernel)
    transform = v2.Resize(resize if isinstance(resize, list) else [resize], interpolation=mode, antialias=True)
    centre = v2.CenterCrop(crop) if crop else v2.Identity()
    normalise = v2.Normalize(preprocess["mean"], preprocess["std"])
    scale = v2.ToDtype(torch.float32, scale=True)

    def pillow(image: Image.Image, *, width_first: bool = False) -> torch.Tensor:
        size = resize
        if not isinstance(resize, list):
            short = min(image.size)
            size = [resize if side == short else int(resize * side / short) for side in (image.height, image.width)]
        if width_first:
            image = image.resize((size[1], image.height), Image.Resampling[kernel.upper()])
        small = image.resize((size[1], size[0]), Image.Resampling[kernel.upper()])
        values = torch.from_numpy(np.asarray(small).astype(np.float32) / 255).permute(2, 0, 1)
        shown: torch.Tensor = normalise(centre(values))
        return shown

    return {
        "float": lambda image: normalise(centre(transform(scale(functional.pil_to_tensor(image))))),
        "pillow": pillow,
        "pillow before 13": lambda image: pillow(image, width_first=True),
        "torchvision, PIL": lambda image: normalise(scale(functional.pil_to_tensor(centre(transform(image))))),
        "torchvision, uint8": lambda image: normalise(scale(centre(transform(functional.pil_to_tensor(image))))),
    }


def entries(path: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yield the group, the folder and the record of each photo of a report, or of the records of `evaluate`."""
    if path.suffix == ".jsonl":
        for line in map(json.loads, path.read_text().splitlines()):
            for record in line.get("records", ()):
                yield line["case"], path.parent / "images" / line["case"] / line["method"], record
        return
    report = json.loads(path.read_text())
    out = report.get("settings", {}).get("out", ".")
    for record in report["images"]:
        yield "", path.parent if out == "." else path.parent / out, record


@torch.inference_mode()
def judge(
    rows: Iterable[tuple[str, Path, dict[str, Any]]], network: torch.nn.Module, facts: dict[str, Any], *, every: bool
) -> dict[str, dict[str, bool]]:
    """Say for every reader and every photo whether each decision is as asked on its file."""
    boundary = torch.logit(torch.tensor(facts["thresholds"]))
    found: dict[str, dict[str, bool]] = {name: {} for name in readers(facts["preprocess"])}
    for _, folder, entry in rows:
        if entry["files"]["adversarial"] is None or not (every or entry["status"] == "success"):
            continue
        image = Image.open(folder / entry["files"]["adversarial"]).convert("RGB")
        for name, read in readers(facts["preprocess"]).items():
            decided = network(read(image)[None])[0] >= boundary
            right = [
                bool(decision) == (entry["truth"][label] != (label in entry["flip"]))
                for label, decision in zip(facts["labels"], decided, strict=True)
                if label in entry["flip"] or label in entry["keep"]
            ]
            found[name][entry["source"]] = all(right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--require", action="append", help="a reader in which all must hold")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="reports to compare the RMSD with")
    parser.add_argument("--all", action="store_true", help="judge the files of every status")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network, facts = load(arguments.checkpoint)
    required = arguments.require or ["float", "pillow", "torchvision, uint8"]
    failed = False
    beside = {
        (group, entry["source"]): entry["distortion"]["rmsd"]
        for path in arguments.beside
        for group, _, entry in entries(path)
        if entry["distortion"]
    }
    for path in arguments.reports:
        groups: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
        for row in entries(path):
            groups.setdefault(row[0], []).append(row)
        for group, rows in groups.items():
            found = judge(rows, network, facts, every=arguments.all)
            print(f"{path} {group}: {len(rows)} photos")
            for name, held in found.items():
                print(f"  {name:20} {sum(held.values())} of {len(held)} files hold")
                failed |= name in required and not all(held.values())
            ratios = [
                entry["distortion"]["rmsd"] / beside[group, entry["source"]]
                for _, _, entry in rows
                if all(found[name].get(entry["source"]) for name in required) and (group, entry["source"]) in beside
            ]
            if ratios:
                print(f"  RMSD beside the other: {statistics.fmean(ratios):.3f} of {len(ratios)} photos")
    sys.exit(failed)


if __name__ == "__main__":
    main()
