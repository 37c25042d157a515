from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from mlperturb.errors import ImageError, UsageError
from mlperturb.photos.formats import decode_elsewhere, open_photo, write_jpeg
from mlperturb.photos.images import read_photo
from mlperturb.photos.jpeg import Jpeg, read_jpeg
from mlperturb.photos.kinds import FileFormat

pytest.importorskip("jpeglib")

PIXELS = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((75, 53)), np.uint8
)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encode(image: Image.Image | None = None, orientation: int = 1, **options) -> bytes:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a maker"
    (image or Image.fromarray(PIXELS)).save(stream, "JPEG", exif=exif, **{"quality": 80, **options})
    return stream.getvalue()


def opened(data: bytes) -> Jpeg:
    jpeg = read_jpeg(data)
    assert jpeg is not None
    return jpeg


KINDS = {
    **{ratio: {"subsampling": ratio} for ratio in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "best": {"quality": 100},
    "worst": {"quality": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_coefficients_written_again_give_the_same_upright_pixels(tmp_path, kind, orientation):
    path = tmp_path / "x.jpg"
    path.write_bytes(encode(orientation=orientation, **KINDS[kind]))
    jpeg, pixels = opened(path.read_bytes()), read_photo(path).rgb
    assert jpeg.orientation == orientation
    assert np.array_equal(jpeg.decode(jpeg.planes), pixels)
    for metadata in (False, True):
        path.write_bytes(jpeg.finish(jpeg.planes, metadata=metadata))
        assert np.array_equal(read_photo(path).rgb, pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_were_not_changed_and_tables_stay_as_they_were(kind):
    jpeg = opened(encode(**KINDS[kind]))
    planes = [plane.copy() for plane in jpeg.planes]
    planes[0][2, 3, 1, 2] += 3
    again = opened(jpeg.finish(planes))
    assert all(np.array_equal(one, other) for one, other in zip(again.planes, planes, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(again.tables, jpeg.tables, strict=True))
    assert again.sampling == jpeg.sampling
    differs = (again.planes[0] != jpeg.planes[0]).any((2, 3))
    assert differs.sum() == 1
    assert differs[2, 3]
    moved = again.decode(again.planes) != jpeg.decode(jpeg.planes)
    assert moved[16:24, 24:32].any()
    assert not np.delete(moved, range(16, 24), 0).any()


def test_a_grey_jpeg_stays_grey():
    jpeg = opened(encode(Image.fromarray(PIXELS).convert("L")))
    assert len(jpeg.planes) == 1
    with Image.open(io.BytesIO(jpeg.finish(jpeg.planes))) as image:
        assert image.mode == "L"


def test_a_jpeg_of_other_colours_is_none():
    assert read_jpeg(encode(Image.fromarray(PIXELS).convert("CMYK"))) is None
    assert read_jpeg(encode(keep_rgb=True)) is None


def test_the_profile_and_orientation_stay_and_metadata_goes_unless_kept(tmp_path):
    jpeg = opened(encode(orientation=6, icc_profile=PROFILE * 40, comment=b"mine"))  # of several segments
    for metadata in (False, True):
        with Image.open(io.BytesIO(jpeg.finish(jpeg.planes, metadata=metadata))) as image:
            assert image.info["icc_profile"] == PROFILE * 40
            assert image.getexif()[0x0112] == 6
            assert image.getexif().get(0x010F) == ("a maker" if metadata else None)
            assert image.info.get("comment") == (b"mine" if metadata else None)
    (tmp_path / "x.jpg").write_bytes(jpeg.data)
    photo = open_photo(tmp_path / "x.jpg", "x.adv.jpg", FileFormat("jpeg"))
    write_jpeg(tmp_path / "x.adv.jpg", photo, jpeg.planes)
    assert np.array_equal(read_photo(tmp_path / "x.adv.jpg").rgb, photo.rgb)


def test_a_file_is_about_as_large_as_its_source():
    source = encode(optimize=True)
    jpeg = opened(source)
    assert len(jpeg.finish(jpeg.planes, metadata=True)) <= 1.02 * len(source)


@pytest.mark.parametrize("orientation", [1, 6])
def test_other_decoders_see_the_pixels_that_pillow_sees(tmp_path, orientation):
    path = tmp_path / "x.jpg"
    path.write_bytes(encode(orientation=orientation))
    found = decode_elsewhere(path)
    assert "torchvision" in found
    for pixels in found.values():
        assert np.array_equal(pixels, read_photo(path).rgb)


def test_a_photo_that_is_not_a_jpeg_is_encoded_and_said(tmp_path):
    Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])).save(tmp_path / "x.png", icc_profile=PROFILE)
    photo = open_photo(tmp_path / "x.png", "x.adv.jpg", FileFormat("jpeg", 90))
    assert photo.notes == ("encoded as a JPEG of quality 90 before the attack", "alpha is dropped: a JPEG has none")
    assert photo.jpeg is not None
    assert photo.encoded is not None
    assert 0 < np.abs(photo.encoded.astype(int) - PIXELS).mean() < 8
    write_jpeg(tmp_path / "x.adv.jpg", photo, photo.jpeg.planes)
    assert read_photo(tmp_path / "x.adv.jpg").beside.profile == PROFILE
    assert open_photo(tmp_path / "x.png", "x.adv.png", FileFormat()).jpeg is None


def test_without_jpeglib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jpeglib", None)
    with pytest.raises(UsageError, match=r"pip install 'mlperturb\[jpeg\]'"):
        read_jpeg(encode())


def test_a_file_of_many_segments_and_with_bytes_after_its_end_is_read(tmp_path):
    data = encode(progressive=True)
    comments = b"\xff\xfe\x00\x06mine" * 200  # jpeglib has room for 50
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    crowded = data[:2] + comments + data[2:second] + comments + data[second:] + data  # as files of two views end
    (tmp_path / "x.jpg").write_bytes(crowded)
    photo = open_photo(tmp_path / "x.jpg", "x.adv.jpg", FileFormat("jpeg"))
    assert photo.notes == ()
    assert photo.encoded is None
    assert np.array_equal(photo.rgb, opened(data).decode(opened(data).planes))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_give_a_photo_or_an_image_error(tmp_path, seed):
    random = np.random.default_rng(seed)
    data = bytearray(encode(progressive=bool(seed % 2)))
    for position in random.integers(2, len(data), 4):
        data[position] = random.integers(256)
    (tmp_path / "x.jpg").write_bytes(data)
    try:
        photo = open_photo(tmp_path / "x.jpg", "x.adv.jpg", FileFormat("jpeg"))
    except ImageError as error:
        assert "x.jpg" in str(error)
    else:
        assert photo.jpeg is not None
        seen = photo.rgb if photo.encoded is None else photo.encoded
        assert np.array_equal(photo.jpeg.decode(photo.jpeg.planes), seen)
