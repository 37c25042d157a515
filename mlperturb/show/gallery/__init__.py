"""Write a report as one self-contained page, `index.html`, without network and framework.

File and label names are untrusted text: the template escapes everything, and the page's Content-Security-Policy allows
only the page's own script, by its hash.
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
from mlperturb.run.pictures import find_output, find_photo
from mlperturb.run.report import thresholds_of
from mlperturb.show.shown import choose_labels
from mlperturb.system.files import is_remote, write_file
from mlperturb.system.text import printable

_SIDE = 360  # pixels of a thumbnail's longer side
_BARS = 8  # labels of B, or of neither set, that a card shows beside those of A


def write_gallery(
    report: dict[str, Any], folder: Path, path: Path, done: Callable[[str | None], None] = lambda _: None
) -> None:
    """Write the page of a report whose files lie in `folder`.

    Args:
        report: a report of `attack`.
        folder: the folder of its PNGs.
        path: the file of the page.
        done: called after each image, with the error if a picture of it cannot be read, else with None.

    Raises:
        OutputError: if the page cannot be written.
        ValueError, LookupError, TypeError: if the report does not follow its schema.
    """
    environment = Environment(
        loader=PackageLoader("mlperturb.show", "gallery"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script = _asset(environment, "gallery.js")
    labels = sorted({label for image in report["images"] for label in image["flip"]})
    stream = environment.get_template("index.html.j2").stream(
        report=report,
        counts=Counter(image["status"] for image in report["images"]),
        cards=_cards(report, folder, path.parent, done),
        labels=labels,
        script=script,
        style=_asset(environment, "gallery.css"),
        hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )
    try:
        text = "".join(stream)
    except UndefinedError as error:
        raise ValueError(str(error)) from error
    write_file(path, text.encode("utf-8", "backslashreplace"))


def _asset(environment: Environment, name: str) -> Any:
    from markupsafe import Markup

    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])  # our own file, no data in it


def _cards(
    report: dict[str, Any], folder: Path, page: Path, done: Callable[[str | None], None]
) -> Iterator[dict[str, Any]]:
    """Yield the values of each image for the template."""
    thresholds = thresholds_of(report["classifier"])
    for number, image in enumerate(report["images"]):
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
            "name": printable(_name(image)),
            "thumbnails": thumbnails,
            "links": {
                kind: _link(pictures[kind], page, image["files"][kind])
                for kind in ("adversarial", "map")
                if kind in thumbnails
            },
            "bars": choose_labels(image, thresholds, len(image["flip"]) + _BARS),
            "rmsd": image["distortion"]["rmsd"] if image["distortion"] else None,
        }
        done(missing)


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
    name = name if is_remote(path) else os.path.relpath(path.resolve(), page.resolve())
    return "./" + quote(name.encode("utf-8", "surrogateescape"))
