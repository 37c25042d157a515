from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlperturb.errors import ImageError, OutputError, UsageError
from mlperturb.photos.bounds import MAX_PIXELS
from mlperturb.photos.formats import read_pixels, write_pixels
from mlperturb.photos.images import describe_left_out, find_photos, is_output, magnify, read_photo

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("size", [(6, 8), (1, 1), (1, 300), (77, 3)])
def test_a_png_round_trip_keeps_every_byte(tmp_path, size):
    rgb = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    write_pixels(tmp_path / "x.png", rgb)
    photo = read_photo(tmp_path / "x.png")
    assert np.array_equal(photo.rgb, rgb)
    assert photo.alpha is None
    assert np.array_equal(read_pixels(tmp_path / "x.png"), rgb)
    assert photo.sha256 == hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()


def test_a_png_round_trip_keeps_alpha_and_the_colours_below_it(tmp_path):
    alpha = np.zeros((6, 8), dtype=np.uint8)
    alpha[0, :4] = 1, 128, 254, 255
    write_pixels(tmp_path / "x.png", RGB, alpha)
    photo = read_photo(tmp_path / "x.png")
    assert np.array_equal(photo.rgb, RGB)
    assert np.array_equal(photo.alpha, alpha)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", list(TURNS))
def test_the_exif_orientation_is_applied_to_colours_and_alpha(save_photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgba = np.dstack([RGB, GREY])
    photo = read_photo(save_photo("x.png", Image.fromarray(rgba), exif=exif))
    upright = TURNS[orientation](rgba)
    assert np.array_equal(photo.rgb, upright[..., :3])
    assert np.array_equal(photo.alpha, upright[..., 3])


def test_a_turned_jpeg_is_upright(save_photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_photo(save_photo("x.jpg", Image.fromarray(RGB), exif=exif)).rgb.shape == (8, 6, 3)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
@pytest.mark.parametrize("top", [65535, 1000, 1])
def test_16_bit_greys_are_scaled_to_8_bits_and_noted(save_photo, name, top):
    samples = np.linspace(0, top, 48).astype(np.uint16).reshape(6, 8)
    photo = read_photo(save_photo(name, Image.fromarray(samples)))
    expected = np.rint(samples / 257).astype(np.uint8)
    assert np.array_equal(photo.rgb, np.repeat(expected[..., None], 3, axis=2))
    assert photo.notes == ("16-bit: scaled to 8 bits",)


def test_floats_in_0_to_1_span_the_8_bits(save_photo):
    samples = np.array([[0.0, 0.5, 1.0, np.nan, -3.0]], dtype=np.float32)
    photo = read_photo(save_photo("x.tif", Image.fromarray(samples)))
    assert photo.rgb[0, :, 0].tolist() == [0, 128, 255, 0, 0]


def test_a_palette_becomes_its_colours(save_photo):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    photo = read_photo(save_photo("x.png", image))
    assert photo.rgb.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert photo.alpha is None


@pytest.mark.parametrize("name", ["x.png", "x.gif"])
def test_a_transparent_palette_entry_becomes_alpha(save_photo, name):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    photo = read_photo(save_photo(name, image, transparency=1))
    assert photo.rgb.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert photo.alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9)])
def test_a_transparent_colour_becomes_alpha(save_photo, mode, colour):
    image = Image.new(mode, (2, 1))
    image.putpixel((1, 0), colour)
    assert read_photo(save_photo("x.png", image, transparency=colour)).alpha.tolist() == [[255, 0]]


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.pgm"])
def test_grey_is_repeated_over_the_channels(save_photo, name):
    photo = read_photo(save_photo(name, Image.fromarray(GREY)))
    assert np.array_equal(photo.rgb, np.repeat(GREY[..., None], 3, axis=2))
    assert photo.alpha is None
    assert photo.notes == ()


def test_grey_with_alpha_keeps_both(save_photo):
    photo = read_photo(save_photo("x.png", Image.fromarray(np.dstack([GREY, GREY[::-1]]), "LA")))
    assert np.array_equal(photo.rgb[..., 2], GREY)
    assert np.array_equal(photo.alpha, GREY[::-1])


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_cmyk_becomes_rgb(save_photo, name):
    photo = read_photo(save_photo(name, Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
    assert photo.rgb.shape == (8, 8, 3)
    assert abs(photo.rgb.astype(int) - (255, 0, 0)).max() < 12


def test_one_bit_becomes_black_and_white(save_photo):
    image = Image.new("1", (3, 1))
    image.putpixel((1, 0), 1)
    assert read_photo(save_photo("x.png", image)).rgb[0].tolist() == [[0] * 3, [255] * 3, [0] * 3]


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_the_first_frame_of_an_animation_is_taken_and_noted(save_photo, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if name == "x.webp" else {}
    photo = read_photo(save_photo(name, frames[0], save_all=True, append_images=frames[1:], **options))
    assert photo.rgb[0, 0].tolist() == [255, 0, 0]
    assert photo.notes == ("animated: only the first frame is taken",)


def test_a_photo_of_two_views_is_its_first_view(save_photo):
    views = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    photo = read_photo(save_photo("x.jpg", views[0], format="MPO", save_all=True, append_images=views[1:]))
    assert abs(photo.rgb.astype(int) - (255, 0, 0)).max() < 12
    assert photo.notes == ()


def test_the_pixels_of_a_photo_can_be_written_to(save_photo):
    for image in (Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(np.dstack([RGB, GREY]))):
        photo = read_photo(save_photo("x.png", image))
        assert photo.rgb.flags.writeable
        assert photo.rgb.flags.c_contiguous


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.gif", "x.tif", "x.bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_photo_is_an_image_error(save_photo, name, share):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save_photo(name, Image.fromarray(pixels))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=rf"{name} is (damaged|not an image)"):
        read_photo(path)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_bytes_give_a_photo_or_an_image_error(save_photo, seed):
    random = np.random.default_rng(seed)
    path = save_photo(("x.png", "x.jpg", "x.webp", "x.gif", "x.tif", "x.bmp")[seed % 6])
    data = bytearray(path.read_bytes())
    for position in random.integers(0, len(data), 8):
        data[position] = random.integers(256)
    path.write_bytes(data)
    try:
        rgb = read_photo(path).rgb
    except ImageError as error:
        assert str(path) in str(error)
    else:
        assert rgb.dtype == np.uint8
        assert rgb.shape[2] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"this is no photo\n" * 20, "is not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known format"),
        (_png_header(8, 8), "is damaged|not an image"),
    ],
)
def test_a_file_that_is_no_photo_is_an_image_error(tmp_path, data, message):
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=message):
        read_photo(tmp_path / "x.jpg")


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_before_they_are_decoded(tmp_path, monkeypatch, size):
    assert size[0] * size[1] > MAX_PIXELS
    (tmp_path / "x.png").write_bytes(_png_header(*size) + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)

    def no_decoding(_: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    with pytest.raises(ImageError, match="pixels"):
        read_photo(tmp_path / "x.png")


def test_a_missing_file_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match=r"cannot read .*none.png: No such file"):
        read_photo(tmp_path / "none.png")


def test_a_folder_given_as_a_photo_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="Is a directory"):
        read_photo(tmp_path)


def test_a_pipe_given_as_a_photo_is_an_image_error_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_photo(tmp_path / "x.png")


@pytest.fixture
def folder(tmp_path, save_photo):
    for name in ("b.PNG", "a.jpg", "a.adv.png", "a.MAP.png", ".hidden.png", "sub/c.jpeg", "sub/c.adv.png"):
        save_photo(name)
    (tmp_path / "notes.txt").write_text("no photo")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


def test_a_folder_gives_its_photos_in_name_order_without_our_outputs(folder):
    assert find_photos([folder]) == [folder / "a.jpg", folder / "b.PNG"]


def test_subfolders_are_searched_on_request(folder):
    assert find_photos([folder], recursive=True) == [folder / "a.jpg", folder / "b.PNG", folder / "sub" / "c.jpeg"]


def test_files_are_taken_as_named_and_once(folder):
    named = [folder / "notes.txt", folder / "b.PNG", folder, folder / "b.PNG", folder / "a.adv.png"]
    assert find_photos(named) == [folder / "notes.txt", folder / "b.PNG", folder / "a.jpg", folder / "a.adv.png"]


def test_what_is_left_out_of_a_folder_is_told(folder):
    left_out: list[Path] = []
    found = find_photos(
        [folder, folder / "a.adv.png"], own=lambda path: path.name in ("a.jpg", "a.adv.png"), left_out=left_out
    )
    assert found == [folder / "a.MAP.png", folder / "b.PNG", folder / "a.adv.png"]
    assert left_out == [folder / ".hidden.png", folder / "a.adv.png", folder / "a.jpg"]
    assert describe_left_out(left_out) == (
        f"left out 3 files, such as {folder / '.hidden.png'}: hidden, or written by mlperturb"
    )
    assert describe_left_out(left_out[2:]).startswith(f"left out the file {folder / 'a.jpg'}: ")


def test_a_missing_path_is_a_usage_error_even_beside_good_ones(folder):
    with pytest.raises(UsageError, match=r"no such file or folder: .*none"):
        find_photos([folder, folder / "none"])


def test_a_path_that_cannot_be_looked_up_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="File name too long"):
        find_photos([tmp_path / ("x" * 5000)])


def test_nothing_found_names_the_folder_and_the_way_out(tmp_path, save_photo):
    save_photo("sub/a.adv.png")
    with pytest.raises(UsageError, match=rf"no photo found in {tmp_path}: .*\.jpg.*add -r"):
        find_photos([tmp_path])
    with pytest.raises(UsageError, match=r"no photo found in [^(]*\.webp; left out the file .*a\.adv\.png: [^(]*$"):
        find_photos([tmp_path], recursive=True)
    with pytest.raises(UsageError, match="no photo found in the paths given"):
        find_photos([])


def test_our_outputs_are_told_by_their_names(tmp_path):
    names = ["a.adv.png", "A.ADV.PNG", "a.map.png", "a.png", "adv.png", "a.adv.gif"]
    assert [is_output(tmp_path / name) for name in names] == [True] * 3 + [False] * 3


def test_a_png_that_cannot_be_written_is_an_output_error_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "folder.png", tmp_path / "none" / "x.png"):
        with pytest.raises(OutputError, match="cannot write"):
            write_pixels(path, RGB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_the_map_is_magnified_to_its_largest_change_over_all_channels():
    photo = np.full((2, 2, 3), 128, dtype=np.uint8)
    pixels = photo.copy()
    pixels[0, 0] = 129, 126, 132
    pixels[1, 1] = 127, 128, 131
    assert magnify(pixels, photo)[0, 0].tolist() == [64, 128, 255]
    assert magnify(pixels, photo)[1, 1].tolist() == [64, 0, 191]
    assert magnify(np.zeros_like(photo), np.full_like(photo, 255)).min() == 255


def test_the_map_of_no_change_is_black():
    assert not magnify(*np.zeros((2, 2, 2, 3), dtype=np.uint8)).any()
