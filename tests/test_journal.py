from __future__ import annotations

import pytest

from mlperturb.errors import StorageError, UsageError
from mlperturb.journal import Journal

KEY = {"version": "1", "seed": 0}


def test_a_journal_gives_back_what_was_appended_and_goes_on(tmp_path):
    first = Journal(tmp_path / "j.jsonl", KEY)
    assert not first.resumed and list(first.entries()) == []
    first.append({"a": 1})
    second = Journal(tmp_path / "j.jsonl", KEY)
    second.append({"a": "\u202e\n"})
    assert second.resumed and not second.torn
    assert list(second.entries()) == [{"a": 1}, {"a": "\u202e\n"}]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, KEY)
    journal.append({"number": 1})
    whole = path.read_bytes()
    journal.append({"number": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, KEY)
    assert again.torn and list(again.entries()) == [{"number": 1}]
    assert path.read_bytes() == whole


def test_another_key_is_refused_and_named(tmp_path):
    Journal(tmp_path / "j.jsonl", KEY).append({"a": 1})
    before = (tmp_path / "j.jsonl").read_bytes()
    with pytest.raises(UsageError, match="written with another budget, seed"):
        Journal(tmp_path / "j.jsonl", {"version": "1", "seed": 1, "budget": "fast"})
    assert (tmp_path / "j.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"photo", b"[1]\n", b'{"key": 3', b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "j.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match="no journal"):
        Journal(tmp_path / "j.jsonl", KEY)
    assert (tmp_path / "j.jsonl").read_bytes() == content


def test_a_folder_that_is_gone_stops_the_run(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", KEY)
    journal.path = tmp_path / "gone" / "j.jsonl"
    with pytest.raises(StorageError, match="cannot write"):
        journal.append({"a": 1})
    with pytest.raises(StorageError, match="cannot read"):
        list(journal.entries())
