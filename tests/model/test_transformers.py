"""Folders of transformers models that transformers itself wrote, against its own processors and logits."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.transformers_folders import KINDS, LABELS, SIDE, change, write_folder

import mlperturb
from mlperturb.errors import CheckpointError
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.readers import parse_reader
from mlperturb.model.views import read_logits

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_input_and_logits_of_odd_photos_equal_those_of_both_backends_of_transformers(kind, tmp_path, monkeypatch):
    network = write_folder(tmp_path, kind)
    monkeypatch.setattr("socket.socket", None)
    classifier, metadata = load_checkpoint(tmp_path)
    assert metadata.architecture == f"transformers/{kind}"
    assert classifier.preprocess.readers == ("torchvision", "pillow", "float")
    rng = np.random.default_rng(0)
    photos = [rng.integers(0, 256, (*rng.integers(20, 300, 2), 3), dtype=np.uint8) for _ in range(20)]
    moved = []
    for backend, reader in (("torchvision", "torchvision"), ("pil", "pillow")):
        processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path), backend=backend)
        for number, photo in enumerate(photos):
            seen = processor(images=Image.fromarray(photo), return_tensors="pt")["pixel_values"]
            bound = parse_reader(reader).bind(classifier.preprocess, [photo.shape[:2]], "cpu")
            ours = bound(torch.from_numpy(photo).permute(2, 0, 1)[None] / 255)
            ours = ours.flip(1) if classifier.preprocess.channels == "bgr" else ours
            torch.testing.assert_close(ours, seen, rtol=1e-6, atol=2e-6)
            if number >= (4 if kind in ("convnext", "mobilevit", "efficientnet") else 20):  # larger networks
                continue
            expected = network(pixel_values=seen).logits.detach()
            moved.append(expected)
            torch.testing.assert_close(
                read_logits(classifier, photo, parse_reader(reader)), expected, rtol=1e-4, atol=1e-5
            )
    assert torch.cat(moved).std(0).min() > 1e-4  # the logits depend on the photo


def test_a_multi_label_folder_is_attacked_from_the_command_line(folder, save_photo, cli, tmp_path):
    photo, out = save_photo("img.png"), tmp_path / "out"
    code, shown, said = cli("labels", "--checkpoint", folder)
    assert code == 0, said
    assert "softmax" not in shown + said
    code, _, said = cli("attack", photo, "--flip", "dog", "--keep", "rest", "--budget", "fast", "--checkpoint", folder,
                        "--out", out)  # fmt: skip
    assert code == 0, said
    report = json.loads((out / "report.json").read_text())
    assert report["classifier"]["architecture"] == "transformers/vit"
    assert report["classifier"]["labels"] == list(LABELS)
    assert report["settings"]["readers"] == ["torchvision", "pillow", "float"]
    assert report["classifier"]["activation"] == "sigmoid"


def test_a_folder_without_a_problem_type_is_a_softmax_network_and_says_so(tmp_path, save_photo, cli):
    folder, photo = tmp_path / "net", save_photo("img.png")
    network = write_folder(folder, multi=False)
    classifier = mlperturb.load(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    seen = processor(images=Image.open(photo), return_tensors="pt")["pixel_values"]
    expected = network(pixel_values=seen).logits.softmax(1).detach()
    torch.testing.assert_close(mlperturb.predict(classifier, [photo]), expected, rtol=1e-4, atol=1e-6)
    sigmoid = mlperturb.predict(mlperturb.load(folder, activation="sigmoid"), [photo])
    assert not torch.allclose(sigmoid, expected)
    least = LABELS[int(expected.argmin())]
    code, shown, said = cli("labels", "--checkpoint", folder)
    assert code == 0
    assert "is a softmax network" in said
    assert "activation: softmax" in shown
    assert "problem_type None of config.json" in shown
    code, _, said = cli("predict", photo, "--checkpoint", folder)
    assert code == 0
    assert "is a softmax network" in said
    code, _, said = cli("attack", photo, "--add", least, "--budget", "fast", "--checkpoint", folder, "--out",
                        tmp_path / "out")  # fmt: skip
    assert code == 0, said
    assert "is a softmax network" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    after = report["images"][0]["probabilities"]
    assert report["classifier"]["activation"] == "softmax"
    assert after
    code, _, said = cli("labels", "--checkpoint", folder, "--activation", "relu")
    assert code == 2
    assert "expected --activation sigmoid or softmax, got 'relu'" in said


def test_weights_in_half_precision_or_a_bin_file_load_in_float32(folder):
    network = mlperturb.load(folder)
    state = transformers.AutoModelForImageClassification.from_pretrained(folder).half().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    change(folder / "config.json", dtype="float16", _attn_implementation="flash_attention_2")
    other = mlperturb.load(folder)
    photo = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    torch.testing.assert_close(
        mlperturb.predict(other, [photo]), mlperturb.predict(network, [photo]), rtol=0, atol=5e-3
    )


def test_repeated_names_get_the_number_of_their_output_and_given_names_replace_all(folder):
    change(folder / "config.json", id2label={"0": "crane", "1": "hen", "2": "crane", "3": "cow"})
    assert mlperturb.load(folder).labels == ("crane #0", "hen", "crane #2", "cow")
    assert mlperturb.load(folder, labels=["a", "b", "c", "d"]).labels == ("a", "b", "c", "d")
    with pytest.raises(CheckpointError, match="expected a head of 2 outputs, one for each label, got 4"):
        mlperturb.load(folder, labels=["a", "b"])
    change(folder / "config.json", id2label=None)
    with pytest.raises(CheckpointError, match="names no labels: give `labels`"):
        mlperturb.load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": 1}, r"expected 2 \(bilinear\) or 3 \(bicubic\).* got resample 1"),
        ({"do_resize": False}, "expected photos to be resized .* got do_resize False"),
        ({"do_pad": True}, "expected no padding .* got do_pad True"),
        ({"size": {"shortest_edge": 50}}, "expected a crop after resizing to a shortest edge .* got do_center_crop"),
        ({"size": {"shortest_edge": 50, "longest_edge": 90}}, "the shortest edge alone.* got size"),
        ({"size": {"height": 10**6, "width": 10**6}}, "expected to resize to at most 4096 pixels a side"),
        ({"size": {"height": 10**9, "width": 9}}, "expected numbers up to 10000000 .* got .* 1000000000"),
        ({"size": {"height": float("nan"), "width": 9}}, "expected numbers up to 10000000 .* got height nan"),
        ({"do_center_crop": True, "crop_size": {"height": 90, "width": 90}}, "expected a crop within the resized"),
        ({"image_std": [0, 0, 0]}, "expected 3 means and 3 positive stds"),
        ({"image_mean": "dark"}, "cannot read the preprocessing|expected three numbers"),
        ({"auto_map": {"AutoImageProcessor": "code.P"}}, "does not run code of a checkpoint"),
        ({"image_processor_type": "PerceiverImageProcessor", "crop_size": {"height": 48, "width": 48}},
         "does more than resize, crop and normalise"),
        ({"image_processor_type": "NoSuch"}, "cannot read the preprocessing|does more than"),
    ],
)  # fmt: skip
def test_a_processor_that_preprocess_cannot_express_is_a_line_that_names_the_field(folder, fields, message):
    path = folder / "preprocessor_config.json"
    change(path, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        mlperturb.load(folder)
    assert "\n" not in str(caught.value)


def test_what_the_processor_says_may_be_replaced_and_is_asked_for_when_missing(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"records no preprocessing, .*give `preprocess`"):
        mlperturb.load(folder)
    wanted = {"resize": [SIDE, SIDE], "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    assert mlperturb.load(folder, preprocess=wanted).preprocess.resize == (SIDE, SIDE)


def test_without_transformers_a_line_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mlperturb\[hf\]'"):
        mlperturb.load(folder)


def test_weights_of_layers_that_config_json_does_not_have_are_refused(tmp_path):
    write_folder(tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 0}))
    with pytest.raises(CheckpointError, match=r"does not fit its config.json: expected \d+ numbers, got \d+"):
        mlperturb.load(tmp_path / "folder")
