"""Ctrl-C and SIGTERM: the first signal waits until a result is written; the second stops at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

Before = dict[int, Any]  # the earlier handler of each signal, as `signal.getsignal` returns it


def handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Before:
    """Handle SIGINT and SIGTERM, unless ignored (as SIGINT in a script's background); return the earlier handlers."""
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def restore(before: Before) -> None:
    """Put back the handlers that `handle` returned."""
    for number, handler in before.items():
        signal.signal(number, handler)


def end_at_second_signal(end: Callable[[], None], patience: float = 2.0) -> None:
    """From now on, call `end` some seconds after a second SIGINT or SIGTERM, whatever the threads of Python do.

    A handler written in Python runs in the main thread, and only between two steps of Python: not while a decoder or a
    network runs there. The interpreter itself writes each signal to a socket, which a thread watches here.

    Args:
        end: ends the process.
        patience: seconds that the main thread has to end by itself.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def watch() -> None:
        count = 0
        while count < 2 and (got := ours.recv(1)):
            count += got[0] in (signal.SIGINT, signal.SIGTERM)
        time.sleep(patience)
        end()

    def forget() -> None:  # a forked process has the socket too
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)

    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)
    threading.Thread(target=watch, name="signals", daemon=True).start()
    theirs.detach()  # it stays open until the process ends


class Interrupts:
    """While entered, SIGINT and SIGTERM raise KeyboardInterrupt; inside `hold`, the first signal waits for its end."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = 0
        self._before: Before = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = handle(self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        restore(self._before)

    def _arrive(self, _number: int, _frame: FrameType | None) -> None:
        self._waiting += 1
        if not self._held or self._waiting > 1:
            raise KeyboardInterrupt

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let the block finish before a first signal stops the run.

        Raises:
            KeyboardInterrupt: at the end of the block, if a signal came meanwhile; at once, at a second signal.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            raise KeyboardInterrupt
