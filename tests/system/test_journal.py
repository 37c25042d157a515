from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from mlperturb.errors import StorageError, UsageError
from mlperturb.system.files import write_file
from mlperturb.system.journal import Journal

KEY = {"version": "1", "seed": 0}


def test_a_journal_gives_back_what_was_appended_and_goes_on(tmp_path):
    with Journal(tmp_path / "j.jsonl", KEY) as first:
        assert not first.resumed
        assert list(first.entries()) == []
        first.append({"a": 1})
    with Journal(tmp_path / "j.jsonl", KEY) as second:
        second.append({"a": "\u202e\n"})
        assert second.resumed
        assert not second.torn
        assert list(second.entries()) == [{"a": 1}, {"a": "\u202e\n"}]


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_run_cannot_open_it(tmp_path):
    with Journal(tmp_path / "j.jsonl", KEY), pytest.raises(UsageError, match="another run is writing"):
        Journal(tmp_path / "j.jsonl", KEY)
    Journal(tmp_path / "j.jsonl", KEY).close()


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        journal.append({"number": 1})
        whole = path.read_bytes()
        journal.append({"number": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, KEY) as again:
        assert again.torn
        assert list(again.entries()) == [{"number": 1}]
        assert path.read_bytes() == whole


def test_another_key_is_refused_and_named(tmp_path):
    with Journal(tmp_path / "j.jsonl", KEY) as journal:
        journal.append({"a": 1})
    before = (tmp_path / "j.jsonl").read_bytes()
    with pytest.raises(UsageError, match="written with another budget, seed"):
        Journal(tmp_path / "j.jsonl", {"version": "1", "seed": 1, "budget": "fast"})
    assert (tmp_path / "j.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"photo", b"[1]\n", b"[" * 10**5 + b"\n", b'{"key": 5}\n', b'{"key": 3', b"\x89PNG\r\n\x1a\n"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "j.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="not the journal of a run"):
        Journal(tmp_path / "j.jsonl", KEY)
    assert (tmp_path / "j.jsonl").read_bytes() == content


@pytest.mark.parametrize("line", [b"nonsense\n", b"123\n", b"\xff\xfe\n", b"[" * 10**5 + b"\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    with Journal(tmp_path / "j.jsonl", KEY) as journal:
        journal.append({"a": 1})
        with journal.path.open("ab") as stream:
            stream.write(line)
        journal.append({"a": 2})
        with pytest.raises(StorageError, match=r"j.jsonl, line 3: damaged"):
            list(journal.entries())


@pytest.mark.parametrize("replace", [False, True])
def test_a_journal_that_is_gone_stops_the_run_and_is_not_made_again(tmp_path, replace):
    with Journal(tmp_path / "j.jsonl", KEY) as journal:
        journal.path.unlink()
        if replace:
            journal.path.write_bytes(b"another")
        with pytest.raises(StorageError, match="was replaced" if replace else "cannot write"):
            journal.append({"a": 1})
        assert journal.path.exists() == replace


@pytest.mark.parametrize("hole", [b"\0\0\0\0", b"####"])
def test_a_last_line_with_a_hole_is_dropped_as_a_torn_line_is(tmp_path, hole):
    path = tmp_path / "j.jsonl"
    with Journal(path, KEY) as journal:
        journal.append({"number": 1})
        whole = path.read_bytes()
        journal.append({"number": 2, "text": "x" * 50})
    data = path.read_bytes()
    path.write_bytes(data[:-40] + hole + data[-40 + len(hole) :])
    path.with_name("j.rank-1.jsonl").write_bytes(path.read_bytes())  # of a process that does not come again
    with Journal(path, KEY) as again:
        assert again.torn
        assert list(again.entries()) == [{"number": 1}] * 2
        assert path.read_bytes() == whole


def test_no_flipped_bit_is_taken_for_what_was_written(tmp_path):
    path = tmp_path / "j.jsonl"
    entries = [{"a": number, "text": "some words"} for number in range(3)]
    with Journal(path, KEY) as journal:
        for entry in entries:
            journal.append(entry)
    data, refused = path.read_bytes(), 0
    places = range(0, 8 * len(data), 3)
    for place in places:
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            with Journal(path, KEY) as again:
                found = list(again.entries())
        except (UsageError, StorageError):
            refused += 1
            continue
        shown = [{name: entry.get(name) for name in ("a", "text")} for entry in found]
        assert shown in (entries, entries[:2], entries[:1]), (place, found)  # a lost line end joins the last two lines
    assert refused > len(places) // 3


def test_a_journal_of_an_earlier_version_has_no_checksums_and_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps({"key": KEY}) + '\n{"a": 1}\n')
    with Journal(path, KEY) as journal:
        journal.append({"a": 2})
        assert list(journal.entries()) == [{"a": 1}, {"a": 2}]
    with Journal(path, KEY) as again:
        assert list(again.entries()) == [{"a": 1}, {"a": 2}]
        assert not again.torn


def test_the_folder_is_flushed_after_a_rename(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flush(opened: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(opened).st_mode) else "file")
        fsync(opened)

    def rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    write_file(tmp_path / "x", b"x")
    assert done == ["file", "rename", "folder"]
