"""The processes of one run: which photos each takes, and who waits for whom.

Under `torchrun` (or with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set by hand) the processes meet at the key-value
store of PyTorch's rendezvous. Work is shared out by a counter there, so that a fast process takes more; there is no
central process, and nothing is exchanged while photos are attacked. The store outlives processes that torchrun starts
again, so those of one start first agree on a name for it.
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

_PATIENCE = 600.0  # seconds, for the other processes to start
_POLL = 0.1  # seconds
_QUIET = 30.0  # seconds of waiting before it is said
_LIFE = 120.0  # seconds without a sign of life after which a process counts as dead


class Share:
    """This process's part of a run; of a run of one process, all of it.

    Attributes:
        rank: of this process; 0 writes the report.
        size: the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._counts: Counter[str] = Counter()  # where there is no store
        self._lock = Lock()
        self._start = ""  # the name of this start; every key begins with it

    def exit_code(self, code: int) -> int:
        """Return the code for a run that came to its end, photos that failed and all; 0 under torchrun."""
        return 0 if self.launched else code

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process: it takes any exit code but 0 for a crash, and may start it again."""
        return self.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and reports."""
        return self.rank == 0

    def claims(self, name: str, count: int) -> Iterator[int]:
        """Yield the numbers below `count` that this process is to do: each goes to the process that asks first."""
        if self._store is None:
            yield from range(count)
            return
        while (number := self._add(f"claims/{name}", 1) - 1) < count:
            yield number

    def tell(self, name: str, value: str) -> None:
        """Tell the other processes a value."""
        if self._store is not None:
            self._call(lambda store: store.set(self._start + name, value))

    def ask(self, name: str, *, patience: float = float("inf")) -> str | None:
        """Wait until another process has told a value, for so many seconds at most; None if none came."""
        deadline = time.monotonic() + patience
        while (value := self._get(name)) is None:
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL)
        return value

    def agree(self, value: str, what: str) -> None:
        """Let the other processes go on once rank 0 is here too, and has the same value.

        Raises:
            UsageError: if it has another one.
        """
        if self._store is None:
            return
        if self.first:
            self.tell(f"agreed/{what}", value)
        elif self.ask(f"agreed/{what}") != value:
            raise UsageError(f"process {self.rank} of {self.size} has other {what} than process 0: expected the same")

    def count(self, name: str, more: int = 0) -> int:
        """Add to a number that all processes share; return what it is now."""
        if self._store is not None:
            return self._add(name, more)
        with self._lock:
            self._counts[name] += more
            return self._counts[name]

    def gather(self, *, patience: float = float("inf"), warn: Callable[[str], None] = lambda _: None) -> bool:
        """Say that this process has finished; rank 0 waits for the others, and learns whether all came.

        Args:
            patience: wait so many seconds at most.
            warn: told which ones it waits for, after a while.

        Raises:
            StorageError: if one of the others shows no sign of life any more.
        """
        self.tell(f"finished/{self.rank}", "")
        began, silent = time.monotonic(), True
        lost = dict.fromkeys(range(1, self.size), (-1, began)) if self.first else {}  # the last sign of life, when
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
                        "not done: the same command goes on"
                    )
            if lost and silent and time.monotonic() - began > _QUIET:
                silent = False
                warn(f"waiting for {len(lost)} of the {self.size} processes to finish")
            time.sleep(_POLL if lost else 0)
        return not lost

    def live(self) -> None:
        """Show signs of life, from a thread, until the process ends."""

        def beat() -> None:
            with suppress(StorageError):  # the thread that works will hear of it
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
        except RuntimeError as error:  # of torch.distributed: the store's host is gone
            reason = str(error).partition("\n")[0]
            raise StorageError(f"lost touch with the other processes of the run: {reason:.200}") from error

    @contextmanager
    def process_group(self, device: str) -> Iterator[None]:
        """Open what `torch.distributed`'s collectives need, for training: NCCL on CUDA, Gloo elsewhere."""
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
        """Say whether torchrun has started any of the processes again."""
        if self._store is None:
            return False
        self.tell(f"restarts/{self.rank}", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return any(self.ask(f"restarts/{rank}") != "0" for rank in range(self.size))

    def meet(self, *, patience: float = _PATIENCE) -> None:
        """Wait until all processes of this start are here, and agree on its name with them.

        What an earlier start left in the store cannot be taken for theirs: rank 0 answers to a word that each other
        process has just made up, and that process confirms it under the new name.

        Raises:
            UsageError: if they do not come in so many seconds.
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
    """Say whether this is one of several processes.

    Raises:
        UsageError: if the environment says so, and does not say which one, or where they meet.
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
    """Meet the other processes, if there are any.

    Raises:
        UsageError: if the environment does not say how, or they do not come.
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
    """Return the device of this process: of several on a host, each has a CUDA device of its own."""
    if not is_shared() or name not in ("auto", "cuda"):
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{int(os.environ.get('LOCAL_RANK', os.environ['RANK'])) % count}" if count else name
