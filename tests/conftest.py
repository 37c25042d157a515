"""What several test modules share: one thread, reproducible Hypothesis, small photos and networks."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from support.models import TINY_LABELS, TINY_PIXELS
from support.runs import contents, write_photos

from mlperturb.cli.main import main
from mlperturb.model.checkpoints import Metadata, build_network, save_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess

settings.register_profile("mlperturb", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("mlperturb")
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it, and so would all we start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def save_photo(tmp_path: Path) -> Callable[..., Path]:
    """Save a random photo, or the PIL image given, under `tmp_path`."""

    def save(name: str = "photo.png", image: Image.Image | None = None, **options: Any) -> Path:
        if image is None:
            pixels = np.random.default_rng(len(name)).integers(0, 256, (7, 9, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
        return path

    return save


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Run a statement in a fresh interpreter and return what it prints."""

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Return a checkpoint of ours of a small torchvision network that is quick to run."""
    preprocess = Preprocess(resize=(40, 40))
    torch.manual_seed(0)
    net = build_network("shufflenet_v2_x0_5", len(TINY_LABELS))
    rng = np.random.default_rng(0)
    probe = torch.from_numpy(rng.random((16, 3, 40, 40), dtype=np.float32)) * 2 - 1
    with torch.no_grad():
        for _ in range(20):
            net.train()(probe)  # gives batch normalisation its statistics
        head = net.eval().get_submodule("fc")
        assert isinstance(head, torch.nn.Linear)
        head.weight.mul_(700)
        seen = Classifier(net, TINY_LABELS, None, preprocess)([torch.from_numpy(TINY_PIXELS).permute(2, 0, 1) / 255])[0]
        head.bias.sub_(seen - torch.tensor([0.3, -0.3, 0.2, -0.2]))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    metadata = Metadata("shufflenet_v2_x0_5", TINY_LABELS, (0.5,) * 4, preprocess.to_dict())
    save_checkpoint(path, net.state_dict(), metadata)
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    """Write the photo that `tiny` was made for, in a folder of its own."""
    path = tmp_path / "in" / "photo.png"
    path.parent.mkdir()
    Image.fromarray(TINY_PIXELS).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Write nine photos of several sizes and a file that is none."""
    return write_photos(tmp_path / "photos", 9)


@pytest.fixture
def command(photos: Path, tiny: Path) -> Callable[..., list[str]]:
    """Return the arguments that attack `photos`, three at a time, and write to a folder."""

    def build(out: Path, *more: object) -> list[str]:
        arguments = ["attack", photos, "--flip", "cat", "--keep", "rest", "--budget", "fast", "--batch-size", 3]
        return [*map(str, arguments), "--checkpoint", str(tiny), "--device", "cpu", "--out", str(out), *map(str, more)]

    return build


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlperturb", *map(str, arguments)])
        monkeypatch.setattr("mlperturb.system.devices.keep_freed_memory", lambda: False)
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            torch.use_deterministic_algorithms(False)
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def whole(
    cli: Callable[..., tuple[int, str, str]], command: Callable[..., list[str]], tmp_path: Path
) -> tuple[dict[str, bytes], list[dict]]:
    """Return the files and records of an undisturbed run."""
    assert cli(*command(tmp_path / "whole"))[0] == 1  # one file is no photo
    return contents(tmp_path / "whole")
