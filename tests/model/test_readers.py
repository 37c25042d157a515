from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as plain

from mlperturb.errors import UsageError
from mlperturb.model.linear import Dense, to_pixels
from mlperturb.model.preprocess import Preprocess, pad_batch
from mlperturb.model.readers import Reader, parse_reader, parse_readers
from mlperturb.model.taps import bind_products

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HAS_OPENCV = importlib.util.find_spec("cv2") is not None
needs_opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV is not installed")
OPENCV = [pytest.param(name, marks=needs_opencv) for name in ("opencv", "opencv:area", "opencv:cubic")]
ENGINES = ["pillow", "pillow-12", "torchvision", "torchvision:no-antialias", "torchvision-cuda", "pillow:lanczos"]
EIGHT_BITS = pytest.mark.parametrize("name", [*ENGINES, "pillow:box", "torchvision-cuda:no-antialias", *OPENCV])
ALL = pytest.mark.parametrize("name", ["float", "float:no-antialias", "float:bicubic", *ENGINES, *OPENCV])
KERNELS = pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])


def _sizes(count: int = 50) -> list[tuple[int, int]]:
    """Return (height, width) of every kind: odd, long and thin, tiny, or with one side of the result's length."""
    generator = np.random.default_rng(14)
    sizes = [(1, 1), (1, 9), (700, 3), (3, 700), (56, 56), (56, 91), (133, 56), (57, 55), (320, 240), (240, 320)]
    while len(sizes) < count:
        height, width = generator.integers(2, 400 if len(sizes) % 2 else 60, 2)
        sizes.append((int(height), int(width)))
    return sizes


def _photos(sizes) -> list[torch.Tensor]:
    """Return 8-bit photos, (3, H, W); every third has only black and white, so that cubic filters overshoot."""
    generator = np.random.default_rng(3)
    photos = [generator.integers(0, 256, (3, *size), dtype=np.uint8) for size in sizes]
    return [torch.from_numpy(np.where(n % 3 == 2, photo // 128 * 255, photo)) for n, photo in enumerate(photos)]


def _pil(photo: torch.Tensor) -> Image.Image:
    return Image.fromarray(photo.permute(1, 2, 0).contiguous().numpy())


def _library(reader: Reader, photo: torch.Tensor, size: tuple[int, int], kernel: str) -> torch.Tensor:
    """Return the library's own result for an 8-bit photo, (3, h, w)."""
    kernel = reader.filter or kernel
    if reader.engine == "opencv":
        import cv2

        flag = {"bilinear": "LINEAR", "bicubic": "CUBIC"}.get(kernel, kernel.upper())
        rows = cv2.resize(np.array(_pil(photo)), (size[1], size[0]), interpolation=getattr(cv2, f"INTER_{flag}"))
        return torch.from_numpy(rows).permute(2, 0, 1)
    if reader.engine.startswith("pillow"):
        image = _pil(photo)
        if reader.engine == "pillow-12":
            image = image.resize((size[1], image.height), Image.Resampling[kernel.upper()])
        return torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling[kernel.upper()]))).permute(
            2, 0, 1
        )
    resize = v2.Resize(list(size), interpolation=InterpolationMode(kernel), antialias=reader.antialias)
    if reader.engine == "torchvision":
        return resize(photo)
    if tuple(photo.shape[1:]) == size:
        return photo
    return resize(photo.float()).clamp(0, 255).round().to(torch.uint8)


@KERNELS
@EIGHT_BITS
def test_50_photos_of_odd_sizes_in_one_batch_are_bit_for_bit_what_the_library_makes_of_each(name, kernel):
    reader, photos = parse_reader(name), _photos(_sizes())
    batch, sizes = pad_batch(photos)
    bound = reader.bind(Preprocess((56, 61), interpolation=kernel), sizes, "cpu")
    for ours, photo in zip(bound.resized(batch), photos, strict=True):
        assert torch.equal(ours, _library(reader, photo, (56, 61), kernel))


@KERNELS
@pytest.mark.parametrize("engine", ["pillow", "pillow-12", "torchvision"])
@pytest.mark.parametrize("target", [(56, 61), (224, 224)])
def test_the_integer_products_of_a_device_are_bit_for_bit_what_the_library_computes(engine, kernel, target):
    reader, photos = Reader(engine), _photos(_sizes())
    batch, sizes = pad_batch(photos)
    bound = reader.bind(Preprocess(target, interpolation=kernel), sizes, "cpu")
    products = bind_products(engine, kernel, [plan.axes for plan in bound.plans], "cpu")
    assert torch.equal(products(batch), bound.resized(batch))
    some = torch.tensor([8, 2, 31])
    assert torch.equal(products.select(some)(batch[some]), bound.resized(batch)[some])


@KERNELS
@pytest.mark.parametrize("engine", ["pillow", "pillow-12", "torchvision"])
def test_a_crop_after_the_shorter_side_is_the_same_from_library_and_products(engine, kernel):
    sizes = [(40, 53), (53, 40), (97, 31), (26, 26), (18, 90), (300, 301)]
    photos = _photos(sizes)
    batch, _ = pad_batch(photos)
    bound = Reader(engine).bind(Preprocess(26, (21, 22), interpolation=kernel), sizes, "cpu")
    products = bind_products(engine, kernel, [plan.axes for plan in bound.plans], "cpu")
    assert torch.equal(products(batch), bound.resized(batch))


def test_pillow_equals_torchvisions_transform_of_a_pil_image_up_to_the_networks_input():
    transform = v2.Compose(
        [v2.Resize(26), v2.CenterCrop((21, 22)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    )
    for photo in _photos([(40, 53), (97, 31), (31, 97), (24, 25)]):
        size = (photo.shape[1], photo.shape[2])
        ours = Reader("pillow").bind(Preprocess(26, (21, 22), MEAN, STD), [size], "cpu")(photo[None] / 255)[0]
        theirs = plain.normalize(transform(_pil(photo)), list(MEAN), list(STD))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_torchvision_equals_its_own_transform_of_uint8_tensors_up_to_the_networks_input():
    transform = v2.Compose([v2.Resize(26), v2.CenterCrop((21, 22)), v2.ToDtype(torch.float32, scale=True)])
    for photo in _photos([(40, 53), (97, 31), (31, 97), (24, 25)]):
        size = (photo.shape[1], photo.shape[2])
        ours = Reader("torchvision").bind(Preprocess(26, (21, 22), MEAN, STD), [size], "cpu")(photo[None] / 255)[0]
        for layout in (photo, photo.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            theirs = plain.normalize(transform(layout), list(MEAN), list(STD))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_float_without_antialias_equals_the_interpolation_kernel():
    photo = torch.rand(1, 3, 90, 71)
    ours = parse_reader("float:no-antialias").bind(Preprocess((24, 31)), [(90, 71)], "cpu")(photo)
    theirs = torch.nn.functional.interpolate(photo, size=(24, 31), mode="bilinear") * 2 - 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@ALL
def test_the_result_of_a_photo_and_its_gradient_do_not_depend_on_its_batch(name):
    sizes = [(37, 53), (9, 60), (41, 4), (70, 22)]
    preprocess, weights = Preprocess((24, 20)), torch.randn(3, 24, 20)
    batch, _ = pad_batch([photo / 255 for photo in _photos(sizes)])
    inside, _ = pad_batch([torch.ones(3, *size) for size in sizes])
    loud = torch.where(inside > 0, batch, 1e3).requires_grad_()
    bound = parse_reader(name).bind(preprocess, sizes, "cpu")
    mapped = bound(loud)
    (gradient,) = torch.autograd.grad((mapped * weights).sum(), loud)
    assert torch.equal(gradient[inside == 0], torch.zeros(int((inside == 0).sum())))
    some = torch.tensor([2, 0])
    torch.testing.assert_close(bound.select(some)(loud[some]), mapped[some], rtol=0, atol=2e-6)
    for row, (height, width) in enumerate(sizes):
        alone = batch[row : row + 1, :, :height, :width].clone().requires_grad_()
        seen = parse_reader(name).bind(preprocess, [(height, width)], "cpu")(alone)
        torch.testing.assert_close(seen[0], mapped[row], rtol=0, atol=2e-6)
        (own,) = torch.autograd.grad((seen * weights).sum(), alone)
        torch.testing.assert_close(own[0], gradient[row, :, :height, :width], rtol=1e-4, atol=1e-5)


def _matrix(band):
    """Return the matrix of which a band has the entries."""
    width = len(band.transposed.counts)
    matrix = torch.zeros(len(band.counts), width)
    matrix[torch.arange(len(matrix)).repeat_interleave(band.counts), band.places] = band.values
    return matrix


@ALL
def test_the_backward_pass_is_the_librarys_own_map_without_rounding(name):
    """The linear map predicts the 8-bit result to a grey level where rounding errors average out."""
    reader, size = parse_reader(name), (90, 71)
    bound = reader.bind(Preprocess((31, 24), None, (0, 0, 0), (1, 1, 1)), [size], "cpu")
    resizer = getattr(bound, "resizer", bound)
    photo = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 98, 79), 9, stride=1)  # smooth: cubic filters do not clip
    photo = to_pixels(photo).float() / 255
    rows, columns = (_matrix(band) for band in resizer.linear.bands[0])
    predicted = rows @ photo @ columns.T
    assert float((bound(photo) - predicted).abs().max()) <= 1.01 / 255
    image = photo.clone().requires_grad_()
    weights = torch.randn(1, 3, 31, 24)
    (gradient,) = torch.autograd.grad((bound(image) * weights).sum(), image)
    expected = rows.T @ weights @ columns
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_gradients_can_be_batched():
    image = torch.rand(2, 3, 30, 33, requires_grad=True)
    bound = Reader("pillow").bind(Preprocess((5, 6)), [(30, 33)] * 2, "cpu")
    rows, columns = (_matrix(band).expand(2, -1, -1) for band in bound.resizer.linear.bands[0])
    mapped = replace(bound, resizer=replace(bound.resizer, linear=Dense(rows, columns)))(image)  # as on a device
    seeds = torch.randn(4, *mapped.shape)
    packed = torch.autograd.grad(mapped, image, seeds, is_grads_batched=True, retain_graph=True)[0]
    for seed, gradient in zip(seeds, packed, strict=True):
        torch.testing.assert_close(torch.autograd.grad(mapped, image, seed, retain_graph=True)[0], gradient)


def test_iterates_are_rounded_to_8_bits_before_they_are_read():
    photo = _photos([(40, 30)])[0][None].float()
    bound = Reader("pillow").bind(Preprocess((16, 16)), [(40, 30)], "cpu")
    assert torch.equal(bound((photo + 0.49) / 255), bound(photo / 255))
    assert torch.equal(bound(photo / 255 * 1.0 - 0.3 / 255), bound(photo / 255))


@pytest.mark.parametrize(
    "name",
    ["float", "pillow", "pillow:bicubic", "pillow-12:lanczos", "torchvision:bicubic:no-antialias", "opencv:area"],
)
def test_names_are_read_and_written(name):
    assert parse_reader(name).name == name


def test_a_list_of_names_is_read_once_each():
    assert [one.name for one in parse_readers(["float, pillow", "pillow", "torchvision"])] == [
        "float",
        "pillow",
        "torchvision",
    ]


@pytest.mark.parametrize(
    "name", ["", "gimp", "pillow:", "pillow:area", "pillow:no-antialias", "opencv:bilinear", "float:bilinear:bicubic"]
)
def test_unknown_names_are_refused_in_a_line(name):
    with pytest.raises(UsageError) as refused:
        parse_reader(name)
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError):
        parse_readers([])


def test_a_reader_whose_library_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="pip install opencv"):
        Reader("opencv").bind(Preprocess(), [(30, 30)], "cpu")
