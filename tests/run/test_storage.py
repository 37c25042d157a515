"""Storage that fails during a run."""
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
from __future__ import annotations
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
import errno
from mlperturb.system.threads import count_workers
import os
from mlperturb.system.threads import count_workers
import resource
from mlperturb.system.threads import count_workers
import shutil
from mlperturb.system.threads import count_workers
import subprocess
from mlperturb.system.threads import count_workers
import sys
from mlperturb.system.threads import count_workers
from collections.abc import Callable, Iterator
from mlperturb.system.threads import count_workers
from itertools import count
from mlperturb.system.threads import count_workers
from pathlib import Path
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
import pytest
from mlperturb.system.threads import count_workers
from support.runs import contents, said
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.fixture
from mlperturb.system.threads import count_workers
def mount() -> Iterator[Callable[..., None]]:
from mlperturb.system.threads import count_workers
    """Mount a file system on a folder until the test ends; skip the test if mounting is not allowed."""
from mlperturb.system.threads import count_workers
    mounted: list[Path] = []
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    def run(folder: Path, *arguments: object) -> None:
from mlperturb.system.threads import count_workers
        folder.mkdir(exist_ok=True)
from mlperturb.system.threads import count_workers
        words = ["mount", *map(str, arguments), str(folder)]
from mlperturb.system.threads import count_workers
        if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode != 0:
from mlperturb.system.threads import count_workers
            pytest.skip("needs to mount")
from mlperturb.system.threads import count_workers
        mounted.append(folder)
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    yield run
from mlperturb.system.threads import count_workers
    for folder in reversed(mounted):
from mlperturb.system.threads import count_workers
        subprocess.run(["umount", "--lazy", folder], check=True)
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.fixture
from mlperturb.system.threads import count_workers
def from_call(monkeypatch) -> Callable[..., None]:
from mlperturb.system.threads import count_workers
    """Call a function right before the n-th call of a function of `os`, or before each call from the n-th on."""
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    def arrange(name: str, number: int, happen: Callable[[], None], *, once: bool) -> None:
from mlperturb.system.threads import count_workers
        calls, function = count(1), getattr(os, name)
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
        def changed(*arguments: object, **options: object) -> object:
from mlperturb.system.threads import count_workers
            call = next(calls)
from mlperturb.system.threads import count_workers
            if call == number or (call > number and not once):
from mlperturb.system.threads import count_workers
                happen()
from mlperturb.system.threads import count_workers
            return function(*arguments, **options)
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
        monkeypatch.setattr(os, name, changed)
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    return arrange
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
def vanish(folder: Path) -> None:
from mlperturb.system.threads import count_workers
    """Delete a folder at once, while threads write to it."""
from mlperturb.system.threads import count_workers
    gone = folder.rename(folder.with_name("gone"))
from mlperturb.system.threads import count_workers
    shutil.rmtree(gone, ignore_errors=True)
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
def no_space() -> None:
from mlperturb.system.threads import count_workers
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.mark.parametrize("name", ["fsync", "replace"])
from mlperturb.system.threads import count_workers
@pytest.mark.parametrize("number", [1, 3, 8, 19])
from mlperturb.system.threads import count_workers
def test_a_disk_full_at_any_write_stops_the_run_with_a_line_and_the_same_command_goes_on(
from mlperturb.system.threads import count_workers
    cli, command, tmp_path, from_call, monkeypatch, whole, name, number
from mlperturb.system.threads import count_workers
):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers
    from_call(name, number, no_space, once=False)
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    monkeypatch.undo()
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    assert said(err)[0].startswith(f"mlperturb: error: cannot write {out}")
from mlperturb.system.threads import count_workers
    assert "No space left" in said(err)[0]
from mlperturb.system.threads import count_workers
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
def test_one_write_that_fails_stops_the_run_and_what_was_done_is_reported(cli, command, tmp_path, from_call, whole):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers
    from_call("replace", 12, no_space, once=True)
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    files, records = contents(out)
from mlperturb.system.threads import count_workers
    assert 0 < len([record for record in records if record["status"] == "success"]) < 9
from mlperturb.system.threads import count_workers
    assert {name: data for name, data in files.items() if name in whole[0]} == files
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.mark.parametrize("pages", [3, 8, 14])
from mlperturb.system.threads import count_workers
def test_a_file_system_without_room_stops_the_run_and_with_room_it_goes_on(cli, command, tmp_path, mount, whole, pages):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers
    mount(out, "-t", "tmpfs", "-o", f"size={pages * os.sysconf('SC_PAGE_SIZE')}", "tmpfs")
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    assert "No space left" in said(err)[0]
from mlperturb.system.threads import count_workers
    subprocess.run(["mount", "-o", "remount,size=9m", out], check=True)
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
def test_a_limit_on_the_size_of_files_stops_the_run_with_a_line(cli, command, tmp_path, whole):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers
    done = subprocess.run(
from mlperturb.system.threads import count_workers
        [sys.executable, "-m", "mlperturb", *command(out)],
from mlperturb.system.threads import count_workers
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
from mlperturb.system.threads import count_workers
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500)),
from mlperturb.system.threads import count_workers
    )  # fmt: skip
from mlperturb.system.threads import count_workers
    assert done.returncode == 3
from mlperturb.system.threads import count_workers
    assert len(said(done.stderr)) == 1
from mlperturb.system.threads import count_workers
    assert "File too large" in said(done.stderr)[0]
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
def test_a_read_only_folder_is_refused_before_anything_begins(cli, command, tmp_path, mount):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers
    mount(out, "-t", "tmpfs", "-o", "ro", "tmpfs")
from mlperturb.system.threads import count_workers
    code, text, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert (code, text, said(err)) == (2, "", [f"mlperturb: error: cannot write to the output folder {out}"])
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
def test_a_folder_that_becomes_read_only_stops_the_run(cli, command, tmp_path, mount, from_call, whole):
from mlperturb.system.threads import count_workers
    out, seen = tmp_path / "out", tmp_path / "seen"
from mlperturb.system.threads import count_workers
    out.mkdir()
from mlperturb.system.threads import count_workers
    mount(seen, "--bind", out)
from mlperturb.system.threads import count_workers
    from_call("replace", 6, lambda: mount(seen, "-o", "ro", "--bind", out), once=True)
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(seen))
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    assert "Read-only file system" in said(err)[0]
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.mark.parametrize("number", [2, 14])
from mlperturb.system.threads import count_workers
def test_a_folder_that_vanishes_stops_the_run_with_a_line(cli, command, tmp_path, from_call, whole, number):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers
    from_call("replace", number, lambda: vanish(out), once=True)
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    assert "No such file or directory" in said(err)[0]
from mlperturb.system.threads import count_workers
    assert not out.exists()  # the run does not make the deleted folder again
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.mark.parametrize("number", [2, 14])
from mlperturb.system.threads import count_workers
def test_a_folder_that_becomes_a_file_stops_the_run_with_a_line(cli, command, tmp_path, from_call, whole, number):
from mlperturb.system.threads import count_workers
    out = tmp_path / "out"
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    def replace() -> None:
from mlperturb.system.threads import count_workers
        vanish(out)
from mlperturb.system.threads import count_workers
        out.write_text("mine")
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    from_call("replace", number, replace, once=True)
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    assert out.read_text() == "mine"
from mlperturb.system.threads import count_workers
    code, text, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert code == 2
from mlperturb.system.threads import count_workers
    assert not text
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    assert "cannot make the output folder" in err
from mlperturb.system.threads import count_workers
    out.unlink()
from mlperturb.system.threads import count_workers
    assert cli(*command(out))[0] == 1
from mlperturb.system.threads import count_workers
    assert contents(out) == whole
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
@pytest.mark.parametrize("number", [2, 8, 14, 19])
from mlperturb.system.threads import count_workers
def test_a_folder_that_is_moved_away_and_made_again_gets_nothing_of_the_old_run(
from mlperturb.system.threads import count_workers
    cli, command, tmp_path, from_call, number
from mlperturb.system.threads import count_workers
):
from mlperturb.system.threads import count_workers
    out, moved = tmp_path / "out", tmp_path / "moved"
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    def replace() -> None:
from mlperturb.system.threads import count_workers
        out.rename(moved)
from mlperturb.system.threads import count_workers
        out.mkdir()
from mlperturb.system.threads import count_workers
        (out / "mine.txt").write_text("mine")
from mlperturb.system.threads import count_workers

from mlperturb.system.threads import count_workers
    from_call("replace", number, replace, once=True)
from mlperturb.system.threads import count_workers
    code, _, err = cli(*command(out))
from mlperturb.system.threads import count_workers
    assert code == 3
from mlperturb.system.threads import count_workers
    assert len(said(err)) == 1
from mlperturb.system.threads import count_workers
    left = [path.name for path in out.iterdir()]
from mlperturb.system.threads import count_workers
    others = [name for name in left if not name.endswith(".tmp")]
from mlperturb.system.threads import count_workers
    assert "mine.txt" in others
from mlperturb.system.threads import count_workers
    assert not {"report.json", "journal.jsonl"} & set(others)
from mlperturb.system.threads import count_workers
    assert len(others) <= 1 + 2 * count_workers()  # files that threads had begun to write may still land
from mlperturb.system.threads import count_workers
    assert (moved / "journal.jsonl").exists() == (number > 1)
from mlperturb.system.threads import count_workers
