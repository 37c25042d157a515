from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from mlperturb.errors import UsageError
from mlperturb.system import devices
from mlperturb.system.devices import free_memory, prepare, resolve_device


@pytest.fixture
def found(monkeypatch):
    """Pretend that this machine has so many CUDA devices, and MPS or not."""

    def pretend(cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"), [(2, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_fastest_device_there_is(found, cuda, mps, chosen):
    found(cuda, mps)
    assert resolve_device("auto") == chosen


def test_a_device_that_is_here_keeps_its_name(found):
    found(2, True)
    assert [resolve_device(name) for name in ("cpu", "cuda", "cuda:1", "mps")] == ["cpu", "cuda", "cuda:1", "mps"]


@pytest.mark.parametrize(("name", "cuda"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2), ("mps", 2)])
def test_a_device_that_is_not_here_is_a_usage_error(found, name, cuda):
    found(cuda)
    with pytest.raises(UsageError, match=f"expected a device of this machine.*, got '{name}'"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "meta", "CPU", "xla"])
def test_an_unknown_device_lists_the_known_ones(name):
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


def test_preparing_seeds_torch_and_asks_for_determinism(monkeypatch):
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: True)
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        assert prepare("cpu", 7) == "cpu"
        first = torch.rand(3)
        prepare("cpu", 7)
        assert torch.equal(torch.rand(3), first)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


@pytest.mark.parametrize(("platform", "library"), [("darwin", None), ("linux", object())])
def test_a_c_library_without_mallopt_is_left_alone(monkeypatch, platform, library):
    monkeypatch.setattr(devices.sys, "platform", platform)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: library)
    assert devices.keep_freed_memory() is False


def test_glibc_is_told_to_keep_what_is_freed(monkeypatch):
    class Glibc:
        calls: ClassVar[list[tuple[int, int]]] = []

        def mallopt(self, option: int, value: int) -> int:
            self.calls.append((option, value))
            return 1

    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: Glibc())
    assert devices.keep_freed_memory() is True
    assert {option for option, _ in Glibc.calls} == {-1, -2, -4, -8}


KEPT = """
import torch
from mlperturb.system.devices import keep_freed_memory, return_freed_memory

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

assert keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(80)]  # 4 MB each
pins = blocks[::8]  # so that the heap's end stays in use
del blocks
kept = resident()
return_freed_memory()
assert kept - resident() > 200_000, (kept, resident())
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_kept_memory_can_be_given_back():
    subprocess.run([sys.executable, "-c", KEPT], check=True, timeout=120)


@pytest.mark.parametrize(("platform", "library"), [("win32", None), ("linux", object())])
def test_without_glibc_nothing_is_given_back(monkeypatch, platform, library):
    monkeypatch.setattr(devices.sys, "platform", platform)
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: library)
    devices.return_freed_memory()


def test_free_memory_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    assert free_memory(torch.device("cuda:1")) == 1200
    assert free_memory(torch.device("mps")) is None
    here = free_memory(torch.device("cpu"))
    assert here is None or here > 2**20
