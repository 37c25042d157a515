from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from mlperturb.errors import ImageError, OutputError, UsageError
from mlperturb.photos.formats import read_pixels, write_pixels
from mlperturb.photos.images import Beside, find_photos, is_output, read_photo
from mlperturb.photos.kinds import is_adversarial, parse_format, strip_ending

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
WIDE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ENDS = (".png", ".webp")


def grey_profile() -> bytes:
    """Return a header that says grey: Pillow cannot make a grey profile, and copies any."""
    return WIDE[:16] + b"GRAY" + WIDE[20:]


@pytest.mark.parametrize("end", ENDS)
def test_a_file_has_the_pixels_alpha_and_the_colours_below_it(tmp_path, end):
    alpha = np.zeros((6, 8), dtype=np.uint8)
    alpha[0, :4] = 1, 128, 254, 255
    write_pixels(tmp_path / f"x{end}", RGB, alpha)
    photo = read_photo(tmp_path / f"x{end}")
    assert np.array_equal(photo.rgb, RGB)
    assert np.array_equal(photo.alpha, alpha)
    assert np.array_equal(read_pixels(tmp_path / f"x{end}"), RGB)


@pytest.mark.parametrize("end", ENDS)
def test_the_profile_comes_back_byte_for_byte(tmp_path, end):
    write_pixels(tmp_path / f"x{end}", RGB, beside=Beside(WIDE))
    assert read_photo(tmp_path / f"x{end}").beside == Beside(WIDE)
    with Image.open(tmp_path / f"x{end}") as image:
        assert image.info["icc_profile"] == WIDE


def test_a_grey_file_has_one_channel_and_its_profile(tmp_path):
    rgb = np.repeat(GREY[..., None], 3, axis=2)
    write_pixels(tmp_path / "x.png", rgb, grey=True, beside=Beside(grey_profile()))
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.array(image), GREY)
    assert read_photo(tmp_path / "x.png").beside.profile == grey_profile()
    write_pixels(tmp_path / "a.png", rgb, GREY[::-1], grey=True)
    photo = read_photo(tmp_path / "a.png")
    assert photo.grey
    assert np.array_equal(photo.alpha, GREY[::-1])


@pytest.mark.parametrize(("mode", "grey"), [("1", True), ("L", True), ("LA", True), ("I;16", True), ("P", False),
                                            ("RGB", False), ("RGBA", False)])  # fmt: skip
def test_grey_is_told_by_the_channels_of_the_file(save_photo, mode, grey):
    assert read_photo(save_photo("x.png", Image.new(mode, (4, 4)))).grey == grey


@pytest.mark.parametrize(("mode", "profile", "fits"), [
    ("RGB", WIDE, True), ("RGB", b"GRAY", False), ("L", WIDE, False), ("L", b"GRAY", True), ("CMYK", b"CMYK", False),
])  # fmt: skip
def test_a_profile_of_other_pixels_than_those_written_is_dropped(save_photo, mode, profile, fits):
    made = profile if len(profile) > 4 else WIDE[:16] + profile + WIDE[20:]
    photo = read_photo(save_photo("x.jpg", Image.new(mode, (8, 8)), icc_profile=made))
    assert photo.beside.profile == (made if fits else None)
    assert bool(photo.notes) == (mode == "CMYK")


@pytest.mark.parametrize("orientation", [1, 6])
def test_metadata_is_read_without_the_orientation_that_was_applied(save_photo, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a maker"
    exif.get_ifd(0x8825)[1] = "N"
    photo = read_photo(save_photo("x.jpg", Image.fromarray(RGB), exif=exif, comment=b"mine"))
    kept = Image.Exif()
    kept.load(photo.beside.exif)
    assert kept[0x010F] == "a maker"
    assert kept.get_ifd(0x8825)[1] == "N"
    assert kept.get(0x0112, 1) == 1
    assert photo.beside.text == (("Comment", "mine"),)


@pytest.mark.parametrize("end", ENDS)
def test_metadata_is_written_and_read_again(tmp_path, end):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    beside = Beside(WIDE, exif.tobytes(), b"<x:xmpmeta/>", (("Comment", "mine"),))
    write_pixels(tmp_path / f"x{end}", RGB, beside=beside)
    again = read_photo(tmp_path / f"x{end}").beside
    assert again.profile == WIDE
    assert again.xmp == b"<x:xmpmeta/>"
    assert again.exif is not None
    kept = Image.Exif()
    kept.load(again.exif)
    assert dict(kept) == {0x010F: "a maker"}
    assert again.text == (() if end == ".webp" else (("Comment", "mine"),))


def test_damaged_metadata_is_dropped_and_the_pixels_are_read(save_photo):
    path = save_photo("x.jpg", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert read_photo(path).rgb.shape == RGB.shape


def test_webp_is_smaller_than_png_on_a_photo(tmp_path):
    smooth = np.add.outer(np.arange(96), np.arange(128)).astype(np.uint8)
    noisy = np.stack([smooth, smooth // 2, 255 - smooth], 2) + np.random.default_rng(0).integers(0, 3, (96, 128, 3))
    sizes = []
    for end in ENDS:
        write_pixels(tmp_path / f"x{end}", noisy.astype(np.uint8))
        sizes.append((tmp_path / f"x{end}").stat().st_size)
    assert sizes[1] < sizes[0]


def test_a_photo_too_long_for_webp_is_an_error_with_the_limit(tmp_path):
    with pytest.raises(OutputError, match="at most 16383 pixels"):
        write_pixels(tmp_path / "x.webp", np.zeros((1, 16384, 3), dtype=np.uint8))
    assert not list(tmp_path.iterdir())


def test_formats_have_names_and_ends():
    names = ("png", "webp", "jpeg", "jpeg:80", "same")
    assert [parse_format(name).suffix(Path("x.jpg")) for name in names] == [*ENDS, *[".jpg"] * 3]
    assert [parse_format(name).name for name in names] == list(names)
    assert parse_format("jpeg:80").quality == 80
    assert [parse_format("same").suffix(Path(name)) for name in ("x.WEBP", "x.png", "x.gif")] == [
        ".webp",
        *[".png"] * 2,
    ]
    with pytest.raises(UsageError, match="unknown `format` 'tiff': expected png, webp"):
        parse_format("tiff")


def test_adversarial_photos_are_told_by_their_names(tmp_path):
    names = ["a.adv.png", "A.ADV.WEBP", "b.adv.jpg", "a.map.png", "a.png", "adv.png"]
    assert [is_adversarial(Path(name)) for name in names] == [True] * 3 + [False] * 3
    assert [strip_ending(name) for name in names[:3]] == ["a", "A", "b"]
    assert [is_output(tmp_path / name) for name in names] == [True] * 4 + [False] * 2


def test_a_converted_image_is_written_as_pillow_would(tmp_path):
    write_pixels(tmp_path / "x.png", RGB)
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "PNG", compress_level=1)
    assert (tmp_path / "x.png").read_bytes() == stream.getvalue()


def test_a_heic_photo_comes_in_with_its_profile(save_photo):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    smooth = Image.fromarray(RGB[:2, :3].copy()).resize((64, 48))
    path = save_photo("x.heic", smooth, quality=95, icc_profile=WIDE)
    photo = read_photo(path)
    assert photo.rgb.shape == (48, 64, 3)
    assert np.abs(photo.rgb.astype(int) - np.asarray(smooth)).mean() < 6
    assert photo.beside.profile == WIDE
    assert find_photos([path.parent]) == [path]


def test_a_heic_photo_without_its_library_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(ImageError, match=r"pip install 'mlperturb\[heif\]'"):
        read_photo(tmp_path / "x.heic")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_an_avif_photo_comes_in(save_photo):
    smooth = Image.fromarray(RGB[:2, :3].copy()).resize((64, 48))
    photo = read_photo(save_photo("x.avif", smooth, quality=95, icc_profile=WIDE))
    assert np.abs(photo.rgb.astype(int) - np.asarray(smooth)).mean() < 6
    assert photo.beside.profile == WIDE
