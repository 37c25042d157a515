"""Whether two versions of mlperturb write the same bytes: the same commands, run by both, side by side.

    python tests/benchmarks/same_bytes.py --old ae60d8a --new HEAD --voc ../shared/voc --photos 4 --cache /tmp/same
    python tests/benchmarks/same_bytes.py --old ae60d8a --new . --voc ../shared/voc --cache /tmp/same --quick
    python tests/benchmarks/same_bytes.py --old HEAD~1 --new . --voc ../shared/voc --only method,resume --except flip

A version is a commit of the repository in which the script is started, or a folder: its files as they are, committed or
not. Each is copied to a temporary folder, and each command is `python -m mlperturb ...` of one thread on the CPU, in a
folder with the same photos under the same relative names. Compared are the files, the exit codes and stdout: PNGs,
tables and pages byte by byte, JSON value by value, with the order of its keys and its layout.

In JSON the values at the paths of `same_values.MAY_DIFFER` are left out, and those of `--allow PATH` (repeatable):
`images.*.notes` in any file, `report.json:settings.device` in one kind of file, `index.html:` for a whole file; `*`
stands for anything. stderr is not compared. After `kill -9` it is chance which batches a journal has twice: there the
latest record of every photo is compared, with the run that was not killed too.

With `--cache DIR` the outputs of the old side are kept, by commit, command, photos and machine, and used the next time.
The script prints a line for each case, and exits with 1 if a case differs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from same_cases import CASES, KILL, QUICK, prepare_photos
from same_values import MAY_DIFFER, UNSEEN, Comparison


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
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        return {**kept, **fixed, "NO_COLOR": "1", "PYTHONPATH": str(self.folder)}


def git(*words: str) -> bytes:
    done = subprocess.run(["git", *words], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout


def find_version(name: str, folder: Path) -> Version:
    if Path(name).is_dir():
        return Version(str(Path(name).resolve()), None, folder)
    return Version(name, git("rev-parse", "--verify", f"{name}^{{commit}}").decode().strip(), folder)


# Running


def run_case(name: str, side: Version, inputs: Path, folder: Path) -> None:
    """Run the commands of a case in a new folder, and leave only what they wrote there."""
    side.check_out()
    shutil.copytree(inputs, folder)
    for number, command in enumerate(CASES[name], 1):
        words = [sys.executable, "-m", "mlperturb", *shlex.split(command.removeprefix(KILL))]
        if command.startswith(KILL):
            _run_and_kill(words, side, folder)
            continue
        done = subprocess.run(words, cwd=folder, env=side.environment(), capture_output=True)
        ending = "json" if "--json" in words else "txt"
        (folder / f"{number}.stdout.{ending}").write_bytes(done.stdout)
        (folder / f"{number}.exit.txt").write_text(f"{done.returncode}\n")
        (folder / f"{number}{UNSEEN}").write_bytes(done.stderr)
    for path in inputs.iterdir():
        given = folder / path.name
        shutil.rmtree(given) if given.is_dir() else given.unlink()


def _run_and_kill(words: list[str], side: Version, folder: Path) -> None:
    """Start a command, and kill it when a line of its journal has records."""
    out, told = folder / words[words.index("--out") + 1], f"{side.name}: {shlex.join(words[1:])}"
    nowhere, begun = subprocess.DEVNULL, False
    with subprocess.Popen(words, cwd=folder, env=side.environment(), stdout=nowhere, stderr=nowhere) as process:
        try:
            while not begun and process.poll() is None:
                time.sleep(0.02)
                begun = any(b'"records": [{' in path.read_bytes() for path in out.glob("*.jsonl"))
        finally:
            process.kill()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"{told}\nexit code {process.returncode}: it ended before it could be killed")


def check_exit_codes(name: str, side: Version, folder: Path) -> None:
    """Refuse a command that is refused: it would compare nothing."""
    for path in sorted(folder.glob("*.exit.txt")):
        code = path.read_text().strip()
        if code not in ("0", "1"):
            number = path.name.partition(".")[0]
            said = (folder / f"{number}{UNSEEN}").read_text().strip().splitlines()[-1:]
            raise SystemExit(f"{side.name}, {name}: {CASES[name][int(number) - 1]}\nexit code {code}: {said}")


def machine() -> list[str]:
    """Return what beside the code decides the bytes."""
    names = ("torch", "torchvision", "numpy", "scipy", "pillow", "matplotlib", "jinja2", "safetensors")
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith("model name")), cpu)
    return [platform.python_version(), cpu, *(f"{name} {version(name)}" for name in names)]


# The run


@dataclass(frozen=True)
class Run:
    """Compares case by case."""

    old: Version
    new: Version
    scratch: Path
    photos: str  # their hash
    cache: Path | None
    comparison: Comparison

    def compare(self, name: str) -> bool:
        """Run a case on both sides and print a line; return whether they are the same."""
        started = time.perf_counter()
        old, cached = self._old(name)
        between = time.perf_counter()
        new = self.scratch / "new" / name
        run_case(name, self.new, self.scratch / "inputs", new)
        found = list(self.comparison.folders(old, new))
        for side, folder in (("old", old), ("new", new)):
            if (folder / "killed").is_dir():
                twins = self.comparison.folders(folder / "whole", folder / "killed")
                found += [f"{side}: killed and gone on with, against the run that was not: {text}" for text in twins]
        files = sum(path.is_file() and path.suffix != UNSEEN for path in new.rglob("*"))
        before = "cached" if cached else f"{between - started:.0f} s"
        times = f"old {before}, new {time.perf_counter() - between:.0f} s"
        if found:
            more = f"; and {len(found) - 1} files more" if len(found) > 1 else ""
            print(f"DIFFERS  {name:17} {found[0]}{more}", flush=True)
        else:
            print(f"same     {name:17} {files} files; {times}", flush=True)
        return not found

    def _old(self, name: str) -> tuple[Path, bool]:
        """Return the folder of the old side's outputs, and whether it was there already."""
        folder, kept = self.scratch / "old" / name, None
        if self.cache and self.old.commit:
            key = json.dumps([self.old.commit, CASES[name], self.photos, machine()])
            kept = self.cache / self.old.commit[:12] / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
            if kept.is_dir():
                return kept, True
        run_case(name, self.old, self.scratch / "inputs", folder)
        check_exit_codes(name, self.old, folder)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as half:
                shutil.copytree(folder, Path(half) / "whole")
                Path(half, "whole").rename(kept)
        return folder, False


def select(only: str, skipped: str, *, quick: bool) -> list[str]:
    """Return the names of the cases: of `limit`, all that begin with `limit.`."""

    def named(text: str) -> set[str]:
        found = set()
        for word in filter(None, text.split(",")):
            cases = {name for name in CASES if name == word or name.startswith(f"{word}.")}
            if not cases:
                raise SystemExit(f"no case {word!r}: expected {', '.join(CASES)}, or what stands before a point")
            found |= cases
        return found

    chosen = named(only) if only else set(QUICK if quick else CASES)
    return [name for name in CASES if name in chosen - named(skipped)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="a commit, or a folder")
    parser.add_argument("--new", default="HEAD", help="a commit, or a folder")
    parser.add_argument("--voc", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=4, help="of VOC 2012 val, beside Matplotlib's portrait")
    parser.add_argument("--only", default="", metavar="NAME,...", help="cases, or groups of them")
    parser.add_argument("--except", default="", metavar="NAME,...", dest="skipped")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--allow", action="append", default=[], metavar="PATH", help="of JSON, that may differ")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keeps the outputs of the old side")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder, for the outputs of both sides")
    arguments = parser.parse_args()
    names = select(arguments.only, arguments.skipped, quick=arguments.quick)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what is temporary goes

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as temporary:
        scratch = Path(temporary).resolve()
        sides = [find_version(getattr(arguments, side), scratch / f"code-{side}") for side in ("old", "new")]
        photos = prepare_photos(arguments.voc, arguments.photos, scratch / "inputs")
        comparison = Comparison([*MAY_DIFFER, *arguments.allow])
        run = Run(sides[0], sides[1], scratch, photos, arguments.cache, comparison)
        try:
            same = [run.compare(name) for name in names]
        finally:
            if arguments.keep:
                for side in ("old", "new"):
                    if (scratch / side).is_dir():
                        shutil.copytree(scratch / side, arguments.keep / side)
    print(f"{sum(same)} of {len(same)} cases are the same; {time.perf_counter() - started:.0f} s")
    raise SystemExit(int(not all(same)))


if __name__ == "__main__":
    main()
