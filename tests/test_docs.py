"""README and docs: every block runs on real files, every link leads somewhere, every dotted name exists.

A block that cannot run here has a comment before it, `<!-- not run: needs VOC -->`; the options of its commands are
parsed all the same. In a block `console`, the lines after a command are its output: `...` stands for anything, and
numbers with a decimal point may differ by a tenth, as they do from one processor to another. A block `text` after a
block of Python is what that prints. The blocks of a page run in order, in a folder with the files of docs/start.md.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from typer.core import TyperGroup
from typer.main import get_group

from mlperturb.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "commands").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "weights" / "README.md"]
GROUP = get_group(app)
assert isinstance(GROUP, TyperGroup)
COMMANDS = GROUP.commands
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
EVERY_TEXT = pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>not run: [^>]+|files) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"\d*\.\d+")
SHELL = set("|&;<>$`*?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: where it stands.
        line: of its fence.
        language: of its fence.
        text: between the fences.
        mark: of the comment before it: `not run: WHY`, `files`, or nothing.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        body = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(page, line, match["language"], body, match["mark"] or ""))
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a fence that is not understood"
    return found


def read_commands(block: Block) -> Iterator[tuple[str, str]]:
    """Yield the commands of a shell block, each with the output that the page shows."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output
    else:
        for line in text.splitlines():
            if line.strip() and not line.startswith("#"):
                yield line, ""


def assert_alike(shown: str, printed: str, where: object) -> None:
    """Compare what a page shows with what was printed: words exactly, numbers to a tenth, `...` with anything."""
    printed = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    shown = "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())
    pieces, numbers = [], []
    for piece in re.split(rf"(\.\.\.|{NUMBER.pattern})", shown):
        if piece == "...":
            pieces.append(".*?")
        elif NUMBER.fullmatch(piece):
            pieces.append(rf"({NUMBER.pattern})")
            numbers.append(float(piece))
        else:
            pieces.append(re.sub(r"(\\ )+", " +", re.escape(piece)))
    match = re.fullmatch("".join(pieces), printed, re.DOTALL)
    assert match, f"{where} shows\n{shown}\nbut this was printed\n{printed}"
    for number, text in zip(numbers, match.groups(), strict=True):
        assert float(text) == pytest.approx(number, rel=0.1, abs=0.03), f"{where} shows {number}, got {text}"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder with the files that the pages are about, and stand in it."""
    monkeypatch.chdir(tmp_path)
    (maker,) = [block for block in read_blocks(DOCS / "start.md") if block.mark == "files"]
    exec(compile(maker.text, str(maker), "exec"), {})
    return tmp_path


@pytest.fixture
def shell(cli) -> Callable[[str], tuple[int, str, str]]:
    """Run a line: our own commands in this process, which is quick, all else by bash."""

    def run(line: str) -> tuple[int, str, str]:
        words = shlex.split(line)
        if words[0] == "mlperturb" and not SHELL & set(line):
            return cli(*words[1:])
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], env={**os.environ, **paths}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return run


@EVERY_PAGE
@pytest.mark.usefixtures("folder")
def test_every_block_runs_and_prints_what_the_page_shows(page, shell):
    names: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None  # by the Python block before
    for block in read_blocks(page):
        if block.mark.startswith("not run"):
            continue
        if block.language in ("console", "bash"):
            for command, shown in read_commands(block):
                run_command(block, command, shown, shell)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(block.text, str(block), "exec"), names)
            printed = stream.getvalue()
            continue
        elif block.language == "text":
            assert printed is not None, f"{block}: expected a block of Python before it"
            assert_alike(block.text, printed, block)
        else:
            pytest.fail(f"{block}: expected console, bash, python or text, got {block.language}")
        printed = None


def run_command(block: Block, command: str, shown: str, shell: Callable[[str], tuple[int, str, str]]) -> None:
    code, out, err = shell(command)
    told = [line for line in shown.splitlines() if line.startswith("mlperturb: ")]
    where = f"{block}: {command}"
    refused = any(line.startswith("mlperturb: error:") for line in told)
    assert (code != 0) == refused, f"{where} ended with {code}:\n{out}\n{err}"
    if told:
        assert_alike("\n".join(told), err, where)
    rest = [line for line in shown.splitlines() if line not in told]
    if rest:
        assert_alike("\n".join(rest), out, where)


@EVERY_PAGE
def test_every_command_has_options_that_exist(page):
    for block in read_blocks(page):
        if block.language in ("console", "bash"):
            for command, _ in read_commands(block):
                for words in simple_commands(command):
                    check_command(words, f"{block}: {command}")


def simple_commands(line: str) -> Iterator[list[str]]:
    """Split a line at `&&`, `|` and `;`."""
    words = shlex.split(line, comments=True)
    for separates, group in itertools.groupby(words, lambda word: word in ("&&", "||", "|", ";")):
        if not separates:
            yield list(group)


def check_command(words: list[str], where: str) -> None:
    """Parse the options of one of our commands, or look for those of a script of the repository in its source."""
    places = [number for number, word in enumerate(words) if Path(word).name == "mlperturb"]
    if places:
        name, *arguments = words[places[0] + 1 :]
        if name in ("--version", "--install-completion"):
            return
        assert name in COMMANDS, f"{where}: there is no command {name}"
        command = COMMANDS[name]
        command.make_parser(command.context_class(command)).parse_args(list(arguments))
    elif words[0] == "python" and words[1].endswith(".py"):
        script = ROOT / words[1]
        assert script.is_file(), f"{where}: there is no {script}"
        source = script.read_text() + (ROOT / "tests" / "benchmarks" / "batches.py").read_text()
        for word in words[2:]:
            assert not word.startswith("--") or f'"{word}"' in source, f"{where}: {script.name} has no option {word}"


def test_a_renamed_option_and_a_changed_output_would_be_found():
    with pytest.raises(Exception, match="No such option"):
        check_command(["srun", "-m", "mlperturb", "attack", "img.png", "--flop", "person"], "here")
    with pytest.raises(AssertionError, match="no option"):
        check_command(["python", "tests/benchmarks/frontier.py", "--vok", "VOC"], "here")
    assert_alike("person  0.478 ...", "person   0.470 and more", "here")
    for shown, printed in (("person 0.478", "person 0.678"), ("success, 3", "partial, 3"), ("a 4", "a 5")):
        with pytest.raises(AssertionError, match="here shows"):
            assert_alike(shown, printed, "here")


@EVERY_TEXT
def test_options_in_the_text_exist(page):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    known = {option for command in COMMANDS.values() for param in command.params for option in param.opts}
    scripts = "".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
    foreign = {"--help", "--version", "--install-completion", "--max-restarts", "--strict"}  # of other programs
    for code in re.findall(r"`([^`\n]+)`", prose):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in known | foreign or f'"{option}"' in scripts, f"{page}: there is no option {option}"


@EVERY_TEXT
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_file(), f"{page}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target} names no heading"


def slug(heading: str) -> str:
    """Return a heading's anchor, as Python-Markdown and GitHub make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


@EVERY_TEXT
def test_every_dotted_name_exists(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`(mlperturb(?:\.[A-Za-z_]\w*)+)`", text) + re.findall(r"^::: (mlperturb[\w.]+)$", text, re.M)
    for name in {*named, *re.findall(r"<!-- code: (mlperturb[\w.]+) -->", text)}:
        resolve(name)


def resolve(name: str) -> object:
    """Return what a dotted name stands for.

    Raises:
        AttributeError: if there is no such thing.
    """
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for place, part in enumerate(parts[1:], start=2):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(".".join(parts[:place]))
        fields = getattr(found, "__dataclass_fields__", {})
        if part in fields:
            return fields[part]
        found = getattr(found, part)
    return found


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page_with_its_help():
    hooks = load_hooks()
    pages = {path.stem for path in (DOCS / "commands").glob("*.md")} - {"index"}
    assert pages == set(COMMANDS)
    for name, command in COMMANDS.items():
        text = (DOCS / "commands" / f"{name}.md").read_text(encoding="utf-8")
        assert f"<!-- help: {name} -->" in text
        shown = hooks.on_page_markdown(text)
        for param in command.params:
            assert all(option in shown for option in param.opts if option.startswith("--")), (name, param.opts)


def test_the_hook_shows_code_without_its_docstring_and_links_names():
    hooks = load_hooks()
    shown = hooks.on_page_markdown("1. Decide.\n\n    <!-- code: mlperturb.targets.decide -->\n")
    assert "    ??? quote" in shown
    assert "def decide(" in shown
    assert "Return the decisions" not in shown
    assert "[`mlperturb.targets.decide`][mlperturb.targets.decide]" in shown
    fenced = "```python\n`mlperturb.targets.decide`\n```"
    assert hooks.on_page_markdown(fenced) == fenced
    with pytest.raises(LookupError):
        hooks.on_page_markdown("<!-- code: mlperturb.targets.no_such_thing -->")


def test_the_readme_is_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    picture = DOCS / "images" / "portrait.png"
    assert picture.stat().st_size < 300_000
    assert picture.read_bytes().startswith(b"\x89PNG")
