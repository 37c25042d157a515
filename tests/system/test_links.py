"""Links, pipes and folders that wait in the output folder of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.runs import contents, said


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """Return a folder beside the output folder, with a file that no run may touch."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_bytes(b"precious")
    return folder


def unchanged(elsewhere: Path) -> bool:
    return {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"precious": b"precious"}


@pytest.mark.parametrize("target", ["precious", "nothing", "."])
@pytest.mark.parametrize("name", ["0.adv.png", "4.map.png", "report.json", "index.html", "journal.jsonl"])
def test_links_out_of_the_folder_are_replaced_or_refused_and_never_written_through(
    cli, command, tmp_path, elsewhere, name, target
):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(elsewhere / target)
    code, _, err = cli(*command(out, "--html"))
    assert code in (1, 2, 3)
    assert len(said(err)) <= 1
    assert unchanged(elsewhere)
    code, _, err = cli(*command(out, "--html", "--overwrite"))
    said(err)
    assert unchanged(elsewhere)
    if target != ".":
        assert code == 1
        assert not (out / name).is_symlink()
        assert (out / name).stat().st_size > 8


def test_a_run_that_goes_on_writes_through_no_link(cli, command, tmp_path, whole):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    cli(*command(out))
    for name in ("0.adv.png", "4.map.png", "report.json"):
        (elsewhere / name).write_bytes(b"precious")
        (out / name).unlink()
        (out / name).symlink_to(elsewhere / name)
    assert cli(*command(out))[0] == 1
    assert [path.read_bytes() for path in elsewhere.iterdir()] == [b"precious"] * 3
    assert contents(out)[0] == whole[0]
    assert not [path for path in out.iterdir() if path.is_symlink()]


@pytest.mark.parametrize("torn", [False, True])
def test_a_journal_that_lies_elsewhere_is_not_added_to(cli, command, tmp_path, elsewhere, torn):
    out = tmp_path / "out"
    cli(*command(out))
    journal = (out / "journal.jsonl").read_bytes()
    journal = journal[:-40] if torn else journal
    (elsewhere / "precious").write_bytes(journal)
    (out / "journal.jsonl").unlink()
    (out / "journal.jsonl").symlink_to(elsewhere / "precious")
    (out / "1.adv.png").unlink()
    said(cli(*command(out))[2])
    assert (elsewhere / "precious").read_bytes() == journal


def test_a_folder_given_by_a_link_is_written(cli, command, tmp_path, whole):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert cli(*command(tmp_path / "out"))[0] == 1
    assert contents(tmp_path / "real") == whole


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("pipe", name) for name in ("journal.jsonl", "report.json", "0.adv.png", "4.map.png")),
        *(("folder", name) for name in ("journal.jsonl", "report.json", "0.adv.png", "4.map.png")),
    ],
)
def test_what_is_no_file_in_the_place_of_an_output_is_told_and_not_waited_for(cli, command, tmp_path, name, kind):
    out = tmp_path / "out"
    out.mkdir()
    (os.mkfifo if kind == "pipe" else os.mkdir)(out / name)

    def late(*_: object) -> None:
        raise TimeoutError("it waits for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        for more in ([], ["--overwrite"]):
            code, _, err = cli(*command(out, *more))
            assert code in (1, 2, 3)
            assert len(said(err)) <= 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
