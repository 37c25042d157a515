"""Write a report as a self-contained page, `index.html`, or pages of 200 photos, without network and framework.

File and label names are untrusted text: the template escapes everything, control characters too, and the page's
Content-Security-Policy allows only the page's own script, by its hash.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, UndefinedError
from PIL import Image, ImageFilter

from mlperturb.errors import ImageError
from mlperturb.photos.images import read_photo
from mlperturb.run.outputs import PHOTOS, page_paths
from mlperturb.run.pictures import find_output, find_photo
from mlperturb.run.report import thresholds_of
from mlperturb.show.shown import choose_labels
from mlperturb.system.files import is_remote, write_file
from mlperturb.system.text import counted, listed, printable

_SIDE = 360  # pixels of a thumbnail's longer side
_FLIPS = 16  # labels of A that a card shows
_BARS = 8  # labels of B, or of neither set, that a card shows beside those of A


def write_gallery(
    report: dict[str, Any], folder: Path, path: Path, done: Callable[[str | None], None] = lambda _: None
) -> None:
    """Write the pages of a report whose files lie in `folder`: `PHOTOS` photos a page, see `page_paths`.

    Args:
        report: a report of `attack`.
        folder: the folder of its PNGs.
        path: the file of the first page.
        done: called after each image, with the error if a picture of it cannot be read, else with None.

    Raises:
        OutputError: if a page cannot be written.
        ValueError, LookupError, TypeError: if the report does not follow its schema.
    """
    environment = Environment(
        loader=PackageLoader("mlperturb.show", "gallery"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    script = _asset(environment, "gallery.js")
    images = report["images"]
    pages = page_paths(path, len(images))
    for number, page in enumerate(pages):
        start = number * PHOTOS
        part = images[start : start + PHOTOS]
        stream = environment.get_template("index.html.j2").stream(
            report=report,
            counts=Counter(image["status"] for image in images),
            here=Counter(image["status"] for image in part),
            cards=_cards(report, start, folder, path.parent, done),
            labels=sorted({label for image in part for label in image["flip"]}),
            first=start + 1,
            last=start + len(part),
            pages=[None if other == page else _address(other.name) for other in pages],
            script=script,
            style=_asset(environment, "gallery.css"),
            hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
        )
        try:
            text = "".join(stream)
        except UndefinedError as error:
            raise ValueError(str(error)) from error
        write_file(page, text.encode("utf-8", "backslashreplace"))


def _harmless(value: Any) -> Any:
    """Return a text with its control characters as escapes, such as one that turns the direction of a line round."""
    return printable(value) if type(value) is str and not value.isprintable() else value  # our own files are `Markup`


def _asset(environment: Environment, name: str) -> Any:
    from markupsafe import Markup

    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])  # our own file, no data in it


def _cards(
    report: dict[str, Any], start: int, folder: Path, page: Path, done: Callable[[str | None], None]
) -> Iterator[dict[str, Any]]:
    """Yield the values of each image of a page for the template."""
    thresholds = thresholds_of(report["classifier"])
    for number, image in enumerate(report["images"][start : start + PHOTOS], start):
        pictures = {"photo": find_photo(image, folder, report["settings"])}
        missing = None
        for kind in ("adversarial", "map"):
            try:
                pictures[kind] = find_output(image, kind, folder, report["settings"])
            except ImageError as error:
                missing = str(error)
        thumbnails: dict[str, str] = {}
        for kind, picture in pictures.items():
            try:
                if picture is not None:
                    thumbnails[kind] = _thumbnail(picture, sparse=kind == "map")
            except ImageError as error:
                missing = str(error)
        yield {
            **image,
            "number": number,
            "name": _name(image),
            "thumbnails": thumbnails,
            "links": {
                kind: _link(pictures[kind], page, image["files"][kind])
                for kind in ("adversarial", "map")
                if kind in thumbnails
            },
            "reason": _reason(image),
            "bars": choose_labels(image, thresholds, min(len(image["flip"]), _FLIPS) + _BARS),
            "hidden": len(thresholds) - min(len(thresholds), min(len(image["flip"]), _FLIPS) + _BARS),
            "rmsd": image["distortion"]["rmsd"] if image["distortion"] else None,
        }
        done(missing)


def _reason(image: dict[str, Any]) -> str:
    """Return why an attack failed or reached only a part; empty for a success, and where there is an error."""
    constraints = image["constraints"]
    if image["status"] not in ("failed", "partial") or image["error"] or not constraints:
        return ""
    violated = constraints["violated"]
    missing = constraints["total"] - constraints["held"]
    lost = [
        name for part in ("readers", "survival") for name, one in (image.get(part) or {}).items() if one["violated"]
    ]
    parts = []
    if missing:
        parts.append(f"{missing} of {counted(constraints['total'], 'constraint')} not met: {listed(violated, 5)}")
    if lost:
        parts.append(f"not met in {listed(lost, 5)}")
    if image["files"]["adversarial"] is None:
        parts.append("no label flipped, so no file was written")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + ("" if text.endswith("...") else ".")


def _name(image: dict[str, Any]) -> str:
    """Return a photo's name in the subfolder of its files, if they have a subfolder."""
    folder = Path(image["files"]["adversarial"] or "").parent
    return str(folder / Path(image["source"]).name)


def _thumbnail(path: Path, *, sparse: bool) -> str:
    """Return a small WebP as a data URI; in a `sparse` picture, single bright pixels stay bright.

    Raises:
        ImageError: if the picture does not exist or cannot be read.
    """
    image = Image.fromarray(read_photo(path).rgb)
    shrink = max(image.size) // _SIDE
    if sparse and shrink:
        image = image.filter(ImageFilter.MaxFilter(2 * (shrink // 2) + 1))
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _link(path: Path | None, page: Path, name: str) -> str:
    """Return a file's address relative to the page; the leading `./` keeps a name from being read as a scheme."""
    assert path is not None
    return _address(name if is_remote(path) else os.path.relpath(path.resolve(), page.resolve()))


def _address(name: str) -> str:
    return "./" + quote(name.encode("utf-8", "surrogateescape"))
