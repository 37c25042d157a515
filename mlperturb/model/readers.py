"""Readers: how a program turns the 8-bit pixels of a file into the input of a network.

`Preprocess` resizes in floats. Most programs resize 8-bit pixels and round the result to 8 bits before they normalise
it: `Image.resize` and torchvision's transforms of PIL images (`pillow`: the version installed; `pillow-12`: versions
before 13, which never resize the height first), torchvision's v2 transforms of uint8 tensors (`torchvision` on the CPU,
`torchvision-cuda` on a GPU; its v1 transforms anywhere, and older versions on CPUs with AVX-512, are the latter too),
OpenCV (`opencv`).

The forward pass of a reader is the library's own code, bit for bit. Its backward pass is the library's linear map
R_h X R_w^T, as if nothing were rounded (the straight-through gradient). On a device, where a copy to the host would
take longer, `pillow`, `pillow-12` and `torchvision` run as integer products with the library's weights
(`mlperturb.model.taps`), equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlperturb.errors import UsageError

if TYPE_CHECKING:
    import torch

    from mlperturb.model.engines import BoundReader
    from mlperturb.model.preprocess import Preprocess, Resizer, Size

_PILLOW = ("bilinear", "bicubic", "box", "hamming", "lanczos")
FILTERS: dict[str, tuple[str, ...]] = {  # the first two of an engine: Preprocess.interpolation bilinear, bicubic
    "float": ("bilinear", "bicubic"),
    "pillow": _PILLOW,
    "pillow-12": _PILLOW,
    "torchvision": ("bilinear", "bicubic"),
    "torchvision-cuda": ("bilinear", "bicubic"),
    "opencv": ("linear", "cubic", "area"),
}
DEFAULT_READERS = ("float", "pillow", "torchvision")
TRANSFORMERS_READERS = (
    "torchvision",
    "pillow",
    "float",
)  # its processors resize 8-bit pixels, by torchvision or Pillow
_PLAIN = "no-antialias"
_OPTIONAL_ANTIALIAS = ("float", "torchvision", "torchvision-cuda")


@dataclass(frozen=True)
class Reader:
    """How a program reads a photo.

    Attributes:
        engine: a key of `FILTERS`.
        filter: one of the engine's filters; None for the checkpoint's own.
        antialias: whether the filter widens when a photo is made smaller. Pillow's filters always widen, OpenCV's never
            (its `area` averages instead).
    """

    engine: str
    filter: str | None = None
    antialias: bool = True

    @property
    def name(self) -> str:
        """The name on the command line, such as `pillow:bicubic`."""
        parts = [self.engine, self.filter, None if self.antialias else _PLAIN]
        return ":".join(part for part in parts if part)

    def filter_for(self, preprocess: Preprocess) -> str:
        """Return the engine's name of the filter: the reader's own, or the checkpoint's."""
        if self.filter is not None:
            return self.filter
        return FILTERS[self.engine][("bilinear", "bicubic").index(preprocess.interpolation)]

    def bind(
        self,
        preprocess: Preprocess,
        sizes: Sequence[Size],
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> Resizer | BoundReader:
        """Return the map from a batch of these (height, width) to network input, see `engines.bind_reader`."""
        from mlperturb.model.engines import bind_reader

        return bind_reader(self, preprocess, sizes, device, dtype)


def parse_reader(name: str) -> Reader:
    """Read a name such as `pillow`, `pillow:bicubic`, `torchvision:no-antialias` or `opencv:area`.

    Raises:
        UsageError: if the engine is unknown, or does not have the filter or `no-antialias`.
    """
    if not isinstance(name, str):
        raise UsageError(f"expected the name of a reader, got {name!r:.60}")
    engine, *parts = name.split(":")
    if engine not in FILTERS:
        raise UsageError(f"unknown reader {name!r}: expected {', '.join(FILTERS)}, with or without :FILTER")
    known = [*FILTERS[engine], *([_PLAIN] if engine in _OPTIONAL_ANTIALIAS else [])]
    for part in parts:
        if part not in known:
            raise UsageError(f"unknown filter {part!r} of reader {name!r}: expected {', '.join(known)}")
    kernels = [part for part in parts if part != _PLAIN]
    if len(kernels) > 1 or len(parts) - len(kernels) > 1:
        raise UsageError(f"expected one filter of a reader, got {name!r}")
    return Reader(engine, kernels[0] if kernels else None, _PLAIN not in parts)


def parse_readers(names: Iterable[str]) -> tuple[Reader, ...]:
    """Read names of readers, comma-separated or one each; repeated readers are dropped.

    Raises:
        UsageError: if a reader is unknown, or `names` is empty.
    """
    readers = [parse_reader(part.strip()) for name in names for part in name.split(",") if part.strip()]
    if not readers:
        raise UsageError(f"expected at least one reader of {', '.join(FILTERS)}")
    return tuple(dict.fromkeys(readers))


def load_opencv() -> Any:
    """Return the module `cv2`.

    Raises:
        UsageError: if OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UsageError("expected OpenCV for the reader opencv: pip install opencv-python-headless") from error
    return cv2
