"""Imports run downward only (CONTRIBUTING.md, "The house"), read from the source with `ast`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mlperturb

PACKAGE = Path(mlperturb.__file__).parent
ORDER = [  # the rooms of the house, from the ground up
    "errors",
    "system",
    "limits",
    "labels",
    "targets",
    "metrics",
    "photos",
    "model",
    "attacks",
    "training",
    "run",
    "experiment",
    "show",
    "api",
    "cli",
]
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py", PACKAGE / "__main__.py"})  # above every layer
EVERY_FILE = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))


def _imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere, under TYPE_CHECKING and in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rank(part: str) -> int:
    """Return the layer of a room."""
    return ORDER.index(part)


def _own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@EVERY_FILE
def test_imports_run_downward_only(path):
    own = _own_part(path)
    parts = {name.split(".")[1] for name in _imports(path) if name.startswith("mlperturb.")}
    known = {part for part in parts if (PACKAGE / f"{part}.py").exists() or (PACKAGE / part).is_dir()}
    upward = {part for part in known - {own} if _rank(part) >= _rank(own)}
    assert not upward, f"{own} imports {sorted(upward)}, which stand no lower"


@EVERY_FILE
def test_only_the_command_line_speaks_of_its_options(path):
    if _own_part(path) != "cli":
        assert not re.findall(r"--[a-z{]\S*", path.read_text(encoding="utf-8"))


@EVERY_FILE
def test_typer_and_rich_stay_in_the_command_line_and_the_tables(path):
    if _own_part(path) != "cli" and path != PACKAGE / "show" / "tables.py":
        assert not {name.split(".")[0] for name in _imports(path)} & {"typer", "rich", "click"}


@pytest.mark.parametrize("path", [path for path in SOURCES if _own_part(path) == "attacks"], ids=lambda path: path.stem)
def test_attacks_know_neither_files_nor_label_names(path):
    names = _imports(path)
    assert not {name.split(".")[0] for name in names} & {"PIL", "pathlib", "os", "io"}
    own = {name.split(".")[1] for name in names if name.startswith("mlperturb.")}
    assert own <= {"attacks", "errors", "metrics", "model", "targets"}
    assert {name for name in names if name.startswith("mlperturb.model.")} <= {
        "mlperturb.model.linear.strips",  # how the CPU reads a tensor, not what a model is
        "mlperturb.model.linear.to_pixels",
        "mlperturb.model.protocol.Model",
        "mlperturb.model.protocol.Readable",
        "mlperturb.model.protocol.Viewed",
        "mlperturb.model.protocol.narrow",
    }


def test_every_room_is_in_the_order():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(ORDER)


@pytest.mark.parametrize(
    "module",
    ["mlperturb", "mlperturb.errors", "mlperturb.labels", "mlperturb.model.checkpoints", "mlperturb.experiment.cases"],
)
def test_importing_what_the_command_line_needs_first_leaves_torch_unimported(run_python, module):
    assert run_python(f"import sys, {module}; print('torch' in sys.modules)") == "False"
