from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from mlperturb.system.threads import Behind, Room, ahead, are_busy, count_workers


def test_results_come_in_order_whatever_takes_long():
    def slow(number: int, room: Callable[[float], None]) -> int:
        room(1)
        time.sleep(0.02 if number % 3 == 0 else 0)
        return number * number

    assert list(ahead(slow, range(20), window=4, most=3)) == [number * number for number in range(20)]
    assert list(ahead(slow, [], window=4, most=3)) == []


def test_no_more_is_read_ahead_than_the_window_allows():
    drawn: list[int] = []

    def items():
        for number in range(100):
            drawn.append(number)
            yield number

    results = ahead(lambda number, _: number, items(), window=5, most=100)
    assert next(results) == 0
    assert len(drawn) == 6
    assert next(results) == 1
    assert len(drawn) == 7
    results.close()
    assert len(drawn) == 7


def test_an_error_is_raised_when_its_turn_comes():
    def fail(number: int, _: object) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = ahead(fail, range(5), window=4, most=100)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


@pytest.mark.parametrize("most", [1, 5, 7, 1000])
def test_what_waits_has_at_most_the_cost_given_or_is_alone(most):
    costs = [3, 1, 2, 9, 1, 1, 1, 5, 2, 0, 8, 1]
    inside, lock = Counter[int](), threading.Lock()
    largest: list[tuple[int, int]] = []

    def make(number: int, room: Callable[[float], None]) -> int:
        if number == 4:
            return number  # it costs nothing, as a file that cannot be read
        room(costs[number])
        with lock:
            inside[number] = costs[number]
            largest.append((sum(inside.values()), len(inside)))
        time.sleep(0.001)
        return number

    taken = []
    for number in ahead(make, range(len(costs)), window=8, most=most):
        taken.append(number)
        with lock:
            inside.pop(number, None)
    assert taken == list(range(len(costs)))
    assert all(cost <= most + 9 for cost, _ in largest)  # a result that was taken is still counted for a moment


def test_results_come_in_by_their_numbers_and_one_alone_may_be_large():
    room = Room(5)
    room.enter(0, 9)  # alone
    entered: list[int] = []
    later = [threading.Thread(target=lambda n=n: (room.enter(n, 2), entered.append(n))) for n in (2, 1, 3)]
    for thread in later:
        thread.start()
    time.sleep(0.05)
    assert entered == []
    room.leave(0)
    later[0].join(5)
    later[1].join(5)
    assert sorted(entered) == [1, 2]  # in order, and no third
    room.leave(1)
    later[2].join(5)
    assert sorted(entered) == [1, 2, 3]


def test_whoever_waits_for_room_is_sent_away_when_nobody_takes_the_results():
    def make(number: int, room: Callable[[float], None]) -> int:
        room(10)
        return number

    results = ahead(make, range(20), window=15, most=1)
    assert next(results) == 0
    results.close()
    deadline = time.monotonic() + 5
    while are_busy(0.01) and time.monotonic() < deadline:
        pass
    assert not are_busy(0)


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
