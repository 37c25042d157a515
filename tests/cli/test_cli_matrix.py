"""`evaluate` with several checkpoints: each one's tables, and the files made on each judged on each."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_LABELS as LABELS

from mlperturb import load, predict
from mlperturb.model.checkpoints import Metadata, read_metadata, read_tensors, save_checkpoint

QUICK = ("--budget", "fast", "--images", 2, "--cases", "random", "--methods", "fgs,ml-ddn:aim=strongest",
         "--max-rmsd", 12, "--device", "cpu")  # fmt: skip


@pytest.fixture
def like(tiny, tmp_path) -> Path:
    """Return a checkpoint that decides as `tiny` does, with its labels in another order and a head of its own."""
    tensors, order = read_tensors(tiny), [2, 0, 3, 1]
    noise = torch.randn(tensors["fc.weight"].shape, generator=torch.Generator().manual_seed(1))
    tensors["fc.weight"] = (tensors["fc.weight"] + 0.0005 * tensors["fc.weight"].std() * noise)[order].clone()
    tensors["fc.bias"] = tensors["fc.bias"][order].clone()
    metadata = read_metadata(tiny)
    labels = tuple(LABELS[number] for number in order)
    save_checkpoint(
        tmp_path / "like.safetensors", tensors, Metadata(metadata.architecture, labels, (0.5,) * 4, metadata.preprocess)
    )
    return tmp_path / "like.safetensors"


@pytest.fixture
def data(tiny, tmp_path) -> tuple[object, ...]:
    """Write five photos and a table of what `tiny` says of them."""
    rng, folder = np.random.default_rng(4), tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 36, 3), dtype=np.uint8)).save(path)
    there = (predict(load(tiny), paths) >= 0.5).int().tolist()
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [["image", *LABELS], *([p.name, *row] for p, row in zip(paths, there, strict=True))]
        )
    return "--photos", folder, "--csv", tmp_path / "labels.csv"


def test_the_files_made_on_each_checkpoint_are_judged_on_each(cli, data, tiny, like, tmp_path):
    both = ("--checkpoint", tiny, "--checkpoint", like)
    command = ("evaluate", *data, *QUICK, *both, "--out", tmp_path / "out")
    code, text, err = cli(*command)
    assert (code, err) == (0, "")
    assert "files made on each classifier, judged on each" in text
    result = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert result["schema"] == "mlperturb.matrix/1"
    assert list(result["classifiers"]) == ["tiny", "like"]
    rows = {(row["source"], row["target"], row["method"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 8
    for name, path in (("tiny", tiny), ("like", like)):
        assert (tmp_path / "out" / name / "tables.json").exists()
        tables = {row["method"]: row for row in json.loads((tmp_path / "out" / name / "tables.json").read_text())}
        for method in ("fgs", "ml-ddn:aim=strongest"):
            own = rows[name, name, method]
            assert own["images"] == tables[method]["images"] == 2
            assert own["successes"] == round(2 * tables[method]["success_rate"])
        assert rows[name, name, "ml-ddn:aim=strongest"]["successes"] == 2
        files = sorted((tmp_path / "out" / name / "images" / "random" / "ml-ddn_aim=strongest").glob("*.adv.png"))
        assert len(files) == 2
        other, there = {"tiny": ("like", like), "like": ("tiny", tiny)}[name]
        records = [json.loads(line) for line in (tmp_path / "out" / name / "records.jsonl").read_text().splitlines()]
        made = [r for one in records if one.get("method") == "ml-ddn:aim=strongest" for r in one["records"]]
        held = 0
        for record in made:
            file = next(file for file in files if file.name == record["files"]["adversarial"])
            classifier = load(there)
            for label in record["flip"]:
                place = classifier.labels.index(label)
                seen = [
                    predict(classifier, [file], reader=one)[0, place] >= 0.5 for one in classifier.preprocess.readers
                ]
                held += all(bool(one) != record["truth"][label] for one in seen)
        assert rows[name, other, "ml-ddn:aim=strongest"]["flips"] == {"labels": held, "total": 4}
        assert load(path).labels != load(there).labels
    for ending in (".md", ".tex", ".png"):
        assert (tmp_path / "out" / f"matrix{ending}").stat().st_size > 100
    code, text, err = cli(*command, "--json")
    assert code == 0
    assert json.loads(text) == result


def test_what_several_checkpoints_cannot_do_is_refused_in_a_line(cli, data, tiny, like, tmp_path):
    both = ("--checkpoint", tiny, "--checkpoint", like)
    for more, words in (
        ((*both, "--labels", data[3]), "each must describe itself"),
        ((*both, "--clean", "--json"), "single --checkpoint"),
        (("--checkpoint", tiny, "--checkpoint", tiny), "twice"),
    ):
        code, text, err = cli("evaluate", *data, *more, "--device", "cpu", "--out", tmp_path / "out")
        assert (code, text) == (2, "")
        assert words in err
        assert err.count("\n") == 1
    code, text, err = cli("evaluate", *data, *both, "--clean", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 0
    assert text.count("Table III") == 2
