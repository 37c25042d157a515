"""What the shell offers after Tab; the command line is asked as the shells' scripts ask it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mlperturb.cli.complete import offer

CODE = """
import atexit, sys

def say():
    print(*{"torch", "timm", "torchvision"} & set(sys.modules), file=sys.stderr)

atexit.register(say)
sys.argv = ["mlperturb", *sys.argv[1:]]
from mlperturb.cli.main import main

main()
"""


@pytest.fixture
def ask(tmp_path):
    """Ask for the completion of the last word of a line; torch must not be loaded."""

    def ask(*words, shell="bash"):
        variables = {"_MLPERTURB_COMPLETE": f"complete_{shell}"}
        if shell == "bash":
            variables |= {"COMP_WORDS": "\n".join(["mlperturb", *words]), "COMP_CWORD": str(len(words))}
        else:
            variables["_TYPER_COMPLETE_ARGS"] = " ".join(["mlperturb", *words])
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, env={**os.environ, **variables}, cwd=tmp_path
        )
        assert done.stderr.strip() == ""
        return done.stdout.split("\n")[:-1] if done.stdout.strip() else []

    return ask


@pytest.fixture
def tagger(tmp_path):
    """Return a folder of a tagger that has only its JSON and its table: nothing else is opened."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit", "num_classes": 5}))
    rows = 'name,category\ndog,0\ndo it,0\n"hat, red",0\nmiku,4\nDon,4\n'
    (tmp_path / "selected_tags.csv").write_text(rows)
    return tmp_path


def test_commands_options_and_words_are_offered(ask):
    assert ask("ev") == ["evaluate"]
    assert {"--keep", "--keep-metadata"} <= set(ask("attack", "p.png", "--ke"))
    assert ask("attack", "--method", "ml-d") == ["ml-ddn", "ml-dp"]
    assert ask("attack", "--budget", "") == ["fast", "balanced", "paper"]
    assert ask("attack", "--rounding", "i") == ["inside"]


def test_labels_of_the_bundled_checkpoint_are_offered_in_a_comma_list(ask):
    assert ask("attack", "p.png", "--flip", "person,do") == ["person,dog"]
    assert ask("attack", "p.png", "--keep", "re") == ["rest"]
    assert ask("labels", "--find", "so") == ["sofa"]


def test_labels_of_a_folder_are_read_without_torch(ask, tagger):
    given = ("attack", "--checkpoint", str(tagger))
    assert ask(*given, "--flip", "do") == ["dog", "do\\ it"]
    assert ask(*given, "--flip", '"do') == ["dog", "do it"]
    assert ask(*given, "--flip", "miku,dog,D") == ["miku,dog,Don"]
    assert ask(*given, "--flip", "ha") == ["hat,\\ red"]
    assert ask(*given, "--keep", "cat") == ["category:0", "category:4"]
    assert ask(*given, "--keep", "category", ":", "4") == ["4"]  # bash ends words at colons
    assert ask("labels", "--checkpoint", str(tagger), "--category", "") == ["0", "4"]


def test_labels_of_several_checkpoints_are_offered(ask, tagger):
    given = ("attack", "--checkpoint", str(tagger), "--checkpoint", str(tagger.parent / "none"))
    assert ask(*given, "--flip", "dog,do") == ["dog,do\\ it"]


def test_readers_are_offered_after_the_colon_of_bash(ask):
    assert ask("attack", "--reader", "pillow", ":", "bic") == ["bicubic"]
    kernels = ("", ":linear", ":cubic", ":area")
    assert ask("attack", "--reader", "float,openc") == [f"float,opencv{kernel}" for kernel in kernels]


def test_a_checkpoint_that_cannot_be_read_offers_nothing(ask, tmp_path):
    assert ask("attack", "--checkpoint", str(tmp_path / "none.safetensors"), "--flip", "do") == []


def test_other_shells_get_plain_values(ask, tagger):
    (line,) = ask("attack", "--checkpoint", str(tagger), "--flip", "do", shell="zsh")[-1:]
    assert "do it" in line
    assert offer(["a b", "a,c", "ab"], "a") == ["a b", "a,c", "ab"]
    assert offer(["x", "xy"], "x,x") == ["x,xy"]
    assert offer(["x", "xy"], "X") == ["x", "xy"]


def test_the_script_of_a_shell_is_printed():
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [sys.executable, "-c", CODE, "--show-completion", "bash"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert "_MLPERTURB_COMPLETE=complete_bash" in done.stdout
