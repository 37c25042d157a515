from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mlperturb.photos.jpeg import Jpeg, read_jpeg

pytest.importorskip("jpeglib")

from mlperturb.model.coefficients import JpegLattice

CPU = torch.device("cpu")
SMOOTH = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(70, 180, (5, 7, 3), dtype=np.uint8)).resize((75, 53)), np.uint8
).copy()


def make(orientation: int = 1, mode: str = "RGB", **options) -> Jpeg:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SMOOTH).convert(mode).save(stream, "JPEG", exif=exif, **{"quality": 80, **options})
    jpeg = read_jpeg(stream.getvalue())
    assert jpeg is not None
    return jpeg


def batch(*files: Jpeg | None) -> torch.Tensor:
    """Return photos, padded; the smooth photo in place of None."""
    images = torch.zeros(len(files), 3, 80, 80)
    for row, file in enumerate(files):
        pixels = SMOOTH if file is None else file.decode(file.planes)
        images[row, :, : pixels.shape[0], : pixels.shape[1]] = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return images


KINDS = [
    *({"subsampling": ratio} for ratio in ("4:4:4", "4:2:2", "4:2:0")),
    *({"orientation": number} for number in range(2, 9)),
    {"progressive": True},
    {"mode": "L"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_origin_is_the_photo_and_the_gradient_is_that_of_the_decoder(kind):
    file = make(**kind)
    images = batch(file)
    lattice = JpegLattice([file], (80, 80), CPU)
    origin = lattice.zeros(images)
    assert torch.equal(lattice.points(images, origin), images)
    generator = torch.Generator().manual_seed(0)
    inner, expected, lengths = [], [], []
    inside = (images > 0).float()
    for _ in range(24):  # many steps at once: the decoder's own rounding averages out
        signs = torch.randint(-1, 2, origin.shape, generator=generator) * (
            torch.rand(origin.shape, generator=generator) < 0.02
        )
        latent = lattice.round(signs * 1e-9 + signs * lattice.steps) * lattice._may
        gradient = torch.randn(images.shape, generator=generator) * inside
        moved = lattice.points(images, latent) - images
        inner.append(float((moved * gradient).sum()))
        expected.append(float((lattice.pull(gradient, torch.full_like(images, 0.5)) * latent).sum()))
        lengths.append(float(moved.norm() / latent.norm()))
    assert np.corrcoef(inner, expected)[0, 1] > 0.97
    assert np.polyfit(expected, inner, 1)[0] == pytest.approx(1, abs=0.1)
    assert np.mean(lengths) == pytest.approx(1, abs=0.12)


def test_a_change_of_less_than_half_a_step_is_no_change():
    file = make()
    images = batch(file)
    lattice = JpegLattice([file], (80, 80), CPU)
    latent = torch.full_like(lattice.zeros(images), 0.49) * lattice.steps
    assert torch.equal(lattice.points(images, latent), images)
    assert lattice.largest(latent).item() == pytest.approx(0.49 / 255)
    assert not lattice.round(latent).any()


def test_photos_of_a_batch_are_jpegs_or_pixels_each_by_itself():
    one, other = make(orientation=6), make(mode="L")
    files = [one, None, other]
    images = batch(*files)
    lattice = JpegLattice(files, (80, 80), CPU)
    latent = lattice.round(torch.randn(lattice.zeros(images).shape, generator=torch.Generator().manual_seed(0)) / 20)
    latent = lattice.clip(latent, images, torch.zeros(()), torch.ones(()))
    points = lattice.points(images, latent)
    for row, file in enumerate(files):
        alone = JpegLattice([file], (80, 80), CPU)
        rows = torch.tensor([row])
        part = latent[rows][:, :, : alone.zeros(images[rows]).shape[2], : alone.zeros(images[rows]).shape[3]]
        assert torch.equal(alone.points(images[rows], part), points[rows])
        assert torch.equal(lattice.select(rows).points(images[rows], latent[rows]), points[rows])
        shape = SMOOTH.shape[:2] if file is None else file.decode(file.planes).shape[:2]
        pixels = (points[row] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()[: shape[0], : shape[1]]
        planes = lattice.select(rows).planes(0, pixels)
        if file is None:
            assert planes is None
            assert torch.equal(points[rows], ((images[rows] + part[:, :, :80, :80]) * 255).round().clamp(0, 255) / 255)
        else:
            assert planes is not None
            shown = file.decode(planes)
            assert np.array_equal(
                (points[row] * 255).permute(1, 2, 0).round().numpy()[: shown.shape[0], : shown.shape[1]], shown
            )


@pytest.mark.parametrize("kind", [{"subsampling": "4:4:4"}, {"subsampling": "4:2:0"}, {"orientation": 8}])
def test_no_pixel_outside_a_region_changes(kind):
    file = make(**kind)
    height, width = file.decode(file.planes).shape[:2]
    region = np.zeros((height, width), dtype=np.bool_)
    region[5:49, 11:60] = True
    images = batch(file)
    lattice = JpegLattice([file], (80, 80), CPU, [region])
    latent = lattice.clip(torch.ones_like(lattice.zeros(images)), images, torch.zeros(()), torch.ones(()))
    moved = (lattice.points(images, latent) != images).any(1)[0, :height, :width].numpy()
    assert moved[region].any()
    assert not moved[~region].any()
