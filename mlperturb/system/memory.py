"""A limit on the memory that a block of code may take, so that an untrusted file cannot take all of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOR_A_THREAD = 2**28  # bytes of addresses that a new thread takes: its stack and its heap


@contextmanager
def limited_memory(free: int | None) -> Iterator[None]:
    """Let the block take at most half of the free memory: what asks for more gets a MemoryError, or the like of it.

    Linux alone has such a limit, on the addresses of the process; elsewhere the block runs without.

    Args:
        free: bytes; None if that is unknown, for no limit.

    Raises:
        MemoryError: if the block asks for more, in Python or in torch.
    """
    if free is None or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    wanted = used + free // 2 + _FOR_A_THREAD * (os.cpu_count() or 1)
    limits = [wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    except RuntimeError as error:  # of torch
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
