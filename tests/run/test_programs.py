"""Files of the command line, judged by the libraries that programs read them with, and by no code of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.models import TINY_LABELS, TINY_PIXELS
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import shufflenet_v2_x0_5
from torchvision.transforms import v2

COUNT = 6


@pytest.fixture
def photos(tmp_path) -> Path:
    """Return a folder of photos of several sizes in which the network sees cat and potted plant, or nearly so."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(4)
    for number in range(COUNT):
        noisy = np.clip(TINY_PIXELS + generator.integers(-20, 21, TINY_PIXELS.shape), 0, 255).astype(np.uint8)
        size = (36 + 31 * number, 30 + 17 * number)
        Image.fromarray(noisy).resize(size, Image.Resampling.NEAREST).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def network(tiny) -> nn.Module:
    net = shufflenet_v2_x0_5(weights=None, num_classes=len(TINY_LABELS))
    net.load_state_dict(load_file(tiny))
    return net.eval()


def by_floats(path: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
    return functional.interpolate(pixels, (40, 40), mode="bilinear", antialias=True)[0]


def by_pillow(path: Path) -> Tensor:
    resized = Image.open(path).resize((40, 40), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def by_torchvision(path: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    return v2.Resize([40, 40], antialias=True)(pixels).float() / 255


PROGRAMS = {"float": by_floats, "pillow": by_pillow, "torchvision": by_torchvision}


@torch.no_grad()
def probabilities(network: nn.Module, inputs: Tensor) -> Tensor:
    result: Tensor = torch.sigmoid(network(((inputs - 0.5) / 0.5)[None])[0])
    return result


def run(cli, tiny, photos: Path, out: Path, *more: object) -> list[dict]:
    code, _, err = cli("attack", photos, "--flip", "cat", "--keep", "rest", "--checkpoint", tiny, "--out", out,
                       "--device", "cpu", "--quiet", *more)  # fmt: skip
    assert code == 0, err
    images: list[dict] = json.loads((out / "report.json").read_text())["images"]
    assert len(images) == COUNT
    return images


@pytest.mark.parametrize("method", ["ml-ddn", "ml-cw", "fgs"])
def test_files_hold_in_the_programs_that_they_were_made_for(cli, tiny, network, photos, tmp_path, method):
    images = run(cli, tiny, photos, tmp_path / "out", "--method", method)
    assert sum(image["status"] == "success" for image in images) >= COUNT - 1
    for image in images:
        assert list(image["readers"]) == list(PROGRAMS)
        before, after = Path(image["source"]), tmp_path / "out" / image["files"]["adversarial"]
        for name, prepare in PROGRAMS.items():
            found = image["readers"][name]
            for when, path in (("before", before), ("after", after)):
                seen = probabilities(network, prepare(path))
                assert found[when] == pytest.approx(dict(zip(TINY_LABELS, seen.tolist(), strict=True)), abs=1e-4)
            there = dict(zip(TINY_LABELS, (seen >= 0.5).tolist(), strict=True))
            wanted = {label: image["truth"][label] != (label == "cat") for label in TINY_LABELS}
            assert found["violated"] == [label for label in TINY_LABELS if there[label] != wanted[label]]
            assert image["status"] != "success" or there == wanted


def test_files_made_for_one_program_break_in_others(cli, tiny, network, photos, tmp_path):
    """So a file must be made for every program that reads it; the test above could fail."""
    images = run(cli, tiny, photos, tmp_path / "out", "--reader", "float")
    held = dict.fromkeys(PROGRAMS, 0)
    for image in images:
        assert image["status"] == "success"
        assert list(image["readers"]) == ["float"]
        wanted = [image["truth"][label] != (label == "cat") for label in TINY_LABELS]
        for name, prepare in PROGRAMS.items():
            seen = probabilities(network, prepare(tmp_path / "out" / image["files"]["adversarial"]))
            held[name] += (seen >= 0.5).tolist() == wanted
    assert held["float"] == COUNT
    assert min(held["pillow"], held["torchvision"]) < COUNT
