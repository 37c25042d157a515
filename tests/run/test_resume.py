from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.models import TINY_PIXELS
from support.runs import attacked, contents

import mlperturb.run.search
from mlperturb.system.files import file_sha256
from mlperturb.system.interrupts import Interrupts
from mlperturb.system.journal import Journal


def test_a_run_that_is_done_is_not_done_again(cli, command, tmp_path, monkeypatch):
    assert cli(*command(tmp_path / "out"))[0] == 1  # one file is not a photo
    before = contents(tmp_path / "out")
    monkeypatch.setattr(mlperturb.run.search, "search", None)  # would fail if it were called
    code, text, err = cli(*command(tmp_path / "out"))
    assert code == 1
    assert "going on: 9 of 10" in err
    assert "9" in text
    assert contents(tmp_path / "out") == before
    assert len(attacked(tmp_path / "out")) == 9


def test_what_changed_is_done_again_and_nothing_else(cli, command, photos, tmp_path):
    out = tmp_path / "out"
    cli(*command(out))
    whole = contents(out)
    (out / "1.adv.png").unlink()
    (out / "4.map.png").write_bytes(b"x")
    Image.fromarray(TINY_PIXELS[::-1].copy()).save(photos / "7.png")
    Image.fromarray(TINY_PIXELS).save(photos / "broken.png")
    code, _, err = cli(*command(out))
    assert code == 0
    assert "going on: 9 of 10" in err
    again = [Path(name).name for name in attacked(out)[9:]]
    assert again == ["1.png", "4.png", "7.png", "broken.png"]
    files, records = contents(out)
    same = {name for name in whole[0] if not name.startswith("7.")}
    assert {name: files[name] for name in same} == {name: whole[0][name] for name in same}
    assert len(records) == 10
    assert all(record["status"] == "success" for record in records)


@pytest.mark.parametrize(
    "more",
    [
        *(("--method", "fgs"), ("--flip", "dog"), ("--max-rmsd", 3), ("--max-linf", 3), ("--passes", 50)),
        *(("--reader", "float"), ("--margin", 0.2)),
    ],
)
def test_other_settings_never_mix_into_a_run(cli, command, tmp_path, more):
    cli(*command(tmp_path / "out"))
    before = contents(tmp_path / "out")
    code, _, err = cli(*command(tmp_path / "out", *more))
    assert code == 2
    assert "was written with another" in err
    assert "--overwrite" in err
    assert contents(tmp_path / "out") == before
    assert cli(*command(tmp_path / "out", *more, "--overwrite"))[0] == 1
    assert len(attacked(tmp_path / "out")) == 9


def test_a_run_that_overwrites_goes_on_after_a_stop_and_starts_again_once_it_is_finished(
    cli, command, tmp_path, monkeypatch
):
    out, search, batches = tmp_path / "out", mlperturb.run.search.search, []
    assert cli(*command(out, "--seed", 1))[0] == 1  # another run, to be replaced

    def stop(*arguments):
        batches.append(len(arguments[1]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return search(*arguments)

    monkeypatch.setattr(mlperturb.run.search, "search", stop)
    assert cli(*command(out, "--overwrite"))[0] == 130
    assert len(attacked(out)) == 6
    code, _, err = cli(*command(out, "--overwrite"))
    assert (code, batches) == (1, [3, 3, 3, 3])
    assert "going on: 6 of 10" in err
    code, _, err = cli(*command(out, "--overwrite"))
    assert "going on" not in err
    assert (code, batches) == (1, [3] * 7)
    code, _, err = cli(*command(out))  # nothing is left to do
    assert "going on: 9 of 10" in err
    assert len(batches) == 7
    assert cli(*command(out, "--overwrite", "--seed", 2))[0] == 1  # other settings: from the beginning
    assert len(batches) == 10


def test_a_torn_last_line_is_dropped_and_said(cli, command, tmp_path):
    out = tmp_path / "out"
    cli(*command(out))
    before = contents(out)
    journal = out / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1])[:-40])  # the last has no photo
    code, _, err = cli(*command(out))
    assert code == 1
    assert "journal.jsonl is incomplete or damaged" in err
    assert "going on: 6 of 10" in err
    assert contents(out) == before


@pytest.mark.parametrize("line", ['{"records": [{}], "hashes": {}}', '{"records": 5}', "[]", "nonsense"])
def test_a_damaged_journal_stops_with_a_line(cli, command, tmp_path, line):
    out = tmp_path / "out"
    cli(*command(out))
    journal = out / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:-1], line + "\n", lines[-1]]))  # at the end it would be a torn line
    code, _, err = cli(*command(out))
    assert code in (2, 3)
    assert "damaged" in err
    assert "--overwrite" in err
    assert "Traceback" not in err


def kill_until_done(arguments: list[str], kills: int, number: signal.Signals, seed: int) -> None:
    """Start the command several times, kill it each time at a random moment, and let the last start finish."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "mlperturb", *arguments]
    rng = random.Random(seed)
    out = Path(arguments[arguments.index("--out") + 1])
    for _ in range(kills):
        with subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:  # until it has begun to attack
                if (out / "journal.jsonl").exists() and rng.random() < 0.2:
                    break
                time.sleep(0.02)
            time.sleep(rng.random() * 0.4)
            process.send_signal(number)
            assert process.wait(60) in (-number, 1, 130)
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kills", "number"),
    [
        pytest.param(2, signal.SIGKILL),
        pytest.param(1, signal.SIGTERM),
        pytest.param(20, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_a_run_comes_to_the_files_and_records_of_an_undisturbed_one(
    command, cli, tmp_path, kills, number
):
    more = ("--budget", "balanced", "--batch-size", 2)
    cli(*command(tmp_path / "whole", *more))
    kill_until_done(command(tmp_path / "out", *more), kills, number, seed=kills)
    files, records = contents(tmp_path / "out")
    expected, wanted = contents(tmp_path / "whole")
    assert files == expected
    assert records == wanted
    sources = attacked(tmp_path / "out")
    assert len(sources) == len(set(sources)) == 9  # no photo in the journal was attacked again


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("exec('signal.raise_signal(signal.SIGTERM)', globals())", id="a text is executed"),
        pytest.param("type('Made', (), {'member': Member()})", id="a class is made"),
        pytest.param("signal.raise_signal(signal.SIGTERM)", id="a function runs"),
    ],
)
def test_a_signal_is_told_by_130_whatever_it_breaks(command, tmp_path, moment):
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import signal, sys
import mlperturb.cli.longrun
from mlperturb.cli.main import run

class Member:
    def __set_name__(self, *_):
        signal.raise_signal(signal.SIGTERM)

def make_bar(quiet):
    {moment}
    raise AssertionError("no signal came")

mlperturb.cli.longrun.make_bar = make_bar
sys.argv = ["mlperturb", *{command(tmp_path / "out")!r}]
run()
"""
    )
    started = [sys.executable, "-m", program.stem]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_while_a_library_loads_ends_the_process_without_an_exception_inside_of_it(command, tmp_path):
    (tmp_path / "library.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)")
    (tmp_path / "program.py").write_text(
        f"""
import sys
import mlperturb.cli.attack
from mlperturb.cli.main import run

def find_sources(*_, **__):
    try:
        import library
    finally:
        print("the library went on")

mlperturb.cli.attack.find_sources = find_sources
sys.argv = ["mlperturb", *{command(tmp_path / "out")!r}]
run()
"""
    )
    done = subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mlperturb: error: interrupted\n")


def test_a_first_signal_waits_for_what_is_held_and_a_second_does_not():
    reached = []

    def signal_once(interrupts: Interrupts) -> None:
        with interrupts.hold():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(1)

    def signal_twice(interrupts: Interrupts) -> None:
        with interrupts.hold():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(2)
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(3)

    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal_once(interrupts)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal_twice(interrupts)
    assert reached == [1, 2]


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_out_of_memory_halves_the_batch_is_said_once_and_every_photo_comes_out(cli, command, tmp_path, monkeypatch):
    cli(*command(tmp_path / "whole", "--batch-size", 8))
    search, sizes = mlperturb.run.search.search, []

    def short_of_memory(classifier, photos, *more):
        sizes.append(len(photos))
        if len(photos) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(classifier, photos, *more)

    monkeypatch.setattr(mlperturb.run.search, "search", short_of_memory)
    code, _, err = cli(*command(tmp_path / "out", "--batch-size", 8))
    assert code == 1
    assert err.count("ran out of memory") == 1
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    records, wanted = contents(tmp_path / "out")[1], contents(tmp_path / "whole")[1]
    assert [record["status"] for record in records] == [record["status"] for record in wanted]


def test_a_photo_too_large_by_itself_fails_and_the_rest_goes_on(cli, command, photos, tmp_path, monkeypatch):
    search, large = mlperturb.run.search.search, file_sha256(photos / "4.png")

    def short_of_memory(classifier, photos, *more):
        if any(photo.sha256 == large for photo in photos):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(classifier, photos, *more)

    monkeypatch.setattr(mlperturb.run.search, "search", short_of_memory)
    code, _, err = cli(*command(tmp_path / "out"))
    records = contents(tmp_path / "out")[1]
    assert code == 1
    assert "4.png: too large" in err
    assert [record["status"] for record in records].count("success") == 8
    assert "4.png" not in [Path(name).name for name in attacked(tmp_path / "out")]  # the photo is attacked again


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_photos(tiny, tmp_path):
    peaks = []
    for count in (100, 10_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        Image.fromarray(TINY_PIXELS).save(folder / "0.png")
        for number in range(1, count):
            os.link(folder / "0.png", folder / f"{number}.png")
        options = ["--flip", "any", "--budget", "fast", "--passes", 20, "--batch-size", 64, "--checkpoint", tiny]
        command = ["attack", folder, *options, "--device", "cpu", "--quiet", "--out", tmp_path / f"out-{count}"]
        with subprocess.Popen([sys.executable, "-m", "mlperturb", *map(str, command)]) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = status
        assert status == 0
        assert json.loads((tmp_path / f"out-{count}" / "report.json").read_text())["summary"]["success"] == count
        peaks.append(usage.ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 300, peaks


def test_another_photo_of_the_same_name_does_not_replace_what_is_done(cli, command, photos, tmp_path, whole):
    out, other = tmp_path / "out", tmp_path / "other"
    cli(*command(out))
    other.mkdir()
    Image.fromarray(TINY_PIXELS[::-1].copy()).save(other / "4.png")
    arguments = command(out)
    code, _, err = cli(*["attack", other, *arguments[2:]])
    assert code == 2
    assert "4.adv.png exists already and was not made of" in err
    assert err.count("\n") == 1
    assert contents(out) == whole
    (out / "new.adv.png").write_bytes(b"precious")
    Image.fromarray(TINY_PIXELS).save(photos / "new.png")
    code, _, err = cli(*arguments)
    assert code == 2
    assert "new.adv.png exists already" in err
    assert (out / "new.adv.png").read_bytes() == b"precious"
    (out / "new.adv.png").unlink()
    assert cli(*arguments)[0] == 1  # one more photo in the folder does not make another run
    assert len(attacked(out)) == 10


def test_a_run_that_is_going_on_is_not_overwritten(cli, command, tmp_path, whole):
    out = tmp_path / "out"
    cli(*command(out))
    journal = (out / "journal.jsonl").read_bytes()
    with Journal(out / "journal.jsonl", json.loads(journal.partition(b"\n")[0])["key"]):
        code, _, err = cli(*command(out, "--overwrite"))
        assert code == 2
        assert "another run is writing" in err
    assert (out / "journal.jsonl").read_bytes() == journal
    assert contents(out) == whole


def test_what_a_killed_run_left_half_written_goes(cli, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "out" / ".mine.tmp").write_bytes(b"whole")
    cli(*command(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".mine.tmp"]


@pytest.mark.parametrize("error", [None, RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_a_photo_for_which_there_is_no_memory_is_an_error_of_its_own(cli, command, tmp_path, monkeypatch, error):
    if error is None:
        free = 36 * 30 * 200 - 1  # the largest photos need more
        monkeypatch.setattr(mlperturb.run.search, "free_memory", lambda _: free)
    else:
        search = mlperturb.run.search.search

        def fail(classifier, photos, *more):
            if max(photo.rgb.shape[0] * photo.rgb.shape[1] for photo in photos) == 36 * 30:
                raise error
            return search(classifier, photos, *more)

        monkeypatch.setattr(mlperturb.run.search, "search", fail)
    code, _, err = cli(*command(tmp_path / "out"))
    records = contents(tmp_path / "out")[1]
    failed = [Path(record["source"]).name for record in records if record["status"] == "failed"]
    assert code == 1
    assert "too large for the device's memory" in err
    assert failed == ["0.png", "6.png"]
    assert [record["status"] for record in records].count("success") == 7
