"""Messages and names on streams that cannot take them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.cli.console import print_error
from mlperturb.show.grids import _harmless


def run(folder: Path, *words: object, **more: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mlperturb", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return subprocess.run(command, cwd=folder, env=environment, timeout=120, **more)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stderr_changes_no_exit_code(tmp_path):
    (tmp_path / "x.png").write_bytes(b"nonsense")
    with Path("/dev/full").open("wb") as full:
        for code, words in ((2, ["attack", "nothing.png", "--flip", "cat"]), (2, ["attack", "--nonsense"])):
            assert run(tmp_path, *words, stderr=full, stdout=subprocess.DEVNULL).returncode == code


def test_a_name_that_stdout_cannot_encode_is_escaped(tmp_path, tiny):
    Image.fromarray(TINY_PIXELS).save(tmp_path / "фото.png")
    done = run(
        tmp_path, "predict", "фото.png", "--checkpoint", tiny, "--device", "cpu",
        env={"PYTHONIOENCODING": "ascii"}, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u0444\u043e\u0442\u043e.png" in done.stdout


def test_a_message_has_a_length_that_a_terminal_bears(capsys):
    print_error("label " + "x" * 90_000_000)
    err = capsys.readouterr().err
    assert err.startswith("mlperturb: error: label xxx")
    assert len(err) < 2100


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\t=1"])
def test_no_cell_of_a_table_is_a_formula(cell):
    assert _harmless(cell) == f"'{cell}"
    assert _harmless("ml-ddn") == "ml-ddn"
