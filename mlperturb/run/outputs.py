"""The outputs of a run: the folder is made, and existing files are checked, before anything is replaced."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mlperturb.errors import StorageError, UsageError
from mlperturb.run.jobs import Job
from mlperturb.system.files import is_remote, list_names, reaching
from mlperturb.system.journal import find_journal, remove_journal
from mlperturb.system.text import counted

JOURNAL = "journal.jsonl"  # in the output folder
DEFENCE = "jpeg-defence.json"  # of `jpeg-defend`
TRANSFER = "transfer.json"  # of `transfer`
CHARTS = ("jpeg-histogram.png", "jpeg-curve.png")  # beside DEFENCE
CURVES = "curves.json"  # of `evaluate`
CURVE = "curve-"  # how the names of its pictures begin, beside CURVES
HISTOGRAM = "histogram-"  # how the names of its pictures of Figure 1, and those of `figures`, begin
FIGURES = "figures"  # the folder of `figures`, beside the first report
FIGURE_OF = "mlperturb figures"  # in the PNGs of every command that draws, as their software
PHOTOS = 200  # on a page of results
_DRAWN = ("case-", HISTOGRAM, "jpeg-")  # how the names of figures begin
_SIGNED = (*_DRAWN, CURVE, "transfer", "matrix")  # how the names of all pictures begin that have FIGURE_OF in them


@dataclass(frozen=True)
class Outputs:
    """Where an attack writes its results.

    Attributes:
        folder: the folder of the PNGs and maps.
        report: the file of the report.
        html: whether to write a page of the results too.
    """

    folder: Path
    report: Path
    html: bool = False

    @property
    def page(self) -> Path | None:
        """The page of the results; None if no page is to be written."""
        return self.folder / "index.html" if self.html else None


class Anchor:
    """Remembers the folders that a run writes to, so that nothing lands in folders that take their place meanwhile.

    Args:
        folders: the folders, which exist.
    """

    def __init__(self, *folders: Path) -> None:
        self._known = {folder: identity(folder) for folder in folders}

    def check(self) -> None:
        """Refuse to go on in another folder of the same name; a folder that is gone is not another folder.

        Raises:
            StorageError: if a folder is another.
        """
        for folder, known in self._known.items():
            if identity(folder) not in (None, known):
                raise StorageError(f"the folder {folder} was replaced while the run was going on")


def page_paths(first: Path, photos: int) -> list[Path]:
    """Return the files of the pages of so many photos: index.html, index-2.html and so on."""
    count = max(1, -(-photos // PHOTOS))
    return [first, *(first.with_name(f"{first.stem}-{number}{first.suffix}") for number in range(2, count + 1))]


def prepare_folder(outputs: Outputs, jobs: list[Job], *, overwrite: bool) -> frozenset[str]:
    """Make the output folder; refuse existing outputs, unless a run is resumed there or `overwrite` is given.

    Returns:
        The names of the existing outputs if a run is resumed; an empty set with `overwrite`.

    Raises:
        UsageError: if the folder cannot be made or written, or an output exists already or would replace a photo.
        StorageError: if the journal of the replaced run cannot be deleted.
    """
    out, report, page = outputs.folder, outputs.report, outputs.page
    make_folder(out)
    make_folder(report.parent)
    with reaching(report):
        if report.exists() and not report.is_file():
            raise UsageError(f"expected a file for `report`, got {report}, which is not a file")
        taken_report = report.is_symlink() or report.exists()
    targets = {name for job in jobs for name in (job.adversarial, job.map)}
    targets |= {one.name for one in page_paths(page, len(jobs))} if page else set()
    folders = subfolders(targets)
    for folder in sorted(folders - {""}):
        make_folder(out / folder)
    there, journal = {folder + name for folder in folders for name in list_names(out / folder)}, out / JOURNAL
    clash = {name.rpartition("/")[0] for name in targets | {JOURNAL} if name.rpartition("/")[2] == report.name}
    if any(same_folder(report.parent, out / folder) for folder in clash):
        raise UsageError(f"the report would replace another file of the run: choose another `report` than {report}")
    existing = [out / name for name in sorted(targets & there)] + ([report] if taken_report else [])
    written = {identity(target) for target in existing} - {None}
    taken = [job for job in jobs if job.source in existing or (written and identity(job.source) in written)]
    if taken:
        raise UsageError(f"an output would replace the photo {taken[0].source}: choose another `out` than {out}")
    if existing and not overwrite and not find_journal(journal):
        more = len(existing) - 1
        what = f"{existing[0]} and {counted(more, 'more output')} exist" if more else f"{existing[0]} exists"
        raise UsageError(f"{what} already: give `overwrite` or another `out`")
    if overwrite:
        remove_journal(journal)
        return frozenset()
    return frozenset(targets & there)


def subfolders(names: Iterable[str]) -> set[str]:
    """Return the folders of outputs, relative to the output folder: empty or with a slash at the end."""
    return {"".join(name.rpartition("/")[:2]) for name in names} | {""}


def is_own(path: Path) -> bool:
    """Say whether mlperturb wrote a picture: `attack` by its ending, a chart or figure by what it says of itself.

    The files of `attack` are told by their endings alone, since a run that was stopped has no report yet. A picture
    that merely has the name of a chart is a photo. Charts of earlier versions are told by the report beside them.
    """
    from mlperturb.photos.images import is_output  # NumPy and Pillow, which the help of a command does not need

    folder = path.parent if is_remote(path) else path.absolute().parent
    if path.name.startswith(_SIGNED) and path.suffix == ".png" and path.is_file():
        with path.open("rb") as stream:
            if FIGURE_OF.encode() in stream.read(400):
                return True
    if path.name in CHARTS and _is_ours(folder / DEFENCE):
        return True
    if path.name.startswith(CURVE) and _is_ours(folder / CURVES):
        return True
    if folder.name == FIGURES and path.name.startswith(_DRAWN):
        return any(_is_ours(folder.parent / name) for name in ("report.json", DEFENCE))
    return is_output(path)


def _is_ours(report: Path) -> bool:
    """Say whether a file begins as our JSON files do, with a schema of mlperturb."""
    if not report.is_file():
        return False
    with report.open("rb") as stream:
        return b'"schema": "mlperturb.' in stream.read(100)


def identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, links followed, which are equal for two paths of the same file.

    None for a URL, or if there is no file.
    """
    if is_remote(path):
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def same_folder(one: Path, other: Path) -> bool:
    """Say whether two paths lead to the same folder."""
    return one == other or (identity(one) is not None and identity(one) == identity(other))


def fingerprint(value: object) -> str:
    """Return the SHA-256 of a value's text, which is equal in all processes that have an equal value."""
    return sha256(repr(value).encode("utf-8", "surrogateescape")).hexdigest()


def make_folder(folder: Path) -> None:
    """Make an output folder.

    Raises:
        UsageError: if the folder cannot be made or written to.
    """
    if is_remote(folder):
        return  # an object store has no folders
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the output folder {error.filename}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to the output folder {folder}")


def folder_of(report: Path) -> Path:
    """Return the folder of a report, given as its file or its folder."""
    with reaching(report):
        return report if report.is_dir() else report.parent


def refuse_existing(targets: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse to replace an existing file without `overwrite`.

    Raises:
        UsageError: if a file exists; the message names the first.
    """
    taken = None
    for target in () if overwrite else targets:
        with reaching(target):
            taken = taken or (target if target.exists() else None)
    if taken is not None:
        raise UsageError(f"{taken} exists already: give `overwrite` or another `out`")
