"""Signals end the process even while a thread, or the main thread, is in code that nothing interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

STUCK = """
import hashlib, sys, pathlib
there = pathlib.Path(sys.argv.pop())
import mlperturb.photos.images as images
from mlperturb.cli.main import run

def decode(path, data, room):
    there.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)  # as a decoder: minutes in C, without the interpreter's lock

images._decode = decode
run()
"""


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a command that stays in the decoder of its photo; wait until it is there."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    words = [*map(str, arguments), str(tmp_path / "there")]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "there").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_waits_for_a_decoder(tmp_path, tiny, number):
    process = start(tmp_path, "attack", "x.png", "--flip", "cat", "--checkpoint", tiny, "--device", "cpu")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: 0 of 1 photo is done and reported" in err


def test_a_second_signal_ends_a_command_whose_main_thread_is_in_a_decoder(tmp_path, tiny):
    process = start(tmp_path, "predict", "x.png", "--checkpoint", tiny, "--device", "cpu")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "mlperturb: error: interrupted\n")
