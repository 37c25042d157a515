from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from support.models import TINY_LABELS as LABELS
from support.models import TINY_PIXELS as PIXELS

from mlperturb.model.checkpoints import read_metadata, save_checkpoint
from mlperturb.model.readers import DEFAULT_READERS
from mlperturb.run.report import read_schema


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def attack(cli, tiny, photo, tmp_path):
    """Attack the photo; return exit code, stdout, stderr and the report, if there is one."""

    def run(*arguments: object, checkpoint: Path = tiny):
        quick = ["--budget", "fast", "--overwrite", "--checkpoint", checkpoint, "--device", "cpu"]
        code, stdout, stderr = cli(
            "attack", photo, "--flip", "cat", "--keep", "rest", *quick, "--out", tmp_path / "out", *arguments
        )
        path = tmp_path / "out" / "report.json"
        return code, stdout, stderr, json.loads(path.read_text()) if path.is_file() else None

    return run


def refused(result, message: str) -> None:
    code, stdout, stderr = result[:3]
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1
    assert stderr.startswith("mlperturb: error: ")
    assert message in stderr


@pytest.mark.parametrize(
    ("given", "readers"),
    [
        ([], list(DEFAULT_READERS)),
        (["float"], ["float"]),
        (["pillow:bicubic"], ["pillow:bicubic"]),
        (["torchvision", "float", "torchvision"], ["torchvision", "float"]),
        (["pillow,float:no-antialias"], ["pillow", "float:no-antialias"]),
    ],
)
def test_an_attack_is_made_for_the_readers_named_and_the_report_has_each(attack, given, readers):
    code, _, err, report = attack(*(part for name in given for part in ("--reader", name)))
    assert code == 0, err
    (image,) = report["images"]
    assert report["schema"] == "mlperturb.report/2"
    assert report["settings"]["readers"] == list(image["readers"]) == list(report["summary"]["readers"]) == readers
    assert image["status"] == "success"
    assert image["probabilities"]["before"] == image["readers"][readers[0]]["before"]
    assert image["probabilities"]["after"] == image["readers"][readers[0]]["after"]
    for reader in image["readers"].values():
        assert (reader["held"], reader["total"], reader["violated"]) == (4, 4, [])
        assert (reader["before"]["cat"] >= 0.5, reader["after"]["cat"] >= 0.5) == (True, False)
    assert set(report["summary"]["readers"].values()) == {1.0}


def test_the_probabilities_of_a_reader_are_those_that_predict_prints(attack, cli, tiny, photo, tmp_path):
    names = ["pillow", "torchvision", "float"]
    (image,) = attack(*(part for name in names for part in ("--reader", name)))[3]["images"]
    for path, when in ((photo, "before"), (tmp_path / "out" / "photo.adv.png", "after")):
        code, text, _ = cli("predict", path, "--reader", ",".join(names), "--checkpoint", tiny, "--json")
        assert code == 0
        entries = json.loads(text)["images"]
        assert [entry["reader"] for entry in entries] == names
        assert {entry["source"] for entry in entries} == {str(path)}
        for entry in entries:
            assert entry["probabilities"] == pytest.approx(image["readers"][entry["reader"]][when], abs=1e-5)
        assert entries[0]["probabilities"] != entries[2]["probabilities"]


def test_predict_shows_a_table_for_each_reader_and_by_default_one(cli, tiny, photo):
    code, text, _ = cli("predict", photo, "--reader", "pillow", "--reader", "torchvision", "--checkpoint", tiny)
    lines = text.splitlines()
    assert code == 0
    assert [line.rsplit(", ", 1)[1] for line in lines if "photo.png" in line] == ["pillow", "torchvision"]
    assert sum(line.startswith("cat") for line in lines) == 2
    code, text, _ = cli("predict", photo, "--checkpoint", tiny)
    assert [line for line in text.splitlines() if "photo.png" in line] == [str(photo)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skimage", "unknown reader 'skimage': expected float, pillow"),
        ("float,Pillow", "unknown reader 'Pillow'"),
        ("pillow:cubic", "unknown filter 'cubic' of reader 'pillow:cubic': expected bilinear, bicubic"),
        ("pillow:no-antialias", "unknown filter 'no-antialias'"),
        ("pillow:box:hamming", "expected one filter of a reader"),
        (",", "expected at least one reader"),
    ],
)
def test_an_unknown_reader_is_refused_in_one_line(attack, cli, tiny, photo, tmp_path, name, message):
    refused(attack("--reader", name), message)
    refused(cli("predict", photo, "--reader", name, "--checkpoint", tiny), message)
    assert not (tmp_path / "out").exists()


def with_preprocess(tiny: Path, path: Path, **fields: object) -> Path:
    """Write a copy of the checkpoint with other fields of preprocessing; None removes a field."""
    metadata = read_metadata(tiny)
    for name, value in fields.items():
        if value is None:
            del metadata.preprocess[name]
        else:
            metadata.preprocess[name] = value
    save_checkpoint(path, load_file(tiny), metadata)
    return path


@pytest.mark.parametrize(
    ("named", "readers"),
    [(None, list(DEFAULT_READERS)), (["pillow"], ["pillow"]), (["torchvision", "pillow"], ["torchvision", "pillow"])],
)
def test_the_readers_are_those_of_the_checkpoint_or_the_default(attack, cli, tiny, photo, tmp_path, named, readers):
    checkpoint = with_preprocess(tiny, tmp_path / "other.safetensors", readers=named)
    code, _, err, report = attack(checkpoint=checkpoint)
    assert code == 0, err
    assert report["settings"]["readers"] == list(report["images"][0]["readers"]) == readers
    entries = json.loads(cli("predict", photo, "--checkpoint", checkpoint, "--json")[1])["images"]
    assert [entry["reader"] for entry in entries] == readers[:1]
    code, _, _, report = attack("--reader", "float", checkpoint=checkpoint)  # the user's word is the last
    assert (code, report["settings"]["readers"]) == (0, ["float"])


@pytest.mark.parametrize("named", [["skimage"], [], "pillow", [1], {"pillow": 1}])
def test_a_checkpoint_of_unknown_readers_is_refused_in_one_line(attack, tiny, tmp_path, named):
    checkpoint = with_preprocess(tiny, tmp_path / "other.safetensors", readers=named)
    code, _, err, report = attack(checkpoint=checkpoint)
    assert code == 2
    assert (err.count("\n"), report) == (1, None)
    assert err.startswith("mlperturb: error: ")


@pytest.mark.parametrize("margin", ["-0.1", "nan", "inf"])
def test_a_margin_out_of_its_range_is_refused_by_its_name(attack, margin):
    refused(attack("--margin", margin), "expected a --margin of at least 0, got")


@pytest.mark.parametrize("reader", ["float", "pillow"])
@pytest.mark.parametrize("margin", [0.0, 0.6])
def test_every_logit_clears_its_threshold_by_the_margin(attack, reader, margin):
    report = attack("--margin", margin, "--reader", reader, "--budget", "balanced")[3]
    (image,) = report["images"]
    assert report["settings"]["margin"] == margin
    assert image["status"] == "success"
    after = np.array([image["readers"][reader]["after"][label] for label in LABELS])
    before = np.array([image["truth"][label] for label in LABELS])
    logits = np.log(after / (1 - after)) * np.where(before != (np.array(LABELS) == "cat"), 1, -1)
    assert logits.min() >= margin - 1e-4


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        (["--reader", "float,pillow,torchvision,float:bicubic"], 12),
        (["--survive", "jpeg:75"], 20),
        (["--survive", "jpeg:75", "--reader", "pillow"], 12),
        (["--survive", "jpeg:60-69"], 68),
    ],
)
def test_too_few_passes_are_refused_in_one_line_that_says_the_least(attack, arguments, least):
    refused(attack(*arguments, "--passes", least - 1), f"expected at least {least} --passes, got {least - 1}")
    code, _, err, report = attack(*arguments, "--passes", least)
    assert code == 0, err
    cost = report["images"][0]["cost"]
    assert 0 < cost["forward"] + cost["backward"] <= least


def test_the_schema_demands_the_readers(attack):
    import jsonschema

    report = attack()[3]
    validator = jsonschema.Draft202012Validator(read_schema())
    validator.validate(report)
    for change in ("settings", "images", "summary"):
        broken = json.loads(json.dumps(report))
        part = broken["images"][0] if change == "images" else broken[change]
        del part["readers"]
        assert not validator.is_valid(broken), change
    broken = json.loads(json.dumps(report))
    del broken["images"][0]["readers"]["float"]["after"]
    assert not validator.is_valid(broken)
