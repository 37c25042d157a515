"""Threads ahead of a loop, which prepare its inputs, and a thread behind it, which stores its results."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

Task = Callable[[], None]


def count_workers() -> int:
    """Return how many threads to decode or encode with; Pillow releases the interpreter's lock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores))


def ahead(function: Callable[[T], R], items: Iterable[T], *, window: int) -> Iterator[R]:
    """Apply a function to items in threads, at most `window` items ahead of the result taken; in order.

    Items are drawn in the thread that takes the results. An error of the function is raised in place of its result.
    """
    pool = ThreadPoolExecutor(count_workers(), "ahead")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
