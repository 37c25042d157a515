"""The adaptive attack: what survives a defence that it knows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.readers import parse_reader
from mlperturb.model.views import read_logits
from mlperturb.photos.purify import parse_survival


@pytest.fixture
def attacked(cli, tiny, tmp_path):
    """Return the folder of an attack on two photos, one of which has nothing to flip."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.fromarray(TINY_PIXELS).save(photos / "0.png")
    code, _, err = cli(
        *("attack", photos, "--flip", "cat", "--keep", "rest", "--budget", "fast"),
        *("--checkpoint", tiny, "--device", "cpu", "--out", out),
    )
    assert code == 0, err
    return out


def test_the_adaptive_attack_stands_beside_the_plain_attack(cli, attacked):
    code, text, err = cli("jpeg-defend", attacked, "--defence", "jpeg:60,median:3", "--adaptive", "--device", "cpu")
    assert code == 0, err
    assert "adaptive holds" in text
    rows = json.loads((attacked / "jpeg-defence.json").read_text())["qualities"]
    assert [row["defence"] for row in rows] == ["jpeg", "median"]
    for row in rows:
        assert row["plain"]["images"] == row["adaptive"]["images"] == 1
        assert row["adaptive"]["successes"] >= row["plain"]["successes"]
    plain, adaptive = rows[0]["plain"], rows[0]["adaptive"]
    assert adaptive["successes"] == 1
    assert adaptive["rmsd"] == adaptive["rmsd_50"] > 0
    assert adaptive["forward"] > adaptive["backward"] > 0
    report = json.loads((attacked / "report.json").read_text())
    assert plain["rmsd"] == pytest.approx(report["images"][0]["distortion"]["rmsd"])
    cost = report["images"][0]["cost"]
    assert (plain["forward"], plain["backward"]) == (cost["forward"], cost["backward"])
    assert f"{cost['forward']} + {cost['backward']}" in text


def test_the_adaptive_attack_keeps_the_plain_attacks_limits(cli, attacked):
    report = json.loads((attacked / "report.json").read_text())
    report["settings"] |= {"max_rmsd": 0.05, "passes": 12}  # as if the plain attack had had them
    (attacked / "report.json").write_text(json.dumps(report))
    assert cli("jpeg-defend", attacked, "--defence", "jpeg:60", "--adaptive", "--device", "cpu", "--quiet")[0] == 0
    (row,) = json.loads((attacked / "jpeg-defence.json").read_text())["qualities"]
    assert row["adaptive"] | {"forward": 0, "backward": 0} == {
        "images": 1, "successes": 0, "rmsd": None, "rmsd_50": None, "forward": 0, "backward": 0,
    }  # fmt: skip
    assert row["adaptive"]["forward"] + row["adaptive"]["backward"] > 12


def test_reports_of_different_limits_have_no_adaptive_attack_beside_them(cli, attacked, tmp_path):
    shutil.copytree(attacked, tmp_path / "other")
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    report["settings"]["max_linf"] = 3
    (tmp_path / "other" / "report.json").write_text(json.dumps(report))
    both = ("jpeg-defend", attacked, tmp_path / "other", "--defence", "jpeg:60", "--device", "cpu")
    code, _, err = cli(*both, "--adaptive")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected reports on the same max_linf" in err
    assert cli(*both)[0] == 0


def test_a_report_whose_settings_are_damaged_is_one_line(cli, attacked):
    report = json.loads((attacked / "report.json").read_text())
    del report["settings"]["margin"]
    (attacked / "report.json").write_text(json.dumps(report))
    code, _, err = cli("jpeg-defend", attacked, "--defence", "jpeg:60", "--adaptive", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)


def test_without_adaptive_no_photo_is_attacked(cli, attacked, monkeypatch):
    monkeypatch.setattr("mlperturb.run.search.search", None)  # a call would fail
    assert cli("jpeg-defend", attacked, "--quality", 60, "--device", "cpu")[0] == 0
    assert "adaptive" not in json.loads((attacked / "jpeg-defence.json").read_text())["qualities"][0]


@pytest.mark.parametrize("name", ["jpeg:75", "webp:80", "median:3", "bits:5", "resize:75"])
def test_an_attack_survives_each_kind_in_every_reader(cli, tiny, tmp_path, name):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(TINY_PIXELS).save(photo)
    code, _, err = cli(
        *("attack", photo, "--flip", "cat", "--keep", "rest", "--survive", name, "--passes", 160),
        *("--checkpoint", tiny, "--device", "cpu", "--out", out),
    )
    assert code == 0, err
    record = json.loads((out / "report.json").read_text())["images"][0]
    assert record["status"] == "success"
    assert record["survival"] == {name: {"held": 4, "total": 4, "violated": []}}
    assert record["cost"]["forward"] + record["cost"]["backward"] <= 160
    classifier, _ = load_checkpoint(tiny)
    (purification,) = parse_survival([name])[0]
    pixels = purification.apply(np.asarray(Image.open(out / "photo.adv.png")))[0]
    for reader in ("float", "pillow", "torchvision"):
        logits = read_logits(classifier, pixels, parse_reader(reader))[0]
        decided = dict(zip(classifier.labels, (logits >= classifier.boundary).tolist(), strict=True))
        assert decided == {label: there != (label == "cat") for label, there in record["truth"].items()}
