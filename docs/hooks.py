"""What MkDocs does to a page before it is rendered; see `on_page_markdown`. Nothing here imports MkDocs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent, indent

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
HELP = re.compile(r"^<!-- help: ([\w-]+) -->$", re.MULTILINE)
CODE = re.compile(r"^( *)<!-- code: (mlperturb[\w.]+) -->$", re.MULTILINE)
NAME = re.compile(r"(?<!\[)`(mlperturb(?:\.[A-Za-z_]\w*)+)`(?!\])")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page with its comments filled in and its names linked.

    - `<!-- help: attack -->` becomes the help of that command, as a table.
    - `<!-- code: mlperturb.targets.decide -->` becomes the source of that function, folded.
    - A dotted name in backticks becomes a link to the Python reference; `mkdocs build --strict` fails where the
      reference does not have the name.
    """
    markdown = HELP.sub(lambda match: show_help(match[1]), markdown)
    markdown = CODE.sub(lambda match: indent(show_code(match[2]), match[1]), markdown)
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [NAME.sub(r"[`\1`][\1]", markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, NAME.sub(r"[`\1`][\1]", markdown[end:])])


def show_help(name: str) -> str:
    """Return a command's own help as Markdown: usage, description, a table of its arguments and options."""
    from typer.main import get_group

    from mlperturb.cli.main import app

    command = get_group(app).commands[name]
    context = command.context_class(command, info_name=f"mlperturb {name}")
    rows = [record for record in (param.get_help_record(context) for param in command.get_params(context)) if record]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"```text\n{usage}\n```", "", dedent(command.help or ""), "", "| option | meaning |", "|---|---|"]
    for option, meaning in rows:
        cells = f"`{option}`".replace("|", "\\|"), meaning.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def show_code(name: str) -> str:
    """Return the source of a function, class or method, without its docstring, as a folded block.

    Raises:
        LookupError: if there is none of that name.
    """
    path, parts = find_module(name)
    source = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(source)
    for part in parts:
        named = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        if not named:
            raise LookupError(f"{path} has no {'.'.join(parts)}")
        node = named[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    shown = lines[first : node.end_lineno]
    if ast.get_docstring(node) is not None:
        text = node.body[0]
        assert text.end_lineno is not None
        shown = lines[first : text.lineno - 1] + lines[text.end_lineno : node.end_lineno]
    block = f"```python\n{dedent(chr(10).join(shown))}\n```"
    link = "" if "._" in name else f"\n    Documented at `{name}`.\n"  # the reference has public names alone
    return f'??? quote "{name}"\n\n{indent(block, "    ")}\n{link}'


def find_module(name: str) -> tuple[Path, list[str]]:
    """Return the file of the module that a dotted name begins with, and the rest of the name.

    Raises:
        LookupError: if no module is called so.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path, parts[count:]
    raise LookupError(f"no module is called {name}")
