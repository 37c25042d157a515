"""CLIP and SigLIP by prompts from the command line: --labels with names, and --prompt."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import numpy as np
import pytest
from PIL import Image
from support.prompts import NAMES, write_model

transformers = pytest.importorskip("transformers")
NAMED = ("--labels", ", ".join(NAMES))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "siglip"
    write_model(folder, "siglip")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    write_model(folder, "clip")
    return folder


@pytest.fixture
def photo(save_photo):
    pixels = np.random.default_rng(3).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    return save_photo("img.png", Image.fromarray(pixels))


def read(out, name="report"):
    return json.loads((out / f"{name}.json").read_text())


def check(value, name):
    schema = json.loads((resources.files("mlperturb") / "schemas" / f"{name}.json").read_text())
    jsonschema.validate(value, schema)


def test_labels_shows_the_names_the_prompts_and_where_they_come_from(siglip, cli):
    code, shown, said = cli("labels", "--checkpoint", siglip, *NAMED)
    assert code == 0, said
    assert all(name in shown for name in NAMES)
    assert "prompts: a photo of {}" in shown
    assert "prompts: the default" in shown
    code, shown, said = cli("labels", "--checkpoint", siglip, *NAMED, "--prompt", "{}", "--prompt", "my {}", "--json")
    assert code == 0, said
    found = json.loads(shown)
    assert found["prompts"] == ["{}", "my {}"]
    assert found["origin"]["prompts"] == "given"
    assert found["activation"] == "sigmoid"


def test_a_siglip_is_attacked_and_its_report_goes_on(siglip, photo, cli, tmp_path):
    out = tmp_path / "out"
    words = ("attack", photo, "--flip", "a dog", "--keep", "rest", "--budget", "fast", "--out", out)
    code, _, said = cli(*words, "--checkpoint", siglip, *NAMED)
    assert code == 0, said
    assert "the text for each label is 'a photo of {}'; --prompt sets another" in said
    assert "records no thresholds: 0.5 is used" in said
    report = read(out)
    check(report, "report-2")
    assert report["images"][0]["status"] == "success"
    assert report["classifier"]["labels"] == list(NAMES)
    assert report["classifier"]["prompts"] == ["a photo of {}"]
    assert report["classifier"]["architecture"] == "transformers/siglip"
    seen = report["images"][0]["probabilities"]
    before, after = (seen[when]["a dog"] >= 0.5 for when in ("before", "after"))
    assert before != after
    code, _, said = cli("attack", photo, "--settings", out, "--out", tmp_path / "again")
    assert code == 0, said
    assert read(tmp_path / "again")["classifier"]["prompts"] == ["a photo of {}"]
    assert read(tmp_path / "again")["images"][0]["distortion"] == report["images"][0]["distortion"]
    code, _, said = cli("jpeg-defend", out, "--quality", "90")
    assert code == 0, said
    code, _, said = cli("jpeg-defend", out, "--quality", "90", "--checkpoint", siglip, *NAMED, "--overwrite")
    assert code == 0, said


def test_other_prompts_are_other_settings_of_a_run(siglip):
    from mlperturb.cli.source import classifier_key, find_source

    keys = [
        classifier_key(find_source(siglip, labels="a dog, a cat", prompt=prompt).load("cpu")[1])
        for prompt in (None, ["a photo of {}"], ["{}"])
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_clip_is_a_softmax_network_and_says_so(clip, photo, cli, tmp_path):
    words = ("--checkpoint", clip, *NAMED, "--prompt", "a drawing of {}")
    code, shown, said = cli("predict", photo, *words, "--json")
    assert code == 0, said
    assert "is a softmax network" in said
    seen = json.loads(shown)["images"][0]["probabilities"]
    assert sum(seen.values()) == pytest.approx(1)
    least = min(seen, key=seen.__getitem__)
    code, _, said = cli("attack", photo, "--add", least, "--budget", "fast", *words, "--out", tmp_path / "out")
    assert code == 0, said
    assert "is a softmax network" in said
    report = read(tmp_path / "out")
    assert report["images"][0]["status"] == "success"
    assert report["classifier"]["activation"] == "softmax"
    code, _, said = cli("labels", "--checkpoint", clip, "--labels", "a dog")
    assert code == 0, said
    code, _, said = cli("predict", photo, "--checkpoint", clip, "--labels", "a dog")
    assert code == 2
    assert "expected at least 2 labels of a softmax network, got 1: give --activation sigmoid" in said


def test_names_go_to_the_models_that_take_them_of_several(siglip, clip, tiny, photo, cli, tmp_path):
    out = tmp_path / "out"
    both = ("--checkpoint", siglip, "--checkpoint", clip, *NAMED, "--prompt", "a photo of {}")
    code, _, said = cli("attack", photo, "--flip", "a dog", "--budget", "fast", *both, "--out", out)
    assert code in (0, 3), said
    report = read(out)
    check(report, "report-2")
    assert [one["prompts"] for one in report["classifier"]["members"]] == [["a photo of {}"]] * 2
    one = ("--checkpoint", siglip, *NAMED)
    code, _, said = cli("attack", photo, "--flip", "a dog", "--budget", "fast", *one, "--out", tmp_path / "one")
    assert code == 0, said
    code, _, said = cli("transfer", tmp_path / "one", "--checkpoint", clip, "--checkpoint", tiny, *NAMED)
    assert code == 0, said
    found = read(tmp_path / "one", "transfer")
    check(found, "transfer-1")
    assert found["classifiers"]["clip"]["prompts"] == ["a photo of {}"]
    code, _, said = cli("transfer", tmp_path / "one", "--checkpoint", tiny, *NAMED, "--overwrite")
    assert code == 2
    assert "expected several --checkpoint without --labels" in said


def test_a_siglip_is_evaluated(siglip, save_photo, cli, tmp_path):
    photos = [save_photo(f"photos/{number}.png") for number in range(2)]
    rows = [f"{photo.name},1,1,0,0" for photo in photos]
    (tmp_path / "truth.csv").write_text("\n".join([f"image,{','.join(NAMES)}", *rows]))
    code, _, said = cli(
        "evaluate", "--photos", tmp_path / "photos", "--csv", tmp_path / "truth.csv", "--clean", "--checkpoint", siglip,
        *NAMED, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no labels of its own: give --labels, the names to look for"),
        (["--labels", "names.txt"], "no such file: names.txt"),
        (["--labels", ","], "expected a file or distinct names for --labels, got ','"),
        (["--labels", "a dog, a dog"], "expected a file or distinct names for --labels, got 'a dog, a dog'"),
        ([*NAMED, "--prompt", "a photo"], "expected {} once in --prompt, in place of the label, got 'a photo'"),
        ([*NAMED, "--arch", "resnet50"], "expected no --arch for a folder"),
        ([*NAMED, "--thresholds", "2"], "expected --thresholds inside (0, 1)"),
    ],
)
def test_what_is_missing_or_wrong_is_a_line(siglip, cli, words, message):
    code, _, said = cli("labels", "--checkpoint", siglip, *words)
    assert code == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_names_and_prompts_are_not_for_other_checkpoints(tiny, cli, tmp_path):
    code, _, said = cli("labels", "--checkpoint", tiny, "--labels", "a dog, a cat", "--arch", "resnet18")
    assert code == 2
    assert "no such file: a dog, a cat; names in place of a file are for a model of images and texts" in said
    code, _, said = cli("labels", "--prompt", "a photo of {}")
    assert code == 2
    assert "expected no --prompt for" in said
    code, _, said = cli("labels", "--checkpoint", tiny, "--labels", tmp_path / "gone.txt", "--arch", "resnet18")
    assert code == 2
    assert "no such file" in said


def test_a_file_names_the_labels_too(siglip, cli, tmp_path):
    (tmp_path / "names.txt").write_text("salt, and pepper\na dog\n")
    code, shown, said = cli("labels", "--checkpoint", siglip, "--labels", tmp_path / "names.txt", "--json")
    assert code == 0, said
    assert list(json.loads(shown)["thresholds"]) == ["salt, and pepper", "a dog"]
