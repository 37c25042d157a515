"""Checkpoints that hold only what differs from a base beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import TINY_PIXELS

from mlperturb.errors import CheckpointError
from mlperturb.model.checkpoints import Metadata, load_checkpoint, read_metadata, read_tensors, save_checkpoint
from mlperturb.system.files import file_sha256

HEAD = {"fc.weight", "fc.bias"}


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    return Path(shutil.copy(tiny, tmp_path / "base.safetensors"))


@pytest.fixture
def over(base) -> Path:
    """Write a checkpoint with another last layer than its base."""
    tensors = read_tensors(base)
    tensors = {name: tensor * 0.5 if name in HEAD else tensor for name, tensor in tensors.items()}
    path = base.parent / "over.safetensors"
    save_checkpoint(path, tensors, replace(read_metadata(base), thresholds=(0.4,) * 4), base=base)
    return path


def names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_only_what_differs_is_written_and_the_rest_read_from_the_base(base, over):
    assert names(over) == HEAD
    assert over.stat().st_size < base.stat().st_size / 20
    photo = [torch.from_numpy(TINY_PIXELS).permute(2, 0, 1) / 255]
    logits = [load_checkpoint(path)[0](photo) for path in (base, over)]
    torch.testing.assert_close(logits[1], logits[0] / 2, atol=1e-4, rtol=1e-4)
    assert read_metadata(over).thresholds == (0.4,) * 4
    assert {name: tuple(value.shape) for name, value in read_tensors(over).items()} == {
        name: tuple(value.shape) for name, value in read_tensors(base).items()
    }


def test_a_base_in_half_precision_differs_by_value_and_not_by_type(base):
    tensors = read_tensors(base)
    half = {name: value.half() if value.dim() > 1 else value for name, value in tensors.items()}
    save_checkpoint(base, half, read_metadata(base))
    whole = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    whole["fc.bias"] = whole["fc.bias"] + 1
    save_checkpoint(base.parent / "over.safetensors", whole, read_metadata(base), base=base)
    assert names(base.parent / "over.safetensors") == {"fc.bias"}


def test_without_its_base_or_with_another_file_in_its_place_it_is_refused(base, over):
    base.write_bytes(base.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"base\.safetensors is not the file that .*over\.safetensors builds on"):
        load_checkpoint(over)
    base.unlink()
    with pytest.raises(CheckpointError, match=r"only what differs from base\.safetensors: expected that file beside"):
        load_checkpoint(over)


@pytest.mark.parametrize(
    "described",
    ["{", "[]", "5", '{"file": "base.safetensors"}', "[" * 100_000]
    + [json.dumps({"file": name, "sha256": "0"}) for name in ("../base.safetensors", "/etc/passwd", "", "..", "x.pt")],
)
def test_a_base_that_is_not_a_checkpoint_beside_it_is_damaged_metadata(base, described):
    path = base.parent / "x.safetensors"
    save_file({"fc.bias": torch.zeros(4)}, path, {"base": described})
    with pytest.raises(CheckpointError, match="damaged metadata") as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 400


def test_a_base_of_a_base_is_refused(base, over):
    third = over.parent / "third.safetensors"
    metadata = read_metadata(base)
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        save_checkpoint(third, read_tensors(base), metadata, base=over)
    described = {"base": json.dumps({"file": "over.safetensors", "sha256": file_sha256(over)})}
    save_file({"fc.bias": torch.zeros(4)}, third, described)
    with pytest.raises(CheckpointError, match="has a base itself"):
        read_tensors(third)


def test_a_base_of_another_architecture_is_refused(base, tmp_path):
    metadata = Metadata("mobilenet_v2", ("a",), (0.5,), {})
    with pytest.raises(CheckpointError, match="of the same architecture"):
        save_checkpoint(tmp_path / "m.safetensors", {"classifier.1.bias": torch.zeros(1)}, metadata, base=base)
