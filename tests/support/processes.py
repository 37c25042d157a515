"""Runs of several processes under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")


def launch(arguments: list[object], *, restarts: int = 0, processes: int = 2, mark: str = "") -> subprocess.Popen[str]:
    """Start an mlperturb command under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", "mlperturb", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLPERTURB_TEST": mark}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the process; return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def find_rank(rank: int, mark: str) -> int:
    """Return the process id of a rank of the run with this mark."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if {f"RANK={rank}".encode(), f"MLPERTURB_TEST={mark}".encode()} <= set(environment):
            return int(path.parent.name)
    raise AssertionError(f"no process of rank {rank}")
