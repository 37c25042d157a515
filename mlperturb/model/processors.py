"""The image processors of transformers as `Preprocess`: each is tried on photos, so that none is misread in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlperturb.errors import CheckpointError
from mlperturb.model.preprocess import Preprocess, to_tensor
from mlperturb.model.readers import TRANSFORMERS_READERS, parse_reader

FILES = ("preprocessor_config.json", "processor_config.json")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_KERNELS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_TRIALS = ((67, 101), (90, 61), (48, 48))  # (height, width) of the photos of the trial


def express(processor: Any, folder: Path) -> Preprocess:
    """Return what an image processor of transformers does, as `Preprocess`.

    Args:
        processor: with torchvision's backend.
        folder: named in errors.

    Raises:
        CheckpointError: if a field says what `Preprocess` cannot, or the processor does more than its fields say.
    """
    fields = _Fields(processor, folder)
    found = Preprocess.from_dict(
        {**fields.frame(), **fields.colours(), "corner": "down", "readers": TRANSFORMERS_READERS}
    )
    _try(processor, found, fields.kind, folder)
    return found


class _Fields:
    """The fields of a processor."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self.processor, self.folder = processor, folder
        self.kind = type(processor).__name__.removesuffix("Fast")

    def get(self, name: str, default: object = None) -> Any:
        """Return a field, or a default where it is missing or null."""
        found = getattr(self.processor, name, None)
        return default if found is None else found

    def refuse(self, name: str, wanted: str) -> CheckpointError:
        """Return the error that names a field."""
        got = self.get(name)
        shown = dict(got) if name in ("size", "crop_size") and got is not None else got
        return CheckpointError(f"expected {wanted} in the preprocessing of {self.folder}, got {name} {shown!r:.80}")

    def frame(self) -> dict[str, Any]:
        """Return the fields of `Preprocess` that say where a photo goes."""
        if not self.get("do_resize", False):
            raise self.refuse("do_resize", "photos to be resized")
        if self.get("do_pad", False):
            raise self.refuse("do_pad", "no padding")
        resample = self.get("resample", 2)
        try:
            interpolation = _INTERPOLATIONS[int(resample)]
        except (TypeError, ValueError, KeyError) as error:
            known = isinstance(resample, int) and 0 <= resample < len(_KERNELS)
            name = f", {_KERNELS[int(resample)]}" if known else ""
            raise self.refuse("resample", f"2 (bilinear) or 3 (bicubic){name and ' resampling'}") from error
        resize, crop = self.sizes()
        return {"resize": resize, "crop": crop, "interpolation": interpolation}

    def sizes(self) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
        """Return the size to resize to, and the crop."""
        size, given = self.get("size"), self.get("crop_size")
        crop = (given.height, given.width) if self.get("do_center_crop", False) and given is not None else None
        short, share = getattr(size, "shortest_edge", None), self.get("crop_pct")
        if short is None:
            if getattr(size, "height", None) is None or size.width is None:
                raise self.refuse("size", "a height and width, or the shortest edge, to resize to")
            if self.kind == "PoolFormerImageProcessor" and share and size.height == size.width:
                return int(size.height / share), crop
            return (size.height, size.width), crop
        if size.longest_edge is not None:
            raise self.refuse("size", "a height and width, or the shortest edge alone, to resize to")
        if self.kind == "ConvNextImageProcessor":
            return (int(short / share), (short, short)) if short < 384 else ((short, short), None)
        if self.kind == "LevitImageProcessor":
            short = int(256 / 224 * short)
        elif self.kind == "PoolFormerImageProcessor" and share:
            short = int(short / share)
        if crop is None:
            raise self.refuse("do_center_crop", "a crop after resizing to a shortest edge")
        return short, crop

    def colours(self) -> dict[str, Any]:
        """Return the fields of `Preprocess` that say what becomes of colours.

        A pixel x in [0, 1] becomes (x r - shift - mean) / std, with r = 255 times the rescale factor.
        """
        scale = 255 * float(self.get("rescale_factor", 1 / 255)) if self.get("do_rescale", False) else 255.0
        shift = 1.0 if self.get("rescale_offset", False) and self.get("do_rescale", False) else 0.0
        mean, std = [0.0] * 3, [1.0] * 3
        if self.get("do_normalize", False):
            mean, std = self.three("image_mean"), self.three("image_std")
        if self.kind == "EfficientNetImageProcessor" and self.get("include_top", False):
            mean, std = mean, [one * two for one, two in zip(std, self.three("image_std"), strict=True)]
        channels = "bgr" if self.get("do_flip_channel_order", False) else "rgb"
        return {
            "mean": [(shift + value) / scale for value in mean],
            "std": [value / scale for value in std],
            "channels": channels,
        }

    def three(self, name: str) -> list[float]:
        """Return a number for each channel."""
        found = self.get(name)
        try:
            values = [float(found)] * 3 if isinstance(found, int | float) else [float(value) for value in found]
        except (TypeError, ValueError) as error:
            raise self.refuse(name, "three numbers") from error
        if len(values) != 3:
            raise self.refuse(name, "three numbers")
        return values


def _try(processor: Any, preprocess: Preprocess, kind: str, folder: Path) -> None:
    """Compare a processor with `Preprocess` on photos.

    Raises:
        CheckpointError: if they differ by more than rounding.
    """
    rng = np.random.default_rng(0)
    for size in _TRIALS:
        photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        ours = parse_reader("torchvision").bind(preprocess, [size], "cpu")(to_tensor(photo, torch.device("cpu"))[None])
        if preprocess.channels == "bgr":
            ours = ours.flip(1)
        theirs = processor(images=photo, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        near = 1e-4 * max(1.0, float(ours.abs().max()))
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, rtol=0, atol=near):
            raise CheckpointError(
                f"{kind} of transformers does more than resize, crop and normalise photos for {folder}: "
                "give `preprocess`, fields that do the same"
            )
