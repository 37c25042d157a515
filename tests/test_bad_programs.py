from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image
from support import bad_programs
from support import corpus as hostile
from support.models import TINY_PIXELS
from support.programs import Gated, export_onnx, export_program, write_beside

FORKED = Path(__file__).parent / "support" / "forked.py"


def attack_each(tmp_path: Path, folder: Path, bad: dict[str, hostile.Bad], good: Path) -> list[object]:
    """Attack a photo with each file as the checkpoint, in a process each; return what was not refused in a line."""
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photo.png")
    attack = ["attack", tmp_path / "photo.png", "--flip", "any", "--method", "fgs", "--budget", "fast", "--passes", 12]
    runs = [[*attack, "--device", "cpu", "--checkpoint", path, "--out", tmp_path / "out" / str(number)]
            for number, path in enumerate([good, *(folder / name for name in bad)])]  # fmt: skip
    (tmp_path / "commands").write_text(json.dumps([[str(word) for word in words] for words in runs]))
    subprocess.run(
        [sys.executable, FORKED, tmp_path / "commands", tmp_path / "results"],
        cwd=tmp_path, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first, *results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert first["code"] == 0, first["err"]
    wrong: list[object] = []
    for (name, one), result in zip(bad.items(), results, strict=True):
        code, printed, lines = result["code"], result["out"] + result["err"], result["err"].splitlines()
        refused = code == 2 and not result["out"] and len(lines) == 1 and lines[0].startswith("mlperturb: error: ")
        fine = refused if one.fate == "refused" else code in (0, 1)
        harmless = all(character.isprintable() or character == "\n" for character in printed)
        if not fine or not harmless or "Traceback" in printed or result["memory"] > first["memory"] + 5e8:
            wrong.append((name, one.kind, code, (result["memory"] - first["memory"]) // 10**6, result["err"][-500:]))
    return wrong


@pytest.fixture(scope="module")
def good_program(tmp_path_factory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        return export_program(tmp_path_factory.mktemp("good") / "good.pt2", Gated())


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_bad_program_is_refused_in_a_line_and_runs_no_code(tmp_path, good_program, all_of_them):
    """Pickles in every place, text that torch would evaluate, unknown operators, bombs, wrong JSON files."""
    folder, victim = tmp_path / "bad", tmp_path / "victim"
    folder.mkdir()
    bad = bad_programs.build_programs(folder, good_program, victim) | bad_programs.build_beside(folder, good_program)
    assert len(bad) >= 80
    if not all_of_them:
        bad = dict(list(bad.items())[::6])
    assert attack_each(tmp_path, folder, bad, good_program) == []
    assert not victim.exists()
    pickle.loads(pickle.dumps(hostile.Payload(victim)))
    assert victim.exists()  # so the code would have worked


def test_torch_itself_runs_the_code_of_a_file_of_the_corpus(tmp_path, good_program):
    """Or the corpus would prove nothing, and our own reader of the archive would be needless."""
    import torch

    victim = tmp_path / "victim"
    bad_programs.build_programs(tmp_path, good_program, victim)
    for name in ("symbols.pt2", "sample-inputs.pt2"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.export.load(tmp_path / name)
            except Exception as error:
                print(error)
        assert victim.exists(), name
        victim.unlink()


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_bad_onnx_file_is_refused_in_a_line(tmp_path, all_of_them):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx2pytorch")
    from support.bad_onnx import build_onnx

    folder = tmp_path / "bad"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        good = export_onnx(tmp_path / "good.onnx", Gated())
    bad = build_onnx(folder, good)
    (folder / "no-json.onnx").write_bytes(good.read_bytes())
    write_beside(folder / "labels.onnx", labels=["cat"], thresholds=0.5)
    (folder / "labels.onnx").write_bytes(good.read_bytes())
    bad |= {"no-json.onnx": hostile.Bad("no JSON"), "labels.onnx": hostile.Bad("wrong JSON")}
    assert len(bad) >= 50
    if not all_of_them:
        bad = dict(list(bad.items())[::6])
    assert attack_each(tmp_path, folder, bad, good) == []
