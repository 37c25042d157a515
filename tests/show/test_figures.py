from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.show.figures import attacked_labels, draw_case, draw_curve, draw_histogram


@pytest.fixture
def report(cli, tiny, tmp_path):
    """Attack two photos, one with a hostile name; return the output folder."""
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(("a", "$\\frac{x}$ & <b>")):
        Image.fromarray(np.roll(TINY_PIXELS, number, 1)).save(tmp_path / "photos" / f"{name}.png")
    code, _, err = cli("attack", tmp_path / "photos", "--flip", "cat,dog", "--keep", "rest", "--budget", "fast",
                       "--checkpoint", tiny, "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert code == 0, err
    return tmp_path / "out"


@pytest.mark.parametrize("form", ["png", "pdf", "svg"])
def test_every_kind_is_drawn_in_every_format(cli, report, form):
    assert cli("jpeg-defend", report, "--quality", "50,90", "--device", "cpu")[0] == 0
    code, _, err = cli("figures", report, "--format", form)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (report / "figures").iterdir())
    cases = [f"case---frac-x------b-.{form}", f"case-a.{form}"]
    kinds = [f"histogram-cat.{form}", f"histogram-dog.{form}", f"jpeg-curve.{form}", f"jpeg-histogram.{form}"]
    assert names == sorted(cases + kinds)
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[form]
    assert all(path.read_bytes().startswith(start) for path in (report / "figures").iterdir())


def test_a_case_study_shows_the_adversarial_photo_and_the_flipped_label_first(report):
    read = json.loads((report / "report.json").read_text())
    image = next(image for image in read["images"] if image["source"].endswith("a.png"))
    figure = draw_case(read, image, report)
    pictures = [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()]
    assert np.array_equal(pictures[1], np.array(Image.open(report / "a.adv.png")))
    bars = figure.axes[-1]
    assert sorted(tick.get_text() for tick in bars.get_yticklabels()[:2]) == sorted(image["flip"])
    widths = [bar.get_width() for bar in bars.patches]
    labels = [tick.get_text() for tick in bars.get_yticklabels()]
    assert widths == pytest.approx(
        [image["probabilities"][when][label] for when in ("before", "after") for label in labels]
    )


def test_a_histogram_counts_every_image_once_clean_and_once_a_report(report):
    read = json.loads((report / "report.json").read_text())
    assert attacked_labels([read]) == ["cat", "dog"]
    figure = draw_histogram([read, read], "cat")
    outlines = [patch.get_xy() for patch in figure.axes[0].patches]
    assert len(outlines) == 3  # clean, and two reports
    for corners in outlines:  # each 1/20 wide: the area under it counts the images
        x, y = corners[:, 0], corners[:, 1]
        area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
        assert area * 20 == pytest.approx(2)


def test_a_label_that_was_not_attacked_is_refused(cli, report):
    code, _, err = cli("figures", report, "--kind", "histogram", "--label", "hen")
    assert code == 2
    assert "'hen'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "pie"], "unknown --kind"),
        (["--format", "gif"], "unknown --format"),
        (["--kind", "jpeg"], "run `mlperturb jpeg-defend` first"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_line(cli, report, arguments, message):
    code, _, err = cli("figures", report, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_picture_that_is_gone_is_named_and_the_rest_is_drawn(cli, report):
    (report / "a.adv.png").unlink()
    code, _, err = cli("figures", report, "--kind", "case")
    assert code == 1
    assert "a.adv.png" in err
    assert len(list((report / "figures").iterdir())) == 1


def test_the_curve_has_a_point_for_each_quality():
    rows = [
        {"defence": "jpeg", "quality": quality, "images": 1, "restored_images": 0, 
         **{count: {"labels": quality // 50, "total": 2} for count in ("recovered", "damaged", "clean_damaged")}}
        for quality in (30, 60, 90)
    ]  # fmt: skip
    figure = draw_curve({"qualities": rows})
    assert list(figure.axes[0].lines[0].get_xdata()) == [30, 60, 90]
    assert list(figure.axes[0].lines[0].get_ydata()) == [0, 0.5, 0.5]


def test_names_that_come_out_alike_or_too_long_get_a_file_each(cli, report):
    path = report / "report.json"
    path.write_text(path.read_text().replace('"cat"', '"c++"').replace('"dog"', '"c--"').replace("ml-ddn", "../../x"))
    code, text, err = cli("figures", report, "--kind", "histogram", "--label", "c++,c--")
    assert (code, err) == (0, "")
    assert "2 figures" in text
    assert len(list((report / "figures").iterdir())) == 2
    code, _, err = cli("figures", report, report, "--kind", "case", "--out", report / "both")
    assert (code, err) == (0, "")
    assert len(list((report / "both").iterdir())) == 4


def test_nothing_is_drawn_if_a_name_is_taken(cli, report):
    assert cli("figures", report, "--kind", "histogram")[0] == 0
    code, _, err = cli("figures", report)
    assert code == 2
    assert "--overwrite" in err
    assert sorted(path.name for path in (report / "figures").iterdir()) == ["histogram-cat.png", "histogram-dog.png"]


def test_a_folder_of_jpeg_defend_alone_is_drawn(cli, report, tmp_path):
    assert cli("jpeg-defend", report, "--quality", 50, "--device", "cpu", "--out", tmp_path / "jd")[0] == 0
    assert cli("figures", tmp_path / "jd")[0] == 0
    (tmp_path / "jd" / "jpeg-defence.json").write_text("{")
    code, _, err = cli("figures", tmp_path / "jd", "--overwrite")
    assert code == 2
    assert err.count("\n") == 1


def test_a_photo_that_was_as_asked_has_no_case_study(cli, tiny, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(TINY_PIXELS).save(photos / "cat.png")
    Image.fromarray(255 - TINY_PIXELS).save(photos / "other.png")
    start = ("attack", photos, "--remove", "cat", "--budget", "fast", "--checkpoint", tiny, "--device", "cpu")
    assert cli(*start, "--out", tmp_path / "out")[0] == 0
    statuses = [image["status"] for image in json.loads((tmp_path / "out" / "report.json").read_text())["images"]]
    assert statuses == ["success", "unchanged"]
    assert cli("figures", tmp_path / "out", "--kind", "case")[0] == 0
    assert [path.name for path in (tmp_path / "out" / "figures").iterdir()] == ["case-cat.png"]


def test_a_case_study_keeps_every_word_inside_and_its_titles_in_a_row(report):
    read = json.loads((report / "report.json").read_text())
    image = next(image for image in read["images"] if image["source"].endswith("a.png"))
    labels = [f"a label of a long name {number}" for number in range(30)]
    read["classifier"] |= {"labels": labels, "thresholds": [0.5] * 30}
    values = dict.fromkeys(labels, 0.9)
    image |= {"truth": dict.fromkeys(labels, True), "flip": labels[:12], "keep": labels[12:],
              "probabilities": {"before": values, "after": values, "float": None}}  # fmt: skip
    figure = draw_case(read, image, report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    bars = figure.axes[-1]
    words = [*figure.texts, *bars.get_yticklabels(), bars.xaxis.label, bars.get_legend()]
    for word in words:
        box = word.get_window_extent(canvas.get_renderer())
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
    lows = {round(title.get_window_extent(canvas.get_renderer()).y0) for title in figure.texts}
    assert max(lows) - min(lows) <= 3
    assert f"RMSD {image['distortion']['rmsd']:.2f}" in figure.texts[2].get_text()
    assert bars.get_legend().get_title().get_text() == "21 more labels not shown"
    red, green, blue, _ = bars.patches[-1].get_facecolor()  # of a label of A
    assert red > 0.7 > 0.3 > max(green, blue)
    widths = [axes.get_window_extent().width / figure.dpi for axes in figure.axes[:3]]
    assert min(widths) > 2  # inches, of a page of 7
