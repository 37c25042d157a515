"""`mlperturb train` from the command line, on tiny data sets."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from mlperturb.cli.main import main
from mlperturb.model.checkpoints import load_checkpoint, read_metadata

LABELS = ("cat", "dog")
TINY = ["--arch", "shufflenet_v2_x0_5", "--size", "32", "--batch-size", "4", "--epochs", "1", "--device", "cpu"]


def _photos(folder, count):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = [f"{number:06d}" for number in range(count)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
    return names


@pytest.fixture
def voc(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2007"
    names = _photos(base / "JPEGImages", 16)
    sets = base / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    for split, members in {"train": names[:8], "val": names[8:12], "test": names[12:]}.items():
        (sets / f"{split}.txt").write_text("\n".join(members) + "\n")
        for place, label in enumerate(LABELS):
            signs = [1 if (number + place) % 2 else -1 for number in range(len(members))]
            lines = [f"{name} {sign}" for name, sign in zip(members, signs, strict=True)]
            (sets / f"{label}_{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlperturb", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_a_vocdevkit_is_trained_on_calibrated_and_measured(voc, monkeypatch, capsys):
    out = voc / "mine.safetensors"
    splits = ["--voc", voc, "--year", "2007", "--train-split", "train", "--val-split", "val", "--test-split", "test"]
    assert _run(monkeypatch, *splits, *TINY, "--out", out) == 0
    assert f"checkpoint: {out}" in capsys.readouterr().out
    metadata = read_metadata(out)
    assert metadata.labels == LABELS
    assert metadata.metrics["VOC2007 test"]["images"] == 4
    assert set(metadata.metrics["VOC2007 test"]["per_label"]) == set(LABELS)
    assert metadata.provenance["photos"] == {"training": 8, "validation": 4}
    assert load_checkpoint(out)[0].labels == LABELS


def test_a_folder_with_a_table_is_trained_on_and_a_tenth_held_out(tmp_path, monkeypatch):
    names = _photos(tmp_path / "photos", 12)
    rows = [f"{name}.jpg,{number % 2},{(number + 1) % 2}" for number, name in enumerate(names)]
    table = tmp_path / "labels.csv"
    table.write_text("image,cat,dog\n" + "\n".join(rows) + "\n")
    out = tmp_path / "mine.safetensors"
    assert _run(monkeypatch, "--photos", tmp_path / "photos", "--csv", table, *TINY, "--head-only", "--out", out) == 0
    assert read_metadata(out).provenance["photos"] == {"training": 11, "validation": 1}


def test_cocos_instances_are_trained_on(tmp_path, monkeypatch):
    names = _photos(tmp_path / "photos", 12)
    instances = tmp_path / "instances_train.json"
    content = {
        "categories": [{"id": number, "name": label} for number, label in enumerate(LABELS)],
        "images": [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate(names)],
        "annotations": [{"image_id": number, "category_id": number % 2} for number in range(12)],
    }
    instances.write_text(json.dumps(content))
    data = ["--photos", tmp_path / "photos", "--coco", instances]
    out = tmp_path / "mine.safetensors"
    assert _run(monkeypatch, *data, *TINY, "--head-only", "--out", out) == 0
    assert read_metadata(out).labels == LABELS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.safetensors"], "expected either --voc"),
        (["--out", "x.safetensors", "--voc", "."], "expected both --year and --voc"),
        (["--out", "x.pt", "--voc", ".", "--year", "2007"], "to end in .safetensors"),
        (["--out", "x.safetensors", "--voc", ".", "--year", "1999"], "VOC1999"),
        (["--out", "x.safetensors", "--voc", ".", "--year", "2007", "--train-split", "2012:train"], "2012"),
    ],
)
def test_a_call_that_cannot_be_carried_out_is_one_line(arguments, message, monkeypatch, capsys):
    assert _run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_photos_are_perturbed_in_training_as_asked_for(voc, monkeypatch, capsys):
    out = voc / "robust.safetensors"
    data = ["--voc", voc, "--year", "2007", "--val-split", "val", *TINY, "--out", out]
    assert _run(monkeypatch, *data, "--adversarial", "linf:2", "--adversarial-steps", 2, "--clean-share", 0.25) == 0
    recipe = read_metadata(out).provenance["recipe"]
    assert [recipe[name] for name in ("adversarial", "adversarial_steps", "clean_share")] == ["linf:2", 2, 0.25]
    capsys.readouterr()
    assert _run(monkeypatch, *data, "--overwrite", "--adversarial", "l3:2") == 2
    assert "expected linf:RADIUS or l2:RMSD, above 0 and at most 255, got 'l3:2'" in capsys.readouterr().err
    assert _run(monkeypatch, *data, "--overwrite", "--adversarial", "l2:2", "--head-only") == 2
    assert "without --head-only and --views" in capsys.readouterr().err
    assert _run(monkeypatch, *data, "--overwrite", "--clean-share", 0.25) == 2
    assert "expected --adversarial with --adversarial-steps and --clean-share" in capsys.readouterr().err
    assert read_metadata(out).provenance["recipe"] == recipe


def test_a_checkpoint_is_not_replaced_unasked_and_stays_if_no_epoch_is_left(voc, monkeypatch, capsys):
    out = voc / "mine.safetensors"
    data = ["--voc", voc, "--year", "2007", "--val-split", "val", *TINY, "--out", out]
    assert _run(monkeypatch, *data) == 0
    first = out.read_bytes()
    capsys.readouterr()
    assert _run(monkeypatch, *data, "--seed", 5) == 2
    assert f"{out} exists already: give --resume to go on, --overwrite or another --out" in capsys.readouterr().err
    assert _run(monkeypatch, *data, "--resume") == 0
    assert f"{out} has had its 1 epoch and stays as it is: give more --epochs" in capsys.readouterr().err
    assert out.read_bytes() == first
    assert _run(monkeypatch, *data, "--resume", "--epochs", 2) == 0
    assert "the optimiser started afresh" in capsys.readouterr().err
    assert read_metadata(out).provenance["recipe"]["epochs"] == 2
    assert _run(monkeypatch, *data, "--overwrite") == 0
    assert read_metadata(out).provenance["recipe"]["epochs"] == 1


def test_an_interrupted_training_says_how_to_go_on(voc, monkeypatch, capsys):
    out, state = voc / "mine.safetensors", voc / "mine.safetensors.resume.pt"
    data = ["--voc", voc, "--year", "2007", "--val-split", "val", *TINY, "--epochs", 3, "--out", out]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlperturb.training.train._validate", stop)  # after two epochs
    assert _run(monkeypatch, *data) == 130
    assert f"interrupted: with --resume the same command goes on from {state}" in capsys.readouterr().err
    monkeypatch.undo()
    assert _run(monkeypatch, *data) == 2
    assert f"{state} exists already: give --resume to go on" in capsys.readouterr().err
    assert _run(monkeypatch, *data, "--resume") == 0
    assert "epoch 3/3" in capsys.readouterr().err
    assert not state.exists()


def test_a_probe_and_gentle_fine_tuning_of_a_network_of_timms_in_one_command(voc, monkeypatch, capsys):
    out, teacher = voc / "mine.safetensors", voc / "teacher.safetensors"
    data = ["--voc", voc, "--year", "2007", "--val-split", "val"]
    tiny = ["--arch", "timm/test_efficientnet", *TINY[2:], "--amp"]
    assert _run(monkeypatch, *data, *tiny, "--probe", "--epochs", 0, "--out", teacher) == 0
    gentle = [
        "--layer-decay",
        0.8,
        "--norm-momentum",
        0,
        "--freeze",
        "conv_stem.*",
        "--freeze",
        "bn1.*",
        "--mixup",
        0.2,
    ]
    kept = ["--views", 2, "--average", 0.9, "--teacher", teacher, "--teacher-weight", 0.4, "--blend", "--half"]
    options = [*gentle, *kept, "--mean", 0.4, "--std", 0.3, "--least-crop", 0.7]
    assert _run(monkeypatch, *data, *tiny, "--probe", *options, "--out", out) == 0
    assert "epoch 1/1" in capsys.readouterr().err
    classifier, metadata = load_checkpoint(out)
    assert metadata.architecture == "timm/test_efficientnet"
    assert classifier.preprocess.mean == (0.4, 0.4, 0.4)
    assert metadata.provenance["teachers"] == ["teacher.safetensors"]
    assert {"probe", "blend"} <= set(metadata.provenance)
    recipe = metadata.provenance["recipe"]
    assert (recipe["freeze"], recipe["teacher_weight"], recipe["views"]) == (["conv_stem.*", "bn1.*"], 0.4, 2)
    assert _run(monkeypatch, *data, *tiny, "--probe", *options, "--epochs", 2, "--resume", "--out", out) == 0
    assert read_metadata(out).provenance["recipe"]["epochs"] == 2
