from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from support.processes import find_rank, finish, launch, linux
from support.runs import contents, write_photos

from mlperturb.errors import StorageError, UsageError
from mlperturb.model.checkpoints import load_checkpoint, read_metadata
from mlperturb.system.processes import Share, join, local_device


def test_alone_a_process_does_everything_and_waits_for_nobody():
    share = Share()
    assert share.first
    assert list(share.claims("x", 4)) == [0, 1, 2, 3]
    share.agree("a", "photos")
    share.tell("a", "b")
    assert share.gather()
    assert share.count("n", 3) == 3


@pytest.fixture
def shares() -> list[Share]:
    """Return the two shares of a run, both in this process."""
    store = dist.HashStore()
    return [Share(rank, 2, store) for rank in range(2)]


def test_what_one_process_claims_no_other_does(shares):
    taken: list[list[int]] = [[], []]
    both, most = threading.Barrier(2), threading.Event()

    def work(rank: int) -> None:
        for number in shares[rank].claims("units", 200):
            taken[rank].append(number)
            if len(taken[rank]) == 1:
                both.wait(30)
            if len(taken[0]) > 150:
                most.set()
            if rank == 1:
                most.wait(30)  # a slow process

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(200))
    assert len(taken[0]) > 2 * len(taken[1]) > 0
    assert list(shares[0].claims("others", 2)) == [0, 1]


def test_processes_that_see_other_photos_are_told_apart(shares):
    shares[0].agree("these", "photos")
    shares[1].agree("these", "photos")
    with pytest.raises(UsageError, match="expected the same photos in all processes, got others in 1 of 2"):
        shares[1].agree("those", "photos")


def test_the_first_process_waits_for_the_others_and_no_longer_than_it_has_patience(shares):
    assert not shares[0].gather(patience=0.2)
    assert shares[1].gather(patience=0)
    assert shares[0].ask("never", patience=0.1) is None
    assert shares[0].count("n", 2) == 2
    assert shares[1].count("n", 3) == 5


def test_what_an_earlier_start_left_in_the_store_is_not_taken_for_this_one():
    store = dist.HashStore()
    taken = []
    for _ in range(3):  # as torchrun restarts both; the second comes a little later, or earlier
        shares = [Share(rank, 2, store) for rank in range(2)]
        threads = [threading.Thread(target=share.meet) for share in shares[:: 1 if taken else -1]]
        for thread in threads:
            thread.start()
            time.sleep(0.15)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        taken.append([next(shares[0].claims("units", 9)), next(shares[1].claims("units", 9))])
        assert not shares[1].ask("word", patience=0)
        shares[0].tell("word", "x")
        assert shares[1].ask("word") == "x"
    assert taken == [[0, 1]] * 3


def test_a_process_that_never_comes_is_not_waited_for_for_ever(shares):
    with pytest.raises(UsageError, match=r"processes \[1\] of 2 did not come"):
        shares[0].meet(patience=0.3)


def test_a_store_that_is_gone_is_told_in_a_line():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=2))
    share = Share(1, 2, client)
    assert share.count("n", 1) == 1
    del server

    def count_on() -> None:
        for _ in range(50):
            share.count("n", 1)

    with pytest.raises(StorageError, match="lost the connection") as caught:
        count_on()
    assert "\n" not in str(caught.value)


def test_a_run_that_says_it_is_shared_and_does_not_say_where_is_refused(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "x")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="cannot meet the other processes"):
        join()
    assert local_device("cpu") == "cpu"
    assert local_device("cuda:3") == "cuda:3"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": ""}, "expected RANK too"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "expected MASTER_ADDR, MASTER_PORT too"),
        ({"RANK": "2"}, "got 2 of 2"),
        ({"RANK": "-1"}, "got -1 of 2"),
        ({"WORLD_SIZE": "-1"}, "got 1 of -1"),
    ],
)
def test_half_an_environment_of_several_processes_is_refused(monkeypatch, changed, message):
    whole = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        join()


def test_a_process_that_falls_silent_is_not_waited_for_for_ever(shares, monkeypatch):
    monkeypatch.setattr("mlperturb.system.processes._LIFE", 0.4)
    monkeypatch.setattr("mlperturb.system.processes._QUIET", 0.1)
    said: list[str] = []
    with pytest.raises(StorageError, match="process 1 of 2 has been silent"):
        shares[0].gather(warn=said.append)
    assert said == ["waiting for 1 of the 2 processes to finish"]


def test_a_process_that_lives_is_waited_for(shares, monkeypatch):
    monkeypatch.setattr("mlperturb.system.processes._LIFE", 1.5)
    shares[1].live()

    def finish_late() -> None:
        time.sleep(3)
        shares[1].gather()

    thread = threading.Thread(target=finish_late)
    thread.start()
    assert shares[0].gather()
    thread.join()


@pytest.fixture
def photos(tmp_path) -> Path:
    """Write 24 photos and a file that is not a photo."""
    return write_photos(tmp_path / "photos", 24)


def attacked_by(out: Path) -> dict[str, list[str]]:
    """Return the photos that each process attacked."""
    entries = {path.name: map(json.loads, path.read_text().splitlines()) for path in out.glob("journal*.jsonl")}
    return {
        name: [r["source"] for entry in found for r in entry.get("records", ()) if r["error"] is None]
        for name, found in entries.items()
    }


@linux
def test_two_processes_one_killed_and_restarted_come_to_the_files_and_report_of_one(cli, photos, tiny, tmp_path):
    command = ["attack", photos, "--flip", "cat", "--keep", "rest", "--batch-size", 2, "--checkpoint", tiny]
    command += ["--device", "cpu"]
    assert cli(*command, "--out", tmp_path / "whole")[0] == 1
    out, mark = tmp_path / "out", str(tmp_path)
    process = launch([*command, "--out", out, "--overwrite"], restarts=1, mark=mark)
    second = out / "journal.rank-1.jsonl"
    deadline = time.monotonic() + 120
    while not (second.exists() and second.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(find_rank(1, mark), signal.SIGKILL)
    code, text, err = finish(process)
    assert code == 0, err
    assert "going on: " in err
    assert "the exit code is 0 all the same" in err
    assert text.count("files in ") == 1  # one process prints
    assert contents(out) == contents(tmp_path / "whole")
    done = attacked_by(out)
    assert done.keys() == {"journal.jsonl", "journal.rank-1.jsonl"}
    assert all(done.values())
    times = Counter(name for names in done.values() for name in names)
    assert len(times) == 24
    assert set(times.values()) == {1}
    # One process continues the run of two.
    (out / "05.adv.png").unlink()
    assert cli(*command, "--out", out)[0] == 1
    assert contents(out) == contents(tmp_path / "whole")
    again = Counter(name for names in attacked_by(out).values() for name in names)
    assert [Path(name).name for name, count in again.items() if count == 2] == ["05.png"]


@pytest.fixture
def labelled(photos) -> list[object]:
    """Return the options that name the photos as a data set of two labels."""
    names = sorted(path.name for path in photos.glob("[0-9]*.png"))
    lines = [f"{name},{number % 2},{number // 2 % 2}" for number, name in enumerate(names)]
    table = photos.parent / "labels.csv"
    table.write_text("\n".join(["image,cat,dog", *lines]) + "\n")
    return ["--photos", photos, "--csv", table]


@linux
def test_two_processes_train_one_network_and_go_on_after_one_is_killed(labelled, tmp_path):
    out, mark = tmp_path / "mine.safetensors", str(tmp_path)
    command = ["train", *labelled, "--arch", "shufflenet_v2_x0_5", "--size", 32, "--batch-size", 4, "--epochs", 8]
    state = tmp_path / "mine.safetensors.resume.pt"
    state.write_bytes(b"of an earlier training")
    process = launch([*command, "--device", "cpu", "--overwrite", "--out", out], restarts=1, mark=mark)
    deadline = time.monotonic() + 120
    while not (state.exists() and state.stat().st_size > 1000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(find_rank(1, mark), signal.SIGKILL)
    code, text, err = finish(process)
    assert code == 0, err
    assert text.count("checkpoint: ") == 1
    firsts = [line for line in err.splitlines() if line.startswith("epoch 1/8 step 1/")]
    assert len(firsts) == 1  # finished epochs were not trained again
    metadata = read_metadata(out)
    assert metadata.provenance["photos"] == {"training": 22, "validation": 2}
    assert load_checkpoint(out)[0].labels == ("cat", "dog")
