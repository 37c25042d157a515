"""Run many commands, each in its own process with its own limits, and load the libraries only once.

`python tests/support/forked.py COMMANDS RESULTS [MODULE...]`: read a JSON list of argument lists, write a JSON line for
each. The modules are loaded once, before.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch

from mlperturb.cli.main import main

SECONDS, MEMORY = 60, 8 * 2**30  # of the clock; bytes of address space, the libraries included


def limited(arguments: list[str], out: int, err: int) -> None:
    """Turn this process into the command; never return."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["mlperturb", *arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str]) -> dict[str, object]:
    """Return the exit code (minus the number of a signal that ended it), the output and the peak of memory."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            limited(arguments, out.fileno(), err.fileno())
        _, status, used = os.wait4(child, 0)
        for stream in (out, err):
            stream.seek(0)
        printed = (stream.read().decode(errors="replace") for stream in (out, err))
        return {
            "code": os.waitstatus_to_exitcode(status),
            **dict(zip(("out", "err"), printed, strict=True)),
            "memory": used.ru_maxrss * 1024,
        }


if __name__ == "__main__":
    import torchvision.models  # noqa: F401
    from safetensors import torch as _tensors  # noqa: F401

    import mlperturb.run.runner  # noqa: F401

    torch.set_num_threads(1)
    commands, results = map(Path, sys.argv[1:3])
    for module in sys.argv[3:]:
        importlib.import_module(module)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        sys.argv = ["mlperturb", "labels"]  # loads the modules that load late
        main()
    gc.collect()
    gc.freeze()
    with results.open("w") as stream:
        for arguments in json.loads(commands.read_text()):
            print(json.dumps(run(arguments)), file=stream, flush=True)
