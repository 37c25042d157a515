from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mlperturb.errors import UsageError
from mlperturb.photos.purify import KINDS, Purification, parse_purifications, parse_qualities, parse_survival

RGB = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_purification_keeps_the_size_and_changes_pixels(kind):
    for one in parse_purifications([kind]):
        pixels, size = one.apply(RGB)
        assert pixels.shape == RGB.shape
        assert pixels.dtype == np.uint8
        assert not np.array_equal(pixels, RGB)
        assert (size is not None) == (kind in ("jpeg", "webp"))


def test_jpeg_is_what_pillow_writes_and_reads_with_halved_chroma():
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "JPEG", quality=75, subsampling="4:2:0")
    pixels, size = Purification("jpeg", 75).apply(RGB)
    assert size == len(stream.getvalue())
    assert np.array_equal(pixels, np.array(Image.open(stream).convert("RGB")))
    full, more = Purification("jpeg", 75, "4:4:4").apply(RGB)
    assert more > size
    assert not np.array_equal(full, pixels)


def test_bits_keeps_the_leading_ones():
    assert np.array_equal(Purification("bits", 3).apply(RGB)[0], RGB & 0b11100000)


def test_median_is_that_of_the_neighbours():
    pixels = Purification("median", 3).apply(RGB)[0]
    assert pixels[5, 6, 1] == np.median(RGB[4:7, 5:8, 1])


def test_names_alone_stand_for_their_usual_settings():
    assert [one.name for one in parse_purifications(["jpeg,median:3"], (40, 90))] == ["jpeg:40", "jpeg:90", "median:3"]
    assert parse_qualities(["30, 50", "30"]) == (30, 50)


@pytest.mark.parametrize(
    "name", ["gif", "jpeg:0", "jpeg:101", "median:4", "bits:9", "resize:100", "jpeg:", "jpeg:x", ""]
)
def test_what_is_no_purification_is_refused(name):
    with pytest.raises(UsageError, match="expected"):
        parse_purifications([name])


@pytest.mark.parametrize("value", ["0", "101", "x", "", "50-60"])
def test_what_is_no_quality_is_refused(value):
    with pytest.raises(UsageError, match="`qualities`"):
        parse_qualities([value])


def test_a_range_to_survive_is_seen_at_four_qualities_and_checked_at_all():
    seen, checked = parse_survival(["jpeg:60-95", "jpeg:75"])
    assert [one.setting for one in seen] == [60, 72, 83, 95, 75]
    assert [one.setting for one in checked] == list(range(60, 96))
    assert [one.setting for one in parse_survival(["jpeg:80-81"])[0]] == [80, 81]


def test_every_kind_can_be_survived_and_a_range_has_the_settings_of_its_kind():
    seen, checked = parse_survival(["webp:80,median:3-9", "resize:50", "bits:6"])
    names = ["webp:80", "median:3", "median:5", "median:7", "median:9", "resize:50", "bits:6"]
    assert [one.name for one in seen] == [one.name for one in checked] == names


NO_SURVIVAL = ["jpeg", "jpeg:90-60", "jpeg:0", "jpeg:101", "jpeg:60-", "webp:101", "median:4", "median:3-4", "bits:9"]


@pytest.mark.parametrize("value", [*NO_SURVIVAL, "resize:100", "png:80", ":80", "webp:-5", "jpeg:1000"])
def test_what_cannot_be_survived_is_refused(value):
    with pytest.raises(UsageError, match="`survive`"):
        parse_survival([value])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("jpeg:95-60", "expected the lower setting first for `survive`, jpeg:60-95, got 'jpeg:95-60'"),
        ("95-60", "expected `survive` KIND:SETTING or KIND:LOW-HIGH of jpeg, webp, median, bits, resize, got '95-60'"),
    ],
)
def test_a_range_has_the_lower_setting_first_and_a_kind(value, message):
    with pytest.raises(UsageError) as told:
        parse_survival([value])
    assert str(told.value) == message
