"""Preprocessing with borders and other fits, against timm's own transforms of PIL images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from mlperturb.errors import CheckpointError
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess, pad_batch
from mlperturb.model.readers import parse_reader

SIZES = [(37, 53), (53, 37), (32, 32), (7, 5), (1, 9), (40, 3), (101, 64), (64, 101), (30, 31)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BORDER = (round(255 * MEAN[0]), round(255 * MEAN[1]), round(255 * MEAN[2]))
WHITE = (255, 255, 255)

CASES = {
    "center": ({"crop_mode": "center", "crop_pct": 0.875}, (32, 32), Preprocess(36, (32, 32), MEAN, STD)),
    "oblong": (
        {"crop_mode": "center", "crop_pct": 0.9}, (28, 32), Preprocess((31, 35), (28, 32), MEAN, STD, fit="cover"),
    ),
    "squash": ({"crop_mode": "squash", "crop_pct": 0.9}, (32, 32), Preprocess((35, 35), (32, 32), MEAN, STD)),
    "border": (
        {"crop_mode": "border", "crop_pct": 1.0}, (32, 32),
        Preprocess((32, 32), (32, 32), MEAN, STD, fit="contain", fill=BORDER),
    ),
    "border and crop": (
        {"crop_mode": "border", "crop_pct": 0.8}, (32, 28),
        Preprocess((40, 35), (32, 28), MEAN, STD, fit="contain", fill=BORDER),
    ),
}  # fmt: skip


def _photo(size):
    return np.random.default_rng(size[0] * 997 + size[1]).integers(0, 256, (*size, 3), dtype=np.uint8)


def _square(photo, fill=WHITE):
    side = max(photo.shape[:2])
    canvas = Image.new("RGB", (side, side), fill)
    canvas.paste(Image.fromarray(photo), ((side - photo.shape[1]) // 2, (side - photo.shape[0]) // 2))
    return canvas


def _read(preprocess, photos, reader):
    batch, sizes = pad_batch([torch.from_numpy(photo).permute(2, 0, 1) / 255 for photo in photos])
    return parse_reader(reader).bind(preprocess, sizes, "cpu")(batch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pillow_equals_timm_bit_for_bit_and_float_is_near(name, interpolation):
    options, crop, preprocess = CASES[name]
    theirs = create_transform((3, *crop), interpolation=interpolation, mean=MEAN, std=STD, **options)
    preprocess = Preprocess(**{**preprocess.__dict__, "interpolation": interpolation})
    photos = [_photo(size) for size in SIZES if min(size) > 1 or preprocess.fit != "contain"]
    expected = torch.stack([theirs(Image.fromarray(photo)) for photo in photos])
    assert torch.equal(_read(preprocess, photos, "pillow"), expected)
    near = _read(preprocess, photos, "float")
    assert (near - expected).abs().mean() < 0.6 / 255 / min(STD)  # Pillow rounds to 8 bits, twice


@pytest.mark.parametrize("reader", ["pillow", "float"])
def test_a_white_square_equals_the_photo_that_was_padded_before(reader):
    plain = Preprocess((32, 32), interpolation="bicubic")
    padded = Preprocess((32, 32), interpolation="bicubic", square=True)
    photos = [_photo(size) for size in SIZES]
    expected = _read(plain, [np.array(_square(photo)) for photo in photos], reader)
    torch.testing.assert_close(_read(padded, photos, reader), expected, rtol=0, atol=0 if reader == "pillow" else 2e-5)


@pytest.mark.parametrize("reader", ["float", "pillow", "pillow:lanczos", "torchvision"])
def test_the_gradient_is_that_of_the_padded_photo(reader):
    plain, padded = Preprocess((24, 24)), Preprocess((24, 24), square=True)
    photo = _photo((37, 52))
    weight = torch.randn(1, 3, 24, 24)
    gradients = []
    for preprocess, pixels in ((plain, np.array(_square(photo))), (padded, photo)):
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255)[None].requires_grad_()
        mapped = parse_reader(reader).bind(preprocess, [pixels.shape[:2]], "cpu")(image)
        gradients.append(torch.autograd.grad((mapped * weight).sum(), image)[0])
    torch.testing.assert_close(gradients[1], gradients[0][:, :, 7:44], rtol=0, atol=1e-5)


def test_some_photos_of_a_batch_keep_their_borders():
    padded, photos = Preprocess((24, 24), square=True), [_photo(size) for size in SIZES[:4]]
    batch, sizes = pad_batch([torch.from_numpy(photo).permute(2, 0, 1) / 255 for photo in photos])
    bound, rows = padded.bind(sizes, "cpu"), torch.tensor([2, 1])
    torch.testing.assert_close(bound.select(rows)(batch[rows]), bound(batch)[rows])


def test_bgr_turns_the_channels_after_they_are_normalised():
    class First(torch.nn.Module):
        def forward(self, inputs):
            return inputs.mean((2, 3))

    image = torch.rand(1, 3, 8, 8)
    means = Preprocess((8, 8), mean=(0.1, 0.2, 0.3))
    rgb, bgr = (
        Classifier(First(), ("a", "b", "c"), None, Preprocess((8, 8), mean=(0.1, 0.2, 0.3), channels=order))(image)
        for order in ("rgb", "bgr")
    )
    assert torch.equal(bgr, rgb.flip(1))
    assert "channels" not in means.to_dict()


@pytest.mark.parametrize("case", CASES.values())
def test_json_values_give_the_same_preprocessing(case):
    assert Preprocess.from_dict(case[2].to_dict()) == case[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fit": "squeeze"}, "expected fit stretch, cover, contain"),
        ({"fit": "cover"}, "expected a height and width to resize to, and a crop"),
        ({"channels": "gbr"}, "expected channels rgb, bgr, grey, got 'gbr'"),
        ({"fill": [0, 0, 256]}, "expected 3 values from 0 to 255"),
        ({"square": 1}, "expected preprocessing fields of the right types"),
        ({"fill": [0.5, 1, 1]}, "expected preprocessing fields of the right types"),
    ],
)
def test_a_field_out_of_its_range_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        Preprocess.from_dict({**Preprocess().to_dict(), **fields})


@pytest.mark.parametrize(("corner", "first"), [("even", [2, 2, 4, 4]), ("down", [1, 2, 3, 4])])
def test_a_crop_whose_margins_differ_begins_at_the_even_pixel_or_before_it(corner, first):
    """Nothing is resized, so that every reader shows pixels of the photo."""
    for margin, start in zip((3, 5, 7, 9), first, strict=True):
        photo = _photo((20, 20 + margin))
        preprocess = Preprocess(20, (20, 20), (0.0,) * 3, (1.0,) * 3, corner=corner)
        for reader in ("float", "pillow", "torchvision", "opencv"):
            seen = _read(preprocess, [photo], reader)[0].permute(1, 2, 0)
            expected = torch.from_numpy(photo[:, start : start + 20]) / 255
            torch.testing.assert_close(seen, expected, msg=f"{reader}, {margin}")
    with pytest.raises(CheckpointError, match="expected corner even or down, got 'up'"):
        Preprocess(corner="up")
    assert Preprocess.from_dict(Preprocess(corner="down").to_dict()).corner == "down"
    assert "corner" not in Preprocess().to_dict()
