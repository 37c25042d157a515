"""Ctrl-C and SIGTERM: what is being written is finished first; a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """While entered, SIGINT and SIGTERM raise KeyboardInterrupt; inside `hold`, the first one waits for its end."""

    def __init__(self) -> None:
        self._held = False
        self._waiting = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        self._waiting += 1
        if not self._held or self._waiting > 1:
            raise KeyboardInterrupt

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let what stands inside come to its end.

        Raises:
            KeyboardInterrupt: at the end, if a signal came meanwhile.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting:
            raise KeyboardInterrupt
