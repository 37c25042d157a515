"""The commands that `same_bytes.py` runs, and the photos that they find."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

KILL = "kill -9: "  # a command so marked is killed once its journal has a batch

_ASK = "--flip person --keep rest --json"
_FAST = f"attack few {_ASK} --budget fast --out out"
_CHEAP = f"attack few {_ASK} --method fgs --passes 20 --out out"
_RESUME = f"attack photos {_ASK} --budget fast --batch-size 1 --max-linf 3 --out"
_EVALUATE = "evaluate --voc voc --year 2012 --split val --images 3 --budget fast"
_AGAIN = f"{_EVALUATE} --cases person --methods fg,ml-ddn --max-linf 4 --passes 40 --batch-size 1 --keep-images --out"

CASES: dict[str, tuple[str, ...]] = {
    "method.ml-ddn": (f"attack photos {_ASK} --out out",),
    "method.ml-cw": (f"{_FAST} --method ml-cw --passes 90",),
    "method.ml-dp": (f"{_FAST} --method ml-dp --passes 120",),
    "method.rank-1": (f"{_FAST} --method rank-1 --passes 120",),
    "method.rank-2": (f"{_FAST} --method rank-2 --passes 120",),
    "method.fgs": (f"{_FAST} --method fgs",),
    "method.fg": (f"{_FAST} --method fg",),
    "option.rounding": (f"{_FAST} --rounding after",),
    "option.space": (f"{_FAST} --space probability", f"{_FAST}-cw --method ml-cw --space probability --passes 40"),
    "option.solver": ("attack few --flip person --method ml-dp --solver pinv --passes 100 --json --out out",),
    "option.between": (
        f"{_FAST} --method rank-2 --between threshold --passes 50",
        f"{_FAST}-1 --method rank-1 --between none --passes 30",
    ),
    "option.paper": (
        f"attack one {_ASK} --budget paper --method ml-cw --passes 60 --out out-cw",
        f"attack one {_ASK} --budget paper --method ml-dp --passes 90 --out out-dp",
        f"attack one {_ASK} --budget paper --method fg --passes 60 --out out-fg",
    ),
    "limit.passes": (f"attack photos {_ASK} --passes 30 --out out", f"{_FAST}-cw --method ml-cw --passes 10"),
    "limit.max-rmsd": (f"{_FAST} --max-rmsd 0.1", f"{_FAST}-cw --method ml-cw --max-rmsd 0.3 --passes 40"),
    "limit.max-linf": (
        f"{_FAST} --max-linf 1",
        f"{_FAST}-cw --method ml-cw --max-linf 1 --passes 40",
        f"{_FAST}-dp --method ml-dp --max-linf 1 --passes 60",
    ),
    "flip.any": ("attack photos --flip any --keep rest --json --passes 40 --out out",),
    "flip.all": ("attack few --flip all --json --out out",),
    "flip.named": ("attack few --add dog,sheep --remove person --keep cat --json --budget fast --out out",),
    "survive.one": (f"{_FAST} --survive jpeg:75",),
    "survive.range": (f"attack one {_ASK} --survive jpeg:60-95 --survive jpeg:50 --passes 150 --out out",),
    "region.rectangle": (f"{_FAST} --region 40,30,150,120",),
    "region.mask": (f"attack one {_ASK} --region mask.png --method ml-cw --passes 40 --out out",),
    "batch": (
        f"attack photos {_ASK} --batch-size 2 --budget fast --out out",
        f"attack photos {_ASK} --batch-size 3 --method fgs --passes 20 --out out-3",
    ),
    "odd": (f"attack odd -r {_ASK} --budget fast --out out --report elsewhere/report.json",),
    "resume.attack": (f"{_RESUME} whole", f"{KILL}{_RESUME} killed", f"{_RESUME} killed"),
    "resume.evaluate": (f"{_AGAIN} whole", f"{KILL}{_AGAIN} killed", f"{_AGAIN} killed"),
    "evaluate.attacks": (
        f"{_EVALUATE} --cases random,person --methods ml-ddn,ml-dp,fg --keep-images --json --out out",
    ),
    "evaluate.clean": (
        "evaluate --voc voc --year 2012 --split val --clean --json --out out-voc",
        "evaluate --photos album --csv album.csv --clean --json --out out-csv",
    ),
    "defend": (
        f"attack few {_ASK} --budget fast --out out",
        "jpeg-defend out --json",
        "jpeg-defend out --defence jpeg,webp,median,bits,resize --quality 50,90 --json --out purified",
        "jpeg-defend out --flip person --keep rest --quality 75 --photos few --json --out by-hand",
    ),
    "predict": ("predict photos odd/tiny.png --json", "predict few"),
    "show": (_CHEAP, "jpeg-defend out --quality 75", "gallery out", "figures out --out figures"),
}
QUICK = (
    "method.ml-ddn", "method.ml-cw", "method.ml-dp", "method.rank-2", "method.fgs", "flip.all", "survive.one",
    "region.rectangle", "resume.attack", "evaluate.attacks", "defend",
)  # fmt: skip


def prepare_photos(voc: Path, count: int, folder: Path) -> str:
    """Make `photos`, `few`, `one`, `odd`, `mask.png`, `voc`, `album` and `album.csv`; return a hash of all of it."""
    base = next((place for place in (voc / "VOC2012", voc / "VOCdevkit" / "VOC2012") if place.is_dir()), None)
    if base is None:
        raise SystemExit(f"expected a VOCdevkit with VOC2012 at --voc, got {voc}")
    sets = base / "ImageSets" / "Main"
    truth: dict[str, dict[str, str]] = {}  # by photo and label: 1, -1 or 0
    for path in sorted(sets.glob("*_val.txt")):
        for line in path.read_text().splitlines():
            name, value = line.split()
            truth.setdefault(name, {})[path.name.removesuffix("_val.txt")] = value
    several = [name for name in sorted(truth) if list(truth[name].values()).count("1") > 1]
    people = [name for name in several if truth[name]["person"] == "1"]
    chosen = list(_of_mixed_sizes(people, base / "JPEGImages"))[:count]
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photos = [base / "JPEGImages" / f"{name}.jpg" for name in chosen]
    for name, paths in {"photos": [*photos, portrait], "few": photos[:3], "one": photos[:1]}.items():
        (folder / name).mkdir(parents=True)
        for path in paths:
            shutil.copy(path, folder / name)
    _make_odd_photos(photos, folder)
    _make_data_sets({name: truth[name] for name in [*people[:30], *several[:10]]}, base, folder)
    parts = [f"{path.relative_to(folder)} {_digest(path)}" for path in sorted(folder.rglob("*")) if path.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _of_mixed_sizes(names: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield photos each of which has a size that none before it has."""
    seen = set()
    for name in names:
        with Image.open(folder / f"{name}.jpg") as image:
            if image.size not in seen:
                seen.add(image.size)
                yield name


def _make_odd_photos(photos: Sequence[Path], folder: Path) -> None:
    """Make photos that are read in ways of their own, two of one name and one that cannot be read; and a mask."""
    odd = folder / "odd"
    (odd / "deep").mkdir(parents=True)
    first = Image.open(photos[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    first.save(odd / "turned.jpg", exif=exif)
    ramp = np.linspace(0, 255, first.width).astype(np.uint8)
    first.putalpha(Image.fromarray(np.broadcast_to(ramp, (first.height, first.width)).copy()))
    first.save(odd / "alpha.png")
    Image.open(photos[-1]).convert("L").save(odd / "deep" / "alpha.png")
    Image.open(photos[-1]).resize((30, 20)).save(odd / "tiny.png")
    (odd / "broken.jpg").write_bytes(photos[0].read_bytes()[:600])
    mask = np.zeros((first.height, first.width), dtype=np.uint8)
    mask[first.height // 4 :, : first.width // 2] = 255
    Image.fromarray(mask).save(folder / "mask.png")


def _make_data_sets(truth: dict[str, dict[str, str]], base: Path, folder: Path) -> None:
    """Make a VOCdevkit of a few photos, and a folder with a table of the first of them."""
    sets, images = folder / "voc" / "VOC2012" / "ImageSets" / "Main", folder / "voc" / "VOC2012" / "JPEGImages"
    for place in (sets, images, folder / "album"):
        place.mkdir(parents=True)
    (sets / "val.txt").write_text("".join(f"{name}\n" for name in truth))
    labels = sorted(next(iter(truth.values())))
    for label in labels:
        (sets / f"{label}_val.txt").write_text("".join(f"{name} {truth[name][label]}\n" for name in truth))
    for name in truth:
        shutil.copy(base / "JPEGImages" / f"{name}.jpg", images)
    meaning = {"1": "1", "-1": "0", "0": "-1"}
    with (folder / "album.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *labels])
        for name in list(truth)[:6]:
            shutil.copy(images / f"{name}.jpg", folder / "album")
            writer.writerow([f"{name}.jpg", *(meaning[truth[name][label]] for label in labels)])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
