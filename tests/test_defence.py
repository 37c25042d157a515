from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_LABELS, TINY_PIXELS
from PIL import Image

from mlperturb.checkpoints import load_checkpoint
from mlperturb.defence import SCHEMA, find_attacked, sweep
from mlperturb.errors import UsageError
from mlperturb.images import read_photo
from mlperturb.purify import parse_purifications
from mlperturb.report import read_report
from mlperturb.runner import to_tensor

QUALITIES = ("jpeg:20", "jpeg:95", "median:3")


@pytest.fixture
def attacked(cli, tiny, tmp_path) -> Path:
    """Attack three photos; return the output folder."""
    rng = np.random.default_rng(3)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.clip(TINY_PIXELS + rng.integers(-20, 20, TINY_PIXELS.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    code, _, err = cli("attack", tmp_path / "photos", "--flip", "cat", "--keep", "rest", "--budget", "fast",
                       "--checkpoint", tiny, "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert code == 0, err
    return tmp_path / "out"


def decide(classifier, rgb) -> np.ndarray:
    with torch.no_grad():
        return (classifier([to_tensor(rgb, classifier.device)])[0] >= classifier.boundary).numpy()


def test_counts_are_those_of_predicting_each_picture_by_itself(attacked, tiny):
    classifier, _ = load_checkpoint(tiny, device="cpu")
    purifications = parse_purifications(QUALITIES)
    result = sweep(classifier, find_attacked(read_report(attacked), attacked), purifications)
    assert result["schema"] == SCHEMA
    truth = {}
    for row, purification in zip(result["qualities"], purifications, strict=True):
        recovered = damaged = restored = broken = total = kept = 0
        for image in read_report(attacked)["images"]:
            clean = np.array(Image.open(image["source"]))
            png = np.array(Image.open(attacked / image["files"]["adversarial"]))
            before, flipped = decide(classifier, clean), decide(classifier, png)
            after, control = (decide(classifier, purification.apply(rgb)[0]) for rgb in (png, clean))
            truth[image["source"]] = before
            cat = np.array([label == "cat" for label in TINY_LABELS])
            gone, held = cat & (flipped != before), ~cat & (flipped == before)
            recovered, total = recovered + int((gone & (after == before)).sum()), total + int(gone.sum())
            damaged, kept = damaged + int((held & (after != before)).sum()), kept + int(held.sum())
            restored += bool(gone.any() and (after == before).all())
            broken += int((control != before).sum())
        assert row["images"] == 3 and total == 3
        assert row["recovered"] == {"labels": recovered, "total": total}
        assert row["damaged"] == {"labels": damaged, "total": kept}
        assert row["restored_images"] == restored
        assert row["clean_damaged"] == {"labels": broken, "total": 12}
        assert (row["bytes"] is None) == (row["defence"] == "median")
    assert any(row["recovered"]["labels"] for row in result["qualities"])


def test_jpeg_defend_writes_its_table_and_figure_3(cli, attacked):
    code, text, err = cli("jpeg-defend", attacked, "--quality", "30,95", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "jpeg 30" in text and "best" in text
    result = json.loads((attacked / "jpeg-defence.json").read_text())
    keys = {"defence", "quality", "images", "recovered", "damaged", "restored_images", "clean_damaged"}
    assert [(row["defence"], row["quality"]) for row in result["qualities"]] == [("jpeg", 30), ("jpeg", 95)]
    assert all(keys <= row.keys() for row in result["qualities"])
    scores = {row["quality"]: row["score"] for row in result["qualities"]}
    assert scores[result["best"]["quality"]] == max(scores.values())
    for row in result["qualities"]:
        share = row["recovered"]["labels"] / row["recovered"]["total"]
        assert row["score"] == pytest.approx(share - row["clean_damaged"]["labels"] / row["clean_damaged"]["total"])
    for name in ("jpeg-histogram.png", "jpeg-curve.png"):
        assert read_photo(attacked / name).rgb.shape[1] > 600
    code, _, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 2 and "--overwrite" in err
    code, text, _ = cli("jpeg-defend", attacked, "--overwrite", "--json", "--device", "cpu")
    assert code == 0 and len(json.loads(text)["qualities"]) == 6


def test_pngs_alone_are_defended_with_what_was_asked_by_hand(cli, attacked, tiny, tmp_path):
    pngs = sorted(attacked.glob("*.adv.png"))
    arguments = ["--flip", "cat", "--keep", "rest", "--checkpoint", tiny, "--device", "cpu", "--json"]
    code, text, err = cli("jpeg-defend", *pngs, *arguments, "--out", tmp_path / "hand")
    assert (code, err.count("no control")) == (0, 1)
    by_hand = json.loads(text)["qualities"]
    code, text, _ = cli("jpeg-defend", attacked, "--json", "--device", "cpu", "--out", tmp_path / "report")
    for mine, other in zip(by_hand, json.loads(text)["qualities"], strict=True):
        assert mine["recovered"] == other["recovered"] and mine["damaged"] == other["damaged"]
        assert mine["clean_damaged"] == {"labels": 0, "total": 0}


def test_a_png_that_is_gone_or_a_photo_that_changed_is_named_and_the_rest_goes_on(cli, attacked, tmp_path):
    (attacked / "0.adv.png").write_bytes(b"nonsense")
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photos" / "1.png")
    code, _, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 1
    assert "0.adv.png" in err and "no longer the photo" in err
    assert json.loads((attacked / "jpeg-defence.json").read_text())["qualities"][0]["images"] == 1


def test_without_the_photos_there_is_no_control_and_that_is_said(cli, attacked, tmp_path):
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    code, text, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 0 and "3 of 3 PNGs" in err
    assert json.loads((attacked / "jpeg-defence.json").read_text())["qualities"][0]["clean_images"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{out}/0.adv.png"], "give --flip"),
        (["{out}", "--quality", "0"], "--quality"),
        (["{out}", "--defence", "magic"], "unknown defence"),
        (["{out}", "--subsampling", "4:1:1"], "--subsampling"),
        (["{out}/nowhere"], "no such report"),
        (["{out}", "--checkpoint", "{other}"], "is not the checkpoint that was attacked"),
        (["{out}/0.adv.png", "--flip", "any", "--checkpoint", "{tiny}"], "--flip any"),
        (["{out}/0.adv.png", "--flip", "cow", "--checkpoint", "{tiny}"], "cow"),
    ],
)
def test_what_cannot_be_defended_is_refused_in_a_line(cli, attacked, tiny, tmp_path, arguments, message):
    from mlperturb.checkpoints import bundled_checkpoint

    names = {"out": attacked, "tiny": tiny, "other": bundled_checkpoint()}
    code, _, err = cli("jpeg-defend", *(text.format(**names) for text in arguments), "--device", "cpu")
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_report_names_no_file_elsewhere(attacked):
    report = read_report(attacked)
    report["images"][0]["files"]["adversarial"] = "../photos/0.png"
    assert len(find_attacked(report, attacked)) == 2
    (attacked / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="expected a report"):
        read_report(attacked)
