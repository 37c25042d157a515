"""The lattice of a JPEG file: its quantised DCT coefficients. Coordinates in which an attack moves, and their pixels.

A coordinate is the change of a dequantised coefficient times the length of the change of the pixels that a change by 1
makes, so that ||r||_2 is the length of the perturbation, but for rounding and for what two coefficients share. A step
of the rounding is thus as long as the change of the pixels. Of the changes that lower the linearised loss by the same
amount, rounding r = -s g to steps picks the shortest: the coefficients with the most fall for their length.

The forward pass is the real codec: the pixels that Pillow decodes from the file as it would be written. The backward
pass is the transpose of JPEG's linear parts: inverse DCT, chroma upsampling, colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mlperturb.model.survival import dct_matrix
from mlperturb.photos.images import Pixels
from mlperturb.photos.jpeg import Jpeg, Plane, load_jpeglib

Made = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]  # places in the coordinates, and changes there in steps

_COLOURS = ((1.0, 1.0, 1.0), (0.0, -0.344136, 1.772), (1.402, -0.714136, 0.0))  # R, G, B of a change of Y, Cb, Cr
_LARGEST = 1023  # of a coefficient that a baseline file can hold


class JpegLattice:
    """The coefficients of the JPEG files of a batch; a photo without a file is on the lattice of 8-bit pixels.

    Coordinates are (n, 3, H', W'): a plane for each component, the coefficients of a block in the block's place.

    Args:
        files: of each photo; None for a photo whose file holds pixels.
        size: (height, width) of the padded batch.
        device: of the batch.
        regions: the pixels that may change in each photo, boolean, (height, width); None for all. A block may change
            if no pixel outside depends on it.

    Attributes:
        steps: the step of each coordinate, (n, 3, H', W').
    """

    small = False

    def __init__(
        self,
        files: Sequence[Jpeg | None],
        size: tuple[int, int],
        device: torch.device,
        regions: Sequence[npt.NDArray[np.bool_] | None] | None = None,
    ) -> None:
        load_jpeglib()
        self._size = size
        self._files = tuple(None if file is None else _Linear(file, device) for file in files)
        self._made: tuple[dict[bytes, Made], ...] = tuple({} for _ in files)  # by the pixels, shared by selections
        shapes = [size, *(shape for file in self._files if file is not None for shape in file.shapes)]
        height, width = (max(shape[axis] for shape in shapes) for axis in (0, 1))
        self.steps = torch.full((len(files), 3, height, width), 1 / 255, device=device)
        self._may = torch.zeros(len(files), 3, height, width, dtype=torch.bool, device=device)
        for row, file in enumerate(self._files):
            if file is None:
                self._may[row, :, : size[0], : size[1]] = True
                continue
            region = None if regions is None else regions[row]
            for number, (tall, wide) in enumerate(file.shapes):
                self.steps[row, number, :tall, :wide] = file.steps(number)
                self._may[row, number, :tall, :wide] = file.changeable(number, region)

    def zeros(self, images: Tensor) -> Tensor:
        """Return the coordinates of the photos, (n, 3, H', W')."""
        return images.new_zeros(self.steps.shape)

    def points(self, images: Tensor, latent: Tensor) -> Tensor:
        """Return the pixels of the files with rounded coordinates, (n, 3, H, W)."""
        height, width = self._size
        points = ((images + latent[:, :, :height, :width]) * 255).round().clamp(0, 255) / 255
        changes = (latent / self.steps).round().to(torch.int32).cpu().numpy()
        rows = [row for row, file in enumerate(self._files) if file is not None]
        for row in rows:
            pixels = self._decode(row, changes[row])
            points[row] = 0
            points[row, :, : pixels.shape[0], : pixels.shape[1]] = (
                torch.from_numpy(pixels).to(points.device).permute(2, 0, 1).to(points) / 255
            )
        return points

    def planes(self, row: int, pixels: Pixels) -> tuple[Plane, ...] | None:
        """Return the coefficients of a file whose pixels, (height, width, 3), were among `points`, or are the photo's.

        None for a photo without a file.
        """
        file = self._files[row]
        if file is None:
            return None
        changes = np.zeros(self.steps.shape[1:], dtype=np.int32)
        made = self._made[row].get(_digest(pixels))
        if made is not None:
            changes.reshape(-1)[made[0]] = made[1]
        return file.planes(changes)

    def fall(self, scale: Tensor, latent: Tensor, gradient: Tensor) -> Tensor:
        """Return -<round(a r), g>, (n,), with a r rounded to steps."""
        return -self.round(scale.view(-1, 1, 1, 1) * latent).mul_(gradient).flatten(1).sum(1)

    def round(self, latent: Tensor) -> Tensor:
        """Return coordinates rounded to steps."""
        return (latent / self.steps).round() * self.steps

    def pull(self, gradient: Tensor, points: Tensor) -> Tensor:
        """Return the gradient with respect to the coordinates; 0 where they may not change."""
        height, width = self._size
        pulled = gradient.new_zeros(self.steps.shape)
        # A pixel that is black or white already does not go further, whatever the coefficients do.
        stuck = ((points <= 0) & (gradient > 0)) | ((points >= 1) & (gradient < 0))
        gradient = gradient.masked_fill(stuck, 0.0)
        for row, file in enumerate(self._files):
            if file is None:
                pulled[row, :, :height, :width] = gradient[row]
            else:
                file.pull(gradient[row], pulled[row])
        return pulled * self._may

    def clip(self, latent: Tensor, images: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return coordinates that the files can hold; pixels are clipped by the decoder."""
        height, width = self._size
        clipped = latent.clone()
        for row, file in enumerate(self._files):
            if file is None:
                inside = slice(None), slice(height), slice(width)
                wanted = images[row] + latent[row][inside]
                limits = [bound if bound.dim() == 0 else bound[row] for bound in (low, high)]
                clipped[row][inside] = wanted.clamp(*limits) - images[row]
        return clipped * self._may

    def largest(self, latent: Tensor) -> Tensor:
        """Return the largest coordinate of each photo, (n,), where a step is 1/255."""
        return (latent / self.steps).flatten(1).abs().amax(1) / 255

    def select(self, rows: Tensor) -> JpegLattice:
        """Return the lattice of some photos."""
        chosen = object.__new__(JpegLattice)
        chosen._size = self._size
        chosen._files = tuple(self._files[row] for row in rows.tolist())
        chosen._made = tuple(self._made[row] for row in rows.tolist())
        chosen.steps, chosen._may = self.steps[rows], self._may[rows]
        return chosen

    def _decode(self, row: int, changes: npt.NDArray[np.int32]) -> Pixels:
        """Return the pixels of a file with changed coefficients, and remember the changes."""
        file = self._files[row]
        assert file is not None
        pixels = file.jpeg.decode(file.planes(changes))
        places = np.flatnonzero(changes)
        self._made[row][_digest(pixels)] = places, changes.reshape(-1)[places]
        return pixels


def _digest(pixels: Pixels) -> bytes:
    return blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()


@dataclass(frozen=True)
class _Linear:
    """JPEG's linear parts for one file.

    Attributes:
        jpeg: the file.
        device: where they are computed.
    """

    jpeg: Jpeg
    device: torch.device

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The (height, width) of each component's plane of coefficients."""
        return [(8 * plane.shape[0], 8 * plane.shape[1]) for plane in self.jpeg.planes]

    def ratio(self, number: int) -> tuple[int, int]:
        """Return by how much a component is made larger, (down, across)."""
        tall, wide = (max(sampling[axis] for sampling in self.jpeg.sampling) for axis in (0, 1))
        down, across = self.jpeg.sampling[number]
        return tall // down, wide // across

    def steps(self, number: int) -> Tensor:
        """Return the length of a step of each coefficient of a component, in its plane, (height, width)."""
        tile = self.lengths(number) * torch.from_numpy(self.jpeg.tables[number].astype(np.float32)).to(self.device)
        rows, columns = self.jpeg.planes[number].shape[:2]
        return tile.repeat(rows, columns) / 255

    def lengths(self, number: int) -> Tensor:
        """Return the length of the change of the pixels, on the 0-255 scale, for a change of each coefficient by 1."""
        down, across = (torch.tensor([_gain(place, times) for place in range(8)]) for times in self.ratio(number))
        return (torch.outer(down, across) * float(np.linalg.norm(self.colours[number]))).to(self.device)

    @property
    def colours(self) -> list[tuple[float, float, float]]:
        """The change of R, G and B for a change by 1 of each component."""
        return list(_COLOURS[: len(self.jpeg.planes)])

    def planes(self, changes: npt.NDArray[np.int32]) -> tuple[Plane, ...]:
        """Return the coefficients with the changes, (3, H', W'), added."""
        planes = []
        for number, plane in enumerate(self.jpeg.planes):
            rows, columns = plane.shape[:2]
            part = changes[number, : 8 * rows, : 8 * columns]
            moved = plane + part.reshape(rows, 8, columns, 8).swapaxes(1, 2)
            moved = np.where(
                part.reshape(rows, 8, columns, 8).swapaxes(1, 2) != 0, moved.clip(-_LARGEST, _LARGEST), plane
            )
            planes.append(moved.astype(np.int16))
        return tuple(planes)

    def pull(self, gradient: Tensor, result: Tensor) -> None:
        """Write the gradient of the coordinates, (3, H', W'), given that of the padded pixels, (3, H, W)."""
        height, width = self.jpeg.size
        turned = _turned(gradient, self.jpeg.orientation, (height, width))
        dct = dct_matrix().to(gradient)
        for number, (tall, wide) in enumerate(self.shapes):
            colours = torch.tensor(self.colours[number], device=gradient.device, dtype=gradient.dtype)
            plane = torch.einsum("c,chw->hw", colours, turned)
            plane = _shrink(plane, self.ratio(number))
            plane = functional.pad(plane, (0, wide - plane.shape[1], 0, tall - plane.shape[0]))
            blocks = plane.view(tall // 8, 8, wide // 8, 8).transpose(1, 2)
            pulled = dct @ blocks @ dct.T / self.lengths(number).to(gradient)
            result[number, :tall, :wide] = pulled.transpose(1, 2).reshape(tall, wide)

    def changeable(self, number: int, region: npt.NDArray[np.bool_] | None) -> Tensor:
        """Return which coefficients of a component may change, boolean, in its plane."""
        tall, wide = self.shapes[number]
        if region is None:
            return torch.ones(tall, wide, dtype=torch.bool, device=self.device)
        outside = torch.from_numpy(~region).to(self.device).float().expand(3, -1, -1)
        plane = _shrink(_turned(outside, self.jpeg.orientation, self.jpeg.size)[0], self.ratio(number))
        plane = functional.pad(plane, (0, wide - plane.shape[1], 0, tall - plane.shape[0]))
        blocks = plane.view(tall // 8, 8, wide // 8, 8).amax((1, 3)) <= 0
        return blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)


def _turned(upright: Tensor, orientation: int, size: tuple[int, int]) -> Tensor:
    """Return padded upright pixels, (3, H, W), as they are stored, (3, height, width), for an EXIF orientation."""
    height, width = size
    if orientation >= 5:
        height, width = width, height
    pixels = upright[:, :height, :width]
    if orientation in (2, 7, 3, 6):
        pixels = pixels.flip(2)
    if orientation in (4, 7, 3, 8):
        pixels = pixels.flip(1)
    return pixels.transpose(1, 2) if orientation >= 5 else pixels


@lru_cache
def _gain(place: int, times: int) -> float:
    """Return how much longer a cosine of 8 points, number `place`, is after it was made `times` longer.

    libjpeg's interpolation to twice the length has the weights 3/4 and 1/4; to other lengths it repeats samples.
    """
    share = 0.625 + 0.375 * float(np.cos(np.pi * place / 8)) if times == 2 else 1.0
    return float((times * share) ** 0.5)


def _shrink(plane: Tensor, ratio: tuple[int, int]) -> Tensor:
    """Return the transpose of a component's upsampling, applied to a plane, (height, width)."""
    size = tuple(-(-side // times) for side, times in zip(plane.shape, ratio, strict=True))
    if ratio == (1, 1):
        return plane
    with torch.enable_grad():
        small = plane.new_zeros(1, 1, *size, requires_grad=True)
        large = small
        for axis, times in enumerate(ratio):
            if times == 2:
                scale = (2, 1) if axis == 0 else (1, 2)
                bigger = [large.shape[2] * scale[0], large.shape[3] * scale[1]]
                large = functional.interpolate(large, size=bigger, mode="bilinear", align_corners=False)
            else:
                large = large.repeat_interleave(times, 2 + axis)
        (shrunk,) = torch.autograd.grad(
            large,
            small,
            functional.pad(plane, (0, large.shape[3] - plane.shape[1], 0, large.shape[2] - plane.shape[0]))[None, None],
        )
    return shrunk[0, 0]
