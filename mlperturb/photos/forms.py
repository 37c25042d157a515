"""Images as a program holds them: tensors, arrays, PIL images and paths, in a batch or a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mlperturb.errors import UsageError
from mlperturb.photos.formats import to_image
from mlperturb.photos.images import Colour, Photo, Pixels, convert_photo, lay_over, read_photo

ImageLike: TypeAlias = "Tensor | npt.NDArray[np.uint8] | npt.NDArray[np.floating] | Image.Image | str | Path"
Images: TypeAlias = "Tensor | Sequence[ImageLike]"
Restore: TypeAlias = "Callable[[Pixels], Tensor | npt.NDArray[np.generic] | Image.Image]"


def open_images(images: Images, over: Colour | None) -> list[tuple[Photo, Restore]]:
    """Return the 8-bit pixels of every image, and a function that gives new pixels the form of the image.

    A transparent image is laid over the colour `over`, see `images.lay_over`.
    """
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise UsageError(f"expected a batch (N, 3, H, W) or a list of images, got a {form_of(images)}")
        return [_open_tensor(image) for image in images]
    if isinstance(images, str | Path | Image.Image | np.ndarray) or not isinstance(images, Sequence):
        raise UsageError(
            f"expected a batch (N, 3, H, W) or a list of images, got a {form_of(images)}: put it in a list"
        )
    return [_open_image(image, over) for image in images]


def _open_image(image: ImageLike, over: Colour | None) -> tuple[Photo, Restore]:
    if isinstance(image, str | Path):
        photo = read_photo(Path(image), over=over)
        return photo, lambda pixels: _to_pil(pixels, photo)
    if isinstance(image, Image.Image):
        photo = lay_over(convert_photo(image, sha256(image.tobytes()).hexdigest()), over)
        return photo, lambda pixels: _to_pil(pixels, photo)
    if isinstance(image, Tensor):
        return _open_tensor(image)
    if isinstance(image, np.ndarray):
        return _open_array(image)
    raise UsageError(f"expected a tensor, an array, a PIL image or a path, got a {form_of(image)}")


def _open_tensor(image: Tensor) -> tuple[Photo, Restore]:
    if image.dim() != 3 or image.shape[0] != 3:
        raise UsageError(f"expected an image tensor (3, H, W), got a {form_of(image)}")
    if image.dtype == torch.bfloat16:
        raise UsageError("expected float16, float32, float64 or uint8, got bfloat16, which cannot hold 255 grey levels")
    pixels = _to_pixels(image.detach().permute(1, 2, 0).cpu().numpy())

    def restore(adversarial: Pixels) -> Tensor:
        tensor = torch.from_numpy(adversarial).permute(2, 0, 1)
        if image.is_floating_point():
            tensor = tensor.to(image.dtype) / 255
        return tensor.to(image.device).contiguous()

    return _photo(pixels), restore


def _open_array(image: npt.NDArray[np.generic]) -> tuple[Photo, Restore]:
    if image.ndim != 3 or image.shape[2] != 3:
        raise UsageError(f"expected an image array (H, W, 3), got a {form_of(image)}")
    pixels = _to_pixels(image)

    def restore(adversarial: Pixels) -> npt.NDArray[np.generic]:
        return adversarial.astype(image.dtype) / image.dtype.type(255) if image.dtype.kind == "f" else adversarial

    return _photo(pixels), restore


def _to_pixels(values: npt.NDArray[np.generic]) -> Pixels:
    """Return uint8 values as they are, and floats in [0, 1] rounded to 8 bits; what is read-only is copied.

    Raises:
        UsageError: if the values are of another type or range.
    """
    if values.dtype == np.uint8:
        return np.require(values, np.uint8, ["C", "W"])  # torch warns of a read-only array, as of a PIL image
    if values.dtype.kind != "f":
        raise UsageError(f"expected pixels of uint8, or floats in [0, 1], got {values.dtype}")
    if values.size and not (float(values.min()) >= 0 and float(values.max()) <= 1):
        raise UsageError(f"expected floats in [0, 1], got values from {values.min():.4g} to {values.max():.4g}")
    return np.ascontiguousarray((values.astype(np.float64) * 255).round(), dtype=np.uint8)


def _to_pil(pixels: Pixels, photo: Photo) -> Image.Image:
    image = to_image(pixels, photo.alpha, grey=photo.grey)
    if photo.beside.profile is not None:
        image.info["icc_profile"] = photo.beside.profile  # `Image.save` writes it
    return image


def _photo(rgb: Pixels) -> Photo:
    return Photo(rgb, None, sha256(rgb.tobytes()).hexdigest())


def form_of(value: object) -> str:
    """Return the type and shape of a value, for an error message."""
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{'' if shape is None else f' of shape {tuple(shape)}'}"
