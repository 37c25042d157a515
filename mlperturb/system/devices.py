"""Choose the device, measure its free memory, and make the C allocator keep memory for the next layer."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import torch

from mlperturb.errors import UsageError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


def resolve_device(name: str) -> str:
    """Return the device called `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        UsageError: if this machine does not have the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"expected a device of this machine, which has {count} CUDA devices, got {name!r}")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("expected a device of this machine, got 'mps'")
    elif device.type != "cpu":
        raise UsageError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    return name


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks in place of returning them to the system; return whether it agreed.

    By default every activation of a network is mapped, zeroed page by page and unmapped again. With kept blocks, a
    forward and backward pass of MobileNetV2 on the CPU takes about two thirds of the time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library other than glibc
        return False
    kept = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 26))
    shared = (_M_ARENA_MAX, 1)  # threads that write files take what the thread that attacks has freed
    return all(mallopt(*option) for option in (*kept, shared))


def return_freed_memory() -> None:
    """Give what `keep_freed_memory` kept back to the system: after large photos, in whose place others find no room."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that this process may still take on a device; None if that is unknown."""
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch
        return torch.cuda.mem_get_info(device)[0] + spare
    if device.type != "cpu":
        return None
    free: list[int] = []
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # the limit of a container; "max" is not a number
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return min(free, default=None)


def prepare(name: str, seed: int) -> str:
    """Resolve the device, seed torch, make it deterministic and return the device's name."""
    device = resolve_device(name)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A fill of every new tensor takes a fifth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # a file found in TF32 may fail in float32 on another device
    if device == "cpu":
        keep_freed_memory()
    return device
