"""`attack --dry-run`, `--strict`, `--settings`, and what is said of a photo whose change is plain to see."""

from __future__ import annotations

import json

import pytest
from support.models import TINY_PIXELS


@pytest.fixture
def attack(cli, tiny, tmp_path):
    def run(*arguments: object, out: str = "out", plain: bool = False):
        given = [] if plain else ["--checkpoint", tiny, "--budget", "fast"]
        return cli("attack", *arguments, *given, "--device", "cpu", "--out", tmp_path / out)

    return run


def test_a_dry_run_tells_what_it_would_do_and_writes_nothing(attack, photo, tmp_path):
    for name in ("b.png", "c.png", "d.png"):
        (photo.parent / name).write_bytes(photo.read_bytes())
    (photo.parent / "e.png").write_bytes(b"nonsense")
    code, text, err = attack(photo.parent, "--flip", "cat", "--keep", "rest", "--dry-run")
    assert code == 1
    assert "e.png" in err
    assert not (tmp_path / "out").exists()
    lines = text.splitlines()
    assert lines[0].startswith(
        f"{photo.parent / 'b.png'}: {TINY_PIXELS.shape[1]} x {TINY_PIXELS.shape[0]} pixels; has "
    )
    assert all(line.endswith("; would flip cat, keep 3") for line in lines[:4])
    last = " ".join(lines).split("photos: ")[1]
    assert last.startswith("4 of 5 to attack, 1 that cannot be read or classified; at most about 41 passes each, ")
    assert last.endswith("nothing was written")
    truth = json.loads(attack(photo, "--flip", "cat", "--dry-run", "--json")[1])["images"][0]
    assert truth["flip"] == ["cat"]
    plan = json.loads(attack(photo, "--flip", "cat", "--keep", "rest", "--passes", 24, "--dry-run", "--json")[1])
    assert plan["schema"] == "mlperturb.plan/1"
    assert plan["most"]["passes"] == 24
    assert plan["most"]["seconds"] > 0
    (image,) = plan["images"]
    assert attack(photo, "--flip", "cat", "--keep", "rest")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())["images"][0]
    assert (image["flip"], image["keep"]) == (report["flip"], report["keep"])
    assert image["probabilities"] == pytest.approx(report["probabilities"]["before"], abs=1e-6)
    assert image["files"] == report["files"]
    wish = "--add" if "cat" in image["labels"] else "--remove"
    text = attack(photo, wish, "cat", "--dry-run")[1]
    assert "is as asked already" in " ".join(text.split())
    assert "0 of 1 to attack, 1 as asked already; nothing was written" in " ".join(text.split())
    assert "would flip the nearest label, keep 0" in attack(photo, "--flip", "any", "--dry-run")[1]
    kept = attack(photo, "--flip", "any", "--keep", "rest", "--dry-run")[1]
    assert "would flip the nearest label, keep the rest" in kept


def test_strict_exits_with_1_where_an_attack_failed(attack, photo):
    short = (photo, "--flip", "cat", "--keep", "rest", "--max-rmsd", 0.001)
    assert attack(*short)[0] == 0
    assert attack(*short, "--strict", "--overwrite")[0] == 1
    assert attack(photo, "--flip", "cat", "--strict", "--overwrite")[0] == 0


def test_a_photo_that_is_changed_plainly_is_said_to_be(attack, photo, monkeypatch):
    import mlperturb.cli.advice as advice

    code, _, err = attack(photo, "--flip", "cat", "--method", "fgs")
    assert (code, err) == (0, "")
    monkeypatch.setattr(advice, "VISIBLE", 0.001)
    code, _, err = attack(photo, "--flip", "cat", "--method", "fgs", "--overwrite")
    assert code == 0
    assert f"mlperturb: {photo} is changed plainly: by " in err
    assert "try --max-rmsd 0 or --method ml-ddn" in err
    (photo.parent / "b.png").write_bytes(photo.read_bytes())
    assert "2 photos are changed plainly: by up to " in attack(photo.parent, "--flip", "cat", "--overwrite")[2]


def test_the_settings_of_an_earlier_run_are_taken_and_options_win(attack, photo, tmp_path, tiny):
    labels = ("--flip", "cat", "--keep", "rest", "--reader", "float", "--margin", 0.2)
    search = ("--method", "ml-dp", "--solver", "pinv", "--passes", 40, "--seed", 7, "--batch-size", 2)
    assert attack(photo, *labels, *search, "--format", "webp", "--keep-metadata")[0] == 0
    old = json.loads((tmp_path / "out" / "report.json").read_text())
    assert attack(photo, "--settings", tmp_path / "out", out="again", plain=True)[0] == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    differ = ("cwd", "out")
    assert {**again["settings"], **dict.fromkeys(differ)} == {**old["settings"], **dict.fromkeys(differ)}
    assert again["classifier"] == old["classifier"]
    assert again["images"][0]["probabilities"] == old["images"][0]["probabilities"]
    report = tmp_path / "out" / "report.json"
    code, _, err = attack(photo, "--settings", report, "--method", "fg", "--flip", "dog", out="third", plain=True)
    assert code == 2
    assert "--solver is an option of ml-dp" in err
    more = ("--solver", "nnls", "--flip", "dog", "--budget", "fast", "--seed", 0, "--checkpoint", tiny)
    assert attack(photo, "--settings", report, *more, out="third", plain=True)[0] == 0
    third = json.loads((tmp_path / "third" / "report.json").read_text())["settings"]
    assert [third[name] for name in ("solver", "flip", "keep", "seed", "passes")] == ["nnls", ["dog"], ["rest"], 0, 40]
    assert len(third["readers"]) > 1  # those of the checkpoint that is given


@pytest.mark.parametrize("damage", [{"flip": "cat"}, {"passes": "40"}, {"method": 3}, {"readers": [1]}])
def test_a_report_that_names_no_settings_is_refused_in_a_line(attack, photo, tmp_path, damage):
    assert attack(photo, "--flip", "cat")[0] == 0
    path = tmp_path / "out" / "report.json"
    report = json.loads(path.read_text())
    report["settings"] |= damage
    path.write_text(json.dumps(report))
    code, _, err = attack(photo, "--settings", path, out="again", plain=True)
    assert (code, err.count("\n")) == (2, 1)
    assert "does not follow its schema" in err
    assert attack(photo, "--settings", tmp_path / "nothing", plain=True)[0] == 2
