"""Photos a second end to end, files in and files out, and where the time goes.

    python tests/benchmarks/throughput.py --photos ../shared/voc/VOCdevkit/VOC2012/JPEGImages --count 200 --budget fast

`mlperturb attack`'s own runner on photos of a folder, into a temporary folder: `--flip any --keep rest`. `forward` and
`backward` are passes of the resizing and the network (on CUDA they are only started by those calls: what is waited for
is in `rest`); `wait` is what the thread that attacks waits for photos to be decoded and for files to be written.
`decode` and `write` (encoding, flushing to disk, renaming, reading back) run in threads meanwhile, and are not part of
the sum.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mlperturb.attacks.problem import Problem
from mlperturb.labels import parse_request
from mlperturb.limits import Limits
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.photos.formats import open_photo
from mlperturb.photos.images import find_photos
from mlperturb.run import runner
from mlperturb.run.jobs import plan_outputs
from mlperturb.run.settings import Settings
from mlperturb.run.verdict import save
from mlperturb.system.devices import prepare


def timed(spent: defaultdict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its seconds added up under `name`."""

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - started

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--method", default="ml-ddn")
    parser.add_argument("--budget", default="balanced")
    parser.add_argument("--passes", type=int)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    device = prepare(arguments.device, 0)
    classifier, _ = load_checkpoint(arguments.checkpoint or bundled_checkpoint(), device=device)
    jobs = plan_outputs(find_photos([arguments.photos], recursive=True)[: arguments.count])
    request = parse_request(classifier.labels, flip=["any"], keep=["rest"])
    settings = Settings(arguments.method, arguments.budget, request, Limits(arguments.passes))
    spent: defaultdict[str, float] = defaultdict(float)
    statuses: Counter[str] = Counter()
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as out,
        patch.object(runner, "open_photo", timed(spent, "decode", open_photo)),
        patch.object(runner, "save", timed(spent, "write", save)),
        patch.object(Problem, "logits", timed(spent, "forward", Problem.logits)),
        patch.object(Problem, "look", timed(spent, "forward", Problem.look)),
        patch.object(Problem, "gradient", timed(spent, "backward", Problem.gradient)),
        patch.object(Problem, "jacobian", timed(spent, "backward", Problem.jacobian)),
        patch.object(Problem, "gradient_norms", timed(spent, "backward", Problem.gradient_norms)),
    ):
        waits = runner.run_attack(
            classifier, jobs, Path(out), settings, lambda records: statuses.update(r.status for r in records)
        )
    total = time.perf_counter() - started
    spent["wait"] = waits.reading + waits.writing
    spent["rest"] = total - spent["forward"] - spent["backward"] - spent["wait"]
    result = {
        "method": arguments.method,
        "budget": arguments.budget,
        "passes": arguments.passes,
        "device": str(device),
        "photos": len(jobs),
        "statuses": dict(statuses),
        "photos_per_second": len(jobs) / total,
        "share": {name: seconds / total for name, seconds in spent.items()},
    }
    print(f"{len(jobs)} photos, {arguments.method}, {arguments.budget}, {device}: {dict(statuses)}")
    print(f"{result['photos_per_second']:.2f} photos a second; of the time:")
    for name in ("forward", "backward", "wait", "rest", "decode", "write"):
        print(f"  {name:9}{spent[name] / total:6.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
