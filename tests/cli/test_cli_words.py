"""What the command line is told of a checkpoint, and the words for labels among thousands."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models import save_for_hf

from mlperturb.labels import Request
from mlperturb.targets import make_targets

LABELS = ("sky", "1girl", "girl, red", "boy", "miku", "explicit")
CATEGORIES = (0, 0, 0, 0, 4, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of a tagger, as timm writes it, without thresholds."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tagger")
    network = timm.create_model("test_vit", num_classes=len(LABELS)).eval()
    save_for_hf(network, folder, model_config={"pretrained_cfg": {}}, safe_serialization=True)
    rows = [f'{n},"{name}",{category}' for n, (name, category) in enumerate(zip(LABELS, CATEGORIES, strict=True))]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category", *rows]) + "\n")
    return folder


def test_thresholds_that_are_assumed_are_said_once_and_calmly(folder, cli, save_photo):
    code, _, said = cli("predict", save_photo(), "--checkpoint", folder)
    assert code == 0
    assert said == (
        f"mlperturb: {folder} records no thresholds: 0.5 is used for every label; --thresholds sets others\n"
    )
    assert cli("predict", save_photo(), "--checkpoint", folder, "--thresholds", ".35")[2] == ""
    assert cli("predict", save_photo())[2] == ""


@pytest.mark.parametrize("command", ["predict", "attack", "attack --dry-run", "evaluate"])
def test_a_network_that_cannot_be_loaded_is_one_line_without_notes(folder, cli, save_photo, tmp_path, command):
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in folder.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "architecture": "resnet18", "model_args": {}}))
    photo, out = save_photo(), ("--out", tmp_path / "out")
    table = tmp_path / "table.csv"
    table.write_text(",".join(["image", *(f'"{label}"' for label in LABELS)]) + f"\n{photo.name}" + ",1" * len(LABELS))
    words = {
        "predict": (photo,),
        "attack": (photo, "--flip", "sky", *out),
        "attack --dry-run": (photo, "--flip", "sky"),
        "evaluate": ("--photos", photo.parent, "--csv", table, "--cases", "extreme", *out),
    }[command]
    code, _, said = cli(*command.split(), *words, "--checkpoint", bad)
    assert code == 2
    assert "does not fit the architecture" in said
    assert said.count("\n") == 1, said


def test_a_table_of_the_folder_gives_thresholds_and_names_of_categories(folder, cli, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "thresholds.csv").write_text("category,name,threshold\n0,general,.3\n4,character,.85\n9,rating,.5\n")
    code, shown, said = cli("labels", "--checkpoint", copy)
    assert (code, said) == (0, "")
    rows = [line.split() for line in shown.splitlines()]
    assert rows[:2] == [["label", "threshold", "category"], ["sky", "0.300", "general"]]
    assert "labels: 6, by category 0 (general): 4, 4 (character): 1, 9 (rating): 1" in shown
    assert "  thresholds: thresholds.csv, by category" in shown
    code, shown, _ = cli("labels", "--checkpoint", copy, "--category", "character", "--json")
    assert json.loads(shown)["thresholds"] == {"miku": 0.85}
    (copy / "thresholds.csv").write_text("category,threshold\n0,.3\n")
    code, _, said = cli("labels", "--checkpoint", copy)
    assert code == 2
    assert "expected a threshold for every label, got none for category '4', thresholds.csv" in said
    assert cli("labels", "--checkpoint", copy, "--thresholds", ".4")[0] == 0


def test_labels_says_what_was_understood_and_finds_labels(folder, cli, tmp_path):
    fields = tmp_path / "wd.json"
    fields.write_text(json.dumps({"square": True, "channels": "bgr"}))
    code, shown, _ = cli("labels", "--checkpoint", folder, "--preprocess", fields, "--thresholds", ".35")
    assert code == 0
    for line in (
        "  channels: bgr", "  square: True", "  weights: model.safetensors", "  labels: selected_tags.csv",
        "  thresholds: given", "  preprocess: given: channels, square; the rest: config.json", "  readers: the default",
    ):  # fmt: skip
        assert line in shown.splitlines()
    code, shown, _ = cli("labels", "--checkpoint", folder, "--find", "girl")
    rows = [line.split() for line in shown.splitlines()]
    assert rows[1:] == [["girl,", "red", "0.500", "0", "2"], ["1girl", "0.500", "0", "1"]]
    code, shown, _ = cli("labels", "--checkpoint", folder, "--category", "9", "--json")
    assert json.loads(shown)["numbers"] == {"explicit": 5}
    assert "no label is like 'zebra'" in cli("labels", "--checkpoint", folder, "--find", "zebra")[2]


def test_many_labels_are_shown_in_part(cli, tmp_path):
    names = tmp_path / "names.csv"
    names.write_text("name,category\n" + "".join(f"tag {number},{number % 3}\n" for number in range(10861)))
    weights = tmp_path / "w.pt"
    weights.write_bytes(b"not read")
    given = ("--checkpoint", weights, "--arch", "resnet18", "--labels", names)
    code, shown, said = cli("labels", *given, "--find", "tag 1")
    assert (code, said) == (0, "")
    assert len(shown.splitlines()) == 32
    assert "and 1942 others: --find TEXT, --category NAME or --json shows them" in shown


def test_a_run_is_refused_another_threshold_or_preprocessing(folder, cli, save_photo, tmp_path):
    out = tmp_path / "out"
    fields = tmp_path / "wd.json"
    fields.write_text(json.dumps({"channels": "bgr"}))
    run = ("attack", save_photo(), "--flip", "sky", "--budget", "fast", "--checkpoint", folder, "--out", out)
    code, _, said = cli(*run, "--thresholds", ".4")
    assert code == 0, said
    described = json.loads((out / "report.json").read_text())["classifier"]
    assert described["thresholds"] == [0.4] * 6
    assert described["origin"]["thresholds"] == "given"
    code, _, said = cli(*run, "--thresholds", ".3")
    assert code == 2
    assert "thresholds" in said
    code, _, said = cli(*run, "--thresholds", ".4", "--preprocess", fields)
    assert code == 2
    assert "preprocess" in said
    fields.write_text(json.dumps({"chanels": "bgr"}))
    code, _, said = cli(*run, "--thresholds", ".4", "--preprocess", fields, "--overwrite")
    assert code == 2
    assert "unknown fields of --preprocess: chanels: expected some of alpha, channels, corner, crop" in said


def test_present_and_categories_at_the_command_line(folder, cli, save_photo, tmp_path):
    out = tmp_path / "out"
    code, _, said = cli(
        "attack", save_photo(), "--remove", "category:9", "--keep", "present", "--keep", "category:4",
        "--add", "sky", "--budget", "fast", "--checkpoint", folder, "--thresholds", ".5", "--out", out,
    )  # fmt: skip
    assert code == 0, said
    image = json.loads((out / "report.json").read_text())["images"][0]
    there = {label for label, present in image["truth"].items() if present}
    named = {"sky", "explicit"}
    assert set(image["keep"]) - named == (there - named) | {"miku"}
    assert image["status"] in ("success", "unchanged")


def test_keep_present_is_decided_for_each_photo():
    truth = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, 1.0]])
    targets = make_targets(Request(flip=(0,), remove=(3,), keep_present=True), truth, torch.zeros(4))
    assert targets.flip.tolist() == [[True, False, False, True], [True, False, False, True]]
    assert targets.keep.tolist() == [[False, False, True, False], [False, False, False, False]]
