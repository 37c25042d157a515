"""What a terminal shows of a run before its first batch ends, and what an attack is expected to cost."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image
from rich.console import Console
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb.attacks.methods import BUDGETS, METHODS
from mlperturb.attacks.problem import Meter
from mlperturb.cli.longrun import LongRun
from mlperturb.limits import Limits
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.run.forecast import most_passes
from mlperturb.run.jobs import plan_outputs
from mlperturb.run.runner import run_attack
from mlperturb.run.settings import Words, read_settings
from mlperturb.system.processes import Share


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """Make stderr a terminal of 80 columns; return what it shows."""
    shown = io.StringIO()
    monkeypatch.setattr(
        "mlperturb.cli.console.err", Console(file=shown, force_terminal=True, width=80, color_system=None)
    )
    return shown


def test_a_batch_that_has_just_begun_shows_its_passes_and_the_time_left(terminal):
    long = LongRun(Share(), quiet=False)
    with long.bar("done", 2, "reading photos"):
        meter = Meter.of(2)
        long.watch(meter, 40)
        for passes in (4, 8, 12):
            meter.forward.fill_(passes)
            long._show()
        task = long._bar.tasks[0]
        assert task.description == "searching, pass 12 of at most 40"
        assert 0.5 < task.completed < 0.7  # 2 photos, 30% of each
        assert task.time_remaining is not None
        long.advance(2, "success 100%")
        assert task.completed == 2
        assert task.description.startswith("success 100%")
    assert "0/2" in terminal.getvalue()


def prints(capsys, line: str) -> bool:
    """Wait until a line is on stderr, for at most ten seconds."""
    lines, until = [], time.monotonic() + 10
    while line not in lines and time.monotonic() < until:
        time.sleep(0.01)
        lines += capsys.readouterr().err.splitlines()
    return line in lines


def test_a_log_gets_a_line_a_minute_and_no_bar(monkeypatch, capsys):
    monkeypatch.setattr("mlperturb.cli.longrun._LINE", 0.01)
    long = LongRun(Share(), quiet=False)
    with long.bar("classified", 9, "classifying"):
        assert prints(capsys, "mlperturb: 0 of 9 classified: classifying")
        long.begin("attacked", 40, 8, "attacking")
        long.advance(8, "random, ml-ddn")
        assert prints(capsys, "mlperturb: 16 of 40 attacked: random, ml-ddn")
        meter = Meter.of(2)
        meter.forward[1] = 7
        long.watch(meter, 30)
        assert prints(capsys, "mlperturb: 16 of 40 attacked: random, ml-ddn; searching, pass 7 of at most 30")
    capsys.readouterr()
    with LongRun(Share(), quiet=True).bar("done", 9, "reading photos"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_an_attack_of_one_batch_shows_passes_on_a_terminal_and_nothing_elsewhere(
    cli, tiny, terminal, tmp_path, monkeypatch
):
    import mlperturb.cli.longrun as longrun

    Image.fromarray(TINY_PIXELS).save(tmp_path / "photo.png")
    seen = []
    monkeypatch.setattr(
        longrun.LongRun, "watch", lambda self, meter, most: (seen.append(most), watch(self, meter, most))[1]
    )
    attack = (
        "attack",
        tmp_path / "photo.png",
        "--flip",
        "cat",
        "--checkpoint",
        tiny,
        "--device",
        "cpu",
        "--budget",
        "fast",
    )
    code, _, err = cli(*attack, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "loading the network" in terminal.getvalue()
    assert "reading photos" in terminal.getvalue()
    assert seen == [41]


watch = LongRun.watch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_the_forecast_is_an_upper_bound_that_is_not_far_off(tiny, tmp_path, method, budget):
    classifier, _ = load_checkpoint(tiny, device="cpu")
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photo.png")
    words = Words(flip=["cat"], keep=["rest"])
    settings = read_settings(words, TINY_LABELS, method=method, budget=budget)
    found: list = []
    run_attack(classifier, plan_outputs([tmp_path / "photo.png"]), tmp_path, settings, found.extend)
    spent = found[0].cost["forward"] + found[0].cost["backward"]
    most = most_passes(settings, len(TINY_LABELS))
    assert spent <= most
    if method in ("ml-ddn", "fgs", "fg"):  # which never end early
        assert most <= 1.6 * spent
    limited = read_settings(words, TINY_LABELS, method=method, budget=budget, limits=Limits(24))
    assert most_passes(limited, len(TINY_LABELS)) == min(24, most)
