"""`attack --dry-run`: what would be attacked, as the classifier sees it, and what it would cost. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mlperturb.cli.advice import SHOWN
from mlperturb.cli.console import out as stdout
from mlperturb.cli.console import print_error, print_note
from mlperturb.cli.source import Source
from mlperturb.run.jobs import Job
from mlperturb.run.settings import Settings
from mlperturb.system.text import counted

if TYPE_CHECKING:
    from mlperturb.model.classifier import Classifier
    from mlperturb.photos.images import Photo

SCHEMA = "mlperturb.plan/1"
_LINES = 20  # photos that are named


@dataclass
class Plan:
    """What an attack would do, gathered photo by photo.

    Attributes:
        images: an entry for each photo, in the form of the JSON.
        first: the photos of the first batch.
    """

    images: list[dict[str, Any]] = field(default_factory=list)
    first: list[Photo] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Return how many photos have a status: `attack`, `unchanged` or `unreadable`."""
        return sum(image["status"] == status for image in self.images)


def dry_run(
    source: Source, jobs: list[Job], settings: Settings, notes: Sequence[str] = (), *, device: str, json: bool
) -> int:
    """Classify the photos and print what an attack would do; return the exit code.

    The notes are printed once the classifier is loaded, so that an error of loading it is the only line.
    """
    from mlperturb.run.forecast import most_passes, time_pass
    from mlperturb.run.report import to_json
    from mlperturb.system.devices import prepare

    classifier, description = source.load(prepare(device, 0))
    for note in notes:
        print_note(note)
    plan = Plan()
    for image in _classify(classifier, jobs, settings, plan):
        plan.images.append(image)
    attacked, passes = plan.count("attack"), most_passes(settings, len(classifier.labels))
    seconds = None
    if plan.first:
        pass_time = time_pass(classifier, plan.first, settings)
        seconds = pass_time * passes * math.ceil(attacked / len(plan.first))
    cost = {"passes": passes, "seconds": seconds}
    if json:
        print(to_json({"schema": SCHEMA, "classifier": description, "images": plan.images, "most": cost}))
    else:
        _print(plan, description, cost, rest=settings.request.keep_rest)
    return int(plan.count("unreadable") > 0)


def _classify(classifier: Classifier, jobs: list[Job], settings: Settings, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield what would be done to each photo; keep the photos of the first batch."""
    from mlperturb.model.views import read_logits
    from mlperturb.run.record import NOT_FINITE, Failure, Record
    from mlperturb.run.runner import read_job
    from mlperturb.run.search import Searcher
    from mlperturb.targets import decide, make_targets

    together = Searcher(classifier, settings).together
    for job in jobs:
        photo = read_job(job, lambda _: None, settings=settings, classifier=classifier)
        image: dict[str, Any] = {
            "source": str(job.source),
            "status": "unreadable",
            "probabilities": None,
            "error": None,
        }
        error = photo.error if isinstance(photo, Record) else None
        logits = None if isinstance(photo, Record) else read_logits(classifier, photo.rgb, settings.readers[0])
        if logits is not None and not bool(logits.isfinite().all()):
            error = Failure(NOT_FINITE.type, f"{job.source}: {NOT_FINITE.message}")
        if error is not None or logits is None or isinstance(photo, Record):
            image["error"] = None if error is None else asdict(error)
            print_error(str(error and error.message))
            yield image
            continue
        truth = decide(logits, classifier.boundary.cpu())
        targets = make_targets([settings.request], truth, classifier.boundary.cpu())
        chosen = {
            name: [label for label, wanted in zip(classifier.labels, mask[0].tolist(), strict=True) if wanted]
            for name, mask in (("labels", truth > 0), ("flip", targets.flip), ("keep", targets.keep))
        }
        nearest = settings.request.any_label
        values = logits[0].double().sigmoid().tolist()
        image |= {
            "status": "attack" if nearest or chosen["flip"] else "unchanged",
            "width": photo.rgb.shape[1],
            "height": photo.rgb.shape[0],
            "probabilities": dict(zip(classifier.labels, values, strict=True)),
            **chosen,
            "any": nearest,
            "files": {"adversarial": job.adversarial, "map": job.map},
        }
        if image["status"] == "attack" and len(plan.first) < together:
            plan.first.append(photo)
        yield image


def _print(plan: Plan, description: dict[str, Any], cost: dict[str, Any], *, rest: bool) -> None:
    from mlperturb.run.report import thresholds_of
    from mlperturb.show.tables import plan_line, prediction_table

    readable = [image for image in plan.images if image["probabilities"]]
    for image in readable[:_LINES]:
        stdout.print(plan_line(image, rest=rest), soft_wrap=True)
        if len(readable) <= SHOWN:
            stdout.print(prediction_table(image["probabilities"], thresholds_of(description)))
    if len(readable) > _LINES:
        stdout.print(f"and {counted(len(readable) - _LINES, 'more photo')}")
    counts = [f"{plan.count('attack')} of {len(plan.images)} to attack"]
    for status, words in (("unchanged", "as asked already"), ("unreadable", "that cannot be read or classified")):
        if plan.count(status):
            counts.append(f"{plan.count(status)} {words}")
    line = f"photos: {', '.join(counts)}"
    if cost["seconds"] is not None:
        line += f"; at most about {cost['passes']} passes each, {_duration(cost['seconds'])}"
    stdout.print(f"{line}; nothing was written", soft_wrap=True)


def _duration(seconds: float) -> str:
    """Return a time as a person says it: 40 seconds, 12 minutes, 3.5 hours."""
    for unit, length in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            number = seconds / length
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
