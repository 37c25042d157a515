"""The processes of one run: which photos each process takes, and which process waits for another.

Under `torchrun` (or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set by hand) the processes meet at the key-value
store of PyTorch's rendezvous. A counter in the store hands out the photos, so that a fast process takes more. The
processes do not have a central process, and exchange nothing while they attack photos. The store outlives processes
that torchrun restarts, so the processes of each start first agree on a name, with which all their keys begin.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeVar

from mlperturb.errors import StorageError, UsageError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_PATIENCE = 600.0  # seconds to wait for the other processes to start
_POLL = 0.1  # seconds between two looks at the store
_QUIET = 30.0  # seconds of waiting before a warning
_LIFE = 120.0  # seconds without a heartbeat after which a process counts as dead


class Share:
    """This process's share of a run; with a single process, the whole run.

    Attributes:
        rank: the rank of this process; rank 0 writes the report.
        size: the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._counts: Counter[str] = Counter()  # in place of a store
        self._lock = Lock()
        self._start = ""  # the name of this start; every key begins with it

    def exit_code(self, code: int) -> int:
        """Return the exit code of a run that finished, failed photos included; 0 under torchrun."""
        return 0 if self.launched else code

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process; torchrun takes any exit code but 0 for a crash, and may restart it."""
        return self.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def first(self) -> bool:
        """Whether this process prints and writes the report."""
        return self.rank == 0

    def claims(self, name: str, count: int) -> Iterator[int]:
        """Yield the numbers below `count` that this process takes: each goes to the process that asks first."""
        if self._store is None:
            yield from range(count)
            return
        while (number := self._add(f"claims/{name}", 1) - 1) < count:
            yield number

    def tell(self, name: str, value: str) -> None:
        """Set a value that the other processes can read."""
        if self._store is not None:
            self._call(lambda store: store.set(self._start + name, value))

    def ask(self, name: str, *, patience: float = float("inf")) -> str | None:
        """Wait at most `patience` seconds for a value of another process; return it, or None."""
        deadline = time.monotonic() + patience
        while (value := self._get(name)) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL)
        return value

    def agree(self, value: str, what: str) -> None:
        """Wait until rank 0 has called this too, and compare this process's value with its value.

        Raises:
            UsageError: if the values differ.
        """
        if self._store is None:
            return
        if self.first:
            self.tell(f"agreed/{what}", value)
        elif self.ask(f"agreed/{what}") != value:
            raise UsageError(f"expected the same {what} in all processes, got others in {self.rank} of {self.size}")

    def count(self, name: str, more: int = 0) -> int:
        """Add to a number that all processes share; return the new number."""
        if self._store is not None:
            return self._add(name, more)
        with self._lock:
            self._counts[name] += more
            return self._counts[name]

    def gather(self, *, patience: float = float("inf"), warn: Callable[[str], None] = lambda _: None) -> bool:
        """Announce that this process has finished. Rank 0 waits for the others and returns whether all have finished.

        Args:
            patience: the most seconds to wait.
            warn: called with a message after a while of waiting.

        Raises:
            StorageError: if the heartbeat of another process has stopped.
        """
        self.tell(f"finished/{self.rank}", "")
        began, silent = time.monotonic(), True
        lost = dict.fromkeys(range(1, self.size), (-1, began)) if self.first else {}  # last heartbeat, when
        while lost and time.monotonic() - began < patience:
            for rank in list(lost):
                sign = self.count(f"alive/{rank}")
                if self._get(f"finished/{rank}") is not None:
                    del lost[rank]
                elif sign != lost[rank][0]:
                    lost[rank] = sign, time.monotonic()
                elif time.monotonic() - lost[rank][1] > _LIFE:
                    raise StorageError(
                        f"process {rank} of {self.size} has been silent for {_LIFE:.0f} seconds, and its photos are "
                        "not done: run the same command again to continue"
                    )
            if lost and silent and time.monotonic() - began > _QUIET:
                silent = False
                warn(f"waiting for {len(lost)} of the {self.size} processes to finish")
            time.sleep(_POLL if lost else 0)
        return not lost

    def live(self) -> None:
        """Send heartbeats from a thread until the process ends."""

        def beat() -> None:
            with suppress(StorageError):  # the main thread gets the same error
                while True:
                    self.count(f"alive/{self.rank}", 1)
                    time.sleep(_LIFE / 10)

        Thread(target=beat, name="alive", daemon=True).start()

    def _add(self, name: str, more: int) -> int:
        return self._call(lambda store: int(store.add(self._start + name, more)))

    def _get(self, name: str) -> str | None:
        key = self._start + name
        found = self._call(lambda store: store.get(key) if store.check([key]) else None)
        return None if found is None else found.decode()

    def _call(self, ask: Callable[[Store], T]) -> T:
        assert self._store is not None
        try:
            return ask(self._store)
        except RuntimeError as error:  # torch.distributed's error when the store's host is gone
            reason = str(error).partition("\n")[0]
            raise StorageError(f"lost the connection to the other processes of the run: {reason:.200}") from error

    @contextmanager
    def process_group(self, device: str) -> Iterator[None]:
        """Open the process group of `torch.distributed` for training: NCCL on CUDA, Gloo elsewhere."""
        if self._store is None:
            yield
            return
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        backend = "nccl" if device.startswith("cuda") else "gloo"
        store = PrefixStore(f"{self._start}group", self._store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.size, timeout=timedelta(days=1)
        )  # rank 0 validates while the others wait
        try:
            yield
        finally:
            dist.destroy_process_group()

    def any_restarted(self) -> bool:
        """Say whether torchrun has restarted any of the processes."""
        if self._store is None:
            return False
        self.tell(f"restarts/{self.rank}", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return any(self.ask(f"restarts/{rank}") != "0" for rank in range(self.size))

    def meet(self, *, patience: float = _PATIENCE) -> None:
        """Wait until all processes of this start have called this, and agree with them on the name of the start.

        Values of an earlier start may still be in the store. So each process sends a random word, rank 0 answers with
        that word and the name of the start, and the process confirms under that name.

        Raises:
            UsageError: if a process does not come within `patience` seconds.
        """
        word, deadline = secrets.token_hex(8), time.monotonic() + patience
        waiting = {self.rank} if self.rank else set(range(1, self.size))
        while waiting:
            if time.monotonic() > deadline:
                raise UsageError(f"processes {sorted(waiting) if self.first else [0]} of {self.size} did not come")
            for rank in sorted(waiting):
                if self.rank:
                    self.tell(f"hello/{rank}", word)
                    answer = self._get(f"welcome/{rank}") or ""
                    if answer.startswith(word):
                        word = answer.removeprefix(word)
                        self.tell(f"{word}/here/{rank}", "")
                        waiting.remove(rank)
                elif self._get(f"{word}/here/{rank}") is not None:
                    waiting.remove(rank)
                elif (hello := self._get(f"hello/{rank}")) is not None:
                    self.tell(f"welcome/{rank}", hello + word)
            if waiting:
                time.sleep(_POLL)
        self._start = f"{word}/"


def is_shared() -> bool:
    """Say whether this process is one of several.

    Raises:
        UsageError: if WORLD_SIZE says so, but RANK, MASTER_ADDR or MASTER_PORT is missing or out of range.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return False
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}: expected {', '.join(missing)} too, as torchrun sets them")
    rank = os.environ["RANK"]
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise UsageError(f"expected RANK from 0 to WORLD_SIZE - 1, got {rank} of {size}")
    return True


def join() -> Share:
    """Meet the other processes of the run; without torchrun, return the share of a single process.

    Raises:
        UsageError: if the environment is incomplete, or a process does not come.
    """
    if not is_shared():
        return Share()
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=_PATIENCE))))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"cannot meet the other processes of the run: {reason:.200}") from error
    share = Share(rank, size, store)
    share.meet()
    share.live()
    return share


def local_device(name: str) -> str:
    """Return the device of this process: processes on one host take different CUDA devices in turn."""
    if not is_shared() or name not in ("auto", "cuda"):
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(os.environ.get('LOCAL_RANK', os.environ['RANK'])) % count}" if count else name
