"""Storage that fails during a run."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from support.runs import contents, said

from mlperturb.system.threads import count_workers


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mount a file system on a folder until the test ends; skip the test if mounting is not allowed."""
    mounted: list[Path] = []

    def run(folder: Path, *arguments: object) -> None:
        folder.mkdir(exist_ok=True)
        words = ["mount", *map(str, arguments), str(folder)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode != 0:
            pytest.skip("needs to mount")
        mounted.append(folder)

    yield run
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def from_call(monkeypatch) -> Callable[..., None]:
    """Call a function right before the n-th call of a function of `os`, or before each call from the n-th on."""

    def arrange(name: str, number: int, happen: Callable[[], None], *, once: bool) -> None:
        calls, function = count(1), getattr(os, name)

        def changed(*arguments: object, **options: object) -> object:
            call = next(calls)
            if call == number or (call > number and not once):
                happen()
            return function(*arguments, **options)

        monkeypatch.setattr(os, name, changed)

    return arrange


def vanish(folder: Path) -> None:
    """Delete a folder at once, while threads write to it."""
    gone = folder.rename(folder.with_name("gone"))
    shutil.rmtree(gone, ignore_errors=True)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 3, 8, 19])
def test_a_disk_full_at_any_write_stops_the_run_with_a_line_and_the_same_command_goes_on(
    cli, command, tmp_path, from_call, monkeypatch, whole, name, number
):
    out = tmp_path / "out"
    from_call(name, number, no_space, once=False)
    code, _, err = cli(*command(out))
    monkeypatch.undo()
    assert code == 3
    assert len(said(err)) == 1
    assert said(err)[0].startswith(f"mlperturb: error: cannot write {out}")
    assert "No space left" in said(err)[0]
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


def test_one_write_that_fails_stops_the_run_and_what_was_done_is_reported(cli, command, tmp_path, from_call, whole):
    out = tmp_path / "out"
    from_call("replace", 12, no_space, once=True)
    code, _, err = cli(*command(out))
    assert code == 3
    assert len(said(err)) == 1
    files, records = contents(out)
    assert 0 < len([record for record in records if record["status"] == "success"]) < 9
    assert {name: data for name, data in files.items() if name in whole[0]} == files
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


@pytest.mark.parametrize("pages", [3, 8, 14])
def test_a_file_system_without_room_stops_the_run_and_with_room_it_goes_on(cli, command, tmp_path, mount, whole, pages):
    out = tmp_path / "out"
    mount(out, "-t", "tmpfs", "-o", f"size={pages * os.sysconf('SC_PAGE_SIZE')}", "tmpfs")
    code, _, err = cli(*command(out))
    assert code == 3
    assert len(said(err)) == 1
    assert "No space left" in said(err)[0]
    subprocess.run(["mount", "-o", "remount,size=9m", out], check=True)
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


def test_a_limit_on_the_size_of_files_stops_the_run_with_a_line(cli, command, tmp_path, whole):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "mlperturb", *command(out)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)),
    )  # fmt: skip
    assert done.returncode == 3
    assert len(said(done.stderr)) == 1
    assert "File too large" in said(done.stderr)[0]
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


def test_a_read_only_folder_is_refused_before_anything_begins(cli, command, tmp_path, mount):
    out = tmp_path / "out"
    mount(out, "-t", "tmpfs", "-o", "ro", "tmpfs")
    code, text, err = cli(*command(out))
    assert (code, text, said(err)) == (2, "", [f"mlperturb: error: cannot write to the output folder {out}"])


def test_a_folder_that_becomes_read_only_stops_the_run(cli, command, tmp_path, mount, from_call, whole):
    out, seen = tmp_path / "out", tmp_path / "seen"
    out.mkdir()
    mount(seen, "--bind", out)
    from_call("replace", 6, lambda: mount(seen, "-o", "ro", "--bind", out), once=True)
    code, _, err = cli(*command(seen))
    assert code == 3
    assert len(said(err)) == 1
    assert "Read-only file system" in said(err)[0]
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


@pytest.mark.parametrize("number", [2, 14])
def test_a_folder_that_vanishes_stops_the_run_with_a_line(cli, command, tmp_path, from_call, whole, number):
    out = tmp_path / "out"
    from_call("replace", number, lambda: vanish(out), once=True)
    code, _, err = cli(*command(out))
    assert code == 3
    assert len(said(err)) == 1
    assert "No such file or directory" in said(err)[0]
    assert not out.exists()  # the run does not make the deleted folder again
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


@pytest.mark.parametrize("number", [2, 14])
def test_a_folder_that_becomes_a_file_stops_the_run_with_a_line(cli, command, tmp_path, from_call, whole, number):
    out = tmp_path / "out"

    def replace() -> None:
        vanish(out)
        out.write_text("mine")

    from_call("replace", number, replace, once=True)
    code, _, err = cli(*command(out))
    assert code == 3
    assert len(said(err)) == 1
    assert out.read_text() == "mine"
    code, text, err = cli(*command(out))
    assert code == 2
    assert not text
    assert len(said(err)) == 1
    assert "cannot make the output folder" in err
    out.unlink()
    assert cli(*command(out))[0] == 1
    assert contents(out) == whole


@pytest.mark.parametrize("number", [2, 8, 14, 19])
def test_a_folder_that_is_moved_away_and_made_again_gets_nothing_of_the_old_run(
    cli, command, tmp_path, from_call, number
):
    out, moved = tmp_path / "out", tmp_path / "moved"

    def replace() -> None:
        out.rename(moved)
        out.mkdir()
        (out / "mine.txt").write_text("mine")

    from_call("replace", number, replace, once=True)
    code, _, err = cli(*command(out))
    assert code == 3
    assert len(said(err)) == 1
    left = [path.name for path in out.iterdir()]
    others = [name for name in left if not name.endswith(".tmp")]
    assert "mine.txt" in others
    assert not {"report.json", "journal.jsonl"} & set(others)
    assert len(others) <= 1 + 2 * count_workers()  # files that threads had begun to write may still land
    assert (moved / "journal.jsonl").exists() == (number > 1)
