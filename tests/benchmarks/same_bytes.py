"""Whether two versions of mlperturb write the same bytes: the same commands, run by both, side by side.

    python tests/benchmarks/same_bytes.py --old ae60d8a --new HEAD --voc ../shared/voc --photos 4 --cache /tmp/same
    python tests/benchmarks/same_bytes.py --old ae60d8a --new . --voc ../shared/voc --cache /tmp/same --quick
    python tests/benchmarks/same_bytes.py --old HEAD~1 --new . --voc ../shared/voc --only method,resume --except flip

A version is a commit of the repository in which the script is started, or a folder: its files as they are, committed or
not. Each is copied to a temporary folder, and each command is `python -m mlperturb ...` of one thread on the CPU, in a
folder with the same photos under the same relative names: a process that is forked once the libraries are loaded, which
saves most of the time, or with `--fresh` a new interpreter. Compared are the files, the exit codes and stdout: PNGs,
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
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from same_cases import CASES, KILL, QUICK, prepare_photos
from same_values import MAY_DIFFER, UNSEEN, Comparison
from same_versions import Command, Version, find_version, load_libraries

# Running


def run_case(name: str, side: Version, inputs: Path, folder: Path, *, fresh: bool) -> None:
    """Run the commands of a case in a new folder, and leave only what they wrote there."""
    side.check_out()
    shutil.copytree(inputs, folder)
    for number, text in enumerate(CASES[name], 1):
        words = shlex.split(text.removeprefix(KILL))
        stdout = folder / f"{number}.stdout.{'json' if '--json' in words else 'txt'}"
        stderr = folder / f"{number}{UNSEEN}"
        command = Command(side, words, folder, fresh)
        if text.startswith(KILL):
            out = folder / words[words.index("--out") + 1]
            code = command.run(stdout, stderr, kill=partial(has_batch, out))
            stdout.unlink()
        else:
            code = command.run(stdout, stderr)
        (folder / f"{number}.exit.txt").write_text(f"{code}\n")
    for path in inputs.iterdir():
        given = folder / path.name
        shutil.rmtree(given) if given.is_dir() else given.unlink()


def has_batch(folder: Path) -> bool:
    """Say whether the journal in a folder has records."""
    return any(b'"records": [{' in path.read_bytes() for path in folder.glob("*.jsonl"))


def check_exit_codes(name: str, side: Version, folder: Path) -> None:
    """Refuse a command that is refused, or that ends before it is killed: it would compare nothing."""
    for number, text in enumerate(CASES[name], 1):
        code = (folder / f"{number}.exit.txt").read_text().strip()
        if code not in ((str(-signal.SIGKILL),) if text.startswith(KILL) else ("0", "1")):
            raise SystemExit(f"{side.name}, {name}: {text}\nexit code {code}: {last_words(folder, number)}")


def last_words(folder: Path, number: int) -> str:
    """Return the last line that a command printed on stderr."""
    return "".join((folder / f"{number}{UNSEEN}").read_text(errors="replace").strip().splitlines()[-1:])


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
    comparison: Comparison
    fresh: bool
    cache: Path | None
    keep: Path | None

    def compare(self, name: str) -> bool:
        """Run a case on both sides and print a line; return whether they are the same."""
        before = spent()
        old, cached = self._old(name)
        between = spent()
        new = self.scratch / "new" / name
        run_case(name, self.new, self.scratch / "inputs", new, fresh=self.fresh)
        found = self._differences(name, old, new)
        if self.keep:
            for side, folder in (("old", old), ("new", new)):
                shutil.copytree(folder, self.keep / side / name, dirs_exist_ok=True)
        if found:
            more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
            print(f"DIFFERS  {name:17} {found[0]}{more}", flush=True)
        else:
            files = sum(path.is_file() and path.suffix != UNSEEN for path in new.rglob("*"))
            times = f"old {'cached' if cached else f'{between - before:.0f} s'}, new {spent() - between:.0f} s of CPU"
            print(f"same     {name:17} {files} files; {times}", flush=True)
        return not found

    def _differences(self, name: str, old: Path, new: Path) -> list[str]:
        """Return the exit codes that differ, then the first difference of each file."""
        found = []
        for number in range(1, len(CASES[name]) + 1):
            codes = [(folder / f"{number}.exit.txt").read_text().strip() for folder in (old, new)]
            if codes[0] != codes[1]:
                found.append(f"command {number}: exit code {codes[0]} -> {codes[1]}: {last_words(new, number)}")
        found += self.comparison.folders(old, new)
        for side, folder in (("old", old), ("new", new)):
            if (folder / "killed").is_dir() and (folder / "whole").is_dir():
                twins = self.comparison.folders(folder / "whole", folder / "killed", killed=True)
                found += [f"{side}: not killed -> killed and gone on with: {text}" for text in twins]
        return found

    def _old(self, name: str) -> tuple[Path, bool]:
        """Return the folder of the old side's outputs, and whether it was there already."""
        folder, kept = self.scratch / "old" / name, None
        if self.cache and self.old.commit:
            key = json.dumps([self.old.commit, CASES[name], self.photos, machine()])
            kept = self.cache / self.old.commit[:12] / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
            if kept.is_dir():
                return kept, True
        run_case(name, self.old, self.scratch / "inputs", folder, fresh=self.fresh)
        check_exit_codes(name, self.old, folder)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as half:
                shutil.copytree(folder, Path(half) / "whole")
                Path(half, "whole").rename(kept)
        return folder, False


def spent() -> float:
    """Return the seconds of CPU that the commands took up to now."""
    times = os.times()
    return times.children_user + times.children_system


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
    parser.add_argument("--fresh", action="store_true", help="load the libraries anew for every command")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keeps the outputs of the old side, and uses them the next time"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keeps the outputs of both sides")
    arguments = parser.parse_args()
    if arguments.photos < 1:
        parser.error(f"expected at least 1 photo, got {arguments.photos}")
    names = select(arguments.only, arguments.skipped, quick=arguments.quick)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what is temporary goes

    started = time.perf_counter()
    if not arguments.fresh:
        load_libraries()
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as temporary:
        scratch = Path(temporary).resolve()
        old, new = (find_version(getattr(arguments, side), scratch / f"code-{side}") for side in ("old", "new"))
        photos = prepare_photos(arguments.voc, arguments.photos, scratch / "inputs")
        comparison = Comparison([*MAY_DIFFER, *arguments.allow])
        run = Run(old, new, scratch, photos, comparison, arguments.fresh, arguments.cache, arguments.keep)
        same = [run.compare(name) for name in names]
    print(f"{sum(same)} of {len(same)} cases are the same; {time.perf_counter() - started:.0f} s")
    raise SystemExit(int(not all(same)))


if __name__ == "__main__":
    main()
