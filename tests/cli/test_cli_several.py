"""Several --checkpoint of `attack`, and `transfer`, on two small checkpoints with overlapping labels."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb import load, predict
from mlperturb.cli.advice import advice
from mlperturb.experiment.transfer import read_schema as read_transfer_schema
from mlperturb.model.checkpoints import Metadata, read_metadata, read_tensors, save_checkpoint
from mlperturb.run.record import Record
from mlperturb.run.report import read_schema
from mlperturb.run.settings import Words, read_settings

OTHER_LABELS = ("dog", "cat", "cow", "hen")


@pytest.fixture
def other(tiny, tmp_path) -> Path:
    """Return a checkpoint like `tiny` whose head differs a little; it has no potted plant, but cow."""
    tensors, path = read_tensors(tiny), tmp_path / "other.safetensors"
    rows = [1, 0, 2, 3]
    for name in ("fc.weight", "fc.bias"):
        tensors[name] = tensors[name][rows].clone()
    noise = torch.randn(tensors["fc.weight"].shape, generator=torch.Generator().manual_seed(0))
    tensors["fc.weight"] = tensors["fc.weight"] + 0.001 * tensors["fc.weight"].std() * noise
    preprocess = read_metadata(tiny).preprocess | {"readers": ["float", "pillow"]}
    save_checkpoint(path, tensors, Metadata(read_metadata(tiny).architecture, OTHER_LABELS, (0.5,) * 4, preprocess))
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(TINY_PIXELS).save(path)
    return path


@pytest.fixture
def both(cli, photo, tiny, other, tmp_path) -> tuple[list[object], Path]:
    """Attack a photo on both checkpoints; return the command and its folder."""
    out = tmp_path / "both"
    command = ["attack", photo, "--flip", "cat", "--keep", "rest", "--budget", "fast", "--checkpoint", tiny,
               "--checkpoint", other, "--device", "cpu", "--out", out]  # fmt: skip
    code, text, err = cli(*command)
    assert code == 0, err
    assert "fools 2 of 2 classifiers" in text
    assert "tiny: fooled" in text
    assert "other: fooled" in text
    return command, out


def test_a_file_fools_every_checkpoint_in_each_ones_own_readers(both, tiny, other):
    report = json.loads((both[1] / "report.json").read_text())
    jsonschema.Draft202012Validator(read_schema()).validate(report)
    described, image = report["classifier"], report["images"][0]
    assert described["labels"] == ["cat", "dog", "potted plant", "hen", "cow"]
    assert [one["name"] for one in described["members"]] == ["tiny", "other"]
    assert [one["readers"] for one in described["members"]] == [["float", "pillow", "torchvision"], ["float", "pillow"]]
    assert image["status"] == "success"
    assert image["constraints"] == {"held": 8, "total": 8, "violated": []}
    assert set(image["classifiers"]["other"]["readers"]) == {"float", "pillow"}
    for name, path in (("tiny", tiny), ("other", other)):
        one, classifier = image["classifiers"][name], load(path)
        assert one["flip"] == ["cat"]
        assert one["keep"] == [label for label in classifier.labels if label != "cat"]
        for reader in one["readers"]:
            for when, file in (("before", image["source"]), ("after", both[1] / "photo.adv.png")):
                seen = predict(classifier, [file], reader=reader)[0]
                assert one["readers"][reader][when] == pytest.approx(
                    dict(zip(classifier.labels, seen.tolist(), strict=True)), abs=1e-5
                )
            now = {label: value >= 0.5 for label, value in one["readers"][reader]["after"].items()}
            assert now == {label: was != (label == "cat") for label, was in one["truth"].items()}


def test_the_run_goes_on_only_with_the_same_checkpoints(cli, both):
    command = both[0]
    code, _, err = cli(*command)
    assert code == 0
    assert "going on: 1 of 1" in err
    assert command[10] == "--checkpoint"
    code, _, err = cli(*command[:10], *command[12:])
    assert code == 2
    assert "--overwrite" in err


def test_advice_names_the_classifiers_that_are_not_fooled():
    settings = read_settings(Words(flip=["a"]), ["a", "b"], networks=2)
    record = Record(
        "photo.png", status="partial", constraints={"held": 1, "total": 2, "violated": ["a"]},
        classifiers={"first": {"violated": []}, "second": {"violated": ["a"]}},
    )  # fmt: skip
    assert advice(record, settings) == "the file fools some classifiers, but not second; try --budget paper"


def test_a_report_on_several_is_shown_by_every_command_but_jpeg_defend(cli, both):
    out = both[1]
    assert cli("gallery", out)[0] == 0
    assert cli("figures", out)[0] == 0
    code, _, err = cli("jpeg-defend", out)
    assert code == 2
    assert "expected a report on one classifier" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--checkpoint", "TINY"], "got"),
        (["--checkpoint", "OTHER", "--arch", "resnet18"], "each must describe itself"),
        (["--checkpoint", "OTHER", "--method", "rank-1"], "--method other than rank-1"),
        (["--checkpoint", "OTHER", "--passes", "19"], "--passes"),
        (["--strongest"], "--max-rmsd or --max-linf"),
        (["--diversity", "both"], "--strongest"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_line(cli, photo, tiny, other, tmp_path, more, words):
    given = [{"TINY": tiny, "OTHER": other}.get(word, word) for word in more]
    code, text, err = cli("attack", photo, "--flip", "cat", "--checkpoint", tiny, *given, "--out", tmp_path / "out")
    assert (code, text) == (2, "")
    assert words in err
    assert err.count("\n") == 1


@pytest.fixture
def made(cli, tiny, photo, tmp_path) -> Path:
    """Return the folder of a report on `tiny` alone: the strongest file within an RMSD, and one photo out of reach."""
    Image.fromarray(np.roll(TINY_PIXELS, 3, 1)).save(tmp_path / "second.png")
    out = tmp_path / "made"
    code, _, err = cli("attack", photo, tmp_path / "second.png", "--flip", "cat,potted plant", "--keep", "hen",
                       "--strongest", "--max-rmsd", 12, "--budget", "fast", "--checkpoint", tiny, "--device", "cpu",
                       "--out", out)  # fmt: skip
    assert code == 0, err
    assert json.loads((out / "report.json").read_text())["settings"]["aim"] == "strongest"
    return out


def test_transfer_says_by_label_what_holds_before_another_classifier(cli, made, other):
    code, text, err = cli("transfer", made, "--checkpoint", other, "--json", "--device", "cpu")
    assert (code, err) == (0, "")
    result = json.loads(text)
    jsonschema.Draft202012Validator(read_transfer_schema()).validate(result)
    assert result == json.loads((made / "transfer.json").read_text())
    with Image.open(made / "transfer.png") as drawn:
        assert drawn.size[0] > 500
    assert result["readers"] == {"other": ["float", "pillow"]}
    assert [(row["source"], row["target"]) for row in result["pairs"]] == [("tiny", "other")]
    row = result["pairs"][0]
    assert row["missing"] == {"potted plant": 2}
    report, classifier = json.loads((made / "report.json").read_text()), load(other)
    flips = broken = total = fooled = 0
    for image in report["images"]:
        decisions = {}
        for reader in ("float", "pillow"):
            for when, file in (("clean", image["source"]), ("file", made / image["files"]["adversarial"])):
                seen = (predict(classifier, [file], reader=reader)[0] >= 0.5).tolist()
                decisions[reader, when] = dict(zip(classifier.labels, seen, strict=True))
        same = {
            label: all(decisions[reader, "clean"][label] == image["truth"][label] for reader in ("float", "pillow"))
            for label in ("cat", "hen")
        }
        held = all(decisions[reader, "file"]["cat"] != image["truth"]["cat"] for reader in ("float", "pillow"))
        total += same["cat"]
        flips += same["cat"] and held
        fooled += same["cat"] and held
        broken += same["hen"] and any(
            decisions[reader, "file"]["hen"] != image["truth"]["hen"] for reader in ("float", "pillow")
        )
    assert total
    assert row["flips"] == {"labels": flips, "total": total}
    assert (row["images"], row["fooled"]) == (total, fooled)
    assert row["broken"]["labels"] == broken
    assert set(row["labels"]) == {"cat", "hen"}


def test_the_attacked_classifier_itself_is_fooled_and_several_reports_make_rows(cli, both, made, tiny, other, tmp_path):
    code, text, err = cli("transfer", made, both[1], "--checkpoint", tiny, "--checkpoint", other, "--device", "cpu",
                          "--out", tmp_path / "t")  # fmt: skip
    assert (code, err) == (0, "")
    assert "potted plant" in text
    result = json.loads((tmp_path / "t" / "transfer.json").read_text())
    assert [(row["source"], row["target"]) for row in result["pairs"]] == [
        ("tiny", "tiny"), ("tiny", "other"), ("tiny+other", "tiny"), ("tiny+other", "other"),
    ]  # fmt: skip
    shares = {(row["source"], row["target"]): (row["successes"], row["images"]) for row in result["pairs"]}
    assert shares["tiny", "tiny"][0] == shares["tiny", "tiny"][1] > 0
    assert shares["tiny+other", "tiny"] == shares["tiny+other", "other"] == (1, 1)
    code, _, err = cli("transfer", made, "--checkpoint", tiny, "--out", tmp_path / "t")
    assert code == 2
    assert "--overwrite" in err


def test_without_the_photo_every_label_counts_and_it_is_said(cli, made, other, photo):
    photo.rename(photo.with_name("moved.jpg"))
    code, text, err = cli("transfer", made, "--checkpoint", other, "--json")
    assert code == 0
    assert "the photos of 1 of 2 files are missing" in err
    result = json.loads(text)
    assert [image["photo"] is None for image in result["images"]] == [True, False]
    assert result["images"][0]["targets"]["other"]["flip"]["cat"]["before"] is None
    assert result["images"][0]["targets"]["other"]["flip"]["cat"]["counts"]


def test_a_file_that_cannot_be_read_is_recorded_and_the_rest_is_shown(cli, made, other):
    (made / "photo.adv.png").write_bytes(b"nonsense")  # it is not what the report recorded
    code, text, err = cli("transfer", made, "--checkpoint", other, "--json")
    assert code == 1
    assert "photo.adv.png" in err
    result = json.loads(text)
    jsonschema.Draft202012Validator(read_transfer_schema()).validate(result)
    assert result["pairs"][0]["unread"] == 1
    assert [image["error"] is None for image in result["images"]] == [False, True]


DAMAGES = [
    (lambda report: report["images"][0]["files"].update(adversarial=7), "does not follow its schema"),
    (lambda report: report["images"][0].update(truth=None), "does not follow its schema"),
    (lambda report: report["images"][0].update(flip=["\x1b[31m"]), "does not follow its schema"),
    (lambda report: report["classifier"].update(checkpoint=None), "does not follow its schema"),
    (lambda report: report.update(classifier=[]), "does not follow its schema"),
    (lambda report: report.update(images={"a": 1}), "does not follow its schema"),
    (lambda report: report.update(images=[]), "no adversarial file"),
    (lambda report: report.update(schema="mlperturb.report/9"), "expected a file of schema"),
]


def test_a_hostile_report_is_refused_in_a_line_and_writes_nothing(cli, made, other):
    path = made / "report.json"
    good, before = path.read_text(), sorted(made.rglob("*"))
    for damage, words in DAMAGES:
        report = json.loads(good)
        damage(report)
        path.write_text(json.dumps(report))
        code, text, err = cli("transfer", made, "--checkpoint", other, "--device", "cpu")
        assert (code, text) == (2, "")
        assert words in err
        assert err.count("\n") == 1
        assert all(character.isprintable() or character == "\n" for character in err)
        assert sorted(made.rglob("*")) == before


@pytest.mark.parametrize("name", ["../photo.png", "/etc/passwd", "memory://x/photo.png"])
def test_a_file_that_is_not_the_reports_own_is_not_opened(cli, made, other, name):
    path = made / "report.json"
    report = json.loads(path.read_text())
    report["images"][0]["files"]["adversarial"] = name
    path.write_text(json.dumps(report))
    code, text, err = cli("transfer", made, "--checkpoint", other, "--json", "--device", "cpu")
    assert code == 1
    assert "not the name of a file" in err
    assert [image["error"] is None for image in json.loads(text)["images"]] == [False, True]


def test_hostile_names_are_shown_harmless(cli, made, other):
    path = made / "report.json"
    report = json.loads(path.read_text())
    report["classifier"]["checkpoint"] = "\x1b[31m[red]$x$.safetensors"
    path.write_text(json.dumps(report))
    code, text, _ = cli("transfer", made, "--checkpoint", other, "--device", "cpu")
    assert code == 0
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "[red]" in text


def test_what_transfer_needs_is_asked_for(cli, made, tiny, tmp_path):
    for more, words in (
        ([], "expected --checkpoint"),
        (["--checkpoint", tmp_path / "none.safetensors"], "no such checkpoint"),
        (["--checkpoint", tiny, "--checkpoint", tiny], "twice"),
        (["--checkpoint", tiny, "--reader", "eyes"], "unknown"),
        (["--checkpoint", tiny, "--photos", tmp_path / "none"], "no such folder"),
    ):
        code, text, err = cli("transfer", made, *more)
        assert (code, text) == (2, "")
        assert words in err
    assert len(TINY_LABELS) == 4
