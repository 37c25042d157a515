"""Folders of timm models that timm itself wrote, against timm's own preprocessing and logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import mlperturb
from mlperturb.errors import CheckpointError
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.readers import parse_reader
from mlperturb.model.views import read_logits

LABELS = ("1girl", "solo", "hat, red", "sky")


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=4).eval()


@pytest.fixture
def folder(tmp_path, network):
    """Return a folder as timm writes it, with a tagger's table."""
    cropped = {"pretrained_cfg": {"crop_mode": "border", "crop_pct": 1.0}}
    save_for_hf(network, tmp_path, model_config=cropped, safe_serialization=True)
    _write_tags(tmp_path)
    return tmp_path


def _write_tags(folder, thresholds=None):
    lines = [f'{number},"{name}",0' for number, name in enumerate(LABELS)]
    head = "tag_id,name,category"
    if thresholds:
        head, lines = head + ",best_threshold", [f"{a},{b}" for a, b in zip(lines, thresholds, strict=True)]
    (folder / "selected_tags.csv").write_text("\ufeff" + "\n".join([head, *lines]) + "\n", encoding="utf-8")


def _change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_logits_of_odd_photos_equal_those_of_timm(folder, network):
    classifier, metadata = load_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    data = timm.data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"])
    assert data["crop_mode"] == "border"
    theirs = timm.data.create_transform(**data)
    rng = np.random.default_rng(0)
    for _ in range(20):
        photo = rng.integers(0, 256, (*rng.integers(20, 400, 2), 3), dtype=np.uint8)
        seen = theirs(Image.fromarray(photo))[None]
        bound = parse_reader("pillow").bind(classifier.preprocess, [photo.shape[:2]], "cpu")
        assert torch.equal(bound(torch.from_numpy(photo).permute(2, 0, 1)[None] / 255), seen)
        expected = network(seen).detach()
        torch.testing.assert_close(read_logits(classifier, photo, parse_reader("pillow")), expected)
    assert metadata.architecture == "timm/test_vit"
    assert classifier.labels == LABELS
    assert set(classifier.thresholds) == {0.5}
    assert metadata.provenance["origin"] == {
        "preprocess": "config.json",
        "readers": "the default",
        "labels": "selected_tags.csv",
        "thresholds": "0.5: the folder records none",
        "weights": "model.safetensors",
    }


def test_best_thresholds_are_those_of_the_table(folder):
    _write_tags(folder, [0.35, 0.2, 0.9, 0.5])
    assert mlperturb.load(folder).thresholds == (0.35, 0.2, 0.9, 0.5)
    _write_tags(folder, [0.35, 0.2, 1, 0.5])
    with pytest.raises(CheckpointError, match=r"expected `best_threshold` inside \(0, 1\)"):
        mlperturb.load(folder)


def test_a_tagger_of_white_squares_and_bgr_is_attacked(folder, network):
    wanted = Preprocess((160, 160), interpolation="bicubic", square=True, channels="bgr")
    classifier = mlperturb.load(folder, preprocess=wanted)
    photo = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    canvas = Image.new("RGB", (120, 120), (255, 255, 255))
    canvas.paste(Image.fromarray(photo), (0, 15))
    seen = np.array(canvas.resize((160, 160), Image.Resampling.BICUBIC))[:, :, ::-1].copy()
    expected = network((torch.from_numpy(seen).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).detach()
    torch.testing.assert_close(read_logits(classifier, photo, parse_reader("pillow")), expected)
    result = mlperturb.attack(classifier, [photo], flip="sky", keep="rest", budget="fast")
    assert result.success.all()


def test_labels_come_from_config_or_are_asked_for(folder):
    (folder / "selected_tags.csv").unlink()
    with pytest.raises(CheckpointError, match="names no labels: give `labels`, 4 names"):
        mlperturb.load(folder)
    assert mlperturb.load(folder, labels=["a", "b", "c", "d"]).labels == ("a", "b", "c", "d")
    with pytest.raises(CheckpointError, match=r"expected 4 labels, .* got 2 \(given\)"):
        mlperturb.load(folder, labels=["a", "b"])
    _change(folder, label_names={str(number): name for number, name in enumerate("wxyz")})
    assert mlperturb.load(folder).labels == ("w", "x", "y", "z")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "does not run code of a checkpoint"),
        ({"architecture": None}, "expected `architecture`, the name of a timm model, or `model_type`"),
        ({"architecture": "test_vit", "model_args": {"img_size": 32}}, "does not fit the architecture"),
        (
            {"pretrained_cfg": {"input_size": [3, 96, 96]}, "model_args": {"dynamic_img_size": False}},
            "the network fails on photos of 96 x 96: ",
        ),
        ({"model_args": {"depth": 1_000_000}}, "expected a network of at most 50000 parameters and modules"),
        ({"model_args": {"depth": 10**9}}, "expected numbers up to 10000000"),
        ({"model_args": {"drop_rate": float("nan")}}, "expected numbers up to 10000000"),
        ({"architecture": "no_such_net"}, "has no architecture 'no_such_net'"),
        ({"architecture": "resnet18", "model_args": {}}, "does not fit the architecture"),
        ({"model_args": [1]}, "expected an object for model_args"),
        ({"model_args": {"depth": "x"}}, "timm cannot build timm/test_vit"),
        ({"num_classes": 9}, "expected 9 labels, one for each output"),
        ({"pretrained_cfg": {"crop_pct": "x"}}, "timm cannot read this preprocessing"),
        ({"pretrained_cfg": {"input_size": [3, 160]}}, "timm cannot read this preprocessing"),
        ({"pretrained_cfg": {"interpolation": "nearest"}}, "expected interpolation bilinear or bicubic"),
        ({"pretrained_cfg": [1]}, "timm cannot read this preprocessing"),
    ],
)
def test_a_bad_config_is_one_line(folder, fields, message):
    _change(folder, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        mlperturb.load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_a_file_or_has_broken_ones_is_one_line(folder):
    with pytest.raises(CheckpointError, match="expected no `architecture` for a folder"):
        load_checkpoint(folder, architecture="resnet18", labels=LABELS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model.safetensors or pytorch_model.bin in"):
        mlperturb.load(folder)
    (folder / "selected_tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="expected a table with a column `name`"):
        mlperturb.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        mlperturb.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a config.json in"):
        mlperturb.load(folder)


def _label_rows(text):
    return [line.split() for line in text.splitlines()]


def test_the_command_line_attacks_a_folder(folder, save_photo, cli, tmp_path):
    photo = save_photo("img.png")
    out = tmp_path / "out"
    code, shown, said = cli("labels", "--checkpoint", folder)
    assert code == 0, said
    assert ["solo", "0.500", "0"] in _label_rows(shown)
    assert "0.5: the folder records none" in shown
    code, _, said = cli("attack", photo, "--flip", "solo", "--budget", "fast", "--checkpoint", folder, "--out", out)
    assert code == 0, said
    described = json.loads((out / "report.json").read_text())["classifier"]
    assert described["architecture"] == "timm/test_vit"
    assert described["labels"] == list(LABELS)
    code, _, said = cli("predict", photo, "--checkpoint", folder, "--arch", "resnet18")
    assert code == 2
    assert "expected no --arch for a folder" in said
    names = tmp_path / "names.txt"
    names.write_text("\ufeffa\nb\nc\nd\n", encoding="utf-8")
    code, shown, said = cli("labels", "--checkpoint", folder, "--labels", names)
    assert code == 0, said
    assert _label_rows(shown)[1] == ["a", "0.500"]
