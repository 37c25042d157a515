from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import matplotlib
import pytest
import torch
from PIL import Image
from support.models import TINY_LABELS as LABELS
from support.models import TINY_PIXELS as PIXELS

from mlperturb.attacks.methods import METHODS
from mlperturb.cli.console import name_options
from mlperturb.model.checkpoints import Metadata, bundled_checkpoint, read_metadata, save_checkpoint
from mlperturb.photos.images import read_photo
from mlperturb.run.report import read_schema

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PORTRAIT = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.fixture
def portrait(tmp_path) -> Path:
    path = tmp_path / "portrait.jpg"
    with Image.open(PORTRAIT) as image:
        image.resize((130, 160)).save(path, quality=95)
    return path


@pytest.fixture
def attack(cli, tiny, tmp_path):
    """Attack with the small network, quickly; return exit code, stdout, stderr and the report, if there is one."""

    def run(*arguments: object, out: Path | None = None):
        out = out or tmp_path / "out"
        given = [str(argument) for argument in arguments]
        quick = [] if "--budget" in given else ["--budget", "fast"]
        quick += [] if "--passes" in given else ["--passes", "24"]
        quick += [] if "--checkpoint" in given else ["--checkpoint", str(tiny)]
        code, stdout, stderr = cli("attack", *given, *quick, "--out", out)
        path = out / "report.json"
        report = json.loads(path.read_text()) if path.is_file() else None
        if report is not None:
            jsonschema.Draft202012Validator(read_schema()).validate(report)
        return code, stdout, stderr, report

    return run


def start(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlperturb", *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def refused(result, *parts: str) -> None:
    """Check that a command line was refused with one line that contains these texts."""
    code, stdout, stderr = result[:3]
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("mlperturb: error: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize(("option", "value"), [("--max-rmsd", "-1"), ("--max-rmsd", "nan"), ("--passes", "2.5")])
def test_an_option_out_of_its_range_names_the_value_that_came(cli, tmp_path, option, value):
    refused(cli("attack", tmp_path / "a.png", "--flip", "cat", option, value), option, value)


# --- the real program with the bundled checkpoint


def test_the_program_attacks_a_photo_and_sees_the_result_in_the_png(portrait, tmp_path, cli):
    out = tmp_path / "out"
    process = start(
        "attack", portrait, "--flip", "person", "--keep", "rest", "--budget", "fast", "--passes", "40", "--out", out,
        "--json",
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert report == json.loads((out / "report.json").read_text())
    jsonschema.Draft202012Validator(read_schema()).validate(report)
    (image,) = report["images"]
    labels = read_metadata(bundled_checkpoint()).labels
    assert report["classifier"]["labels"] == list(labels)
    assert len(labels) == 20
    assert image["truth"]["person"] is True
    assert image["status"] == "success"
    assert image["flip"] == ["person"]
    assert len(image["keep"]) == 19
    assert image["cost"]["forward"] + image["cost"]["backward"] <= 40

    code, stdout, _ = cli("predict", portrait, out / "portrait.adv.png", "--json")
    assert code == 0
    clean, attacked = json.loads(stdout)["images"]
    assert "person" in clean["labels"]
    assert attacked["labels"] == [label for label in clean["labels"] if label != "person"]
    assert attacked["probabilities"] == pytest.approx(image["probabilities"]["after"], abs=1e-4)
    assert clean["probabilities"] == pytest.approx(image["probabilities"]["before"], abs=1e-4)


def test_ctrl_c_leaves_a_valid_report_and_the_files_that_are_finished(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    with Image.open(PORTRAIT) as image:
        small = image.resize((130, 160))
    for number in range(12):
        small.save(folder / f"{number:02}.png")
    process = start(
        "attack", folder, "--flip", "person", "--keep", "rest", "--budget", "fast", "--passes", "20",
        "--batch-size", "1", "--out", out,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not list(out.glob("*.map.png")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted" in stderr
    assert re.search("of 12 photos (is|are) done", stderr)
    report = json.loads((out / "report.json").read_text())
    jsonschema.Draft202012Validator(read_schema()).validate(report)
    assert len(report["images"]) < 12
    for image in report["images"]:
        for name in image["files"].values():
            assert name is None or read_photo(out / name).rgb.shape == (160, 130, 3)
    assert not list(out.glob(".*.tmp"))


def test_help_and_an_unknown_label_are_told_without_loading_torch(run_python):
    code = (
        "import sys, runpy; sys.argv = ['mlperturb', {}]\n"
        "try: runpy.run_module('mlperturb', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    assert run_python(code.format("'--help'")).splitlines()[-1] == "0 False"
    assert run_python(code.format("'attack', '--help'")).splitlines()[-1] == "0 False"
    assert run_python(code.format("'attack', 'x.png', '--flip', 'persn'")).splitlines()[-1] == "2 False"


# --- what is printed


def test_labels_shows_names_and_thresholds(cli, tiny):
    code, stdout, _ = cli("labels", "--json", "--checkpoint", tiny)
    described = json.loads(stdout)
    assert code == 0
    assert described["thresholds"] == dict.fromkeys(LABELS, 0.5)
    assert described["architecture"] == "shufflenet_v2_x0_5"
    assert described["checkpoint"] == str(tiny)
    code, stdout, _ = cli("labels", "--checkpoint", tiny)
    assert code == 0
    assert all(label in stdout for label in LABELS)


def test_the_version_is_shown(cli):
    code, stdout, _ = cli("--version")
    assert (code, stdout.split()[0]) == (0, "mlperturb")


@pytest.mark.parametrize("command", ["attack", "demo", "predict", "labels", "methods", "train"])
def test_every_command_has_help(cli, command):
    code, stdout, _ = cli(command, "--help")
    assert code == 0
    assert f"mlperturb {command} " in stdout


def test_predict_describes_every_photo_in_json(cli, tiny, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    code, stdout, stderr = cli("predict", tmp_path, "--json", "--checkpoint", tiny)
    assert code == 1
    result = json.loads(stdout)
    assert set(result) == {"schema", "classifier", "images"}
    assert result["schema"] == "mlperturb.predictions/1"
    bad, good = result["images"]
    assert bad["error"]["type"] == "ImageError"
    assert bad["labels"] is None
    assert bad["probabilities"] is None
    assert "bad.png is empty" in stderr
    assert good["error"] is None
    assert good["source"] == str(photo)
    assert list(good["probabilities"]) == list(LABELS)
    assert good["labels"] == [label for label in LABELS if good["probabilities"][label] >= 0.5]


def test_predict_shows_a_table(cli, tiny, photo):
    code, stdout, _ = cli("predict", photo, "--checkpoint", tiny)
    assert code == 0
    assert "photo.png" in stdout.replace("\n", "")
    assert any(label in stdout for label in LABELS)


def test_json_prints_json_alone_and_quiet_nothing(attack, photo):
    code, stdout, stderr, report = attack(photo, "--flip", "cat", "--json")
    assert code == 0
    assert json.loads(stdout) == report
    assert stderr == ""
    code, stdout, stderr, _ = attack(photo, "--flip", "cat", "--quiet", "--overwrite")
    assert (code, stdout, stderr) == (0, "", "")


def test_a_few_photos_get_a_table_each_and_many_a_summary(attack, photo, tmp_path):
    code, stdout, _, report = attack(photo, "--flip", "cat", "--keep", "rest")
    assert code == 0
    assert "photo.png: " + report["images"][0]["status"] in stdout.replace("\n", "")
    assert "report.json" in stdout.replace("\n", "")
    for number in range(4):
        (tmp_path / f"p{number}.png").write_bytes(photo.read_bytes())
    code, stdout, _, report = attack(tmp_path, "--flip", "cat", "--overwrite")
    assert code == 0
    assert report["summary"]["images"] == 5
    assert "passes an attacked photo" in stdout


# --- which labels


def test_flip_all_takes_every_label_not_named_elsewhere(attack, photo):
    assert attack(photo, "--flip", "all")[3]["images"][0]["flip"] == list(LABELS)
    (image,) = attack(photo, "--flip", "all", "--keep", "dog", "--overwrite")[3]["images"]
    assert image["flip"] == ["cat", "potted plant", "hen"]
    assert image["keep"] == ["dog"]


def test_flip_any_takes_one_label(attack, photo):
    (image,) = attack(photo, "--flip", "any")[3]["images"]
    assert len(image["flip"]) == 1
    assert image["keep"] == []
    (kept,) = attack(photo, "--flip", "any", "--keep", image["flip"][0], "--overwrite")[3]["images"]
    assert len(kept["flip"]) == 1
    assert kept["flip"] != image["flip"]
    assert kept["keep"] == image["flip"]


def test_keep_rest_takes_every_label_that_is_not_flipped(attack, photo):
    _, _, _, report = attack(photo, "--flip", "Potted Plant, cat", "--keep", "rest")
    (image,) = report["images"]
    assert image["flip"] == ["cat", "potted plant"]
    assert image["keep"] == ["dog", "hen"]
    assert report["settings"]["flip"] == ["Potted Plant, cat"]
    assert report["settings"]["keep"] == ["rest"]
    assert image["constraints"]["total"] == 4


def test_add_and_remove_flip_only_where_there_is_need(attack, photo):
    truth = attack(photo, "--flip", "cat")[3]["images"][0]["truth"]
    present = [label for label in LABELS if truth[label]]
    absent = [label for label in LABELS if not truth[label]]
    assert present
    assert absent
    arguments = ["--add", ",".join((present[0], absent[0])), "--overwrite"]
    if len(present) > 1:
        arguments += ["--remove", present[1]]
    (image,) = attack(photo, *arguments)[3]["images"]
    assert sorted(image["flip"]) == sorted([absent[0], *present[1:2]])
    assert image["keep"] == [present[0]]


def test_without_keep_nothing_is_kept(attack, photo):
    assert attack(photo, "--flip", "cat")[3]["images"][0]["keep"] == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--flip", "potted plnt"], ["unknown label 'potted plnt': did you mean potted plant?"]),
        (["--flip", "zzzzzz"], ["unknown label 'zzzzzz': expected one of cat, dog, potted plant, hen"]),
        (["--flip", "cat", "--keep", "dgo"], ["unknown label 'dgo'", "dog"]),
        (["--flip", "cat", "--keep", "cat"], ["'cat' in both --flip and --keep"]),
        (["--add", "cat", "--remove", "Cat"], ["'cat' in both --add and --remove"]),
        ([], ["nothing to change"]),
        (["--keep", "cat"], ["nothing to change"]),
        (["--flip", ","], ["nothing to change"]),
        (["--flip", "any,cat"], ["expected --flip any alone"]),
        (["--flip", "all", "--keep", "rest"], ["expected --flip all or --keep rest, got both"]),
        (["--flip", "cat", "--method", "cw"], ["unknown method 'cw': expected ml-ddn"]),
        (["--flip", "cat", "--budget", "long"], ["unknown budget 'long': expected fast, balanced, paper"]),
        (["--flip", "cat", "--solver", "nnls"], ["--solver is an option of ml-dp"]),
        (["--flip", "cat", "--method", "rank-1", "--between", "x"], ["unknown --between 'x'"]),
        (["--flip", "cat", "--passes", "9"], ["expected --passes of at least 10, got 9"]),
        (["--flip", "cat", "--max-linf", "0"], ["expected --max-linf from 1 to 255 grey levels, got 0"]),
        (["--flip", "cat", "--batch-size", "0"], ["expected --batch-size auto or a number of at least 1, got '0'"]),
        (["--flip", "cat", "--device", "tpu9"], ["unknown device 'tpu9'"]),
        (["--flip", "cat", "--device", "cuda:99"], ["cuda:99"]),
        (["--flip", "cat", "--arch", "mobilenet_v2"], ["--checkpoint, --arch and --labels together"]),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(attack, photo, tmp_path, arguments, parts):
    refused(attack(photo, *arguments), *parts)
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_error_names_the_option_of_a_parameter_and_leaves_paths_and_quotes():
    assert name_options("expected a finite `rmsd` above 0, got 0") == "expected a finite --max-rmsd above 0, got 0"
    assert name_options("give `architecture` and `labels`: (`years`)") == "give --arch and --labels: (--year)"
    for kept in ("expected `rgb`", "cannot read a/`out`", "cannot read `out`/a", "unknown label '`flip`'"):
        assert name_options(kept) == kept


def test_an_unknown_option_or_command_is_refused(cli, photo):
    for arguments in (
        ["attack", photo, "--flop", "cat"],
        ["atack", photo],
        ["attack"],
        ["attack", photo, "--seed", -1],
    ):
        code, stdout, stderr = cli(*arguments)
        assert code == 2
        assert stdout == ""
        assert "Traceback" not in stderr
        assert stderr


# --- which files


def test_a_missing_photo_or_folder_of_none_is_refused(attack, tmp_path):
    refused(attack(tmp_path / "none.png", "--flip", "cat"), "no such file or folder", "none.png")
    (tmp_path / "empty").mkdir()
    refused(attack(tmp_path / "empty", "--flip", "cat"), "no photo found", "add -r")


def test_bad_files_among_good_ones_are_reported_and_the_good_ones_done(attack, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "z.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(photo.read_bytes()[:500])
    (folder / "text.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("not a photo's name")
    code, _, stderr, report = attack(folder, "--flip", "cat")
    assert code == 1
    assert [Path(image["source"]).name for image in report["images"]] == [
        "a.png", "empty.png", "text.jpg", "truncated.png", "z.png",
    ]  # fmt: skip
    status = {Path(image["source"]).stem: image["status"] for image in report["images"]}
    assert [name for name in status if status[name] == "unreadable"] == ["empty", "text", "truncated"]
    assert report["summary"]["unreadable"] == 3
    assert status["a"] == status["z"] == "success"
    assert (tmp_path / "out" / "a.adv.png").is_file()
    assert (tmp_path / "out" / "z.adv.png").is_file()
    for name in ("empty.png", "text.jpg", "truncated.png"):
        assert name in stderr


def test_bad_files_alone_still_make_a_report(attack, tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    code, _, stderr, report = attack(tmp_path / "x.png", "--flip", "cat")
    assert code == 1
    assert "x.png" in stderr
    assert report["summary"]["success_rate"] is None


def test_outputs_that_exist_are_not_replaced_without_being_asked(attack, photo, tmp_path):
    assert attack(photo, "--flip", "cat")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    refused(attack(photo, "--flip", "dog"), "written with another flip", "--overwrite")
    (tmp_path / "out" / "journal.jsonl").unlink()
    before.pop("journal.jsonl")
    refused(attack(photo, "--flip", "dog"), "outputs exist already", "--overwrite")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, _, _, report = attack(photo, "--flip", "dog", "--overwrite")
    assert code == 0
    assert report["images"][0]["flip"] == ["dog"]


def test_an_output_never_replaces_its_photo(attack, photo, tmp_path):
    named = photo.rename(tmp_path / "photo.adv.png")
    sibling = tmp_path / "photo.png"
    sibling.write_bytes(named.read_bytes())
    refused(
        attack(named, sibling, "--flip", "cat", "--overwrite", out=tmp_path), "would replace the photo", "photo.adv.png"
    )


@pytest.mark.usefixtures("photo")
def test_our_own_outputs_in_a_folder_are_not_attacked_again(attack, tmp_path):
    first = attack(tmp_path, "--flip", "cat", out=tmp_path)[3]
    second = attack(tmp_path, "--flip", "cat", "--overwrite", out=tmp_path)[3]
    assert [image["source"] for image in first["images"]] == [image["source"] for image in second["images"]]


def test_two_photos_of_one_name_get_an_output_each(attack, photo, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(photo.read_bytes())
    code, _, _, report = attack(tmp_path / "x", tmp_path / "y", "--flip", "cat")
    assert code == 0
    assert [image["files"]["adversarial"] for image in report["images"]] == ["p.adv.png", "y/p.adv.png"]
    assert (tmp_path / "out" / "y" / "p.map.png").is_file()


def test_a_photo_named_twice_is_done_once(attack, photo):
    assert len(attack(photo, photo, "--flip", "cat")[3]["images"]) == 1


def test_the_report_may_lie_elsewhere(attack, photo, tmp_path):
    code, *_ = attack(photo, "--flip", "cat", "--report", tmp_path / "deep" / "r.json")
    assert code == 0
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["summary"]["images"] == 1
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_output_folder_that_is_a_file_is_refused(attack, photo, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(attack(photo, "--flip", "cat", out=tmp_path / "file"), "cannot make the output folder")
    refused(attack(photo, "--flip", "cat", out=tmp_path / "file" / "below"), "cannot make the output folder")
    refused(attack(photo, "--flip", "cat", "--report", tmp_path), "expected a file for --report")
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_stops_the_run_and_leaves_what_is_done(attack, photo, tmp_path, monkeypatch):
    import mlperturb.run.verdict
    from mlperturb.errors import StorageError

    (tmp_path / "q.png").write_bytes(photo.read_bytes())
    real = mlperturb.run.verdict.write_pixels

    def write(path, rgb, alpha=None, **more):
        if path.name.startswith("q."):
            raise StorageError(f"cannot write {path}: No space left on device")
        real(path, rgb, alpha, **more)

    monkeypatch.setattr(mlperturb.run.verdict, "write_pixels", write)
    code, _, stderr, report = attack(photo, tmp_path / "q.png", "--flip", "cat", "--batch-size", "1")
    assert code == 3
    assert "No space left on device" in stderr
    assert "Traceback" not in stderr
    assert len(report["images"]) == 1
    assert report["images"][0]["status"] == "success"


# --- which checkpoint


def test_a_file_that_is_no_checkpoint_is_refused(attack, photo, tmp_path):
    fake = tmp_path / "fake.safetensors"
    refused(attack(photo, "--flip", "cat", "--checkpoint", fake), "no such checkpoint")
    for content in (b"", b"x", b"\xff" * 100, (30).to_bytes(8, "little") + b"{}" * 15):
        fake.write_bytes(content)
        refused(attack(photo, "--flip", "cat", "--checkpoint", fake), "fake.safetensors")
    refused(attack(photo, "--flip", "cat", "--checkpoint", photo), "expected a .safetensors checkpoint, got")
    refused(attack(photo, "--flip", "cat", "--checkpoint", tmp_path), "expected a config.json in")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("labels", ["--checkpoint"]),
        ("labels", ["--arch", "resnet18", "--labels"]),
        ("evaluate", ["--year", "2007", "--voc"]),
        ("evaluate", ["--photos", ".", "--csv"]),
        ("train", ["--year", "2007", "--voc", ".", "--out"]),
        ("train", ["--year", "2007", "--voc", ".", "--out", "mine.safetensors", "--init"]),
        ("demo", ["--out"]),
    ],
)
def test_a_url_where_only_a_path_will_do_is_refused_as_it_was_given(cli, command, options):
    url = "s3://bucket/name.safetensors"
    refused(cli(command, *options, url), f"expected a path of this machine, got {url}")


def test_labels_of_an_unknown_architecture_are_not_shown(cli, tiny, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    plain = ("labels", "--checkpoint", tiny, "--labels", tmp_path / "names.txt", "--arch")
    refused(cli(*plain, "resnet81"), "unknown architecture 'resnet81': did you mean resnet")
    code, stdout, _ = cli(*plain, "resnet18")
    assert code == 0
    assert "architecture: resnet18" in stdout


def test_the_labels_are_those_of_the_checkpoint(attack, photo):
    refused(attack(photo, "--flip", "person"), "unknown label 'person'", "cat")
    refused(attack(photo, "--flip", "cats", "--checkpoint", bundled_checkpoint()), "unknown label 'cats'", "cat")


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (["--checkpoint", "w.pt", "--arch", "resnet18"], "got no --labels\n"),
        (["--checkpoint", "w.pt", "--labels", "n.txt"], "got no --arch\n"),
        (["--arch", "resnet18"], "got no --labels and no --checkpoint\n"),
        (["--checkpoint", "w.safetensors", "--arch", "resnet18"], "got no --labels; a .safetensors checkpoint that"),
    ],
)
def test_what_plain_weights_lack_is_named(cli, photo, options, missing):
    code, _, err = cli("predict", photo, *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "expected --checkpoint, --arch and --labels together for plain weights, " + missing in err


def test_a_folder_of_results_is_predicted_and_attacked_without_what_we_drew(attack, cli, photo, tiny, tmp_path):
    out, run = tmp_path / "out", ("--checkpoint", tiny, "--device", "cpu")
    assert attack(photo, "--flip", "cat")[0] == 0
    code, text, err = cli("predict", out, *run, "--json")
    assert [Path(image["source"]).name for image in json.loads(text)["images"]] == ["photo.adv.png"]
    assert (code, err) == (
        0, f"mlperturb: left out the file {out / 'photo.map.png'}: hidden, or written by mlperturb\n"
    )  # fmt: skip
    assert cli("jpeg-defend", out, "--quality", 50, "--device", "cpu")[0] == 0
    assert cli("figures", out)[0] == 0
    code, text, err = cli("predict", out, "-r", *run, "--json")
    assert [Path(image["source"]).name for image in json.loads(text)["images"]] == ["photo.adv.png"]
    assert err.startswith("mlperturb: left out 7 files, such as ")
    code, text, _ = cli("predict", out / "photo.map.png", out / "jpeg-curve.png", *run, "--json")
    assert (code, len(json.loads(text)["images"])) == (0, 2)  # a file that is named is never left out
    again = ("--flip", "cat", "--recursive")
    refused(attack(out, *again, out=tmp_path / "again"), "no photo found", "left out 8 files, such as")
    photo.rename(out / "photo.png")
    code, _, err, report = attack(out, *again, out=tmp_path / "again")
    assert (code, len(report["images"])) == (0, 1)
    first = out / "figures" / "case-photo.png"
    assert err == f"mlperturb: left out 8 files, such as {first}: hidden, or written by mlperturb\n"
    assert attack(out, *again, "--quiet", out=tmp_path / "quiet")[2] == ""


def test_plain_weights_need_an_architecture_and_labels_that_fit(attack, photo, tiny, tmp_path):
    from safetensors.torch import load_file

    weights, names = tmp_path / "plain.pt", tmp_path / "names.txt"
    torch.save(load_file(tiny), weights)
    names.write_text("\n".join(LABELS))
    plain = ["--checkpoint", weights, "--labels", names, "--thresholds", ".5"]
    code, _, stderr, report = attack(photo, "--flip", "cat", *plain, "--arch", "shufflenet_v2_x0_5")
    assert code == 0, stderr
    assert report["classifier"]["labels"] == list(LABELS)
    refused(attack(photo, "--flip", "cat", *plain, "--arch", "nothing", "--overwrite"), "unknown architecture")
    refused(attack(photo, "--flip", "cat", *plain, "--arch", "resnet18", "--overwrite"), "plain.pt")
    names.write_text("cat\ndog")
    refused(attack(photo, "--flip", "cat", *plain, "--arch", "shufflenet_v2_x0_5", "--overwrite"), "plain.pt")
    names.write_text("cat\ncat")
    refused(attack(photo, "--flip", "cat", *plain, "--arch", "shufflenet_v2_x0_5"), "expected distinct label names")
    refused(attack(photo, "--flip", "cat", *plain), "together")


# --- odd photos


def test_an_animation_is_noted(attack, tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    code, _, stderr, report = attack(tmp_path / "moving.gif", "--flip", "cat")
    assert code == 0
    assert report["images"][0]["notes"] == ["animated: only the first frame is taken"]
    assert "only the first frame" in stderr


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_the_smallest_photos_are_attacked_too(attack, tmp_path, size):
    Image.new("RGB", size, (120, 130, 140)).save(tmp_path / "dot.png")
    code, _, _, report = attack(tmp_path / "dot.png", "--flip", "all", "--method", "ml-dp")
    assert code == 0
    (image,) = report["images"]
    assert (image["width"], image["height"]) == size
    assert image["status"] in ("success", "partial", "failed")
    assert image["error"] is None
    if image["files"]["adversarial"]:
        assert read_photo(tmp_path / "out" / "dot.adv.png").rgb.shape == (size[1], size[0], 3)


@pytest.mark.parametrize("command", ["attack", "predict"])
def test_markup_and_terminal_escapes_in_a_name_are_shown_as_text(attack, cli, tiny, photo, tmp_path, command):
    names = ["[red]bold.png", "a\x1b[31m\x1b]0;title\x07.png", "line\nbreak.png", "[bold].png", "\u202egnp.png"]
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in names[:2]:
        (folder / name).write_bytes(photo.read_bytes())
    for name in names[2:]:
        (folder / name).write_bytes(b"broken")
    if command == "attack":
        code, stdout, stderr, report = attack(*sorted(folder.iterdir()), "--flip", "cat")
        assert {Path(image["source"]).name for image in report["images"]} == set(names)
    else:
        code, stdout, stderr = cli("predict", *sorted(folder.iterdir()), "--checkpoint", tiny)
        assert "[red]bold.png" in stdout.replace("\n", "")
        assert "a\\x1b[31m" in stdout.replace("\n", "")
    assert code == 1
    for text in (stdout, stderr):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
    assert "line\\nbreak.png" in stderr
    assert "[bold].png" in stderr
    assert "\\u202egnp.png" in stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_text_is_attacked_and_reported(attack, cli, tiny, photo, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    odd.write_bytes(photo.read_bytes())
    code, stdout, stderr, report = attack(odd, "--flip", "cat")
    assert code == 0, stderr
    assert Path(report["images"][0]["source"]) == odd
    assert (tmp_path / "out" / report["images"][0]["files"]["adversarial"]).is_file()
    assert "caf\\udce9.png" in stdout.replace("\n", "")
    assert json.loads(cli("predict", odd, "--json", "--checkpoint", tiny)[1])["images"][0]["error"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="the length of a name is that of Linux file systems")
def test_a_name_too_long_for_its_outputs_is_cut(attack, photo, tmp_path):
    long, twin = (tmp_path / ("é" * 120 + end) for end in ("aaaaaaa.png", "bbbbbbb.png"))
    for path in (long, twin):
        path.write_bytes(photo.read_bytes())
    code, _, _, report = attack(long, twin, photo, "--flip", "cat")
    assert code == 0
    names = [image["files"]["adversarial"] for image in report["images"]]
    assert names == ["é" * 115 + ".adv.png", f"{tmp_path.name}/" + "é" * 115 + ".adv.png", "photo.adv.png"]
    assert all((tmp_path / "out" / name).is_file() for name in names)


def test_labels_with_markup_are_shown_as_text(cli, tiny, photo, tmp_path):
    from safetensors.torch import load_file

    odd = ("[bold]cat[/bold]", "[/]", "dog\x1b[31m", "hen")
    path = tmp_path / "odd.safetensors"
    metadata = read_metadata(tiny)
    save_checkpoint(path, load_file(tiny), Metadata(metadata.architecture, odd, (0.5,) * 4, metadata.preprocess))
    for command in (["labels"], ["predict", photo], ["attack", photo, "--flip", "all", "--out", tmp_path / "o"]):
        quick = ["--passes", "12", "--budget", "fast"] if command[0] == "attack" else []
        code, stdout, stderr = cli(*command, "--checkpoint", path, *quick)
        assert code == 0, stderr
        assert "[bold]cat[/bold]" in stdout
        assert "\x1b" not in stdout + stderr


# --- methods and settings


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs_from_the_command_line(attack, photo, method):
    code, _, stderr, report = attack(photo, "--flip", "cat", "--keep", "rest", "--method", method)
    assert code == 0, stderr
    (image,) = report["images"]
    assert report["settings"]["method"] == method
    assert report["settings"]["passes"] == 24
    assert image["cost"]["forward"] + image["cost"]["backward"] <= 24
    assert (image["ranking"] is not None) == method.startswith("rank")


@pytest.mark.parametrize("levels", [2, 3])
def test_max_linf_bounds_the_change_of_every_pixel(attack, photo, tmp_path, levels):
    _, _, _, report = attack(photo, "--flip", "cat,dog", "--keep", "rest", "--max-linf", levels, "--budget", "balanced")
    (image,) = report["images"]
    assert report["settings"]["max_linf"] == levels
    assert image["status"] == "success"
    assert image["distortion"]["linf"] == levels
    changes = read_photo(tmp_path / "out" / "photo.adv.png").rgb.astype(int) - PIXELS
    assert abs(changes).max() == levels


def test_a_photo_on_which_the_attack_fails_is_no_error_but_gets_advice(attack, tmp_path, photo, monkeypatch):
    import mlperturb.run.search

    real = mlperturb.run.search.quantise

    def hopeless(problem, outcome, **options):
        found = real(problem, outcome, **options)
        return replace(found, kept=problem.images.clone(), met=torch.zeros_like(found.met))

    monkeypatch.setattr(mlperturb.run.search, "quantise", hopeless)
    code, _, stderr, report = attack(photo, "--flip", "cat", "--method", "fgs")
    assert code == 0
    assert report["images"][0]["status"] == "failed"
    assert "the constraint does not hold (cat)" in stderr
    assert "--method ml-ddn" in stderr
    assert "more --passes" in stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["journal.jsonl", "report.json"]


def test_a_photo_that_the_caps_leave_no_room_for_gets_advice_on_them(cli, tiny, photo, tmp_path):
    code, _, stderr = cli("attack", photo, "--flip", "cat", "--max-rmsd", 0.001, "--max-linf", 3, "--checkpoint", tiny,
                          "--out", tmp_path / "out")  # fmt: skip
    assert code == 0
    assert "try a larger --max-rmsd or a larger --max-linf" in stderr


def test_options_of_a_method_are_taken_and_reported(attack, photo):
    settings = attack(photo, "--flip", "cat", "--method", "ml-dp", "--solver", "pinv", "--space", "probability")[3][
        "settings"
    ]
    assert (settings["solver"], settings["space"], settings["budget"]) == ("pinv", "probability", "fast")
    assert "between" not in settings


def test_the_same_seed_writes_the_same_files(attack, photo, tmp_path):
    for out in ("one", "two"):
        assert attack(photo, "--flip", "cat", "--seed", "7", out=tmp_path / out)[0] == 0
    for name in ("photo.adv.png", "photo.map.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_odd_values_are_usage_errors(tiny, photo, tmp_path):
    base = ["attack", str(photo), "--checkpoint", str(tiny), "--out", str(tmp_path / "out")]
    for arguments, expected in (
        (["--flip", "cat", "--passes", "9" * 23], "--passes"),
        (["--flip", "cat", "--seed", "9" * 23], "--seed"),
        (["--flip", "cat", "--report", str(tmp_path / "out" / "photo.adv.png")], "would replace another file"),
        (["--flip", "cat", "--keep", "any"], "'any' is not a label"),
        (["--flip", "cat", ""], "expected a path or a value, got an empty argument"),
    ):
        found = subprocess.run(
            [sys.executable, "-m", "mlperturb", *base, *arguments], capture_output=True, text=True, env=ENVIRONMENT
        )
        assert found.returncode == 2
        assert expected in found.stderr
        assert "Traceback" not in found.stderr
    assert not list((tmp_path / "out").glob("*.png"))
