"""What several test modules share: one thread, reproducible Hypothesis, small photos and networks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("mlperturb", max_examples=60, deadline=None, derandomize=True, database=None)
settings.load_profile("mlperturb")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def save_photo(tmp_path: Path) -> Callable[..., Path]:
    """Save a random photo, or the PIL image given, under `tmp_path`."""

    def save(name: str = "photo.png", image: Image.Image | None = None, **options: object) -> Path:
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
