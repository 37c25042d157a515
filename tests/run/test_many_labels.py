"""Reports and tables of thousands of labels: what tells something is there, the rest is counted."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console

from mlperturb.run.record import MANY, Record, condense, kept_labels
from mlperturb.show.shown import choose_labels
from mlperturb.show.tables import image_table, prediction_table

LABELS = [f"tag {number}" for number in range(10861)]


def _record(labels, flip, violated=(), keep=None):
    truth = {label: number < 30 for number, label in enumerate(labels)}
    before = {label: (0.9 if truth[label] else 0.01) for label in labels}
    after = {**before, **{label: 1 - before[label] for label in (*flip, *violated)}, labels[-1]: 0.03}
    kept = [label for label in labels if label not in flip] if keep is None else keep
    held = {"held": len(kept) + len(flip) - len(violated), "total": len(kept) + len(flip), "violated": list(violated)}
    return Record(
        "p.png", "0" * 64, 8, 8, "partial" if violated else "success", truth, list(flip), kept,
        {"before": before, "float": after, "after": after}, held,
        readers={"float": {**held, "before": before, "after": after}},
    )  # fmt: skip


def test_a_record_of_a_few_labels_stays_whole():
    record = _record(LABELS[:MANY], LABELS[:1])
    assert condense(record) is record


def test_a_record_of_many_labels_keeps_what_tells_something():
    record = _record(LABELS, LABELS[:2], violated=[LABELS[500]])
    short = condense(record)
    text = json.dumps(asdict(short))
    assert len(text) < 60_000 < len(json.dumps(asdict(record))) / 20
    assert short.keep == ["rest"]
    assert kept_labels(asdict(short), LABELS) == record.keep
    assert short.probabilities is not None
    assert short.truth is not None
    assert [label for label, there in short.truth.items() if there] == LABELS[:30]
    for values in short.probabilities.values():
        assert values is not None
        assert {LABELS[0], LABELS[1], LABELS[500], LABELS[-1]} <= values.keys()
        assert len(values) <= 200
    assert short.readers is not None
    assert short.readers["float"]["before"] == short.probabilities["before"]
    assert Record.from_dict(json.loads(text)) == short


def test_a_set_that_is_not_the_rest_is_listed():
    record = _record(LABELS, LABELS[:2], keep=LABELS[2:50])
    assert condense(record).keep == LABELS[2:50]
    odd = ["rest", *LABELS[1:]]
    assert len(condense(_record(odd, LABELS[1:2])).keep) == len(LABELS) - 1


def _shown(table):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def test_the_table_of_a_photo_shows_what_changed_most_and_counts_the_others():
    lines = _shown(image_table(condense(_record(LABELS, LABELS[:2], violated=[LABELS[500]]))))
    assert len(lines) == 2 + 30
    assert [line.split()[:2] for line in lines[1:4]] == [["tag", "500"], ["tag", "0"], ["tag", "1"]]
    assert lines[-1].split() == ["10831", "others", "keep"]
    few = _shown(image_table(condense(_record(LABELS, LABELS[:2], violated=LABELS[500:600]))))
    assert few[-1].split() == ["10831", "others", "70", "do", "not", "hold"]


def test_the_table_of_a_prediction_counts_the_others():
    values = {label: 1 - number / 10861 for number, label in enumerate(LABELS)}
    lines = _shown(prediction_table(values, dict.fromkeys(LABELS, 0.5)))
    assert len(lines) == 1 + 30 + 1 + 3
    assert lines[31].split() == ["5401", "others", "present"]


def test_the_gallery_reads_a_condensed_record():
    image = asdict(condense(_record(LABELS, LABELS[:2], violated=[LABELS[500]])))
    shown = choose_labels(image, dict.fromkeys(LABELS, 0.5), 10)
    assert [(one.label, one.group) for one in shown[:3]] == [
        ("tag 0", "flip"), ("tag 1", "flip"), ("tag 500", "keep")
    ]  # fmt: skip
