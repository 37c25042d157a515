"""Threads ahead of a loop, which prepare its inputs, and a thread behind it, which stores its results."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

Task = Callable[[], None]


def count_workers() -> int:
    """Return how many threads to decode or encode with; Pillow releases the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores))


class Room:
    """Room for results that wait to be taken: a result comes in with its cost, once the others leave it room.

    Results come in by their numbers, in order; a result that is larger than all the room comes in when it is alone. So
    the next result to be taken never waits for a later result.

    Args:
        most: the room.
    """

    def __init__(self, most: float) -> None:
        self._most, self._next, self._closed = most, 0, False
        self._held: dict[int, float] = {}  # by number
        self._passed: set[int] = set()  # numbers that have come in, or never will, from the next number on
        self._changed = threading.Condition()

    def enter(self, number: int, cost: float) -> None:
        """Wait for room, and take it.

        Raises:
            CancelledError: if nobody takes the results any more.
        """

        def fits() -> bool:
            mine = self._next == number and (not self._held or sum(self._held.values()) + cost <= self._most)
            return mine or self._closed or number in self._held

        with self._changed:
            self._changed.wait_for(fits)
            if self._closed:
                raise CancelledError
            self._held[number] = max(cost, self._held.get(number, 0.0))
            self._pass(number)

    def finish(self, number: int) -> None:
        """Say that a result is made; it may not have come in."""
        with self._changed:
            self._pass(number)

    def leave(self, number: int) -> None:
        """Give back the room of a result."""
        with self._changed:
            self._held.pop(number, None)
            self._changed.notify_all()

    def close(self) -> None:
        """End all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _pass(self, number: int) -> None:
        if number >= self._next:
            self._passed.add(number)
        while self._next in self._passed:
            self._passed.remove(self._next)
            self._next += 1
        self._changed.notify_all()


def ahead(
    function: Callable[[T, Callable[[float], None]], R], items: Iterable[T], *, window: int, most: float
) -> Iterator[R]:
    """Apply a function to items in threads, at most `window` items ahead of the result taken; in order.

    Items are drawn in the thread that takes the results. An error of the function is raised in place of its result.

    Args:
        function: gets an item, and a function to call with the cost of the result before the cost is incurred.
        items: the items.
        window: number of items.
        most: the largest sum of the costs of results that are made and not taken, unless a single one costs more.
    """
    pool, room = ThreadPoolExecutor(count_workers(), "ahead"), Room(most)
    waiting: deque[tuple[int, Future[R]]] = deque()

    def work(number: int, item: T) -> R:
        try:
            return function(item, lambda cost: room.enter(number, cost))
        finally:
            room.finish(number)

    def take() -> R:
        number, future = waiting.popleft()
        result = future.result()
        room.leave(number)
        return result

    try:
        for number, item in enumerate(items):
            waiting.append((number, pool.submit(work, number, item)))
            if len(waiting) > window:
                yield take()
        while waiting:
            yield take()
    finally:
        room.close()
        pool.shutdown(wait=False, cancel_futures=True)


def are_busy(patience: float = 0.2) -> bool:
    """Say whether a thread of this module, or of a pool named `encode`, still works after `patience` seconds each."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(("ahead", "behind", "encode"))]
    for thread in threads:
        thread.join(patience)
    return any(thread.is_alive() for thread in threads)


class Behind:
    """A thread that runs tasks in order; at most `depth` tasks wait, besides the task that runs.

    After a task has raised, no later task runs. The thread does not keep the process alive: a second Ctrl-C
    ends both.
    """

    def __init__(self, depth: int = 1) -> None:
        self._tasks: queue.Queue[Task | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        """Add a task; block while `depth` tasks wait.

        Raises:
            BaseException: the error of an earlier task.
        """
        self._check()
        self._tasks.put(task)

    def finish(self) -> None:
        """Wait for all tasks, and end the thread.

        Raises:
            BaseException: the error of a task.
        """
        if self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join()
        self._check()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._error is None:
                try:
                    task()
                except BaseException as error:  # any error is raised in the thread that added the task
                    self._error = error

    def _check(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
