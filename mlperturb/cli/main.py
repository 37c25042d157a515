"""The app, and the only place that turns errors into messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated

try:
    import typer

    from mlperturb import __version__
    from mlperturb.cli.attack import attack
    from mlperturb.cli.complete import join_at_colons
    from mlperturb.cli.console import Pipe, prepare_streams, print_error
    from mlperturb.cli.convert import convert
    from mlperturb.cli.demo import demo
    from mlperturb.cli.evaluate import evaluate
    from mlperturb.cli.figures import figures
    from mlperturb.cli.gallery import gallery
    from mlperturb.cli.info import labels, methods
    from mlperturb.cli.jpeg_defend import jpeg_defend
    from mlperturb.cli.predict import predict
    from mlperturb.cli.train import train
    from mlperturb.cli.transfer import transfer
    from mlperturb.errors import MlperturbError, StorageError, UsageError
    from mlperturb.system.interrupts import end_at_second_signal, handle, restore
    from mlperturb.system.text import shorten
    from mlperturb.system.threads import are_busy
except KeyboardInterrupt:  # while the libraries load
    sys.exit(130)

app = typer.Typer(
    name="mlperturb",
    help="Attack image files: find the smallest perturbation that flips some labels of a multi-label classifier "
    "and keeps others, and save the photo as a PNG that still succeeds when it is read again.",
    epilog="Exit codes: 0 every image processed; 1 some image could not be read or written; 2 usage error; "
    "3 the run had to stop (disk full, device fault); 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs flow; panels of options
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(attack, demo, jpeg_defend, transfer, figures, gallery),
    *(predict, labels, methods, convert, evaluate, train),
):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlperturb {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Read the options before the command."""


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty path, such as an unset shell variable gives: it would mean the current folder.

    Raises:
        UsageError: if an argument is empty.
    """
    names = ("--flip", "--keep", "--add", "--remove")
    if any(not value and before not in names for before, value in zip(["", *arguments], arguments, strict=False)):
        raise UsageError("expected a path or a value, got an empty argument")


def _interrupt(_number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; but while a module is imported, exit: torch aborts if its import is interrupted."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            print_error("interrupted")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _tell(error: typer.TyperException) -> None:
    """Print what Typer says of a command line as one line; without a command, Typer has shown the help."""
    if message := error.format_message():
        command = getattr(getattr(error, "ctx", None), "command_path", "mlperturb")
        mark = " " if message.endswith("?") else "; "
        print_error(f"{message[:1].lower()}{message[1:].rstrip('.')}{_came(error)}{mark}see `{command} --help`")


def _came(error: typer.TyperException) -> str:
    """Return the value that Pydantic refused, which Typer's message lacks, as the end of a message."""
    problems: list[dict[str, object]] = getattr(error.__cause__, "errors", list)()
    return f", got {shorten(str(problems[0]['input']), 60)!r}" if problems else ""


def run() -> None:
    """Run `main` as a process; after `main` has ended, no earlier or later signal changes the exit code.

    The process does not wait for a thread that still decodes a photo.
    """
    prepare_streams()
    end_at_second_signal(_end)
    if sys.stdout is not None:  # it is None if it was closed before the start
        sys.stdout = Pipe(sys.stdout)
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:  # in the last lines of `main`
        code = 130
    finally:
        handle(signal.SIG_IGN)
        # If an interrupt broke the last `exec` (which `dataclass` calls), CPython exits by SIGINT: `exec` once more.
        exec("")
    if are_busy():
        with suppress(OSError):
            if sys.stdout is not None:
                sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(0 if code is None else code)  # type: ignore[arg-type]


def _end() -> None:
    """End the process at once, whatever its threads do."""
    with suppress(OSError):
        os.write(2, b"mlperturb: error: interrupted\n")
    os._exit(130)


def main() -> None:
    """Run the command line; an MlperturbError becomes one line on stderr and exit code 2, a StorageError code 3."""
    before = handle(_interrupt)
    try:
        join_at_colons()
        _refuse_empty(sys.argv[1:])
        code = app(prog_name="mlperturb", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what goes wrong is told here, not in the last lines of Python
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:  # a command line that Typer cannot read
        _tell(error)
        sys.exit(2)
    except MlperturbError as error:
        print_error(str(error))
        sys.exit(3 if isinstance(error, StorageError) else 2)
    except (KeyboardInterrupt, RuntimeError) as error:
        if KeyboardInterrupt not in (
            type(error),
            type(error.__cause__),
        ):  # Python 3.11 wraps it if it interrupts a class body
            raise
        print_error("interrupted")
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print_error(f"expected a shorter path, got {error.filename!s:.60}...")
            sys.exit(2)
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        print_error(f"cannot write to stdout: {error.strerror}")
        sys.exit(3)
    finally:
        restore(before)
