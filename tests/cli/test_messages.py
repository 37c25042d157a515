"""What the commands say: missing files, words, plural and singular, many labels, a network that gives no number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from mlperturb.cli.advice import advice
from mlperturb.experiment.records import failures
from mlperturb.labels import Request
from mlperturb.model.checkpoints import read_metadata, save_checkpoint
from mlperturb.run.record import NOT_FINITE, Record
from mlperturb.run.settings import Settings
from mlperturb.show.tables import image_table, prediction_table

MANY = [f"label {number}" for number in range(2000)]


@pytest.fixture
def broken(tiny, tmp_path) -> Path:
    """Return the small network with a head that gives no finite number."""
    tensors = load_file(tiny)
    tensors["fc.bias"] = torch.full_like(tensors["fc.bias"], 1e30)
    tensors["fc.weight"] = torch.full_like(tensors["fc.weight"], 3e38)
    path = tmp_path / "broken.safetensors"
    save_checkpoint(path, tensors, read_metadata(tiny))
    return path


def text_of(table: object) -> list[str]:
    console = Console(width=80, record=True, quiet=True)
    with console.capture() as shown:
        console.quiet = False
        console.print(table)
    return shown.get().splitlines()


def test_a_missing_mask_is_called_missing(cli, photo, tmp_path):
    code, _, err = cli("attack", photo, "--flip", "person", "--region", tmp_path / "mask.png")
    assert code == 2
    assert "no such --region mask: " in err
    assert "mask.png" in err
    assert "is not a file" in cli("attack", photo, "--flip", "person", "--region", tmp_path)[2]
    assert "expected --region x,y,w,h in pixels or a mask image, got '1,2'" in cli(
        "attack", photo, "--flip", "person", "--region", "1,2")[2]  # fmt: skip


def test_keep_all_suggests_rest(cli, photo):
    code, _, err = cli("attack", photo, "--flip", "person", "--keep", "all")
    assert code == 2
    assert "'all' is not a label" in err
    assert "--keep rest keeps all the others" in err


def test_a_missing_voc_folder_is_named(cli, tmp_path):
    code, _, err = cli("evaluate", "--voc", tmp_path / "nosuch", "--year", "2007", "--out", tmp_path / "out")
    assert code == 2
    assert f"no such folder of a VOCdevkit: {tmp_path / 'nosuch'}" in err


def failed(violated: list[str], total: int) -> str:
    held = {"held": total - len(violated), "total": total, "violated": violated}
    record = Record(
        "x.png", status="partial", flip=["a"], constraints=held, files={"adversarial": "x.adv.png", "map": "m"}
    )
    return advice(record, Settings("ml-ddn", "fast", Request(flip=(0,))))


def test_advice_counts_in_singular_and_plural_and_says_what_it_leaves_out():
    assert failed(["cat"], 1).startswith("the constraint does not hold (cat);")
    assert failed(["cat"], 3).startswith("1 of 3 constraints does not hold (cat);")
    assert failed(list("abcde"), 20).startswith("5 of 20 constraints do not hold (a, b, c, d, e);")
    assert failed(list("abcdef"), 20).startswith("6 of 20 constraints do not hold (a, b, c, d, e, ...);")


def test_outputs_that_exist_are_counted(cli, tiny, photo, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    attack = ("attack", photo, "--flip", "cat", "--checkpoint", tiny, "--out", out, "--device", "cpu")
    (out / "photo.adv.png").touch()
    assert f"{out / 'photo.adv.png'} exists already: give --overwrite" in cli(*attack)[2]
    (out / "photo.map.png").touch()
    assert "and 1 more output exist already" in cli(*attack)[2]


def test_a_network_that_gives_no_number_is_one_error(cli, broken, photo, tmp_path):
    for name in ("b.png", "c.png"):
        (photo.parent / name).write_bytes(photo.read_bytes())
    run = ("--checkpoint", broken, "--device", "cpu")
    for command in (("attack", "--flip", "cat", "--budget", "fast", "--out", tmp_path / "out"), ("predict",)):
        code, _, err = cli(command[0], photo.parent, *command[1:], *run)
        assert code == 1
        (line,) = [line for line in err.splitlines() if "error" in line]
        assert line.endswith(f"{NOT_FINITE.message} on 3 photos, such as {photo.parent / 'b.png'}")
        assert f"{photo}: {NOT_FINITE.message}" in cli(command[0], photo, *command[1:], *run, *(
            ["--overwrite"] if command[0] == "attack" else []))[2]  # fmt: skip
    table = tmp_path / "labels.csv"
    table.write_text("image,cat,dog,potted plant,hen\nphoto.png,1,0,0,0\nb.png,1,0,0,0\n")
    data = ("evaluate", "--photos", photo.parent, "--csv", table, "--out", tmp_path / "tables")
    code, _, err = cli(*data, "--cases", "random", *run)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{NOT_FINITE.message} on any of 2 photos" in err
    code, _, err = cli(*data, "--clean", *run)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{NOT_FINITE.message} on 2 photos" in err


class Lines:
    """The entries of a journal of an evaluation."""

    def entries(self):
        records = [
            {"error": {"message": NOT_FINITE.message}},
            {"error": {"message": NOT_FINITE.message}},
            {"error": None},
        ]
        return iter([{"unclear": ["a.png"]}, {"case": "random", "method": "fg", "rows": [0, 1, 2], "records": records}])


def test_equal_failures_of_an_evaluation_are_one_line():
    assert failures(Lines()) == [
        f"{NOT_FINITE.message} on 1 photo, left out, such as a.png",
        f"random, fg: {NOT_FINITE.message} (2 photos)",
    ]


def test_two_thousand_labels_are_not_two_thousand_lines():
    values = dict.fromkeys(MANY, 0.9)
    record = Record(
        "x.png", status="partial", truth=dict.fromkeys(MANY, True), flip=MANY[:1000], keep=MANY[1000:],
        probabilities={"before": values, "after": values, "float": None},
        constraints={"held": 1998, "total": 2000, "violated": [MANY[999], MANY[1999]]},
    )  # fmt: skip
    lines = text_of(image_table(record))
    assert len(lines) < 35
    assert [line.split()[1] for line in lines[1:3]] == ["999", "1999"]  # what does not hold comes first
    assert lines[-1].split() == ["1970", "others"]
    lines = text_of(image_table(replace(record, constraints={"held": 1960, "total": 2000, "violated": MANY[:31]})))
    assert lines[-1].split() == ["1970", "others", "1", "does", "not", "hold"]
    lines = text_of(prediction_table(values, dict.fromkeys(MANY, 0.5)))
    assert len(lines) < 37
    assert lines[-1].split() == ["1970", "others", "present"]
