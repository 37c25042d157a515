"""The two versions that `same_bytes.py` compares, and their commands as processes."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

FIXED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "120",
    "NO_COLOR": "1",
}
DROPPED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")

_LIBRARIES = ("torch", "torchvision", "scipy.optimize", "matplotlib.figure", "safetensors.torch", "typer", "jinja2")


@dataclass(frozen=True)
class Version:
    """A version of the package, on disk once it is needed.

    Attributes:
        name: as given.
        commit: its full name; None of a folder as it is.
        folder: where its files are put.
    """

    name: str
    commit: str | None
    folder: Path

    def check_out(self) -> None:
        """Put the files there, unless they are there already."""
        if self.folder.exists():
            return
        self.folder.mkdir()
        if self.commit:
            archive = git("archive", "--format=tar", self.commit)
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                tar.extractall(self.folder, filter="data")
        else:
            listed = git("-C", self.name, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
            for name in filter(None, os.fsdecode(listed).split("\0")):
                if Path(self.name, name).is_file():  # a deleted file is still listed
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(Path(self.name, name), self.folder / name)
        command = [sys.executable, "-c", "import mlperturb; print(mlperturb.__file__)"]
        found = subprocess.run(command, cwd="/", env=self.environment(), check=True, capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_relative_to(self.folder):
            raise SystemExit(f"{self.name}: expected mlperturb of {self.folder}, got {found.stdout.strip()}")

    def environment(self) -> dict[str, str]:
        """Return the environment of its commands: one thread, no accelerator, no terminal, no other process."""
        kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
        return {**kept, **FIXED, "PYTHONPATH": str(self.folder)}


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout


def find_version(name: str, folder: Path) -> Version:
    if Path(name).is_dir():
        return Version(str(Path(name).resolve()), None, folder)
    return Version(name, git("rev-parse", "--verify", f"{name}^{{commit}}").decode().strip(), folder)


def load_libraries() -> None:
    """Load what the package loads, once, for the commands that are forked from this process."""
    os.environ.update(FIXED)
    for name in _LIBRARIES:
        import_module(name)


@dataclass(frozen=True)
class Command:
    """`python -m mlperturb WORDS`.

    Attributes:
        side: the version.
        words: its arguments.
        folder: where it runs.
        fresh: whether in a new interpreter; else in a fork of this process, which has loaded the libraries alone.
    """

    side: Version
    words: Sequence[str]
    folder: Path
    fresh: bool

    def run(self, stdout: Path, stderr: Path, *, kill: Callable[[], bool] = lambda: False) -> int:
        """Run it to its end, or until `kill` says so; return the exit code, -9 if it was killed."""
        with self._started(stdout, stderr) as code:
            while (ended := code()) is None and not kill():
                time.sleep(0.02)
        if ended is None:
            ended = code()
        assert ended is not None, "a process that was killed has an exit code"
        return ended

    @contextmanager
    def _started(self, stdout: Path, stderr: Path) -> Iterator[Callable[[], int | None]]:
        """Start it; yield what returns its exit code, None while there is none; kill it in the end."""
        process: subprocess.Popen[bytes] | BaseProcess
        if self.fresh:
            with stdout.open("wb") as out, stderr.open("wb") as err:
                words, environment = [sys.executable, "-m", "mlperturb", *self.words], self.side.environment()
                process = subprocess.Popen(words, cwd=self.folder, env=environment, stdout=out, stderr=err)
        else:
            process = get_context("fork").Process(target=self._run_here, args=(stdout, stderr))
            process.start()
        try:
            yield process.poll if isinstance(process, subprocess.Popen) else lambda: process.exitcode
        finally:
            process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()

    def _run_here(self, stdout: Path, stderr: Path) -> None:
        """Be that process, from the fork on."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(self.folder)
        os.environ.clear()
        os.environ.update(self.side.environment())
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv[1:] = self.words
        sys.path[:1] = [str(self.folder), str(self.side.folder)]  # in place of the script's own folder
        runpy.run_module("mlperturb", run_name="__main__", alter_sys=True)
