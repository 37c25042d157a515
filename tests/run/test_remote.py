"""Photos and outputs at URLs: fsspec's `memory://` in place of a bucket, and `file://`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from support.models import TINY_PIXELS

import mlperturb.run.search
from mlperturb.errors import StorageError, UsageError
from mlperturb.photos.images import find_photos
from mlperturb.system.files import is_remote, list_names, parse_path, write_file, writing
from mlperturb.system.journal import Journal, find_journal

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def _empty_store():
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]


@pytest.fixture
def bucket(tmp_path) -> str:
    """Put five photos, one of them in a subfolder, and a file that is not a photo at a URL."""
    for number in range(5):
        path = tmp_path / "photo.png"
        Image.fromarray(np.roll(TINY_PIXELS, number, 1)).save(path)
        MEMORY.pipe_file(f"/bucket/photos/{'deep/' if number == 4 else ''}{number} x.png", path.read_bytes())
    MEMORY.pipe_file("/bucket/photos/broken.png", b"nonsense")
    MEMORY.pipe_file("/bucket/photos/notes.txt", b"no photo")
    return "memory://bucket"


@pytest.fixture
def command(bucket, tiny):
    def build(out: object, photos: object = f"{bucket}/photos", *more: object) -> list[object]:
        options = ["--flip", "cat", "--keep", "rest", "--budget", "fast", "--batch-size", 2, "--checkpoint", tiny]
        return ["attack", photos, "-r", *options, "--device", "cpu", "--out", out, *more]

    return build


def contents(out: str) -> dict[str, bytes]:
    return {name.rpartition("/")[2]: MEMORY.cat_file(name) for name in MEMORY.find(out) if name.endswith(".png")}


def records(text: bytes | str) -> list[dict]:
    images = json.loads(text)["images"]
    for image in images:
        image["source"] = image["source"].rpartition("/")[2]
        image["cost"].pop("seconds")
        if image["error"]:
            image["error"]["message"] = image["error"]["message"].rpartition("/")[2]
    return images


def test_photos_at_a_url_come_to_the_files_and_report_that_they_come_to_here(cli, command, bucket, tmp_path):
    code, text, err = cli(*command("memory://bucket/out", f"{bucket}/photos", "--html"))
    assert code == 1, err
    assert "memory://bucket/photos/broken.png is not an image" in err
    assert "files in memory://bucket/out" in text
    here = tmp_path / "here"
    here.mkdir()
    MEMORY.get("/bucket/photos", str(here), recursive=True)
    assert cli(*command(tmp_path / "out", here / "photos"))[0] == 1
    assert contents("/bucket/out") == {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    there = MEMORY.cat_file("/bucket/out/report.json")
    assert records(there) == records((tmp_path / "out" / "report.json").read_text())
    page = MEMORY.cat_file("/bucket/out/index.html").decode()
    assert page.count("<article") == 6
    assert page.count("data:image") == 15
    assert 'href="./0%20x.adv.png"' in page


def test_a_run_at_a_url_goes_on_and_refuses_other_settings(cli, command, monkeypatch):
    out = "memory://bucket/out"
    assert cli(*command(out))[0] == 1
    before = contents("/bucket/out")
    MEMORY.rm_file("/bucket/out/2 x.adv.png")
    attacked, search = [], mlperturb.run.search.search

    def watch(classifier, photos, *more):
        attacked.append(len(photos))
        return search(classifier, photos, *more)

    monkeypatch.setattr(mlperturb.run.search, "search", watch)
    code, _, err = cli(*command(out))
    assert code == 1
    assert "going on: 5 of 6" in err
    assert attacked == [2]  # its batch alone
    assert contents("/bucket/out") == before
    code, _, err = cli(*command(out, "memory://bucket/photos", "--seed", 3))
    assert code == 2
    assert "was written with another seed" in err
    assert cli(*command(out, "memory://bucket/photos", "--seed", 3, "--overwrite"))[0] == 1
    assert len([name for name in MEMORY.find("/bucket/out/journal") if name.endswith("-00000000.json")]) == 1


def test_a_store_that_fails_stops_the_run_and_the_same_command_finishes_it(cli, command, monkeypatch):
    assert cli(*command("memory://bucket/whole"))[0] == 1
    real, calls = MemoryFileSystem._open, []

    def full(self, path, mode="rb", **options):
        if mode == "wb":
            calls.append(path)
            if len(calls) == 6:
                raise ConnectionError("the store does not answer")
        return real(self, path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", full)
        code, _, err = cli(*command("memory://bucket/out"))
    assert code == 3
    assert err.count("the store does not answer") == 1
    assert "Traceback" not in err
    assert cli(*command("memory://bucket/out"))[0] == 1
    assert contents("/bucket/out") == contents("/bucket/whole")


def test_what_is_there_already_at_a_url_is_not_replaced(cli, command):
    MEMORY.pipe_file("/bucket/out/1 x.adv.png", b"mine")
    code, _, err = cli(*command("memory://bucket/out"))
    assert code == 2
    assert "1 x.adv.png" in err
    assert "--overwrite" in err
    assert MEMORY.cat_file("/bucket/out/1 x.adv.png") == b"mine"
    code, _, err = cli("attack", "memory://bucket/out/1 x.adv.png", "memory://bucket/photos/1 x.png", "--flip", "cat",
                       *command("memory://bucket/out")[-6:], "--overwrite")  # fmt: skip
    assert code == 2
    assert "an output would replace the photo memory://bucket/out/1 x.adv.png" in err


def test_a_file_url_is_an_ordinary_path(cli, command, tmp_path):
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photo.png")
    assert cli(*command(f"file://{tmp_path}/out", f"file://{tmp_path}/photo.png"))[0] == 0
    assert (tmp_path / "out" / "photo.adv.png").is_file()
    assert (tmp_path / "out" / "journal.jsonl").is_file()
    assert parse_path("FILE://localhost/a%20b") == Path("/a b")
    assert not is_remote(parse_path("a:b"))


@pytest.mark.parametrize("url", ["nope://x/y", "s3://bucket/x", "://x", "data://x"])
def test_a_url_that_cannot_be_opened_is_refused_in_a_line(cli, command, url):
    if url.startswith("s3") and find_spec("s3fs") is not None:
        pytest.skip("s3fs is installed")
    code, _, err = cli(*command("memory://bucket/out", url))
    assert code in (2, 3)
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "mlperturb[s3]" in err or not url.startswith("s3")


def test_predict_reads_from_a_url(cli, bucket, tiny):
    code, text, _ = cli("predict", f"{bucket}/photos/0 x.png", "--checkpoint", tiny, "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(text)["images"][0]["source"] == "memory://bucket/photos/0 x.png"


def test_a_folder_at_a_url_is_listed_with_and_without_its_subfolders(bucket):
    folder = parse_path(f"{bucket}/photos")
    assert [path.name for path in find_photos([folder])] == ["0 x.png", "1 x.png", "2 x.png", "3 x.png", "broken.png"]
    assert "4 x.png" in [path.name for path in find_photos([folder], recursive=True)]
    with pytest.raises(UsageError, match="no such file or folder: memory://bucket/nothing"):
        find_photos([parse_path("memory://bucket/nothing")])
    assert list_names(folder) >= {"0 x.png", "deep"}
    assert list_names(parse_path("memory://none")) == set()


def test_an_object_is_written_whole_or_not_at_all():
    path = parse_path("memory://bucket/file")
    write_file(path, b"first")

    def break_off() -> None:
        with writing(path) as stream:
            stream.write(b"second")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert path.read_bytes() == b"first"


def test_a_journal_at_a_url_is_an_object_a_line_in_the_order_of_the_turns():
    path, key = parse_path("memory://bucket/j.jsonl"), {"seed": 0}
    with Journal(path, key, rank=0, size=2) as first, Journal(path, key, rank=1, size=2) as second:
        first.append({"a": 1})
        second.append({"a": 2})
        assert not first.resumed
    with Journal(path, key) as again:
        again.append({"a": 3})
        assert again.resumed
        assert [entry["a"] for entry in again.entries()] == [1, 2, 3]
    MEMORY.pipe_file("/bucket/j/.DS_Store", b"no line")
    assert len(find_journal(path)) == 6
    with pytest.raises(UsageError, match="another seed"):
        Journal(path, {"seed": 1})
    MEMORY.pipe_file(str(find_journal(path)[-1]).removeprefix("memory:/"), b"torn")
    with pytest.raises(StorageError, match="damaged"), Journal(path, key) as torn:
        list(torn.entries())


class CutShortError(Exception):
    """As the error of a store's own package when a body is cut short: no OSError."""


class Cut(io.BytesIO):
    """An object of which half comes."""

    def __init__(self, whole: bytes) -> None:
        super().__init__(whole[: len(whole) // 2])
        self.size = len(whole)


@pytest.fixture
def broken(monkeypatch) -> Callable[..., None]:
    """Make reading objects fail, those whose name has a part in it; `error` None: they come cut short, in silence."""

    def arrange(part: str, error: Exception | None) -> None:
        real = MemoryFileSystem._open

        def fail(self, path, mode="rb", **options):
            stream = real(self, path, mode, **options)
            if mode == "rb" and part in path:
                if error is not None:
                    raise error
                return Cut(stream.getvalue())
            return stream

        monkeypatch.setattr(MemoryFileSystem, "_open", fail)

    return arrange


ERRORS = [
    PermissionError("Forbidden"),
    OSError(5, "Internal Server Error"),
    CutShortError("Response payload is not completed\n<Payload 400>"),
    None,
]


@pytest.mark.parametrize("error", ERRORS, ids=["403", "500", "cut", "short"])
@pytest.mark.parametrize("part", ["1 x.adv.png", "1 x.map.png", "photos/1 x.png", "out/journal/"])
def test_what_a_store_does_not_give_is_not_gone_the_run_stops_and_nothing_is_replaced(
    cli, command, broken, monkeypatch, part, error
):
    assert cli(*command("memory://bucket/out"))[0] == 1
    before = {name: MEMORY.cat_file(name) for name in MEMORY.find("/bucket/out")}
    broken(part, error)
    code, _, err = cli(*command("memory://bucket/out"))
    monkeypatch.undo()
    assert code in (2, 3) if part == "out/journal/" and error is None else code == 3
    assert "Traceback" not in err
    assert sum("cannot" in line or "journal" in line for line in err.splitlines()) >= 1
    after = {name: MEMORY.cat_file(name) for name in MEMORY.find("/bucket/out")}
    kept = {name: data for name, data in after.items() if name in before and not name.endswith("report.json")}
    assert kept == {name: data for name, data in before.items() if not name.endswith("report.json")}
    old, new = (json.loads(all_of["/bucket/out/report.json"])["images"] for all_of in (before, after))
    assert [image["status"] for image in new] == [image["status"] for image in old]


@pytest.mark.parametrize("error", ERRORS[:3], ids=["403", "500", "cut"])
def test_a_photo_that_a_store_does_not_give_stops_the_run_and_is_not_called_unreadable(cli, command, broken, error):
    broken("photos/1 x.png", error)
    code, _, err = cli(*command("memory://bucket/out"))
    assert code == 3
    assert "cannot read memory://bucket/photos/1 x.png" in err
    assert "Traceback" not in err
    images = json.loads(MEMORY.cat_file("/bucket/out/report.json"))["images"]
    assert "1 x.png" not in [image["source"].rpartition("/")[2] for image in images]


def test_a_photo_that_a_store_no_longer_has_is_unreadable_and_the_others_go_on(cli, command, broken):
    broken("photos/1 x.png", FileNotFoundError("photos/1 x.png"))
    assert cli(*command("memory://bucket/out"))[0] == 1
    images = json.loads(MEMORY.cat_file("/bucket/out/report.json"))["images"]
    assert sorted(image["status"] for image in images).count("unreadable") == 2


@pytest.mark.parametrize("error", ERRORS[:3], ids=["403", "500", "cut"])
def test_a_report_that_a_store_does_not_give_is_a_line(cli, command, broken, error):
    assert cli(*command("memory://bucket/out"))[0] == 1
    broken("report.json", error)
    for name in ("gallery", "figures", "jpeg-defend"):
        code, _, err = cli(name, "memory://bucket/out", *(["--device", "cpu"] if name == "jpeg-defend" else []))
        assert (code, err.count("\n")) == (3, 1)
        assert "cannot read memory://bucket/out/report.json" in err
