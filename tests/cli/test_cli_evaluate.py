from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import fsspec
import jsonschema
import numpy as np
import pytest
from PIL import Image
from support.models import TINY_LABELS as LABELS
from support.processes import finish, launch, linux

from mlperturb.experiment.evaluate import predict_photos
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.photos.datasets import Dataset
from mlperturb.photos.images import read_photo
from mlperturb.run.outputs import is_own
from mlperturb.run.report import read_schema

QUICK = ("--budget", "fast", "--passes", 20, "--images", 2, "--methods", "fgs,ml-cw", "--cases", "random,extreme")


@pytest.fixture
def table(tmp_path, tiny) -> Path:
    """Write six photos and a table of the classifier's decisions on them."""
    rng = np.random.default_rng(4)
    paths = [tmp_path / "photos" / f"{number}.png" for number in range(6)]
    paths[0].parent.mkdir()
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (30, 36, 3), dtype=np.uint8)).save(path)
    classifier, _ = load_checkpoint(tiny, device="cpu")
    present = predict_photos(classifier, Dataset(tuple(paths), LABELS, np.zeros((6, 4), np.int8))) >= 0
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", *LABELS])
        writer.writerows([path.name, *row] for path, row in zip(paths, present.int().tolist(), strict=True))
    return tmp_path / "labels.csv"


@pytest.fixture
def evaluate(cli, table, tiny):
    def run(*more: object) -> tuple[int, str, str]:
        data = ("--photos", table.parent / "photos", "--csv", table, "--checkpoint", tiny)
        return cli("evaluate", *data, "--out", table.parent / "out", "--device", "cpu", *more)

    return run


def test_tables_are_printed_and_written(evaluate, table):
    code, stdout, stderr = evaluate(*QUICK)
    assert (code, stderr) == (0, "")
    assert "8-bit PNG" in stdout
    assert "float result" in stdout
    assert "random, 2" in stdout
    rows = json.loads((table.parent / "out" / "tables.json").read_text())
    assert [(row["case"], row["method"]) for row in rows] == [
        (case, method) for case in ("random", "extreme") for method in ("fgs", "ml-cw")
    ]
    keys = {"case", "method", "images", "success_rate", "passes", "float", "saved"}
    metrics = {"rmsd", "hamming_a", "hamming_b", "f1", "ranking_loss", "map", "auc", "kendall_tau"}
    assert all(keys <= row.keys() and row["float"].keys() == row["saved"].keys() == metrics for row in rows)
    assert sorted(path.name for path in (table.parent / "out").iterdir()) == [
        "curve-extreme.png",
        "curve-random.png",
        "curves.csv",
        "curves.json",
        "records.jsonl",
        "tables.csv",
        "tables.json",
        "tables.md",
        "tables.tex",
    ]


def test_curves_of_success_agree_with_the_records_and_the_tables(evaluate, table):
    assert evaluate(*QUICK)[0] == 0
    out = table.parent / "out"
    curves = json.loads((out / "curves.json").read_text())
    jsonschema.validate(curves, read_schema("mlperturb.curves/1"))
    entries = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    for row in json.loads((out / "tables.json").read_text()):
        batches = [
            entry for entry in entries if (entry.get("case"), entry.get("method")) == (row["case"], row["method"])
        ]
        records = [record for entry in batches for record in entry["records"]]
        for which, key in (("float", "distortion_float"), ("saved", "distortion")):
            held = [r["success_float"] if which == "float" else r["status"] == "success" for r in records]
            reached = sorted({r[key]["rmsd"] for r, good in zip(records, held, strict=True) if good})
            (curve,) = [
                c for c in curves["curves"] if all(c[k] == row[k] for k in ("case", "method")) and c["result"] == which
            ]
            assert curve["rmsd"] == reached
            assert curve["success"][-1:] == ([sum(held) / len(held)] if reached else [])
            assert row["curve"][which]["rmsd_50"] == (reached[0] if sum(held) else None)
        assert row["passes"] == row["forward"] + row["backward"]
        assert row["forward"] == sum(record["cost"]["forward"] for record in records) / len(records)
    assert read_photo(out / "curve-random.png").rgb.shape[1] > 500
    assert is_own(out / "curve-random.png")
    assert not is_own(table.parent / "photos" / "curve-random.png")


def test_a_case_that_flips_one_label_has_figure_1(evaluate, table):
    out = table.parent / "out"
    code, stdout, stderr = evaluate(*QUICK, "--augment", "cat", "--reduce", "dog")
    assert (code, stderr) == (0, "")
    pictures = ["histogram-augment_cat.png", "histogram-reduce_dog.png"]
    assert sorted(path.name for path in out.glob("histogram-*")) == pictures
    assert all(is_own(out / name) for name in pictures)
    last = stdout.splitlines()[-1]
    assert last.startswith("probabilities of the flipped label: ")
    assert all(name in last for name in pictures)


@pytest.mark.parametrize("more", [(), ("--overwrite", "--seed", 4)])
def test_pictures_of_cases_that_are_not_asked_for_any_more_go(evaluate, table, more):
    out = table.parent / "out"
    assert evaluate(*QUICK, "--augment", "cat")[0] == 0
    shutil.copy(out / "curve-random.png", out / "curve-mine.png")
    assert evaluate(*QUICK[:-1], "extreme", *more)[0] == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["curve-extreme.png", "curve-mine.png"]


def test_the_same_command_goes_on_and_another_one_is_refused(evaluate, table):
    out = table.parent / "out"
    evaluate(*QUICK)
    first, journal = (out / "tables.json").read_bytes(), (out / "records.jsonl").read_bytes()
    code, stdout, stderr = evaluate(*QUICK, "--json")
    assert code == 0
    assert stderr == "mlperturb: going on: 8 of 8 attacks are done already\n"
    assert (out / "tables.json").read_bytes() == first == stdout.encode()
    code, stdout, stderr = evaluate(*QUICK, "--seed", 1)
    assert (code, stdout) == (2, "")
    assert "written with another seed" in stderr
    assert stderr.count("\n") == 1
    assert (out / "records.jsonl").read_bytes() == journal
    assert evaluate(*QUICK[:-1], "random", "--reduce", "dog", "--passes", 3, "--overwrite")[0] == 2
    assert (out / "records.jsonl").read_bytes() == journal
    assert evaluate(*QUICK, "--seed", 1, "--overwrite", "--quiet")[:2] == (0, "")
    assert (out / "records.jsonl").read_bytes() != journal


def test_clean_measures_the_classifier_itself(evaluate, table):
    code, stdout, stderr = evaluate("--clean")
    assert (code, stderr) == (0, "")
    assert "Table III" in stdout
    figures = json.loads((table.parent / "out" / "table3.json").read_text())["labels.csv"]
    assert figures["images"] == 6
    assert figures["hamming"] == 0
    assert figures["micro_f1"] == 1
    assert set(figures["per_label"]) == set(LABELS)


def test_a_photo_that_cannot_be_read_is_left_out_and_said(evaluate, table):
    (table.parent / "photos" / "3.png").write_bytes(b"\x89PNG")
    code, _, stderr = evaluate("--clean")
    assert code == 1
    assert "3.png: could not be read" in stderr
    assert stderr.count("\n") == 1
    assert json.loads((table.parent / "out" / "table3.json").read_text())["labels.csv"]["images"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cases", "nope"), "unknown case 'nope'"),
        (("--methods", "nope", "--cases", "random"), "unknown method 'nope'"),
        (("--methods", "ml-cw:solver=pinv", "--reduce", "cat"), "--solver is an option of ml-dp"),
        (("--reduce", "catt"), "unknown label 'catt'"),
        ((), "unknown label 'person'"),  # the paper's cases are of VOC's labels
        (("--budget", "slow", "--cases", "random"), "unknown budget 'slow'"),
        (("--batch-size", "x", "--cases", "random"), "--batch-size"),
        (("--passes", "3", "--cases", "random"), "--passes of at least"),
        (("--max-rmsd", "inf", "--cases", "random"), "finite --max-rmsd above 0"),
        (("--max-linf", "0", "--cases", "random"), "--max-linf from 1 to 255 grey levels, got 0"),
        (("--split", "test"), "expected --split with --voc"),
        (("--year", "2007"), "expected both --year and --voc"),
        (("--clean", "--cases", "random"), "expected --clean without --cases"),
        (("--voc", "x"), "either --voc with --year, or --photos with --csv or --coco"),
    ],
)
def test_bad_arguments_get_one_line_and_leave_nothing(evaluate, table, arguments, message):
    code, stdout, stderr = evaluate(*arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (table.parent / "out").exists()


def test_labels_that_are_not_the_classifiers_are_refused(evaluate, table):
    table.write_text(table.read_text().replace("hen", "cow"))
    code, _, stderr = evaluate(*QUICK)
    assert code == 2
    assert "'hen' is not in both" in stderr


def test_an_interrupted_run_says_how_to_go_on(evaluate, monkeypatch):
    def interrupt(*_: object, **__: object):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlperturb.experiment.evaluate.run", interrupt)
    code, stdout, stderr = evaluate(*QUICK)
    assert (code, stdout) == (130, "")
    assert "the same command goes on" in stderr


def test_overwriting_drops_the_images_of_the_run_replaced_and_no_other_file(evaluate, table):
    images = table.parent / "out" / "images"
    assert evaluate(*QUICK, "--keep-images")[0] == 0
    (images / "mine.png").write_bytes(b"x")
    first = {path.relative_to(images).as_posix() for path in images.rglob("*.png")}
    assert any(name.startswith("random/ml-cw/") for name in first)
    assert evaluate(*QUICK, "--keep-images", "--overwrite", "--methods", "fgs", "--seed", 3)[0] == 0
    second = {path.relative_to(images).as_posix() for path in images.rglob("*.png")}
    assert "mine.png" in second
    assert {name.split("/")[1] for name in second if "/" in name} <= {"fgs", "ml-cw"}
    records = [json.loads(line) for line in (table.parent / "out" / "records.jsonl").read_text().splitlines()]
    named = {name for entry in records for one in entry.get("records", ()) for name in one["files"].values() if name}
    assert {name.split("/")[-1] for name in second} - {"mine.png"} == named


def test_cocos_instances_do_in_place_of_a_table(cli, evaluate, table, tiny):
    assert evaluate("--clean", "--json")[0] == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    content = {
        "categories": [{"id": 7 * place, "name": label} for place, label in enumerate(LABELS)],
        "images": [{"id": number, "file_name": row["image"]} for number, row in enumerate(rows)],
        "annotations": [
            {"image_id": number, "category_id": 7 * place}
            for number, row in enumerate(rows)
            for place, label in enumerate(LABELS)
            if row[label] == "1"
        ],
    }
    instances = table.parent / "instances_val.json"
    instances.write_text(json.dumps(content))
    data = ("--photos", table.parent / "photos", "--coco", instances, "--checkpoint", tiny, "--device", "cpu")
    code, stdout, stderr = cli("evaluate", *data, "--clean", "--json", "--out", table.parent / "coco")
    assert (code, stderr) == (0, "")
    figures = json.loads((table.parent / "out" / "table3.json").read_text())
    assert json.loads(stdout) == {"instances_val.json": figures["labels.csv"]}
    code, stdout, stderr = cli("evaluate", *data, "--csv", table, "--out", table.parent / "both")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)


@linux
def test_two_processes_come_to_the_tables_of_one(evaluate, table, tiny):
    assert evaluate(*QUICK)[0] == 0
    both = table.parent / "both"
    data = ["--photos", table.parent / "photos", "--csv", table, "--checkpoint", tiny, "--device", "cpu"]
    code, stdout, stderr = finish(launch(["evaluate", *data, *QUICK, "--batch-size", 1, "--out", both]))
    assert code == 0, stderr
    assert stdout.count("tables in") == 1
    tables = [json.loads((table.parent / name / "tables.json").read_text()) for name in ("out", "both")]
    names = [(row["case"], row["method"], row["images"], row["success_rate"]) for row in tables[0]]
    assert names == [(row["case"], row["method"], row["images"], row["success_rate"]) for row in tables[1]]
    for alone, shared in zip(*tables, strict=True):
        assert shared["saved"]["rmsd"] == pytest.approx(alone["saved"]["rmsd"], rel=0.05)
    files = {path.name for path in both.glob("records*.jsonl")}
    assert files == {"records.jsonl", "records.rank-1.jsonl"}
    batches = [json.loads(line).get("records", []) for name in files for line in (both / name).read_text().splitlines()]
    assert sum(map(len, batches)) == sum(row["images"] for row in tables[0])


def test_an_evaluation_may_lie_at_a_url(cli, evaluate, table, tiny):
    fsspec.filesystem("memory").store.clear()
    assert evaluate(*QUICK)[0] == 0
    data = ["--photos", table.parent / "photos", "--csv", table, "--checkpoint", tiny, "--device", "cpu"]
    for _ in range(2):  # the second one goes on
        code, _, err = cli("evaluate", *data, *QUICK, "--out", "memory://bucket/out")
        assert code == 0, err
    assert "8 of 8 attacks are done already" in err
    store = fsspec.filesystem("memory")
    assert store.cat_file("/bucket/out/tables.json") == (table.parent / "out" / "tables.json").read_bytes()
    pictures = [name for name in store.find("/bucket/out") if name.endswith(".png")]
    assert pictures == ["/bucket/out/curve-extreme.png", "/bucket/out/curve-random.png"]
    code, _, err = cli("evaluate", *data, *QUICK, "--out", "memory://bucket/out", "--overwrite", "--seed", 4)
    assert code == 0
    assert "already" not in err
    assert not [name for name in store.find("/bucket/out") if ".old" in name]


def test_more_images_go_on_and_fewer_count_fewer(evaluate, table):
    run = ("--budget", "fast", "--passes", 20, "--methods", "fgs", "--cases", "extreme")
    tables, curves = table.parent / "out" / "tables.json", table.parent / "out" / "curves.json"
    assert evaluate(*run, "--images", 2)[0] == 0
    small, few = json.loads(tables.read_text()), curves.read_bytes()
    code, _, err = evaluate(*run, "--images", 4)
    assert (code, err) == (0, "mlperturb: going on: 2 of 4 attacks are done already\n")
    large = json.loads(tables.read_text())
    assert [row["images"] for row in (*small, *large)] == [2, 4]
    code, _, err = evaluate(*run, "--images", 2)
    assert (code, err) == (0, "mlperturb: going on: 2 of 2 attacks are done already\n")
    assert json.loads(tables.read_text()) == small
    assert curves.read_bytes() == few
