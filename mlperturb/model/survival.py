"""Attacks that survive JPEG compression: each JPEG quality is a further view of the photo.

The forward pass runs Pillow's own codec. The backward pass is the gradient of JPEG's linear parts (colour, chroma
subsampling, block DCT). The gradient of rounding a coefficient is the slope of the rounding, averaged over nearby
coefficients: it is small where small changes do not change the rounded value, as in fine detail rounded to 0.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional

from mlperturb.model.preprocess import Size
from mlperturb.photos.images import Pixels
from mlperturb.photos.purify import Purification

_DITHER = 0.15  # standard deviation of the average over nearby coefficients, in quantisation steps


def compress(images: Tensor, sizes: Sequence[Size], purification: Purification) -> Tensor:
    """Return purified photos, (N, 3, H, W) in [0, 1], padded with zeros; differentiable.

    The forward pass is the purification's own code on 8-bit pixels; the backward pass is that of a map nearby.

    Args:
        images: in [0, 1], padded at the bottom and right; rounded to 8 bits before they are purified.
        sizes: (height, width) of each photo.
        purification: what the photos go through.
    """
    result = torch.zeros_like(images)
    for row, (height, width) in enumerate(sizes):
        image = images[row, :, :height, :width]
        pixels = (image.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        real = torch.from_numpy(purification.apply(pixels)[0]).to(images).permute(2, 0, 1) / 255
        if images.requires_grad and torch.is_grad_enabled():
            near = _NEARBY[purification.kind](image, pixels, purification)
            real = near + (real - near).detach()
        result[row, :, :height, :width] = real
    return result


def _near_jpeg(image: Tensor, pixels: Pixels, purification: Purification) -> Tensor:
    """Return a photo, (3, h, w), after the linear parts of JPEG, with the quantisation tables of its own file.

    WebP's lossy format has the same parts (half the chroma, a block transform, quantisation); JPEG's tables of the same
    quality stand for WebP's own.
    """
    jpeg = Purification("jpeg", max(purification.setting, 1), purification.subsampling)
    data = jpeg.encode(pixels)
    assert data is not None
    with Image.open(io.BytesIO(data)) as opened:
        assert isinstance(opened, JpegImageFile)
        tables = [opened.quantization[number] for number in (0, 1)]  # luma and chroma, in natural order
    return _linear_jpeg(image, tables, halve=purification.subsampling == "4:2:0")


def _near_median(image: Tensor, pixels: Pixels, purification: Purification) -> Tensor:  # noqa: ARG001
    """Return the median of each window, (3, h, w): the gradient goes to the pixel that is the median."""
    width = purification.setting
    padded = functional.pad(image[None], (width // 2,) * 4, mode="replicate")
    windows = padded.unfold(2, width, 1).unfold(3, width, 1).flatten(4)[0]
    return windows.median(dim=3).values


def _near_bits(image: Tensor, pixels: Pixels, purification: Purification) -> Tensor:  # noqa: ARG001
    """Return the photo itself, (3, h, w): the gradient passes straight through the coarser rounding."""
    return image


def _near_resize(image: Tensor, pixels: Pixels, purification: Purification) -> Tensor:  # noqa: ARG001
    """Return the photo, (3, h, w), resized down and up in floats, with Pillow's bicubic filter."""
    size = (int(image.shape[1]), int(image.shape[2]))
    smaller = [max(1, round(side * purification.setting / 100)) for side in size]
    down = functional.interpolate(image[None], smaller, mode="bicubic", antialias=True)
    return functional.interpolate(down, size, mode="bicubic", antialias=True)[0]


_NEARBY: dict[str, Callable[[Tensor, Pixels, Purification], Tensor]] = {
    "jpeg": _near_jpeg,
    "webp": _near_jpeg,
    "median": _near_median,
    "bits": _near_bits,
    "resize": _near_resize,
}


def _linear_jpeg(image: Tensor, tables: Sequence[Sequence[int]], *, halve: bool) -> Tensor:
    """Return a photo, (3, h, w), after JPEG's linear parts; only its gradient is used."""
    height, width = image.shape[1:]
    padded = functional.pad(image[None] * 255, (0, -width % 16, 0, -height % 16), mode="replicate")
    to_ycc, from_ycc = (matrix.to(image) for matrix in _colour_matrices())
    planes = torch.einsum("ck,nkhw->nchw", to_ycc, padded)
    luma, chroma = planes[:, :1], planes[:, 1:]
    if halve:
        chroma = functional.avg_pool2d(chroma, 2)
    luma, chroma = _through_blocks(luma - 128, tables[0]) + 128, _through_blocks(chroma, tables[1])
    if halve:
        chroma = functional.interpolate(chroma, scale_factor=2, mode="bilinear")
    out = torch.einsum("ck,nkhw->nchw", from_ycc, torch.cat([luma, chroma], dim=1))
    return out[0, :, :height, :width] / 255


def _through_blocks(planes: Tensor, table: Sequence[int]) -> Tensor:
    """Pass planes around 0, (1, c, h, w), through the DCT of 8 x 8 blocks, quantisation and back."""
    _, count, height, width = planes.shape
    dct = dct_matrix().to(planes)
    steps = torch.tensor(list(table), device=planes.device).to(planes).view(8, 8)
    blocks = planes.view(count, height // 8, 8, width // 8, 8).transpose(2, 3)
    coefficients = dct @ blocks @ dct.T / steps
    coefficients = coefficients * _sensitivity(coefficients.detach())
    back = dct.T @ (coefficients * steps) @ dct
    return back.transpose(2, 3).reshape(1, count, height, width)


def _sensitivity(coefficients: Tensor) -> Tensor:
    """Return the slope of rounding, averaged over a normal distribution: least at integers, most half-way between."""
    distance = (coefficients - coefficients.floor() - 0.5) / _DITHER  # from the edge between two integers
    edges = torch.exp(-0.5 * distance.square())
    for side in (-1, 1):
        edges = edges + torch.exp(-0.5 * (distance + side / _DITHER).square())
    slopes: Tensor = edges / (_DITHER * (2 * torch.pi) ** 0.5)
    return slopes


@lru_cache
def dct_matrix() -> Tensor:
    """Return the orthonormal DCT-II of 8 points, (8, 8)."""
    places = torch.arange(8, dtype=torch.double)
    matrix = torch.cos((2 * places + 1) * places[:, None] * torch.pi / 16) / 2
    matrix[0] /= 2**0.5
    return matrix


@lru_cache
def _colour_matrices() -> tuple[Tensor, Tensor]:
    """Return RGB -> YCbCr of JFIF, and its inverse, (3, 3) each."""
    rows = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    matrix = torch.tensor(rows, dtype=torch.double)
    return matrix, torch.linalg.inv(matrix)
