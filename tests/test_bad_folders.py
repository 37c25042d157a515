"""Bad folders of timm and transformers models, each in a process of its own: a line each, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support import bad_folders
from support.models import TINY_PIXELS
from support.transformers_folders import write_folder
from timm.models import save_for_hf

FORKED = Path(__file__).parent / "support" / "forked.py"


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_bad_folder_is_refused_in_a_line_in_bounded_memory_and_runs_no_code(tmp_path, all_of_them):
    good, other, victim = tmp_path / "timm", tmp_path / "transformers", tmp_path / "victim"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_vit", num_classes=4)
    save_for_hf(network, good, model_config={"label_names": list("abcd")}, safe_serialization=True)
    write_folder(other)
    folders = bad_folders.build(tmp_path / "bad", good, other, victim)
    for kind in ("timm", "transformers"):
        assert len([folder for folder in folders if folder.parent.name == kind]) >= 60
    if not all_of_them:
        folders = folders[::24]
    photo = tmp_path / "photo.png"
    Image.fromarray(TINY_PIXELS).save(photo)
    commands = [["predict", photo, "--device", "cpu", "--checkpoint", folder] for folder in [good, other, *folders]]
    (tmp_path / "commands").write_text(json.dumps([[str(word) for word in words] for words in commands]))
    subprocess.run(
        [sys.executable, FORKED, tmp_path / "commands", tmp_path / "results", "timm", "transformers.models.vit"],
        cwd=tmp_path, check=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    results = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert [result["code"] for result in results[:2]] == [0, 0], results[:2]
    most = max(result["memory"] for result in results[:2]) + 7e8  # 50,000 modules are built before they are refused
    wrong = []
    for folder, result in zip(folders, results[2:], strict=True):
        printed, lines = result["out"] + result["err"], result["err"].splitlines()
        refused = result["code"] == 2 and not result["out"] and len(lines) == 1
        harmless = all(character.isprintable() or character == "\n" for character in printed)
        if not refused or not harmless or "Traceback" in printed or result["memory"] > most:
            wrong.append((folder.parent.name, folder.name, result["code"], result["memory"] // 10**6, printed[-400:]))
    assert wrong == []
    assert not victim.exists()
