"""Checkpoints of the Hugging Face Hub, up to the edge of the network."""

from __future__ import annotations

import fnmatch
import json
import shutil
import sys

import pytest
from support.prompts import write_model
from support.transformers_folders import write_folder

import mlperturb
from mlperturb.errors import CheckpointError
from mlperturb.model.hub import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the calls of `snapshot_download`, which copies what it is asked for of a repository on this machine."""
    repository, calls = tmp_path / "repository", []
    write_folder(repository)
    (repository / "code.py").write_text("raise SystemExit")
    (repository / "pytorch_model.bin").write_bytes(b"x")
    (repository / "onnx").mkdir()
    (repository / "onnx" / "model.safetensors").write_bytes(b"x")

    def download(name, *, revision=None, allow_patterns, ignore_patterns, local_files_only):
        calls.append((name, revision, local_files_only))
        folder = tmp_path / "hub" / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for path in (path for path in repository.rglob("*") if path.is_file()):
            inner = str(path.relative_to(repository))
            allowed, ignored = (
                any(fnmatch.fnmatch(inner, one) for one in patterns) for patterns in (allow_patterns, ignore_patterns)
            )
            if allowed and not ignored:
                shutil.copy(path, folder / inner)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_a_checkpoint_of_the_hub_is_attacked_and_its_commit_stands_in_the_report(hub, cli, save_photo, tmp_path):
    out = tmp_path / "out"
    command = ["attack", save_photo("img.png"), "--flip", "dog", "--budget", "fast", "--out", out]
    code, _, said = cli(*command, "--checkpoint", "hf:some-one/net@v1.0")
    assert code == 0, said
    assert set(hub) == {("some-one/net", "v1.0", False)}
    fetched = {path.name for path in (tmp_path / "hub" / "snapshots" / COMMIT).iterdir()}
    assert fetched == {"config.json", "model.safetensors", "preprocessor_config.json"}
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["commit"] == COMMIT
    assert report["classifier"]["checkpoint"] == f"hf:some-one/net@{COMMIT}"
    code, shown, said = cli("labels", "--checkpoint", "hf:some-one/net")
    assert code == 0, said
    assert hub[-1] == ("some-one/net", None, False)
    assert f"hf:some-one/net@{COMMIT}" in shown
    assert mlperturb.load("hf:some-one/net").labels == ("cat", "dog", "hen", "cow")
    code, _, said = cli("jpeg-defend", out, "--out", tmp_path / "defended", "--quality", "75")
    assert code == 0, said
    assert hub[-1] == ("some-one/net", COMMIT, True)


def test_a_siglip_of_the_hub_is_attacked_by_prompts(hub, cli, save_photo, tmp_path):
    shutil.rmtree(tmp_path / "repository")
    write_model(tmp_path / "repository")
    (tmp_path / "repository" / "spiece.model").write_bytes(b"x")
    out = tmp_path / "out"
    command = ["attack", save_photo("img.png"), "--flip", "a dog", "--budget", "fast", "--out", out]
    code, _, said = cli(*command, "--checkpoint", "hf:some-one/siglip", "--labels", "a dog, a cat")
    assert code == 0, said
    fetched = {path.name for path in (tmp_path / "hub" / "snapshots" / COMMIT).iterdir()}
    assert "tokenizer.json" in fetched
    assert "spiece.model" not in fetched
    report = json.loads((out / "report.json").read_text())
    assert report["classifier"]["checkpoint"] == f"hf:some-one/siglip@{COMMIT}"
    assert report["classifier"]["prompts"] == ["a photo of {}"]
    code, _, said = cli("jpeg-defend", out, "--out", tmp_path / "defended", "--quality", "75")
    assert code == 0, said
    assert hub[-1] == ("some-one/siglip", COMMIT, True)


def test_a_hub_that_cannot_be_reached_is_a_line_that_names_the_way_without(monkeypatch, cli):
    def fail(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    code, _, said = cli("labels", "--checkpoint", "hf:some/net")
    assert code == 2
    assert said.count("\n") == 1
    assert "cannot fetch hf:some/net: no route to host; a folder with its files on this machine does as well" in said


@pytest.mark.parametrize("name", ["hf:", "hf:net", "hf:a/b/c", "hf:../b", "hf:a/b@", "hf:a/b@../c", "hf:a/b c"])
def test_a_name_of_another_form_is_refused_before_anything_is_fetched(name, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    with pytest.raises(CheckpointError, match="expected hf:OWNER/NAME"):
        fetch(name)


def test_without_huggingface_hub_a_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mlperturb\[hf\]'"):
        fetch("hf:a/b")
