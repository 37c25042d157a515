from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb.errors import UsageError
from mlperturb.experiment.defence import SCHEMA, Attacked, Views, find_attacked, sweep
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.readers import DEFAULT_READERS, parse_readers
from mlperturb.model.views import read_logits
from mlperturb.photos.images import read_photo
from mlperturb.photos.purify import parse_purifications
from mlperturb.run.report import read_report
from mlperturb.show.tables import best_line, defence_table

QUALITIES = ("jpeg:20", "jpeg:95", "median:3")
READERS = parse_readers(DEFAULT_READERS)


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
    """Return the decisions in every reader, (R, L)."""
    rows = [read_logits(classifier, rgb, reader)[0] >= classifier.boundary for reader in READERS]
    return torch.stack(rows).numpy()


def test_counts_are_those_of_predicting_each_picture_by_itself(attacked, tiny):
    classifier, _ = load_checkpoint(tiny, device="cpu")
    purifications = parse_purifications(QUALITIES)
    result = sweep(classifier, find_attacked(*read_report(attacked)), purifications, READERS)
    assert result["schema"] == SCHEMA
    assert result["readers"] == [reader.name for reader in READERS]
    cat = np.array([label == "cat" for label in TINY_LABELS])
    for row, purification in zip(result["qualities"], purifications, strict=True):
        counts = np.zeros((len(READERS) + 1, 8), dtype=int)
        for image in read_report(attacked)[0]["images"]:
            clean = np.array(Image.open(image["source"]))
            png = np.array(Image.open(attacked / image["files"]["adversarial"]))
            views = [decide(classifier, rgb) for rgb in (clean, png)]
            truth = views[0][0]
            views += [decide(classifier, purification.apply(rgb)[0]) for rgb in (png, clean)]
            for number, rows in enumerate([slice(None), *(slice(one, one + 1) for one in range(len(READERS)))]):
                before, _, back, control = ((view[rows] == truth).all(0) for view in views)
                gone, stays = ((view[rows] != truth).all(0) for view in views[1:3])
                kept = ~cat & (views[1][rows] == truth).all(0)
                counts[number] += [
                    (cat & gone & back).sum(), (cat & gone).sum(), (kept & ~back).sum(), kept.sum(),
                    (cat & gone).any() and back.all(), (~control & before).sum(), before.sum(),
                    (np.where(cat, stays, back)).all(),
                ]  # fmt: skip
        assert row["images"] == row["flipped_images"] == 3
        for one, part in zip(counts.tolist(), [row, *row["readers"].values()], strict=True):
            assert part["recovered"] == {"labels": one[0], "total": one[1]}
            assert part["damaged"] == {"labels": one[2], "total": one[3]}
            assert part["restored_images"] == one[4]
            assert part["clean_damaged"] == {"labels": one[5], "total": one[6]}
            assert (part["successes"] if "successes" in part else part["plain"]["successes"]) == one[7]
        assert list(row["readers"]) == result["readers"]
        assert (row["bytes"] is None) == (row["defence"] == "median")
    assert any(row["recovered"]["labels"] for row in result["qualities"])


@pytest.fixture
def seen(monkeypatch, tiny):
    """Return a function that sweeps views whose logits are given, of two labels and two readers, A the first."""
    classifier, _ = load_checkpoint(tiny, device="cpu")
    classifier.labels, classifier.boundary = ("a", "b"), torch.zeros(2)

    def run(*photos: tuple[list[list[int]], list[list[int]]]):
        """Sweep photos that have both labels, each given by the logits of its PNG and of the purified PNG."""
        tensors = [[torch.tensor(logits).float() for logits in photo] for photo in photos]
        asked = torch.tensor([True, False]), torch.tensor([False, True])
        views = iter(
            [Views(torch.ones(2).bool(), asked, png, torch.ones(2, 2), [after], [torch.ones(2, 2)], [9, 9])
             for png, after in tensors]
        )  # fmt: skip
        monkeypatch.setattr("mlperturb.experiment.defence._look", lambda *_: next(views))
        photo = Attacked(Path("a.adv.png"), Path("a.png"), ("a",), ("b",))
        return sweep(classifier, [photo] * len(photos), parse_purifications(["jpeg:50"]), READERS[:2])

    return run


FLIPPED = [[-1, 1], [-1, 1]]


def test_a_label_is_back_or_kept_only_in_every_reader(seen):
    row = seen((FLIPPED, [[1, 1], [-1, 1]]))["qualities"][0]
    assert (row["recovered"], row["restored_images"]) == ({"labels": 0, "total": 1}, 0)
    assert row["plain"]["successes"] == 0  # it does not hold in the first reader
    assert [one["recovered"]["labels"] for one in row["readers"].values()] == [1, 0]
    assert [one["successes"] for one in row["readers"].values()] == [0, 1]
    row = seen((FLIPPED, [[1, 1], [1, -1]]))["qualities"][0]
    assert (row["recovered"], row["restored_images"]) == ({"labels": 1, "total": 1}, 0)
    assert row["damaged"] == {"labels": 1, "total": 1}
    assert [one["damaged"]["labels"] for one in row["readers"].values()] == [0, 1]
    row = seen(([[-1, 1], [1, -1]], [[1, 1], [1, 1]]))["qualities"][0]  # in one reader nothing flipped, b was lost
    assert row["recovered"] == row["damaged"] == {"labels": 0, "total": 0}
    assert (row["flipped_images"], row["restored_images"]) == (0, 0)


def test_restored_is_a_share_of_the_photos_on_which_a_label_was_flipped(seen):
    result = seen((FLIPPED, [[1, 1], [1, 1]]), ([[1, 1], [1, 1]], [[1, 1], [1, 1]]))
    row = result["qualities"][0]
    assert (row["images"], row["flipped_images"], row["restored_images"]) == (2, 1, 1)
    result["qualities"][0]["bytes"] = None
    console = Console(record=True, width=100)
    console.print(defence_table(result))
    assert console.export_text().splitlines()[1].split()[2:8] == ["1/1", "100%", "0/2", "0%", "1/1", "100%"]


@pytest.mark.parametrize(
    ("after", "line"),
    [
        ([[1, 1], [1, 1]], "best: jpeg 50 (1.000: "),
        (FLIPPED, "best: none, no flipped label came back; decided in float, pillow"),
        ([[1, 1], [-1, 1]], "best: none, no flipped label came back"),
    ],
)
def test_no_setting_is_best_if_nothing_came_back(seen, after, line):
    assert best_line(seen((FLIPPED, after))).plain.startswith(line)


def test_without_a_flipped_label_nothing_can_come_back(seen):
    result = seen(([[1, 1], [1, 1]], [[1, 1], [1, 1]]))
    assert (result["best"], result["qualities"][0]["score"]) == (None, None)
    assert best_line(result).plain.startswith("best: none, no label was flipped")


def test_a_defence_that_does_nothing_is_not_best_and_is_drawn_all_the_same(cli, attacked):
    code, text, err = cli("jpeg-defend", attacked, "--defence", "bits:8", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "best: none, no flipped label came back; decided in float, pillow, torchvision" in text
    assert json.loads((attacked / "jpeg-defence.json").read_text())["best"] is None
    assert cli("figures", attacked, "--kind", "jpeg")[0] == 0


def defended(cli, *arguments: object) -> dict:
    code, text, err = cli("jpeg-defend", *arguments, "--quality", 50, "--json", "--device", "cpu", "--overwrite")
    assert code == 0, err
    return json.loads(text)


def to_version_1(folder: Path) -> None:
    """Rewrite a report as version 1 had it: no readers, and photos that were as asked already as successes."""
    path = folder / "report.json"
    report = json.loads(path.read_text())
    report["schema"] = "mlperturb.report/1"
    del report["settings"]["readers"], report["summary"]["readers"], report["summary"]["unchanged"]
    for image in report["images"]:
        del image["readers"]
        image["status"] = "success" if image["status"] == "unchanged" else image["status"]
    path.write_text(json.dumps(report))


def test_the_readers_are_those_of_the_report_or_those_named(cli, attacked, tmp_path):
    assert defended(cli, attacked)["readers"] == ["float", "pillow", "torchvision"]
    named = defended(cli, attacked, "--reader", "pillow:bicubic", "--reader", "float")
    assert named["readers"] == list(named["qualities"][0]["readers"]) == ["pillow:bicubic", "float"]
    assert list(named["images"][0]["readers"]) == ["pillow:bicubic", "float"]
    assert named["images"][0]["probabilities"] == named["images"][0]["readers"]["pillow:bicubic"]
    earlier = tmp_path / "earlier"
    shutil.copytree(attacked, earlier)
    to_version_1(earlier)
    assert defended(cli, earlier)["readers"] == ["float"]
    code, _, err = cli("jpeg-defend", attacked, earlier, "--device", "cpu", "--overwrite")
    assert code == 2
    assert "expected reports on the same readers, got float in" in err
    assert "give --reader" in err
    assert defended(cli, attacked, earlier, "--reader", "float")["qualities"][0]["images"] == 6
    code, _, err = cli("jpeg-defend", attacked, "--reader", "skimage", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown reader 'skimage'" in err


@pytest.mark.parametrize("version", [1, 2])
def test_photos_that_were_as_asked_already_are_left_out(cli, tiny, tmp_path, version):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.fromarray(TINY_PIXELS).save(photos / "cat.png")
    Image.fromarray(255 - TINY_PIXELS).save(photos / "other.png")
    start = ("attack", photos, "--remove", "cat", "--keep", "rest", "--budget", "fast", "--checkpoint", tiny)
    assert cli(*start, "--out", out, "--device", "cpu")[0] == 0
    statuses = {Path(image["source"]).stem: image["status"] for image in read_report(out)[0]["images"]}
    assert statuses == {"cat": "success", "other": "unchanged"}
    if version == 1:
        to_version_1(out)
    code, text, err = cli("jpeg-defend", out, "--quality", 50, "--json", "--device", "cpu")
    assert (code, err) == (
        0,
        "mlperturb: 1 of 2 photos is as asked already, not attacked, and left out\n",
    )
    result = json.loads(text)
    row = result["qualities"][0]
    assert [Path(image["source"]).stem for image in result["images"]] == ["cat"]
    assert (row["images"], row["clean_images"]) == (1, 1)
    assert (row["recovered"]["total"], row["damaged"]["total"], row["clean_damaged"]["total"]) == (1, 3, 4)
    (photos / "cat.png").unlink()
    assert cli(*start, "--out", tmp_path / "none", "--device", "cpu")[0] == 0
    if version == 1:
        to_version_1(tmp_path / "none")
    code, _, err = cli("jpeg-defend", tmp_path / "none", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "every photo was as asked already" in err


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
    assert "1 of 3 clean photos is missing or changed" in err
    row = json.loads((attacked / "jpeg-defence.json").read_text())["qualities"][0]
    assert (row["images"], row["clean_images"]) == (2, 1)


def test_without_the_photos_there_is_no_control_and_that_is_said(cli, attacked, tmp_path):
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    code, _, err = cli("jpeg-defend", attacked, "--device", "cpu")
    assert code == 0
    assert "3 of 3 clean photos" in err
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
