"""Run many commands, each in a process of its own with limits of its own, and load the libraries once for all.

`python tests/support/forked.py COMMANDS RESULTS`: a JSON list of argument lists in, a JSON line each out.
"""

from __future__ import annotations

import contextlib
import gc
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

SECONDS, MEMORY = 60, 8 * 2**30  # of the clock; of address space, of which the libraries take a part


def limited(arguments: list[str], out: int, err: int) -> None:
    """Become the command; never come back."""
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
    """Return the exit code, minus the signal's number if one ended it, what was printed and the peak of memory."""
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
    commands, results = map(Path, sys.argv[1:])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        sys.argv = ["mlperturb", "labels"]  # loads what is loaded late
        main()
    gc.collect()
    gc.freeze()
    with results.open("w") as stream:
        for arguments in json.loads(commands.read_text()):
            print(json.dumps(run(arguments)), file=stream, flush=True)
