"""Find and decode photos; magnify a perturbation into a map."""

from __future__ import annotations

import ctypes
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from mlperturb.errors import ImageError, UsageError
from mlperturb.photos.bounds import MAX_PIXELS, check_cost, check_size
from mlperturb.photos.kinds import ADVERSARIAL
from mlperturb.system.files import MOST, is_remote, reaching, read_regular

if TYPE_CHECKING:
    from mlperturb.photos.jpeg import Jpeg

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"} | {".avif", ".heic", ".heif"}
)
_STRIP = 4_000_000  # pixels that are converted together
_ORIENTATION = 0x0112  # the tag of EXIF
_SPACES = {"RGB": b"RGB ", "L": b"GRAY"}  # of the ICC profiles that fit the pixels that are written

Image.init()  # loads every plugin: `Image.open(formats=...)` knows only loaded plugins
_NAMES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # JPEG covers MPO; older Pillows have no AVIF
FORMATS = tuple(name for name in _NAMES if name in Image.OPEN)
with suppress(OSError, AttributeError):  # libtiff writes its own lines to stderr; Pillow raises the errors all the same
    _TIFF = ctypes.CDLL(str(import_module("PIL._imaging").__file__))
    _TIFF.TIFFSetWarningHandler(None)
    _TIFF.TIFFSetErrorHandler(None)
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")  # brands of files


@dataclass(frozen=True)
class Beside:
    """The parts of a photo's file beside its pixels.

    Attributes:
        profile: the ICC profile, which says which colours the pixels are; None for sRGB.
        exif: EXIF data, GPS included, without the orientation, which is applied to the pixels.
        xmp: XMP data.
        text: further text by key, such as a PNG's chunks of text and a JPEG's comment.
    """

    profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    text: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Photo:
    """A decoded photo.

    Attributes:
        rgb: (H, W, 3), upright: the EXIF orientation is applied.
        alpha: (H, W), or None.
        sha256: the SHA-256 of the file, in hexadecimal.
        notes: conversions that lost something, in words.
        grey: whether the file has a single channel of colour; the three of `rgb` are equal then.
        beside: the file's colour profile and metadata.
        data: the file itself, where it was asked for.
        jpeg: the coefficients of the JPEG file to be written; None where pixels are to be written.
        encoded: the pixels of that file before the attack, (H, W, 3); None where they are `rgb`.
    """

    rgb: Pixels
    alpha: Pixels | None
    sha256: str
    notes: tuple[str, ...] = ()
    grey: bool = False
    beside: Beside = Beside()
    data: bytes | None = field(default=None, repr=False)
    jpeg: Jpeg | None = field(default=None, repr=False)
    encoded: Pixels | None = field(default=None, repr=False)

    @property
    def changeable(self) -> npt.NDArray[np.bool_] | None:
        """The pixels that are not fully transparent, (H, W); None for all."""
        return None if self.alpha is None or bool(self.alpha.all()) else self.alpha > 0


def is_output(path: Path) -> bool:
    """Say whether a file name is that of an adversarial photo or of a map of `attack`."""
    return path.name.lower().endswith((*ADVERSARIAL, ".map.png"))


def find_photos(
    paths: Iterable[Path],
    *,
    recursive: bool = False,
    own: Callable[[Path], bool] = is_output,
    left_out: list[Path] | None = None,
) -> list[Path]:
    """Return the photos among `paths` and in its folders, in name order; a path of a file is always a photo.

    Args:
        paths: files and folders.
        recursive: whether to search subfolders too.
        own: says of a picture in a folder whether it is left out, because mlperturb wrote it.
        left_out: a list to which the pictures left out are added, hidden files too.

    Raises:
        UsageError: if a path does not exist or cannot be read, or no photo is found.
    """
    found: dict[Path, None] = {}
    folders, skipped = [], [] if left_out is None else left_out
    for path in paths:
        try:
            with reaching(path):
                if path.is_dir():
                    folders.append(path)
                    for inside in _list_files(path, recursive=recursive):
                        if inside.suffix.lower() in EXTENSIONS:
                            if inside.name.startswith(".") or own(inside):
                                skipped.append(inside)
                            else:
                                found.setdefault(inside)
                elif path.exists():
                    found.setdefault(path)
                else:
                    raise UsageError(f"no such file or folder: {path}")
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    if not found:
        where = ", ".join(map(str, folders)) or "the paths given"
        hint = "" if recursive else " (add -r to search subfolders)"
        hint += f"; {describe_left_out(skipped)}" if skipped else ""
        raise UsageError(f"no photo found in {where}: expected {', '.join(sorted(EXTENSIONS))}{hint}")
    return list(found)


def describe_left_out(paths: Sequence[Path]) -> str:
    """Return the words on the pictures that `find_photos` left out."""
    count = f"{len(paths)} files, such as" if len(paths) > 1 else "the file"
    return f"left out {count} {paths[0]}: hidden, or written by mlperturb"


def _list_files(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """Yield the files of a folder in name order; follow links to files, not links to folders."""
    if is_remote(folder):
        store, root = folder.fs, folder.path.rstrip("/")  # type: ignore[attr-defined]
        names = store.find(root, maxdepth=None if recursive else 1)  # a single listing, not a request for each file
        yield from sorted((folder / name.removeprefix(root).lstrip("/") for name in names), key=str)
        return
    yield from sorted(_walk(folder, recursive=recursive), key=lambda path: path.parts)


def _walk(folder: Path, *, recursive: bool) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if recursive:
                    yield from _walk(folder / entry.name, recursive=True)
            elif entry.name.lower().endswith(tuple(EXTENSIONS)):
                path = folder / entry.name
                if entry.is_file(follow_symlinks=False) or path.is_file():  # a link may be broken, or point to itself
                    yield path


def read_photo(
    path: Path, *, whole: bool = False, over: Colour | None = None, room: Callable[[int], None] = lambda _: None
) -> Photo:
    """Decode a photo to upright 8-bit RGB, and its alpha channel if it has one.

    16-bit samples are scaled to 8 bits; palettes, greys and CMYK are converted; an animation gives its first frame.

    Args:
        path: the file.
        whole: whether to keep the file itself, as `Photo.data`.
        over: the 8-bit R, G, B that a transparent photo is laid over, see `lay_over`; None to leave it as it is.
        room: called with the number of pixels, which the header says, before they are decoded; it may wait.

    Raises:
        ImageError: if the file cannot be read, is damaged, of an unknown format, larger than `MAX_PIXELS`, or would
            cost more than `bounds` allows.
        StorageError: if a store does not give the file, for any reason but that it does not exist.
    """
    try:
        data = read_regular(path, MOST)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise ImageError(f"{path} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes, which are checked here more strictly
            photo = lay_over(_decode(path, data, room), over)
        return replace(photo, data=data) if whole else photo
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is not an image of a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: expected at most {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data: this photo is unreadable
        raise ImageError(f"{path} is damaged: {str(error) or type(error).__name__:.200}") from error


def _decode(path: Path, data: bytes, room: Callable[[int], None]) -> Photo:
    notes = []
    check_cost(path, data)
    with Image.open(io.BytesIO(data), formats=[*FORMATS, *_heif(path, data)]) as image:
        check_size(path, data, image.width, image.height)
        if getattr(image, "is_animated", False) and image.format not in ("MPO", "HEIF"):  # it counts no frames
            notes.append("animated: only the first frame is taken")
            image.seek(0)
        room(image.width * image.height)
        image.load()
        if image.mode.startswith(("I", "F")):
            notes.append(f"{'floating-point' if image.mode.startswith('F') else '16-bit'}: scaled to 8 bits")
        if image.mode in ("CMYK", "YCCK"):
            notes.append("CMYK: converted to RGB without its colour profile")
        photo = convert_photo(image, sha256(data).hexdigest())
    return replace(photo, notes=tuple(notes))


def _heif(path: Path, data: bytes) -> list[str]:
    """Return Pillow's name of the HEIF format, which HEIC files have, once its plugin is loaded; nothing for others.

    Raises:
        ImageError: if the plugin is not installed.
    """
    if data[4:8] != b"ftyp" or data[8:12] not in _HEIF:
        return []
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(f"{path} is a HEIC file: expected pillow-heif: pip install 'mlperturb[heif]'") from error
    pillow_heif.register_heif_opener()
    return ["HEIF"]


def lay_over(photo: Photo, colour: Colour | None) -> Photo:
    """Return a photo with alpha as Pillow lays it over a colour, 8-bit R, G, B, without alpha; else the photo."""
    if colour is None or photo.alpha is None:
        return photo
    image = Image.new("RGBA", (photo.rgb.shape[1], photo.rgb.shape[0]), (*colour, 255))
    image.alpha_composite(Image.fromarray(np.dstack([photo.rgb, photo.alpha])))
    rgb = np.array(image.convert("RGB"))
    grey = photo.grey and len(set(colour)) == 1
    note = f"alpha: laid over {', '.join(map(str, colour))} and dropped, as the network reads it"
    return replace(photo, rgb=rgb, alpha=None, grey=grey, notes=(*photo.notes, note))


def convert_photo(image: Image.Image, digest: str) -> Photo:
    """Return a PIL image as a photo; `digest` is its SHA-256."""
    rgb, alpha = convert_image(image)
    grey = image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))  # a palette is not a channel
    return Photo(rgb, alpha, digest, (), grey, _beside(image, grey=grey))


def _beside(image: Image.Image, *, grey: bool) -> Beside:
    """Return a decoded image's profile, if it fits the pixels in RGB or grey, and its metadata."""
    info = image.info
    profile = info.get("icc_profile") or b""
    fits = profile[16:20] == _SPACES["L" if grey else "RGB"]  # the header's field "data colour space"
    exif, turned = _exif(image)
    xmp = None if turned else info.get("xmp") or info.get("XML:com.adobe.xmp")  # it may have the orientation too
    text = [(str(key), str(value)) for key, value in getattr(image, "text", {}).items() if "xmp" not in str(key)]
    if isinstance(comment := info.get("comment"), bytes):
        text.append(("Comment", comment.decode("latin-1")))
    return Beside(
        profile=profile if fits else None,
        exif=exif,
        xmp=xmp.encode() if isinstance(xmp, str) else xmp,
        text=tuple(text),
    )


def _exif(image: Image.Image) -> tuple[bytes | None, bool]:
    """Return an image's EXIF data without the orientation, and whether there was an orientation to apply."""
    raw = image.info.get("exif")
    if not isinstance(raw, bytes):
        return None, False
    try:
        exif = image.getexif()
        turned = exif.pop(_ORIENTATION, 1) != 1
        return (exif.tobytes() if turned else raw) if len(exif) else None, turned
    except Exception:  # Pillow's reader raises almost anything on damaged data: the pixels are good all the same
        return None, True


def convert_image(image: Image.Image) -> tuple[Pixels, Pixels | None]:
    """Return the pixels of a PIL image, upright, (H, W, 3), and its alpha channel, (H, W), if it has one."""
    mode, transparency = image.mode, "transparency" in image.info
    upright = image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    if mode.startswith(("I", "F")):
        return _scale_grey(np.asarray(upright)), None
    width, height = upright.size
    rgb, alpha = np.empty((height, width, 3), dtype=np.uint8), None
    if ("A" in mode.upper() and mode != "LAB") or transparency:
        alpha = np.empty((height, width), dtype=np.uint8)
    rows = max(1, _STRIP // max(1, width))
    for top in range(0, height, rows):  # the copies that Pillow makes would be some 10 bytes for each pixel
        strip = upright if rows >= height else upright.crop((0, top, width, min(top + rows, height)))
        samples = np.asarray(strip.convert("RGB" if alpha is None else "RGBA"))
        rgb[top : top + rows] = samples[..., :3]
        if alpha is not None:
            alpha[top : top + rows] = samples[..., 3]
    return rgb, alpha


def _scale_grey(grey: npt.NDArray[np.generic]) -> Pixels:
    """Scale 16-bit (or wider) grey samples to 8-bit RGB; a wider range than 16 bits is stretched to fit."""
    highest = max((float(_numbers(row).max(initial=0)) for row in grey), default=0.0)
    floats = np.issubdtype(grey.dtype, np.floating)  # a guess: in [0, 1] or [0, 255]
    top = next(scale for scale in ((1.0, 255.0) if floats else ()) + (max(highest, 65535.0),) if highest <= scale)
    scaled = np.empty((*grey.shape, 3), dtype=np.uint8)
    for row, samples in zip(scaled, grey, strict=True):  # a row at a time: 8 bytes for each sample are many
        row[:] = np.clip(np.rint(_numbers(samples) * (255.0 / top)), 0, 255)[:, None]
    return scaled


def _numbers(samples: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    return np.nan_to_num(samples.astype(np.float64))


def magnify(pixels: Pixels, photo: Pixels) -> Pixels:
    """Return the perturbation map |r| * 255 / max|r| of r = pixels - photo, (H, W, 3), max over all (Section IV-H1)."""
    magnified = np.empty(photo.shape, dtype=np.uint8)
    for row, *pair in zip(magnified, pixels, photo, strict=True):  # a row at a time: 8 bytes for each number are many
        row[:] = np.abs(np.subtract(*pair, dtype=np.int16))
    top = int(magnified.max(initial=0))
    for row in magnified:
        row[:] = np.rint(row * (255.0 / top if top else 0.0))
    return magnified
