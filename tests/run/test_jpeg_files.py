"""Whole runs that write JPEGs: they hold as read back, and nothing of the photo's file changes but what has to."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.models import TINY_PIXELS

import mlperturb.run.verdict
from mlperturb.photos.images import read_photo
from mlperturb.photos.jpeg import read_jpeg

pytest.importorskip("jpeglib")

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def attack(cli, tiny, tmp_path):
    """Attack photos; return the report."""

    def run(*arguments, out=tmp_path / "out", code=0):
        got, _, err = cli("attack", *arguments, "--flip", "cat", "--checkpoint", tiny, "--device", "cpu",
                          "--budget", "fast", "--out", out)  # fmt: skip
        assert got == code, err
        return json.loads((out / "report.json").read_text()) if code == 0 else err

    return run


KINDS = {
    **{ratio: {"subsampling": ratio} for ratio in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": {"progressive": True},
    "grey": {},
    "turned": {"orientation": 6},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_comes_back_as_a_jpeg_that_holds(attack, cli, save_photo, tiny, tmp_path, kind):
    options, exif = dict(KINDS[kind]), Image.Exif()
    exif[0x0112], exif[0x010F] = options.pop("orientation", 1), "a maker"
    image = Image.fromarray(TINY_PIXELS).convert("L" if kind == "grey" else "RGB")
    path = save_photo("photo.jpg", image, quality=90, optimize=True, exif=exif, **options)
    (record,) = attack(path, "--format", "same")["images"]
    written = tmp_path / "out" / record["files"]["adversarial"]
    assert record["status"] == "success"
    assert written.name == "photo.adv.jpg"
    assert record["notes"] == []
    predicted = json.loads(cli("predict", path, written, "--checkpoint", tiny, "--json")[1])["images"]
    assert [("cat" in image["labels"]) for image in predicted] in ([True, False], [False, True])
    before, after = read_jpeg(path.read_bytes()), read_jpeg(written.read_bytes())
    assert before is not None
    assert after is not None
    assert (before.sampling, before.orientation, before.size) == (after.sampling, after.orientation, after.size)
    assert all(np.array_equal(one, other) for one, other in zip(before.tables, after.tables, strict=True))
    changed = sum(int((one != other).sum()) for one, other in zip(before.planes, after.planes, strict=True))
    assert 0 < changed < 0.2 * sum(plane.size for plane in before.planes)
    moved = read_photo(written).rgb.astype(int) - read_photo(path).rgb
    assert record["distortion"]["rmsd"] == pytest.approx(float(np.sqrt((moved**2).mean())))
    with Image.open(written) as opened:
        assert opened.mode == image.mode
        assert opened.getexif().get(0x010F) is None


def test_a_run_of_several_formats_goes_on_and_every_command_reads_it(attack, cli, save_photo, tmp_path):
    save_photo("in/a.jpg", Image.fromarray(TINY_PIXELS), quality=90, icc_profile=PROFILE)
    save_photo("in/b.png", Image.fromarray(TINY_PIXELS[:, ::-1].copy()))
    save_photo("in/c.webp", Image.fromarray(TINY_PIXELS[::-1].copy()), lossless=True)
    images = attack(tmp_path / "in", "--format", "same", "--html")["images"]
    assert [image["files"]["adversarial"] for image in images] == ["a.adv.jpg", "b.adv.png", "c.adv.webp"]
    assert {image["status"] for image in images} == {"success"}
    out = tmp_path / "out"
    assert read_photo(out / "a.adv.jpg").beside.profile == PROFILE
    before = (out / "a.adv.jpg").read_bytes()
    (out / "a.adv.jpg").unlink()
    again = attack(tmp_path / "in", "--format", "same", "--html")["images"]
    assert (out / "a.adv.jpg").read_bytes() == before  # in the same batch as before
    assert [{**one, "cost": 0} for one in again] == [{**one, "cost": 0} for one in images]
    assert cli("gallery", out, "--overwrite")[0] == 0
    assert cli("figures", out)[0] == 0
    assert cli("jpeg-defend", out, "--quality", "50")[0] == 0
    assert "a.adv.jpg" in (out / "index.html").read_text()


def test_photos_in_other_formats_become_jpegs_of_a_quality(attack, save_photo, tmp_path):
    path = save_photo("photo.png", Image.fromarray(TINY_PIXELS))
    (record,) = attack(path, "--format", "jpeg:90")["images"]
    assert record["status"] == "success"
    assert record["notes"] == ["encoded as a JPEG of quality 90 before the attack"]
    moved = read_photo(tmp_path / "out" / "photo.adv.jpg").rgb.astype(int) - TINY_PIXELS
    assert record["distortion"]["rmsd"] == pytest.approx(float(np.sqrt((moved**2).mean())))


def test_limits_of_passes_and_rmsd_hold_and_a_region_is_kept(attack, save_photo, tmp_path):
    path = save_photo("photo.jpg", Image.fromarray(TINY_PIXELS), quality=90)
    (record,) = attack(path, "--format", "jpeg", "--passes", 30, "--max-rmsd", 40, "--region", "8,8,24,20")["images"]
    assert record["cost"]["forward"] + record["cost"]["backward"] <= 30
    written = tmp_path / "out" / "photo.adv.jpg"
    if written.exists():
        moved = (read_photo(written).rgb != read_photo(path).rgb).any(2)
        moved[8:28, 8:32] = False
        assert not moved.any()
        assert record["distortion"]["rmsd"] <= 40


def test_a_photo_that_is_as_asked_stays_the_file_it_was(cli, save_photo, tiny, tmp_path):
    path = save_photo("photo.jpg", Image.fromarray(TINY_PIXELS), quality=90)
    seen = json.loads(cli("predict", path, "--checkpoint", tiny, "--json")[1])["images"][0]["labels"]
    wanted = ("--add" if "cat" in seen else "--remove", "cat")
    assert cli("attack", path, "--format", "jpeg", *wanted, "--checkpoint", tiny, "--out", tmp_path / "out")[0] == 0
    (record,) = json.loads((tmp_path / "out" / "report.json").read_text())["images"]
    assert record["status"] == "unchanged"
    assert record["distortion"]["linf"] == 0


def test_a_decoder_that_sees_other_pixels_is_judged_too(attack, save_photo, monkeypatch):
    path = save_photo("photo.jpg", Image.fromarray(TINY_PIXELS), quality=90)
    clean = read_photo(path).rgb
    monkeypatch.setattr(mlperturb.run.verdict, "decode_elsewhere", lambda _: {"another": clean})
    (record,) = attack(path, "--format", "jpeg")["images"]
    assert record["status"] == "failed"
    assert record["files"]["adversarial"] is None
    assert record["notes"] == ["another decodes other pixels than Pillow: judged in both"]


@pytest.mark.parametrize(("more", "words"), [
    (("--method", "ml-cw"), "expected --method ml-ddn"),
    (("--rounding", "after"), "expected --method ml-ddn"),
    (("--max-linf", "4"), "limit --max-rmsd"),
    (("--format", "jpeg:0"), "a quality of 1 to 100"),
    (("--format", "jpeg:x"), "a quality of 1 to 100"),
    (("--format", "gif"), "unknown --format 'gif'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(attack, save_photo, tmp_path, more, words):
    path = save_photo("photo.jpg", Image.fromarray(TINY_PIXELS))
    assert words in attack(path, "--format", "jpeg", *more, code=2)
    assert not (tmp_path / "out").exists()


def test_without_jpeglib_one_line_says_what_to_install(attack, save_photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "jpeglib", None)
    path = save_photo("photo.jpg", Image.fromarray(TINY_PIXELS))
    assert "pip install 'mlperturb[jpeg]'" in attack(path, "--format", "same", code=2)
    assert Path(path).is_file()
