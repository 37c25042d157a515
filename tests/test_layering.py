"""Imports run downward only (DESIGN.md, "The way of the data"), read from the source with `ast`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mlperturb

PACKAGE = Path(mlperturb.__file__).parent
ORDER = [
    "errors",
    "text",
    "files",
    "interrupts",
    "pipeline",
    "sharing",
    "journal",
    "labels",
    "targets",
    "metrics",
    "preprocess",
    "taps",
    "readers",
    "images",
    "regions",
    "purify",
    "devices",
    "classifier",
    "checkpoints",
    "attacks",
    "quantise",
    "survival",
    "voc",
    "cases",
    "losses",
    "loading",
    "training",
    "report",
    "jobs",
    "resume",
    "search",
    "verdict",
    "runner",
    "defence",
    "evaluation",
    "figures",
    "tables",
    "gallery",
    "cli",
]
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__main__.py"})  # which stands above every layer
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
    """Return the layer of a module; one that ORDER does not name may be imported by the command line alone."""
    return 2 * ORDER.index(part) if part in ORDER else 2 * ORDER.index("cli") - 1


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
def test_typer_and_rich_stay_in_the_command_line_and_the_tables(path):
    if _own_part(path) not in ("cli", "tables"):
        assert not {name.split(".")[0] for name in _imports(path)} & {"typer", "rich", "click"}


@pytest.mark.parametrize("path", [path for path in SOURCES if _own_part(path) == "attacks"], ids=lambda path: path.stem)
def test_attacks_know_neither_files_nor_label_names(path):
    names = _imports(path)
    assert not {name.split(".")[0] for name in names} & {"PIL", "pathlib", "os", "io"}
    own = {name.split(".")[1] for name in names if name.startswith("mlperturb.")}
    assert not own & {"files", "images", "labels", "checkpoints", "voc"}


def test_the_layers_name_modules_that_exist():
    existing = {path.stem for path in PACKAGE.iterdir()}
    assert {"errors", "targets", "classifier", "attacks", "training", "cli"} <= existing & set(ORDER)


@pytest.mark.parametrize(
    "module", ["mlperturb", "mlperturb.errors", "mlperturb.labels", "mlperturb.checkpoints", "mlperturb.cases"]
)
def test_importing_what_the_command_line_needs_first_leaves_torch_unimported(run_python, module):
    assert run_python(f"import sys, {module}; print('torch' in sys.modules)") == "False"
