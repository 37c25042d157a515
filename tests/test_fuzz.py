from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("target", ["images", "checkpoints"])
def test_a_minute_of_fuzzing_finds_no_bytes_that_a_reader_fails_at_in_a_way_not_ours(tmp_path, target):
    pytest.importorskip("atheris")
    script, found = Path(__file__).with_name("fuzz.py"), tmp_path / "found"
    found.mkdir()
    done = subprocess.run(
        [sys.executable, script, target, "-max_total_time=60", "-seed=1"],
        cwd=found, capture_output=True, text=True, errors="replace", timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in found.iterdir()] == []
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 3000
    assert len(re.findall(r"^#\d+\s+NEW ", done.stderr, re.MULTILINE)) > 20  # ways through the code not in the seeds
