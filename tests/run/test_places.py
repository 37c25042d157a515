"""Whole runs: what of a photo's file is kept, in which format, in which folder; runs that grow and shrink."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.models import TINY_PIXELS

import mlperturb.run.search
from mlperturb.photos.images import read_photo
from mlperturb.run.jobs import plan_outputs

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture
def attack(cli, tiny, tmp_path):
    """Attack photos; return the report."""

    def run(*arguments, flip="cat", out=tmp_path / "out", code=0):
        got, _, err = cli("attack", *arguments, "--flip", flip, "--budget", "fast", "--checkpoint", tiny, "--device",
                          "cpu", "--out", out)  # fmt: skip
        assert got == code, err
        return json.loads((out / "report.json").read_text())

    return run


def test_the_profile_stays_and_metadata_goes_unless_kept(attack, save_photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker"
    exif.get_ifd(0x8825)[1] = "N"
    path = save_photo("photo.jpg", Image.fromarray(TINY_PIXELS), exif=exif, icc_profile=PROFILE, quality=95)
    for name, more in (("out", ()), ("kept", ("--keep-metadata",))):
        attack(path, *more, out=tmp_path / name)
        with Image.open(tmp_path / name / "photo.adv.png") as written:
            assert written.info["icc_profile"] == PROFILE
            assert written.size == TINY_PIXELS.shape[:2]  # upright
            assert written.getexif().get(0x0112, 1) == 1
            assert (written.getexif().get(0x010F) == "a maker") == bool(more)
            assert bool(written.getexif().get_ifd(0x8825)) == bool(more)


@pytest.mark.parametrize("method", ["ml-ddn", "ml-cw", "fgs", "fg", "ml-dp", "rank-1"])
def test_a_grey_photo_gives_a_grey_file_that_holds(attack, save_photo, tmp_path, method):
    path = save_photo("photo.png", Image.fromarray(TINY_PIXELS).convert("L"))
    (image,) = attack(path, "--method", method)["images"]
    with Image.open(tmp_path / "out" / "photo.adv.png") as written:
        assert written.mode == "L"
        assert np.abs(np.array(written).astype(int) - np.array(Image.open(path))).max() == image["distortion"]["linf"]
    assert image["distortion"]["linf"] > 0
    assert image["status"] == "success" or method in ("fgs", "rank-1")


@pytest.mark.parametrize("method", ["ml-ddn", "ml-cw", "fgs", "ml-dp"])
@pytest.mark.parametrize("end", ["png", "webp"])
def test_alpha_and_hidden_pixels_stay_byte_for_byte(attack, save_photo, tmp_path, method, end):
    alpha = np.full(TINY_PIXELS.shape[:2], 255, np.uint8)
    alpha[:, :12], alpha[:4] = 0, 7
    path = save_photo("photo.png", Image.fromarray(np.dstack([TINY_PIXELS, alpha])))
    (image,) = attack(path, "--method", method, "--format", end)["images"]
    written = read_photo(tmp_path / "out" / image["files"]["adversarial"])
    assert np.array_equal(written.alpha, alpha)
    hidden = alpha == 0
    assert np.array_equal(written.rgb[hidden], TINY_PIXELS[hidden])
    assert (written.rgb[~hidden] != TINY_PIXELS[~hidden]).any()


def test_same_gives_each_photo_its_own_format_and_every_command_reads_it(attack, cli, save_photo, tiny, tmp_path):
    save_photo("in/a.webp", Image.fromarray(TINY_PIXELS), lossless=True)
    save_photo("in/b.png", Image.fromarray(TINY_PIXELS[:, ::-1].copy()))
    images = attack(tmp_path / "in", "--format", "same", "--html", "--keep", "rest")["images"]
    assert [image["files"]["adversarial"] for image in images] == ["a.adv.webp", "b.adv.png"]
    assert {image["status"] for image in images} == {"success"}
    with Image.open(tmp_path / "out" / "a.adv.webp") as written:
        assert written.format == "WEBP"
        assert np.array_equal(np.array(written), read_photo(tmp_path / "out" / "a.adv.webp").rgb)
    assert "a.adv.webp" in (tmp_path / "out" / "index.html").read_text()
    assert attack(tmp_path / "in", "--format", "same", "--html", "--keep", "rest")["images"] == images  # goes on
    out = tmp_path / "out"
    assert cli("predict", out / "a.adv.webp", "--checkpoint", tiny)[0] == 0
    assert cli("gallery", out, "--overwrite")[0] == 0
    assert cli("figures", out)[0] == 0
    assert (out / "figures" / "case-a.png").is_file()
    assert cli("jpeg-defend", out, "--quality", "50")[0] == 0
    code, stdout, err = cli("jpeg-defend", out, "--flip", "cat", "--photos", tmp_path / "in", "--quality", "50",
                            "--checkpoint", tiny, "--json", "--out", tmp_path / "hand")  # fmt: skip
    assert code == 0, err
    assert [Path(image["source"]).name for image in json.loads(stdout)["images"]] == ["a.webp", "b.png"]
    assert cli("attack", tmp_path / "in", "--format", "png", "--flip", "cat", "--out", out)[0] == 2  # another format


def test_names_depend_on_the_folder_alone():
    photos = [
        Path(name) for name in ("in/a.png", "in/x/a.png", "in/x/y/a.jpg", "in/x/y/A.gif", "more/x/a.png", "b.png")
    ]
    names = [job.adversarial for job in plan_outputs(photos, [Path("in"), Path("more")])]
    assert names == [
        "a.adv.png",
        "x/a.adv.png",
        "x/y/a.jpg.adv.png",
        "x/y/A.gif.adv.png",
        "more/x/a.adv.png",
        "b.adv.png",
    ]
    assert [job.map for job in plan_outputs(photos)] == [
        job.adversarial.replace(".adv.", ".map.") for job in plan_outputs(photos)
    ]
    assert [job.adversarial for job in plan_outputs(photos[1:2], [Path("in")])] == names[1:2]
    assert [job.adversarial for job in plan_outputs([Path("../a.png")], [Path()])] == ["a.adv.png"]  # not above `out`


def write_tree(folder: Path, numbers: range) -> None:
    """Write a photo for each number, ten to a folder, with the same ten names in every folder."""
    for number in numbers:
        path = folder / f"day-{number // 10}" / f"IMG_{number % 10}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(TINY_PIXELS, number, 1)).save(path)


def test_a_tree_of_200_photos_with_repeated_names_runs_grows_shrinks_and_goes_on(attack, cli, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    search, batches = mlperturb.run.search.search, []

    def counted(classifier, photos, *more):
        batches.append(len(photos))
        return search(classifier, photos, *more)

    monkeypatch.setattr(mlperturb.run.search, "search", counted)
    write_tree(folder, range(180))
    first = attack(folder, "-r", "--passes", 20, "--batch-size", 60)["images"]
    assert batches == [60, 60, 60]
    assert [image["files"]["adversarial"] for image in first[8:12]] == [
        f"day-{day}/IMG_{number}.adv.png" for day, number in ((0, 8), (0, 9), (1, 0), (1, 1))
    ]
    write_tree(folder, range(180, 200))
    (folder / "day-3" / "more").mkdir()
    Image.fromarray(TINY_PIXELS).save(folder / "day-3" / "more" / "IMG_0.png")
    Image.fromarray(TINY_PIXELS).save(folder / "day-3" / "IMG_0.bmp")  # its name was taken by IMG_0.png alone
    grown = attack(folder, "-r", "--passes", 20, "--batch-size", 60)["images"]
    assert sum(batches[3:]) == 20 + 1 + 2  # and nothing else is attacked again
    assert len(grown) == 202
    assert [image for image in grown if image["source"] in {one["source"] for one in first}][:30] == first[:30]
    assert {"day-3/IMG_0.png.adv.png", "day-3/IMG_0.bmp.adv.png", "day-3/more/IMG_0.adv.png"} <= {
        image["files"]["adversarial"] for image in grown
    }
    for path in folder.glob("day-1?/*"):
        path.unlink()
    shrunk = attack(folder, "-r", "--passes", 20, "--batch-size", 7)["images"]
    assert len(batches) == len(batches[:3]) + sum(count > 0 for count in batches[3:])
    assert len(shrunk) == 102
    assert sum(batches[3:]) == 23
    assert (out / "day-12" / "IMG_0.adv.png").is_file()  # what was made stays
    (out / "day-0" / "IMG_0.adv.png").unlink()
    attack(folder, "-r", "--passes", 20, "--batch-size", 7)
    assert sum(batches[3:]) == 24  # with another batch size, finished photos do not fill the batch
    assert cli("gallery", out)[0] == 0
    assert "./day-0/IMG_1.adv.png" in (out / "index.html").read_text()


def test_files_left_by_a_start_that_was_killed_are_replaced_when_the_folder_has_grown(attack, tmp_path):
    write_tree(tmp_path / "in", range(3))
    attack(tmp_path / "in", "-r")
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))  # the key and the list
    write_tree(tmp_path / "in", range(4))
    assert len(attack(tmp_path / "in", "-r")["images"]) == 4


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "", ".", "s3://x/a.png"])
def test_a_report_may_not_name_files_outside_its_folder(attack, cli, save_photo, tmp_path, name):
    report = attack(save_photo("photo.png", Image.fromarray(TINY_PIXELS)))
    report["images"][0]["files"]["adversarial"] = name
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    code, _, err = cli("gallery", tmp_path / "out")
    assert code == 1
    assert "is not the name of a file beside its report" in err
