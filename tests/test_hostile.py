from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support import corpus as hostile
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb.errors import LabelError, UsageError
from mlperturb.labels import parse_request
from mlperturb.photos.purify import parse_purifications, parse_qualities, parse_survival
from mlperturb.photos.regions import parse_region
from mlperturb.run.report import read_schema
from mlperturb.system.text import file_stem, printable

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=12)
VALUES = {
    "--flip": TEXT | st.sampled_from(["cat", "all", "any", "cat,dog", " Cat "]),
    "--keep": TEXT | st.sampled_from(["rest", "hen", "potted plant"]),
    "--budget": TEXT | st.just("fast"),
    "--method": TEXT | st.sampled_from(["fgs", "rank-2"]),
    "--passes": TEXT | st.integers(-5, 60).map(str),
    "--max-rmsd": TEXT | st.floats().map(str),
    "--max-linf": TEXT | st.integers().map(str),
    "--batch-size": TEXT | st.integers(-2, 9).map(str),
    "--survive": TEXT | st.sampled_from(["jpeg:75", "jpeg:0-101", "jpeg:5-6"]),
    "--region": TEXT | st.lists(st.integers(-3, 50), min_size=3, max_size=5).map(lambda v: ",".join(map(str, v))),
    "--device": TEXT | st.just("cpu"),
    "--seed": TEXT | st.integers(-1, 2**33).map(str),
}

FORKED = Path(__file__).parent / "support" / "forked.py"


def test_a_folder_of_bad_files_gives_a_record_each_and_nothing_outside_the_output(tmp_path, tiny):
    """Each in a record or an error, in bounded time and memory, no traceback; the good ones among them attacked."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    kinds = hostile.build(photos)
    assert len(kinds) >= 60
    assert len(set(kinds.values())) >= 15
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
    assert b"Traceback" not in done.stderr
    assert b"\x1b[31m" not in done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, read_schema())
    statuses = {image["source"].rpartition("/")[2]: image["status"] for image in report["images"]}
    assert all(image["error"]["message"] for image in report["images"] if image["status"] == "unreadable")
    regular = [path for path in photos.iterdir() if path.is_file()]
    assert len(report["images"]) == len(regular) == len(statuses)
    expected = {"empty.png", "text.jpg", "html.png", "huge.png", "wide.png", "none.png", "loop.tif", "size.ppm"}
    assert {statuses[name] for name in expected} == {"unreadable"}
    assert statuses["thin.png"] == statuses["tall.png"] == "failed"
    fine = ["CASE.png", "case.png", "new\nline\x1b[31m.png", "twice.png", "wrong.png.tif"]
    assert all(statuses[name] != "unreadable" for name in fine)
    assert [path for path in sorted(tmp_path.rglob("*")) if out not in (path, *path.parents)] == before
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


PLAIN = ["--arch", "shufflenet_v2_x0_5", "--thresholds", 0.5]  # without thresholds there is a note, a second line


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_bad_checkpoint_is_refused_in_a_line_or_does_what_it_says_and_runs_no_code(tmp_path, tiny, all_of_them):
    """Each, or one of each kind, in a process of its own, in bounded time and memory; no file but in --out."""
    folder, out, cwd = (tmp_path / name for name in ("bad", "out", "cwd"))
    folder.mkdir()
    cwd.mkdir()
    bad = hostile.build_checkpoints(folder, tiny, tmp_path / "victim")
    assert len(bad) >= 100
    assert len({one.kind for one in bad.values()}) >= 30
    if not all_of_them:
        seen = Counter[str]()
        for name, one in list(bad.items()):
            seen[one.kind] += 1
            if seen[one.kind] > 1:
                del bad[name]
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photo.png")
    (tmp_path / "names.txt").write_text("\n".join(TINY_LABELS))
    attack = ["attack", tmp_path / "photo.png", "--flip", "any", "--method", "fgs", "--budget", "fast", "--passes", 12]
    attack += ["--device", "cpu", "--html"]
    runs: list[tuple[str, hostile.Bad, list[object]]] = [
        ("good", hostile.Bad("good", "odd"), [*attack, "--checkpoint", tiny, "--out", out / "good"])
    ]
    for number, (name, one) in enumerate(bad.items()):
        source = ["--checkpoint", folder / name]
        source += [*PLAIN, "--labels", tmp_path / "names.txt"] if one.plain else []
        runs.append((name, one, [*attack, *source, "--out", out / str(number)]))
        if not one.plain and (one.fate != "refused" or "metadata" in one.kind or "preprocessing" in one.kind):
            runs.append((name, one, ["labels", "--json", *source]))
        if one.fate != "refused":
            runs.append((name, one, ["labels", *source]))
    (tmp_path / "commands").write_text(json.dumps([[str(word) for word in words] for _, _, words in runs]))
    before = _tree(tmp_path, out)
    subprocess.run(
        [sys.executable, FORKED, tmp_path / "commands", out.with_name("results")],
        cwd=cwd, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    wrong = []
    for (name, one, words), result in zip(runs, results, strict=True):
        code, printed, lines = result["code"], result["out"] + result["err"], result["err"].splitlines()
        refused = code == 2 and not result["out"] and len(lines) == 1 and lines[0].startswith("mlperturb: error: ")
        fine = {
            "refused": refused or (code == 0 and words[0] == "labels"),  # its names and numbers alone may be in order
            "odd": code in (0, 1),
            "not finite": code == (words[0] == "attack") and ("not finite" in result["err"]) == (words[0] == "attack"),
            "either": refused or code in (0, 1),
        }[one.fate]
        harmless = all(character.isprintable() or character == "\n" for character in printed)
        if not fine or not harmless or "Traceback" in printed or result["memory"] > results[0]["memory"] + 5e8:
            wrong.append((name, one.kind, words[0], code, result["memory"] // 10**6, result["err"][-500:]))
    assert wrong == []
    (tmp_path / "results").unlink()
    assert _tree(tmp_path, out) == before
    for page in out.rglob("index.html"):
        assert "<script>alert" not in page.read_text()
    pickle.loads(pickle.dumps(hostile.Payload(tmp_path / "victim")))
    assert (tmp_path / "victim").exists()  # so the code would have worked


def _tree(folder: Path, but: Path) -> dict[Path, tuple[int, int]]:
    """Return everything in a folder, but for one folder in it, with size and time of change."""
    paths = (path for path in folder.rglob("*") if but not in (path, *path.parents))
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths if not path.is_dir()}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(list(VALUES)).flatmap(lambda name: st.tuples(st.just(name), VALUES[name])), max_size=4))
def test_no_arguments_end_in_a_traceback_and_refusals_are_a_line(cli, tiny, tmp_path, given_options):
    photo = tmp_path / "photo.png"
    Image.fromarray(TINY_PIXELS).save(photo)
    arguments = [f"{name}={value}" for name, value in given_options]
    code, _, err = cli("attack", photo, "--flip", "cat", "--budget", "fast", "--passes", 20, *arguments, "--checkpoint",
                       tiny, "--overwrite", "--out", tmp_path / "out")  # fmt: skip
    assert code in (0, 1, 2)
    assert "Traceback" not in err
    assert all(character.isprintable() or character == "\n" for character in err)


@given(st.lists(TEXT, max_size=4), st.lists(TEXT, max_size=3), st.lists(TEXT, min_size=1, max_size=5, unique=True))
def test_any_label_names_are_found_or_refused(flip, keep, labels):
    try:
        request = parse_request(labels, flip=flip, keep=keep, add=(), remove=())
    except (UsageError, LabelError) as error:
        assert str(error)
    else:
        assert set(request.flip) <= set(range(len(labels)))
        assert not set(request.flip) & set(request.keep)


@given(TEXT)
def test_what_is_read_from_the_command_line_is_understood_or_refused(text):
    for parse in (lambda t: parse_purifications([t]), lambda t: parse_qualities([t]), lambda t: parse_survival([t])):
        try:
            parse(text)
        except UsageError as error:
            assert "expected" in str(error)
    try:
        parse_region(text)
    except UsageError as error:
        assert "`region`" in str(error)


@given(st.text(max_size=400))
def test_names_are_shown_on_one_line_and_make_safe_file_names(text):
    assert printable(text).isprintable()
    name = file_stem(text)
    assert name
    assert not set(name) & set("/\\\0\n")
    assert not name.startswith(".")
    assert len(name.encode()) <= 200
