from __future__ import annotations

import json

import pytest
import timm
import torch
from support.programs import write_beside
from timm.models import save_for_hf

import mlperturb

NAMES = ["cat", "dog", "hen"]


@pytest.fixture
def folder(tmp_path):
    network = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=3).eval()
    found = tmp_path / "tagger"
    save_for_hf(network, found, model_config={"label_names": NAMES, "num_classes": 3}, safe_serialization=True)
    return found


def test_a_folder_becomes_one_file_with_the_same_logits(cli, folder, tmp_path):
    out = tmp_path / "one.safetensors"
    code, printed, err = cli("convert", "--checkpoint", folder, "--thresholds", 0.3, "--out", out)
    assert (code, err) == (0, "")
    assert "timm/test_resnet, 3 labels" in printed
    converted, original = mlperturb.load(out), mlperturb.load(folder)
    assert converted.labels == tuple(NAMES)
    assert converted.thresholds == (0.3,) * 3
    assert converted.preprocess == original.preprocess
    batch = torch.rand(2, 3, 90, 70)
    torch.testing.assert_close(converted(batch), original(batch))
    code, _, err = cli("convert", "--checkpoint", folder, "--out", out)
    assert code == 2
    assert "exists: give --overwrite" in err


def test_what_a_file_of_ours_cannot_say_is_refused(cli, folder, tmp_path):
    out = tmp_path / "one.safetensors"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {"global_pool": "max"}}))
    code, printed, err = cli("convert", "--checkpoint", folder, "--out", out)
    assert (code, printed) == (2, "")
    assert "has options of timm/test_resnet that a file of ours cannot name" in err
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {"stem_width": 24}}))
    assert cli("convert", "--checkpoint", folder, "--out", out)[0] == 2
    write_beside(tmp_path / "own.pt2")
    (tmp_path / "own.pt2").write_bytes(b"")
    code, printed, err = cli("convert", "--checkpoint", tmp_path / "own.pt2", "--out", out)
    assert (code, printed) == (2, "")
    assert "is a program: its architecture is none of" in err
    assert cli("convert", "--checkpoint", folder, "--out", tmp_path / "one.pt")[0] == 2
    assert not out.exists()
