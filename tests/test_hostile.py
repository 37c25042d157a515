from __future__ import annotations

import json
import resource
import subprocess
import sys

import hostile
import jsonschema

from mlperturb.report import read_schema


def test_a_folder_of_bad_files_gives_a_record_each_and_nothing_outside_the_output(tmp_path, tiny):
    """Each in a record or an error, in bounded time and memory, no traceback; the good ones among them attacked."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    kinds = hostile.build(photos)
    assert len(kinds) >= 60 and len(set(kinds.values())) >= 15
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "mlperturb", "attack", str(photos), "--flip", "any", "--keep", "rest"]
    command += ["--method", "fgs", "--budget", "fast", "--passes", "12", "--html", "--checkpoint", str(tiny)]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(out)],
        capture_output=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (200, 200)),
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert b"Traceback" not in done.stderr and b"\x1b[31m" not in done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, read_schema())
    statuses = {image["source"].rpartition("/")[2]: image["status"] for image in report["images"]}
    assert all(image["error"]["message"] for image in report["images"] if image["status"] == "unreadable")
    regular = [path for path in photos.iterdir() if path.is_file()]
    assert len(report["images"]) == len(regular) == len(statuses)
    expected = {"empty.png", "text.jpg", "html.png", "huge.png", "wide.png", "none.png", "loop.tif", "size.ppm"}
    assert {statuses[name] for name in expected} == {"unreadable"}
    fine = ["CASE.png", "case.png", "new\nline\x1b[31m.png", "twice.png", "wrong.png.tif"]
    assert all(statuses[name] != "unreadable" for name in fine)
    assert [path for path in sorted(tmp_path.rglob("*")) if out not in (path, *path.parents)] == before
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
