from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from mlperturb.errors import CheckpointError, ImageError
from mlperturb.model.preprocess import Preprocess, pad_batch

STRETCH = Preprocess((24, 20))
SHORT_SIDE = Preprocess(26, (22, 21), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BICUBIC = Preprocess((18, 23), interpolation="bicubic")
CROPPED_BICUBIC = Preprocess(25, (20, 20), interpolation="bicubic")
ALL = pytest.mark.parametrize("preprocess", [STRETCH, SHORT_SIDE, BICUBIC, CROPPED_BICUBIC])
SIZES = [(37, 53), (53, 37), (24, 20), (7, 5), (1, 1), (1, 9), (40, 3), (26, 26), (101, 64)]


def _photo(size: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8)


@ALL
@pytest.mark.parametrize("size", SIZES)
def test_it_equals_the_reference_transform_of_8_bit_photos(preprocess, size):
    photo = _photo(size)
    ours = preprocess.bind([size], "cpu")(photo[None] / 255)
    assert ours.shape == (1, 3, *preprocess.output_size)
    torch.testing.assert_close(ours[0], preprocess.reference()(photo), rtol=0, atol=2e-5)


@ALL
def test_a_photo_longer_than_a_strip_of_unit_images_equals_the_reference(preprocess):
    photo = _photo((2, 2500))
    ours = preprocess.bind([(2, 2500)], "cpu")(photo[None] / 255)
    torch.testing.assert_close(ours[0], preprocess.reference()(photo), rtol=0, atol=2e-5)


@ALL
def test_photos_of_mixed_sizes_in_one_batch_equal_the_reference_of_each(preprocess):
    photos = [_photo(size) for size in SIZES]
    batch, sizes = pad_batch([photo / 255 for photo in photos])
    assert sizes == SIZES
    ours = preprocess.bind(sizes, "cpu")(batch)
    for mapped, photo in zip(ours, photos, strict=True):
        torch.testing.assert_close(mapped, preprocess.reference()(photo), rtol=0, atol=2e-5)


@ALL
def test_padding_has_no_influence_and_gets_no_gradient(preprocess):
    sizes = [(37, 53), (9, 60), (41, 4)]
    batch, _ = pad_batch([torch.rand(3, *size) for size in sizes])
    inside, _ = pad_batch([torch.ones(3, *size) for size in sizes])
    bound = preprocess.bind(sizes, "cpu")
    loud = torch.where(inside > 0, batch, 1e3).requires_grad_()
    mapped = bound(loud)
    assert torch.equal(mapped, bound(batch))
    mapped.square().sum().backward()
    assert torch.equal(loud.grad[inside == 0], torch.zeros(int((inside == 0).sum())))
    assert bool((loud.grad[inside > 0] != 0).any())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_photo_gets_the_gradient_of_the_interpolation_kernel(interpolation):
    preprocess = Preprocess((12, 10), None, (0.2, 0.3, 0.4), (0.5, 0.25, 0.2), interpolation)
    photos = [torch.rand(3, *size, requires_grad=True) for size in [(31, 17), (8, 25), (1, 1)]]
    weights = torch.randn(3, 3, 12, 10)
    batch, sizes = pad_batch(photos)
    (preprocess.bind(sizes, "cpu")(batch) * weights).sum().backward()
    ours = [photo.grad.clone() for photo in photos]
    std = torch.tensor(preprocess.std).view(3, 1, 1)
    for photo, weight, gradient in zip(photos, weights, ours, strict=True):
        photo.grad = None
        mapped = functional.interpolate(photo[None], size=(12, 10), mode=interpolation, antialias=True)[0] / std
        (mapped * weight).sum().backward()
        torch.testing.assert_close(gradient, photo.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preprocess", [Preprocess((3, 4)), Preprocess(4, (3, 4), interpolation="bicubic")])
def test_gradients_equal_finite_differences(preprocess):
    sizes = [(5, 6), (2, 3)]
    batch = torch.rand(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    bound = preprocess.bind(sizes, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda images: bound(images).square(), (batch,))


@ALL
def test_the_map_is_affine(preprocess):
    bound = preprocess.bind([(13, 17)], "cpu", torch.float64)
    one, other = torch.rand(2, 1, 3, 13, 17, dtype=torch.float64)
    zero = bound(torch.zeros_like(one))
    torch.testing.assert_close(bound(one + 3 * other) - zero, bound(one) - zero + 3 * (bound(other) - zero))


def test_selected_photos_map_as_they_did_in_the_batch():
    sizes = [(9, 9), (5, 30), (20, 4)]
    batch, _ = pad_batch([torch.rand(3, *size) for size in sizes])
    bound = SHORT_SIDE.bind(sizes, "cpu")
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(bound.select(rows)(batch[rows]), bound(batch)[rows])


def test_binding_twice_gives_the_same_map_and_keeps_its_matrices():
    photo = torch.rand(1, 3, 11, 13)
    first = STRETCH.bind([(11, 13)], "cpu")
    before = first(photo)
    first.linear.bands[0][0].values.zero_()
    assert torch.equal(STRETCH.bind([(11, 13)], "cpu")(photo), before)


@ALL
def test_what_to_dict_writes_survives_json_and_is_read_back(preprocess):
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    "change",
    [
        {"resize": "224"},
        {"resize": [224]},
        {"resize": [224, 224, 224]},
        {"resize": [8.5, 8]},
        {"resize": 0},
        {"resize": [10, -1]},
        {"resize": None},
        {"crop": [8]},
        {"crop": [float("inf"), 8]},
        {"crop": [25, 1]},
        {"crop": 8},
        {"mean": [0.5, 0.5]},
        {"mean": ["a", 0.5, 0.5]},
        {"mean": [float("nan"), 0.5, 0.5]},
        {"mean": 0.5},
        {"std": [0.5, 0, 0.5]},
        {"std": [0.5, float("nan"), 0.5]},
        {"interpolation": "nearest"},
        {"interpolation": None},
    ],
)
def test_fields_of_the_wrong_type_or_range_are_refused(change):
    with pytest.raises(CheckpointError, match="expected"):
        Preprocess.from_dict({**STRETCH.to_dict(), **change})


@pytest.mark.parametrize("values", [None, [], {}, {"resize": 224}, {**STRETCH.to_dict(), "extra": 1}])
def test_missing_and_unknown_fields_are_refused(values):
    with pytest.raises(CheckpointError, match=r"the fields|unknown fields"):
        Preprocess.from_dict(values)


def test_output_size_is_what_the_network_gets():
    assert [p.output_size for p in (STRETCH, SHORT_SIDE, Preprocess(9, (9, 9)))] == [(24, 20), (22, 21), (9, 9)]


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (1, 5000)])
def test_a_photo_that_would_take_for_ever_to_resize_is_refused(size):
    preprocess = Preprocess(resize=256, crop=(224, 224))
    for refuse in (preprocess.check, preprocess.matrices):
        with pytest.raises(ImageError, match=f"got {size[1]} x {size[0]} pixels"):
            refuse(size)
    preprocess.check((6000, 8000))


def test_a_thin_photo_is_resized_as_the_reference_does():
    preprocess = Preprocess(resize=64, crop=(64, 64))
    photo = torch.randint(0, 256, (3, 900, 3), dtype=torch.uint8)  # its long side becomes 19,200 pixels
    expected = preprocess.reference()(photo)
    images = photo.float().unsqueeze(0) / 255
    torch.testing.assert_close(preprocess.bind([(900, 3)], "cpu")(images)[0], expected, atol=1e-5, rtol=1e-5)
