"""The help of every command, and what a wrong command line is told, at 80 columns."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command

from mlperturb.attacks.methods import METHODS
from mlperturb.cli.console import OPTIONS
from mlperturb.cli.main import app
from mlperturb.show.grids import Grid
from mlperturb.show.tables import show

COMMANDS = [command.callback.__name__.replace("_", "-") for command in app.registered_commands if command.callback]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_in_panels_and_cuts_nothing_at_80_columns(cli, command, option):
    code, text, err = cli(*([command] if command else []), option)
    assert (code, err) == (0, "")
    assert f"Usage: mlperturb {command}".rstrip() in text
    assert "╭─ Options ─" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    if command:
        shown = {word.strip("[]") for word in text.replace("│", " ").replace(",", " ").split()}
        parameters = get_command(app).commands[command].params
        assert {name for parameter in parameters for name in parameter.opts if name.startswith("--")} <= shown


def test_the_options_of_attack_are_grouped(cli):
    text = cli("attack", "--help")[1]
    panels = [line.strip("╭─╮ ") for line in text.splitlines() if line.startswith("╭")]
    assert panels == ["Arguments", "Options", "What", "How", "Limits", "Classifier", "Output", "Machine"]
    limits = text[text.index("─ Limits ─") : text.index("─ Classifier ─")]
    assert all(option in limits for option in ("--passes", "--max-rmsd", "--max-linf"))
    assert "--flip" not in limits


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["attack", "x.png", "--flop", "cat"], ["no such option: --flop", "--flip", "see `mlperturb attack --help`"]),
        (["atack", "x.png"], ["no such command 'atack'", "'attack'? see `mlperturb --help`"]),
        (["attack"], ["missing argument 'PATH'"]),
        (["attack", "x.png", "--passes", "many"], ["'--passes'", "integer"]),
        (["attack", "x.png", "--flip", "person", "--passes", 10**10], ["expected --passes of at most 1000000000"]),
        (["attack", "x.png", "--seed", -1], ["expected --seed from 0 to 4294967295, got -1"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(cli, arguments, parts):
    code, out, err = cli(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mlperturb: error: ")
    assert all(part in err for part in parts)


def test_without_a_command_the_help_is_shown(cli):
    code, out, err = cli()
    assert (code, err) == (2, "")
    assert "╭─ Commands ─" in out


def test_methods_is_readable_at_80_columns(cli):
    code, text, _ = cli("methods")
    assert code == 0
    lines = [line.rstrip() for line in text.splitlines()]
    for name, method in METHODS.items():
        (start,) = [number for number, line in enumerate(lines) if line.split()[:1] == [name]]
        entry = lines[start : start + 4]
        assert entry[0][8:] in method.summary  # never less than a line of it
        assert any(method.equation in line for line in entry)
        assert all(any(OPTIONS[option] in line for line in entry) for option in method.options)


def test_the_table_of_an_evaluation_keeps_its_columns_at_80():
    name = "ml-dp:solver=pinv:space=probability"
    cells = [["random", "1000", name, "79.158", *["0.343"] * 7, "100%", "1234"], ["random", "1000", "ml-dp:solver=pinv",
             "9.158", *["0.343"] * 7, "100%", "1234"]]  # fmt: skip
    columns = ("case", "images", "method", "RMSD", "Hamm. (A)", "Hamm. (B)", "F1", "rank. loss", "mAP", "AUC", "tau_b",
               "succ.", "passes")  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(show(Grid("title", columns, cells, keys=3)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[2].split() == ["Hamm.", "Hamm.", "rank."]
    assert lines[3].split()[0] == "method"
    assert lines[4].split()[:2] == ["ml-dp:solver=pinv:", "79.158"]
    assert lines[5] == "space=probability"
    assert lines[6].split()[0] == "ml-dp:solver=pinv"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full, and the exit codes of a shell")
def test_a_reader_that_leaves_ends_the_program_in_silence_and_a_full_disk_does_not():
    def run(out: int) -> tuple[int, bytes]:
        command = [sys.executable, "-m", "mlperturb", "labels", "--json"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=60)
        return done.returncode, done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(writer) == (141, b"")
    finally:
        os.close(writer)
    with Path("/dev/full").open("wb") as full:
        code, err = run(full.fileno())
    assert code == 3
    assert err == b"mlperturb: error: cannot write to stdout: No space left on device\n"
