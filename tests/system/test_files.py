from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlperturb.errors import OutputError, StorageError
from mlperturb.system.files import file_sha256, write_file


def test_a_file_is_written_whole_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "out.bin"
    write_file(path, b"old and longer")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.bin"]


def test_the_fingerprint_is_that_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_parent_that_is_a_file_takes_nothing_at_all(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"cannot write .*out\.png: Not a directory"):
        write_file(tmp_path / "file" / "out.png", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_that_is_a_folder_is_an_output_error_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OutputError) as caught:
        write_file(tmp_path / "out.png", b"data")
    assert not isinstance(caught.value, StorageError)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        write_file(tmp_path / "none" / "out.png", b"data")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_fault_of_the_disk_stops_the_run_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, step, code):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(StorageError, match=os.strerror(code)):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_writers_in_one_folder_do_not_meet(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_file(tmp_path / f"{number}", bytes([number]) * 5000), range(64)))
    assert all((tmp_path / f"{number}").read_bytes() == bytes([number]) * 5000 for number in range(64))
    assert len(list(tmp_path.iterdir())) == 64
