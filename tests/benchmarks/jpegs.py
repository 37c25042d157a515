"""Attack JPEGs as JPEGs and as PNGs, then judge the files, with no code of ours, in several decoders and readers.

    python tests/benchmarks/jpegs.py make --voc ../shared/voc --out jpegs --images 25
    python tests/benchmarks/jpegs.py judge jpegs

`make` draws photos of VOC 2012's val that the bundled classifier gets right: for Person, photos with `person` and
another label, `person` to be removed; for Random, a label to be removed and a label to be added, drawn at random; the
rest is to be kept. It attacks each with `--format png` and `--format jpeg`. With `--quality` the photos are encoded in
that quality first, with 4:2:0 chroma and the best Huffman tables. `judge` opens each file with Pillow's, torchvision's
and OpenCV's decoder, reads each in the five ways of `judge_readers.py`, and asks timm's or torchvision's own network.
The distortion is measured against the photo as Pillow decodes it. The exit code is 1 if the aim is missed: 98% of the
JPEGs hold everywhere, their size is within 2% of their photos' on average, and their mean RMSD is at most twice the
PNGs'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import judge_readers
import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image, read_file

if TYPE_CHECKING:
    from mlperturb import Classifier
    from mlperturb.labels import Request

FORMATS = ("png", "jpeg")


def choose(arguments: argparse.Namespace, classifier: Classifier) -> dict[str, list[tuple[Path, Request]]]:
    """Return the photos of each case that the classifier gets right, and what is asked of each."""
    from mlperturb.experiment.cases import Case
    from mlperturb.model.readers import DEFAULT_READERS, parse_reader
    from mlperturb.model.views import read_logits
    from mlperturb.photos.datasets import read_voc
    from mlperturb.photos.images import read_photo

    dataset = read_voc(arguments.voc / "VOCdevkit", "2012", "val")
    order = [dataset.labels.index(label) for label in classifier.labels]
    truth = dataset.truth[:, order]
    generator = np.random.default_rng(arguments.seed)
    reader = parse_reader(DEFAULT_READERS[0])
    cases = {"Person": Case("person", "reduce", classifier.labels.index("person")), "Random": Case("random", "random")}
    chosen: dict[str, list[tuple[Path, Request]]] = {name: [] for name in arguments.cases}
    for row in generator.permutation(len(dataset.paths)):
        wanting = [name for name, rows in chosen.items() if len(rows) < arguments.images]
        if not wanting:
            break
        name = wanting[0]
        if not cases[name].eligible(truth[row][None])[0]:
            continue
        logits = read_logits(classifier, read_photo(dataset.paths[row]).rgb, reader)[0]
        signs = np.where(logits.numpy() >= classifier.boundary.numpy(), 1, -1)
        if bool(((signs == truth[row]) | (truth[row] == 0)).all()):
            path = dataset.paths[row]
            if arguments.quality:
                path = encode(path, arguments.out / name / "photos", arguments.quality)
            chosen[name].append((path, cases[name].request(truth[row], generator)))
    return chosen


def make(arguments: argparse.Namespace) -> None:
    """Attack the photos in every format; write records.json."""
    from mlperturb import load
    from mlperturb.photos.kinds import parse_format
    from mlperturb.run.jobs import plan_outputs
    from mlperturb.run.record import Record
    from mlperturb.run.runner import run_attack
    from mlperturb.run.settings import Settings

    classifier = load(arguments.checkpoint)
    found: list[dict[str, Any]] = []
    for name, photos in choose(arguments, classifier).items():
        for form in FORMATS:
            out = arguments.out / name / form
            out.mkdir(parents=True)
            jobs = plan_outputs([path for path, _ in photos], (), parse_format(form))
            jobs = [
                type(job)(job.source, job.adversarial, job.map, one[1]) for job, one in zip(jobs, photos, strict=True)
            ]
            records: list[Record] = []
            settings = Settings("ml-ddn", arguments.budget, photos[0][1], format=parse_format(form), keep_failed=True)
            run_attack(classifier, jobs, out, settings, records.extend)
            for record in records:
                found.append({
                    "case": name, "format": form, "source": record.source, "file": record.files["adversarial"],
                    "flip": record.flip, "keep": record.keep, "truth": record.truth, "status": record.status,
                    "passes": record.cost["forward"] + record.cost["backward"],
                })  # fmt: skip
            print(name, form, len(records), flush=True)
            (arguments.out / "records.json").write_text(json.dumps(found))


def encode(path: Path, folder: Path, quality: int) -> Path:
    """Write the photo as a JPEG of another quality."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as photo:
        photo.convert("RGB").save(folder / path.name, "JPEG", quality=quality, subsampling="4:2:0", optimize=True)
    return folder / path.name


def decoders(path: Path) -> dict[str, Image.Image]:
    """Return the picture in a file as each decoder decodes it."""
    tensor = decode_image(read_file(str(path)), mode=ImageReadMode.RGB)
    pixels = np.asarray(cv2.imread(str(path)))[..., ::-1]
    return {
        "Pillow": Image.open(path).convert("RGB"),
        "torchvision": Image.fromarray(tensor.permute(1, 2, 0).numpy()),
        "OpenCV": Image.fromarray(np.ascontiguousarray(pixels)),
    }


def judge(arguments: argparse.Namespace) -> int:
    """Print a table; return 1 if the aim is missed."""
    network, facts = judge_readers.load(arguments.checkpoint)
    ways = judge_readers.readers(facts["preprocess"])
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in json.loads((arguments.folder / "records.json").read_text()):
        path = arguments.folder / record["case"] / record["format"] / record["file"]
        with torch.inference_mode():
            holds = {
                f"{decoder}, {way}": _holds(network, facts, read(image), record)
                for decoder, image in decoders(path).items()
                for way, read in ways.items()
            }
        clean, after = (np.asarray(Image.open(one).convert("RGB")).astype(float) for one in (record["source"], path))
        row = {
            "everywhere": all(holds.values()),
            "rmsd": float(np.sqrt(((after - clean) ** 2).mean())),
            "size": path.stat().st_size / Path(record["source"]).stat().st_size,
            "passes": record["passes"],
        }
        rows.setdefault((record["case"], record["format"]), []).append(row)
        rows.setdefault(("both", record["format"]), []).append(row)
    print("case | format | photos | hold everywhere | RMSD, mean | median | size / photo's, mean | largest | passes")
    for (case, form), found in rows.items():
        rmsd, sizes = [row["rmsd"] for row in found], [row["size"] for row in found]
        held = sum(row["everywhere"] for row in found)
        print(
            f"{case} | {form} | {len(found)} | {held} | {statistics.fmean(rmsd):.3f} | "
            f"{statistics.median(rmsd):.3f} | {statistics.fmean(sizes):.3f} | {max(sizes):.3f} | "
            f"{statistics.fmean(row['passes'] for row in found):.0f}"
        )
    png, jpeg = (rows["both", form] for form in FORMATS)
    share = sum(row["everywhere"] for row in jpeg) / len(jpeg)
    ratio = statistics.fmean(row["rmsd"] for row in jpeg) / statistics.fmean(row["rmsd"] for row in png)
    size = statistics.fmean(row["size"] for row in jpeg)
    print(f"JPEGs: {share:.1%} hold everywhere, {size:.3f} of the photos' size, RMSD {ratio:.2f} times the PNGs'")
    return int(share < 0.98 or abs(size - 1) > 0.02 or ratio > 2)


def _holds(network: torch.nn.Module, facts: dict[str, Any], inputs: torch.Tensor, record: dict[str, Any]) -> bool:
    probabilities = network(inputs[None])[0].sigmoid()
    for label, probability, threshold in zip(facts["labels"], probabilities, facts["thresholds"], strict=True):
        present = bool(probability >= threshold)
        if label in record["flip"] and present == record["truth"][label]:
            return False
        if label in record["keep"] and present != record["truth"][label]:
            return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make")
    making.add_argument("--voc", type=Path, required=True)
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--images", type=int, default=25)
    making.add_argument("--cases", nargs="+", choices=("Person", "Random"), default=["Person", "Random"])
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--budget", default="balanced")
    making.add_argument("--checkpoint", default="efficientnet-lite2", help="Name of a bundled one, or a path.")
    making.add_argument("--quality", type=int, help="Encode the photos in this quality first; default: as they are.")
    making.set_defaults(go=lambda arguments: make(arguments))
    judging = commands.add_parser("judge")
    judging.add_argument("folder", type=Path)
    judging.add_argument("--checkpoint", type=Path, default=Path("weights/voc-efficientnet-lite2.safetensors"))
    judging.set_defaults(go=lambda arguments: judge(arguments))
    parsed = parser.parse_args()
    sys.exit(parsed.go(parsed))
