"""Reports of strangers: what they name is opened only where its content is recorded, and no host is called."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.run.pictures import _is_near, find_photo
from mlperturb.system.files import file_sha256, parse_path, read_regular, same_store

COMMANDS = ("gallery", "figures", "jpeg-defend")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """Attack two photos; return the folder of `photos` and `out`."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for number in range(2):
        Image.fromarray(np.roll(TINY_PIXELS, number, 1)).save(folder / "photos" / f"{number}.png")
    command = [
        "attack",
        folder / "photos",
        "--flip",
        "cat",
        "--method",
        "fgs",
        "--budget",
        "fast",
        "--checkpoint",
        tiny,
    ]
    command += ["--out", folder / "out", "--device", "cpu", "--quiet"]
    subprocess.run([sys.executable, "-m", "mlperturb", *map(str, command)], check=True)
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    """Return a copy of the output folder; its photos are where they were."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def edit(out: Path, **image: Any) -> dict[str, Any]:
    """Change values of the first image, or settings; return the report."""
    report = json.loads((out / "report.json").read_text())
    report["settings"] |= image.pop("settings", {})
    report["images"][0] |= image
    (out / "report.json").write_text(json.dumps(report))
    return report


def every(cli, out: Path, tmp_path: Path, *names: str) -> dict[str, tuple[int, str, str]]:
    """Run commands that read reports; return exit code, stdout and stderr."""
    found = {}
    for name in names or ("gallery", "jpeg-defend"):
        target = tmp_path / f"of-{name}"
        more = {
            "gallery": ["--out", target / "page.html"],
            "figures": ["--out", target, "--kind", "case"],
            "jpeg-defend": ["--out", target, "--quality", 50, "--device", "cpu"],
        }[name]
        found[name] = cli(name, out, "--overwrite", *more)
        assert "Traceback" not in found[name][2]
    return found


@pytest.fixture
def listener():
    """Listen at a port of this machine; yields the port and the number of connections so far."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)

        def calls() -> int:
            count = 0
            while True:
                try:
                    server.accept()[0].close()
                except BlockingIOError:
                    return count
                count += 1

        yield server.getsockname()[1], calls


@pytest.mark.parametrize("scheme", ["ftp", "http", "s3", "nope"])
def test_no_host_that_a_report_names_is_called_and_its_photo_is_gone(cli, out, tmp_path, listener, scheme):
    port, calls = listener
    edit(out, source=f"{scheme}://127.0.0.1:{port}/x.png")
    for name, (code, _, err) in every(cli, out, tmp_path, *(COMMANDS if scheme == "ftp" else ["gallery"])).items():
        assert code == 0, (name, err)
    assert calls() == 0
    assert (tmp_path / "of-gallery" / "page.html").read_text().count("the photo is gone") == 1


def test_a_photo_at_a_url_is_found_in_the_folder_given(cli, out, tmp_path):
    edit(out, source="ftp://nowhere/0.png")
    code, text, _ = cli(
        "jpeg-defend", out, "--photos", tmp_path / "photos", "--quality", 50, "--json", "--device", "cpu"
    )
    assert code == 0
    assert json.loads(text)["qualities"][0]["clean_images"] == 2


@pytest.mark.parametrize(
    ("url", "folder", "same"),
    [
        ("memory://b/x.png", "memory://b/out", True),
        ("memory://other/x.png", "memory://b/out", True),
        ("ftp://b/x.png", "memory://b/out", False),
        ("memory://b/x.png", "/b", False),
        ("http://other/x.png", "http://b/out", False),
        ("http://b/x.png", "http://b/out", True),
    ],
)
def test_a_store_is_a_scheme_and_its_host_or_any_of_its_buckets(url, folder, same):
    path = parse_path(folder) if not folder.startswith("http") else cast(Path, folder)
    assert same_store(url, path) == same


@pytest.mark.parametrize(
    ("place", "near"), [(r"C:\x.png", True), (r"photos\x.png", True), (r"\\host\share\x.png", False)]
)
def test_a_share_of_windows_is_another_machine(monkeypatch, place, near):
    monkeypatch.setattr("mlperturb.run.pictures.is_remote", lambda _: False)
    assert _is_near(cast(Path, PureWindowsPath(place)), cast(Path, PureWindowsPath(r"C:\out"))) == near


@pytest.mark.parametrize("kind", ["absolute", "up"])
def test_pictures_elsewhere_are_shown_only_if_their_content_is_recorded(cli, out, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.fromarray(TINY_PIXELS).save(secret / "s.png")
    files = {"adversarial": "s.png", "map": "s.png"}
    elsewhere = str(secret) if kind == "absolute" else "../secret"
    for hashes in ({}, {"adversarial": "0" * 64, "map": "0" * 64}):
        edit(out, files=files, hashes=hashes, settings={"out": elsewhere})
        for name, (code, _, err) in every(cli, out, tmp_path).items():
            assert code in (1, 2), name
            assert "does not lie beside its report" in err or "has changed" in err or "No such file" in err
        assert (tmp_path / "of-gallery" / "page.html").read_text().count("data:image") == 2  # the photos alone
    digest = sha256((secret / "s.png").read_bytes()).hexdigest()
    edit(out, hashes={"adversarial": digest, "map": digest})
    assert every(cli, out, tmp_path)["gallery"][0] == 1
    assert (tmp_path / "of-gallery" / "page.html").read_text().count("data:image") == 4


def test_a_link_beside_a_report_that_leads_out_is_not_followed_unless_its_content_is_recorded(cli, out, tmp_path):
    Image.fromarray(TINY_PIXELS).save(tmp_path / "secret.png")
    (out / "0.adv.png").unlink()
    (out / "0.adv.png").symlink_to(tmp_path / "secret.png")
    for hashes, words in (({}, "does not lie beside its report"), (None, "has changed since its report")):
        report = edit(out, **({} if hashes is None else {"hashes": hashes}))
        if hashes is None:
            report["images"][0]["hashes"] = report["images"][1]["hashes"]
            (out / "report.json").write_text(json.dumps(report))
        for name, (code, _, err) in every(cli, out, tmp_path, *COMMANDS).items():
            assert code == 1, name
            assert words in err


def test_reports_without_recorded_content_show_what_lies_beside_them(cli, out, tmp_path):
    report = json.loads((out / "report.json").read_text())
    assert [set(image.pop("hashes")) for image in report["images"]] == [{"adversarial", "map"}] * 2
    (out / "report.json").write_text(json.dumps(report))
    shutil.move(out, tmp_path / "moved")
    assert [code for code, _, _ in every(cli, tmp_path / "moved", tmp_path, *COMMANDS).values()] == [0, 0, 0]


def test_a_png_that_changed_since_is_an_error_of_its_own(cli, out, tmp_path):
    shutil.copy(out / "1.adv.png", out / "0.adv.png")
    results = every(cli, out, tmp_path)
    for name, (code, _, err) in results.items():
        assert code == 1, name
        assert "0.adv.png has changed since its report was written" in err
    images = json.loads((tmp_path / "of-jpeg-defend" / "jpeg-defence.json").read_text())["images"]
    assert ["error" in image for image in images] == [True, False]


@pytest.mark.parametrize("folder", ["a\0b", "ftp://127.0.0.1:1/x", "\ud800", 5, ["x"], "x" * 5000])
def test_a_folder_that_cannot_be_is_refused_in_a_line(cli, out, tmp_path, folder):
    edit(out, settings={"out": folder})
    for name, (code, _, err) in every(cli, out, tmp_path, *COMMANDS).items():
        assert code in (1, 2), name
        assert all(line.startswith("mlperturb: ") for line in err.splitlines())


def test_a_picture_whose_name_is_half_a_character_is_an_error_of_its_own(cli, out, tmp_path):
    images = json.loads((out / "report.json").read_text())["images"]
    edit(out, files=images[0]["files"] | {"adversarial": "\ud800.png"})
    for name, (code, _, err) in every(cli, out, tmp_path, *COMMANDS).items():
        assert code == 1, name
        assert "is not the name of a file beside its report" in err


@pytest.mark.parametrize("name", ["/dev/zero", "/proc/kmsg", "/proc/self/mem", "/proc/kcore", "pipe.png", "/dev/stdin"])
def test_a_device_that_a_report_names_is_not_opened(cli, out, tmp_path, name):
    os.mkfifo(out / "pipe.png")
    report = edit(out, source=name)
    assert find_photo(report["images"][0], out, report["settings"]) is None
    report["classifier"]["checkpoint"] = name
    (out / "report.json").write_text(json.dumps(report))
    results = every(cli, out, tmp_path)
    assert [code for code, _, _ in results.values()] == [0, 2]


def test_a_file_is_read_only_if_it_is_regular_and_not_too_large(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert read_regular(path, 3) == b"abc"
    with pytest.raises(OSError, match="more than 2 bytes"):
        read_regular(path, 2)
    assert file_sha256(path) == sha256(b"abc").hexdigest()
    assert file_sha256(path, 2) == sha256(b"ab").hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(odd, 3)
