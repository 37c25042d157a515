from __future__ import annotations

import threading
import time

import pytest

from mlperturb.system.threads import Behind, ahead, count_workers


def test_results_come_in_order_whatever_takes_long():
    def slow(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(ahead(slow, range(20), window=4)) == [number * number for number in range(20)]
    assert list(ahead(slow, [], window=4)) == []


def test_no_more_is_read_ahead_than_the_window_allows():
    drawn: list[int] = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    results = ahead(lambda number: number, items(), window=5)
    assert next(results) == 0
    assert len(drawn) == 6
    assert next(results) == 1
    assert len(drawn) == 7
    results.close()
    assert len(drawn) == 7


def test_an_error_is_raised_when_its_turn_comes():
    def fail(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = ahead(fail, range(5), window=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_tasks_are_carried_out_in_order_while_the_caller_goes_on():
    started, go, done = threading.Event(), threading.Event(), []
    behind = Behind()

    def first() -> None:
        started.set()
        assert go.wait(10)
        done.append("first")

    behind.submit(first)
    assert started.wait(10)
    behind.submit(lambda: done.append("second"))
    assert done == []
    go.set()
    behind.finish()
    assert done == ["first", "second"]


def test_who_is_too_far_ahead_waits():
    go, third = threading.Event(), threading.Event()
    behind = Behind(depth=1)
    behind.submit(lambda: go.wait(10) and None)
    behind.submit(lambda: None)  # the first runs now, the second waits

    def hand_over() -> None:
        behind.submit(lambda: None)
        third.set()

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert not third.wait(0.2)
    go.set()
    assert third.wait(10)
    thread.join()
    behind.finish()


def test_after_an_error_no_task_is_carried_out_and_the_caller_hears_of_it():
    done: list[int] = []
    behind = Behind(depth=5)

    def fail() -> None:
        raise OSError("disk full")

    def submit_more() -> None:
        for _ in range(200):
            behind.submit(lambda: done.append(1))
            time.sleep(0.005)

    behind.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        submit_more()
    behind.finish()
    assert done == []


def test_there_is_a_worker_for_every_core_and_not_too_many():
    assert 1 <= count_workers() <= 16
