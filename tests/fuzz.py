"""Look for bytes at which a reader fails in any way but ours: `python tests/fuzz.py images|checkpoints [OPTION...]`.

The options are libFuzzer's, such as -max_total_time=60. It starts from the corpora of `hostile`; what it finds is
written to the current folder as crash-*, timeout-* or oom-*.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch
import torch._weights_only_unpickler as unpickler
from safetensors.torch import save_file
from support import corpus as hostile

with atheris.instrument_imports(include=["mlperturb", "PIL"]):
    from mlperturb.errors import CheckpointError, ImageError
    from mlperturb.model import checkpoints
    from mlperturb.model.preprocess import Preprocess
    from mlperturb.photos import bounds, images

MOST = 30_000  # bytes of a file to start from


def fuzz_images(folder: Path) -> Callable[[bytes], None]:
    """Return what reads bytes as a photo."""
    bounds.MAX_PIXELS = 300_000  # so that it tries many small ones

    def read(data: bytes) -> None:
        (folder / "photo").write_bytes(data)
        try:
            photo = images.read_photo(folder / "photo")
        except ImageError as error:
            assert str(error)
        else:
            assert photo.rgb.ndim == 3
            assert photo.rgb.shape[2] == 3
            assert photo.rgb.dtype == "uint8"
            assert photo.alpha is None or photo.alpha.shape == photo.rgb.shape[:2]

    return read


def fuzz_checkpoints(folder: Path) -> Callable[[bytes], None]:
    """Return what reads bytes as a checkpoint of ours, and as plain weights."""
    checkpoints.build_network = small_network
    atheris.instrument_func(unpickler.Unpickler.load)

    def read(data: bytes) -> None:
        for name in ("x.safetensors", "x.pt"):
            (folder / name).write_bytes(data)
            given: dict[str, Any] = (
                {} if name == "x.safetensors" else {"architecture": "resnet18", "labels": ("a", "b", "c", "d")}
            )
            try:
                classifier, metadata = checkpoints.load_checkpoint(folder / name, **given)
            except CheckpointError as error:
                assert str(error)
            else:
                assert len(classifier.labels) == len(classifier.thresholds) == len(metadata.labels)
                classifier.network.get_submodule("fc")(torch.zeros(1, 8))

    return read


def small_network(architecture: str, outputs: int, *, meta: bool = False) -> torch.nn.Module:
    """Return a network that is quickly filled, whatever the architecture."""
    del architecture, meta
    with torch.device("meta"):
        return torch.nn.ModuleDict({"fc": torch.nn.Linear(8, outputs), "norm": torch.nn.BatchNorm1d(3)})


def seeds(target: str, folder: Path) -> None:
    """Write files to start from."""
    bad = folder / "bad"
    bad.mkdir()
    if target == "images":
        hostile.build(bad)
        for form in set(hostile.FORMATS.values()):
            (folder / form).write_bytes(hostile.good(form, (7, 5)))
    else:
        network = small_network("", 4).to_empty(device="cpu")
        state = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
        described = checkpoints.Metadata("resnet18", tuple("abcd"), (0.5,) * 4, Preprocess((8, 8)).to_dict())
        checkpoints.save_checkpoint(folder / "ours", state, described)
        save_file(state, folder / "theirs")
        for number in (0, 1):
            torch.save(state, folder / f"plain-{number}", _use_new_zipfile_serialization=bool(number))
        hostile.build_checkpoints(bad, folder / "ours", folder / "victim")
    for number, path in enumerate(sorted(bad.iterdir())):
        if path.is_file() and path.stat().st_size <= MOST:
            (folder / str(number)).write_bytes(path.read_bytes())


def main() -> None:
    target, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as corpus:
        seeds(target, Path(corpus))
        read = {"images": fuzz_images, "checkpoints": fuzz_checkpoints}[target](Path(work))
        limits = [f"-max_len={2 * MOST}", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *limits, *options, corpus], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
