"""Files of some kilobytes that would take minutes or gigabytes to decode."""

from __future__ import annotations

import io
import re
import struct
import time

import numpy as np
import pytest
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.errors import ImageError
from mlperturb.photos import bounds
from mlperturb.photos.bounds import MAX_PIECES, MAX_SCANS, MAX_WORK, count_scans
from mlperturb.photos.images import convert_image, read_photo


def progressive(image: Image.Image, scans: int | None = None) -> bytes:
    """Return a progressive JPEG; its last scan is repeated until it has so many scans."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", progressive=True, quality=90)
    data = stream.getvalue()
    starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    more = 0 if scans is None else scans - len(starts)
    return data[:-2] + data[starts[-1] : -2] * more + data[-2:]


def tiff(width: int, height: int, *tags: tuple[int, int, int, bytes], order: str = "<", big: bool = False) -> bytes:
    """Return a TIFF of 8-bit grey: each tag is its number, type, count, and values as bytes in this order."""
    short = [(258, 8), (259, 1), (262, 1), (277, 1)]
    every = [(number, 3, 1, struct.pack(f"{order}H", value)) for number, value in short]
    every += [(number, 4, 1, struct.pack(f"{order}I", value)) for number, value in ((256, width), (257, height))]
    every = sorted([*every, *tags])
    inline, entry = (8, f"{order}HHQ") if big else (4, f"{order}HHI")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    head += struct.pack(f"{order}HHQ", 8, 0, 16) if big else struct.pack(f"{order}I", 8)
    place = len(head) + (8 if big else 2) + len(every) * (4 + 2 * inline) + inline
    entries, values = b"", b""
    for number, kind, count, value in every:
        where = value.ljust(inline, b"\0")
        if len(value) > inline:
            where = struct.pack(f"{order}{'Q' if big else 'I'}", place + len(values))
            values += value
        entries += struct.pack(entry, number, kind, count) + where
    return head + struct.pack(f"{order}{'Q' if big else 'H'}", len(every)) + entries + bytes(inline) + values


@pytest.mark.parametrize("size", [(36, 30), (600, 400)])
@pytest.mark.parametrize("exif", [False, True])
def test_a_real_progressive_jpeg_has_some_ten_scans_and_is_read(tmp_path, size, exif):
    image = Image.fromarray(TINY_PIXELS).resize(size)
    data = progressive(image)
    if exif:  # with a thumbnail, which is a JPEG with markers of its own
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(data)) + data + data[2:]
    assert count_scans(data) == 10 <= MAX_SCANS // 10
    (tmp_path / "x.jpg").write_bytes(data)
    assert read_photo(tmp_path / "x.jpg").rgb.shape == (size[1], size[0], 3)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=98, restart_marker_blocks=1)
    assert count_scans(stream.getvalue()) == 1
    noise = np.random.default_rng(0).bytes(200_000)  # after the end, as the film of a phone's moving photo
    assert count_scans(stream.getvalue() + noise) == 1


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(tmp_path):
    data = progressive(Image.new("RGB", (2000, 2000), (9, 200, 90)), 8000)
    assert len(data) < 300_000
    (tmp_path / "x.jpg").write_bytes(data)
    before = time.process_time()
    with pytest.raises(ImageError, match=f"x.jpg has too many scans: expected a JPEG of at most {MAX_SCANS}"):
        read_photo(tmp_path / "x.jpg")
    assert time.process_time() - before < 0.5
    (tmp_path / "x.jpg").write_bytes(progressive(Image.new("RGB", (64, 64)), MAX_SCANS))
    assert read_photo(tmp_path / "x.jpg").rgb.shape == (64, 64, 3)


def test_a_large_jpeg_may_have_fewer_scans(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_WORK", 64 * 64 * 20)
    (tmp_path / "x.jpg").write_bytes(progressive(Image.new("RGB", (64, 64)), 21))
    with pytest.raises(ImageError, match="has 21 scans, expected at most 20 of 64 x 64 pixels"):
        read_photo(tmp_path / "x.jpg")
    assert bounds.MAX_PIXELS * 10 < MAX_WORK  # the largest photo, with the scans of a real photo


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True), (">", True)])
def test_a_tiff_of_countless_tiles_or_of_a_huge_tile_is_refused_before_it_is_opened(tmp_path, order, big):
    path, count = tmp_path / "x.tif", MAX_PIECES + 1
    many = struct.pack(f"{order}I", 8) * count
    sides = [(number, 3, 1, struct.pack(f"{order}H", 16)) for number in (322, 323)]
    path.write_bytes(tiff(12000, 12000, *sides, (324, 4, count, many), (325, 4, count, many), order=order, big=big))
    with pytest.raises(ImageError, match=f"has {count} strips or tiles, expected at most {MAX_PIECES}"):
        read_photo(path)
    path.write_bytes(tiff(1, count, (273, 4, count, many), (279, 4, count, many), order=order, big=big))
    with pytest.raises(ImageError, match="strips or tiles"):
        read_photo(path)
    sides = [(number, 4, 1, struct.pack(f"{order}I", 40_000)) for number in (322, 323)]
    one = [(number, 4, 1, struct.pack(f"{order}I", 8)) for number in (324, 325)]
    path.write_bytes(tiff(4, 4, *sides, *one, order=order, big=big))
    with pytest.raises(ImageError, match="has tiles of 40000 x 40000 pixels"):
        read_photo(path)
    whole = [(273, 4, 1, struct.pack(f"{order}I", 8)), (279, 4, 1, struct.pack(f"{order}I", 16))]
    path.write_bytes(tiff(4, 4, *whole, order=order, big=big))
    try:
        assert read_photo(path).rgb.shape == (4, 4, 3)
    except ImageError as error:  # Pillow 13 does not know this form
        assert (order, big, "not an image" in str(error)) == (">", True, True)


def test_samples_as_text_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "MAX_TEXT", 1000)
    (tmp_path / "x.ppm").write_bytes(b"P3 20 20 255\n" + b"1 " * 1200)
    with pytest.raises(ImageError, match="has 2413 bytes of samples as text, expected at most 1000"):
        read_photo(tmp_path / "x.ppm")


def test_the_frames_of_an_animation_are_not_counted(tmp_path):
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "TIFF")
    data = bytearray(stream.getvalue())
    (first,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, first)
    image = bytes(data[first : first + 6 + 12 * entries])
    start, size, count = len(data), len(image), 20_000
    for number in range(count):
        following = start + (number + 1) * size if number + 1 < count else 0
        data += image[:-4] + struct.pack("<I", following)
    struct.pack_into("<I", data, 4, start)
    (tmp_path / "x.tif").write_bytes(data)
    before = time.process_time()
    assert "animated: only the first frame is taken" in read_photo(tmp_path / "x.tif").notes
    assert time.process_time() - before < 1


def test_libtiff_writes_no_lines_of_its_own(tmp_path, capfd):
    stream = io.BytesIO()
    Image.fromarray(TINY_PIXELS).save(stream, "TIFF", compression="tiff_lzw")
    data = bytearray(stream.getvalue())
    data[8:200] = bytes(192)
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        read_photo(tmp_path / "x.tif")
    assert capfd.readouterr().err == ""


def test_grey_of_16_bits_takes_little_more_memory_than_its_pixels(save_photo):
    tracemalloc = pytest.importorskip("tracemalloc")
    path = save_photo("x.png", Image.fromarray(np.full((1500, 1500), 30_000, dtype=np.uint16)))
    tracemalloc.start()
    try:
        assert read_photo(path).rgb[0, 0].tolist() == [117] * 3
        assert tracemalloc.get_traced_memory()[1] < 1500 * 1500 * 8
    finally:
        tracemalloc.stop()


def test_the_number_of_pixels_is_told_before_they_are_decoded(save_photo, monkeypatch):
    path = save_photo("x.png", Image.new("L", (30, 20)))
    told: list[int] = []

    def decode(*_: object) -> None:
        assert told == [600]
        raise ZeroDivisionError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ImageError):
        read_photo(path, room=told.append)
    assert told == [600]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa"])
@pytest.mark.parametrize("transparency", [None, 3])
def test_a_photo_converted_strip_by_strip_has_the_pixels_of_the_whole(monkeypatch, mode, transparency):
    rng = np.random.default_rng(0)
    image = Image.new(mode, (7, 11))
    image.frombytes(rng.bytes(len(image.tobytes())))
    if mode in ("P", "PA"):
        image.putpalette(rng.bytes(768))
    if transparency is not None and mode in ("1", "L", "P"):
        image.info["transparency"] = transparency
    whole = convert_image(image)
    monkeypatch.setattr("mlperturb.photos.images._STRIP", 21)
    strips = convert_image(image)
    assert np.array_equal(whole[0], strips[0])
    assert (whole[1] is None) == (strips[1] is None)
    assert whole[1] is None or np.array_equal(whole[1], strips[1])


def test_a_large_photo_takes_little_more_memory_than_its_pixels_and_what_pillow_decodes(save_photo):
    tracemalloc = pytest.importorskip("tracemalloc")
    path = save_photo("x.png", Image.new("L", (4000, 4000), 9))
    tracemalloc.start()
    try:
        assert read_photo(path).rgb.shape == (4000, 4000, 3)
        assert tracemalloc.get_traced_memory()[1] < 4000 * 4000 * 3 * 2  # Pillow's own memory is not traced
    finally:
        tracemalloc.stop()
