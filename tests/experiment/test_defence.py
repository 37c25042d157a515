from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb.errors import UsageError
from mlperturb.experiment.defence import SCHEMA, find_attacked, sweep
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.preprocess import to_tensor
from mlperturb.photos.images import read_photo
from mlperturb.photos.purify import parse_purifications
from mlperturb.run.report import read_report

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
    result = sweep(classifier, find_attacked(*read_report(attacked)), purifications)
    assert result["schema"] == SCHEMA
    truth = {}
    for row, purification in zip(result["qualities"], purifications, strict=True):
        recovered = damaged = restored = broken = total = kept = 0
        for image in read_report(attacked)[0]["images"]:
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
        assert row["images"] == 3
        assert total == 3
        assert row["recovered"] == {"labels": recovered, "total": total}
        assert row["damaged"] == {"labels": damaged, "total": kept}
        assert row["restored_images"] == restored
        assert row["clean_damaged"] == {"labels": broken, "total": 12}
        assert (row["bytes"] is None) == (row["defence"] == "median")
    assert any(row["recovered"]["labels"] for row in result["qualities"])


def test_jpeg_defend_writes_its_table_and_figure_3(cli, attacked):
    code, text, err = cli("jpeg-defend", attacked, "--quality", "30,95", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "jpeg 30" in text
    assert "best" in text
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
    assert code == 2
    assert "--overwrite" in err
    code, text, _ = cli("jpeg-defend", attacked, "--overwrite", "--json", "--device", "cpu")
    assert code == 0
    assert len(json.loads(text)["qualities"]) == 6


def test_pngs_alone_are_defended_with_what_was_asked_by_hand(cli, attacked, tiny, tmp_path):
    pngs = sorted(attacked.glob("*.adv.png"))
    arguments = ["--flip", "cat", "--keep", "rest", "--checkpoint", tiny, "--device", "cpu", "--json"]
    code, text, err = cli("jpeg-defend", *pngs, *arguments, "--out", tmp_path / "hand")
    assert (code, err.count("no control")) == (0, 1)
    by_hand = json.loads(text)["qualities"]
    code, text, _ = cli("jpeg-defend", attacked, "--json", "--device", "cpu", "--out", tmp_path / "report")
    for mine, other in zip(by_hand, json.loads(text)["qualities"], strict=True):
        assert mine["recovered"] == other["recovered"]
        assert mine["damaged"] == other["damaged"]
        assert mine["clean_damaged"] == {"labels": 0, "total": 0}


def test_a_png_that_is_gone_or_a_photo_that_changed_is_named_and_the_rest_goes_on(cli, attacked, tmp_path):
    (attacked / "0.adv.png").write_bytes(b"nonsense")
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photos" / "1.png")
    code, _, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 1
    assert "0.adv.png" in err
    assert "the photos of 1 of 3 PNGs are missing or changed" in err
    row = json.loads((attacked / "jpeg-defence.json").read_text())["qualities"][0]
    assert (row["images"], row["clean_images"]) == (2, 1)


def test_without_the_photos_there_is_no_control_and_that_is_said(cli, attacked, tmp_path):
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    code, _, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 0
    assert "3 of 3 PNGs" in err
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
def test_what_cannot_be_defended_is_refused_in_a_line(cli, attacked, tiny, arguments, message):
    from mlperturb.model.checkpoints import bundled_checkpoint

    names = {"out": attacked, "tiny": tiny, "other": bundled_checkpoint()}
    code, _, err = cli("jpeg-defend", *(text.format(**names) for text in arguments), "--device", "cpu")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_report_names_no_file_elsewhere(cli, attacked):
    path = attacked / "report.json"
    report = json.loads(path.read_text())
    report["images"][0]["files"]["adversarial"] = "../photos/0.png"
    path.write_text(json.dumps(report))
    for command in (("jpeg-defend", attacked, "--device", "cpu"), ("figures", attacked), ("gallery", attacked)):
        code, _, err = cli(*command)
        assert code in (1, 2)
        assert "is not the name of a file beside its report" in err
    path.write_text("{}")
    with pytest.raises(UsageError, match="expected a file of schema"):
        read_report(attacked)


def test_photos_are_found_where_they_lie_now_and_by_their_content(cli, attacked, tmp_path):
    """Find photos after a start elsewhere, beside the report, and with --photos; not another photo of the same name."""

    def control(*more: object) -> int:
        code, _, err = cli("jpeg-defend", attacked, "--quality", 50, "--device", "cpu", "--overwrite", *more)
        assert code == 0, err
        return json.loads((attacked / "jpeg-defence.json").read_text())["qualities"][0]["clean_images"]

    path = attacked / "report.json"
    text = path.read_text().replace(f"{tmp_path}/photos", "photos")
    path.write_text(text.replace(f'"cwd": "{Path.cwd()}"', f'"cwd": "{tmp_path}"'))
    assert control() == 3
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert control() == 0
    assert control("--photos", tmp_path / "moved") == 3
    arguments = ("--flip", "cat", "--checkpoint", json.loads(text)["classifier"]["checkpoint"])
    assert control(*arguments, "--photos", tmp_path / "moved", "--out", attacked) == 3
    for photo in (tmp_path / "moved").iterdir():
        photo.rename(attacked / photo.name)
    assert control() == 3
    Image.fromarray(TINY_PIXELS).save(attacked / "1.png")
    assert control() == 2


def test_a_report_elsewhere_still_finds_its_pngs(cli, attacked, tmp_path):
    photo, report = tmp_path / "photos" / "0.png", tmp_path / "reports" / "r.json"
    checkpoint = json.loads((attacked / "report.json").read_text())["classifier"]["checkpoint"]
    start = ("attack", photo, "--flip", "cat", "--budget", "fast", "--checkpoint", checkpoint, "--device", "cpu")
    assert cli(*start, "--out", tmp_path / "o", "--report", report)[0] == 0
    assert cli("jpeg-defend", report, "--quality", 50, "--device", "cpu")[0] == 0
    assert cli("gallery", report)[0] == 0
    assert "adversarial PNG" in (report.parent / "index.html").read_text()
    assert cli("figures", report, "--kind", "case")[0] == 0


def test_folders_given_by_hand_count_adversarial_pngs_alone_and_each_once(cli, attacked, tiny, tmp_path):
    assert cli("jpeg-defend", attacked, "--quality", 50, "--device", "cpu")[0] == 0  # leaves figures there
    code, text, _ = cli("jpeg-defend", attacked, attacked, "--flip", "cat", "--checkpoint", tiny, "--json", "--device",
                        "cpu", "--out", tmp_path / "hand")  # fmt: skip
    assert code == 0
    assert json.loads(text)["qualities"][0]["images"] == 3
    code, text, _ = cli("jpeg-defend", attacked, attacked, "--json", "--device", "cpu", "--out", tmp_path / "twice")
    result = json.loads(text)
    assert result["qualities"][0]["images"] == 3
    assert "clean photos" in result["best"]["criterion"]


def test_settings_that_score_the_same_are_named(cli, attacked):
    _, text, _ = cli("jpeg-defend", attacked, "--quality", "94,95", "--json", "--device", "cpu")
    result = json.loads(text)
    scores = [row["score"] for row in result["qualities"]]
    assert result["best"]["equals"] == (["jpeg 94"] if scores[0] == scores[1] else [])


def test_outputs_are_not_replaced_without_being_asked(cli, attacked):
    (attacked / "jpeg-curve.png").write_bytes(b"mine")
    code, _, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 2
    assert "jpeg-curve.png exists already" in err
    assert (attacked / "jpeg-curve.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report["images"][0].update(truth={}),
        lambda report: report["images"][0].update(truth=None),
        lambda report: report["images"][0].update(flip=["nothing"]),
        lambda report: report["images"][0].update(flip=[5]),
        lambda report: report["images"][0]["files"].update(adversarial="a\0b"),
        lambda report: report["images"][0].update(source="x" * 5000),
        lambda report: report["classifier"].update(checkpoint="x" * 5000),
        lambda report: report["classifier"].update(sha256=5),
        lambda report: report["settings"].update(cwd=5),
        lambda report: report.update(images=[[]]),
    ],
)
def test_a_report_edited_by_hand_never_ends_in_a_traceback(cli, attacked, damage):
    path = attacked / "report.json"
    report = json.loads(path.read_text())
    damage(report)
    path.write_text(json.dumps(report))
    for command in (("jpeg-defend", attacked, "--device", "cpu"), ("figures", attacked), ("gallery", attacked)):
        code, _, err = cli(*command)
        assert code in (0, 1, 2)
        assert "Traceback" not in err
        assert code == 0 or err.startswith("mlperturb: ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": "mlperturb.report/1", "settings": NaN}', "5", "\xff"])
def test_what_is_no_report_is_refused(cli, tmp_path, text):
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    for command in ("jpeg-defend", "figures", "gallery"):
        code, _, err = cli(command, tmp_path)
        assert code == 2
        assert err.count("\n") == 1
