from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.text import Text
from support.models import TINY_LABELS, TINY_PIXELS

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.cli.advice import advice
from mlperturb.labels import parse_request
from mlperturb.metrics import Distortion
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.readers import parse_readers
from mlperturb.photos.images import Photo
from mlperturb.photos.purify import parse_survival
from mlperturb.run import verdict
from mlperturb.run.jobs import plan_outputs
from mlperturb.run.record import Record, Status, Summary
from mlperturb.run.search import Found, search
from mlperturb.run.settings import Settings
from mlperturb.show.tables import image_line, readers_line, summary_table
from mlperturb.targets import Targets

LABELS = ("cat", "dog", "cow")
SETTINGS = Settings("ml-ddn", "fast", parse_request(LABELS, flip=["cat"], keep=["rest"]))
READERS = ("float", "pillow", "torchvision")
BLACK, GREY = np.zeros((6, 5, 3), np.uint8), np.full((6, 5, 3), 9, np.uint8)
BEFORE = (1.0, -1.0, 1.0)
GONE, STILL, SPOILT = (-1.0, -1.0, 1.0), (0.5, -1.0, 1.0), (-1.0, -1.0, -1.0)  # of cat: gone, still there; cow is lost


def make_found(flip: tuple[bool, ...] = (True, False, False), pixels: np.ndarray = GREY) -> Found:
    """Return a result of a photo with cat and cow, in which every label is to be flipped or kept."""
    flipped = torch.tensor([flip])
    goal = ClassificationGoal(Targets(flipped, ~flipped, torch.tensor([[1.0, -1.0, 1.0]]), torch.zeros(3)))
    before = torch.tensor([BEFORE] * 3)
    return Found(pixels, goal, before, None, None, None, Distortion(0.0, 0.0, 0.0), 5, 4, 0.1)


@pytest.fixture
def look(monkeypatch) -> Callable[..., verdict.Seen]:
    """Judge a file whose logits in each reader are given."""

    def judge(logits: dict[str, tuple[float, ...]], found: Found, settings: Settings = SETTINGS) -> verdict.Seen:
        monkeypatch.setattr(verdict, "read_columns", lambda _, __, reader: torch.tensor([logits[reader.name]]))
        return verdict.look(cast(Classifier, None), found.pixels, BLACK, found, settings)

    return judge


@pytest.mark.parametrize(
    ("logits", "status", "held"),
    [
        ((GONE, GONE, GONE), "success", (True, True, True)),
        ((GONE, STILL, GONE), "failed", (True, False, True)),  # cat is gone in float, and so it is not gone
        ((GONE, GONE, STILL), "failed", (True, True, False)),
        ((STILL, GONE, GONE), "failed", (False, True, True)),
        ((GONE, SPOILT, GONE), "partial", (True, False, True)),  # cat is gone everywhere, cow in one reader too
        ((STILL, STILL, STILL), "failed", (False, False, False)),
        ((SPOILT, SPOILT, SPOILT), "partial", (False, False, False)),
        ((GONE, (float("nan"),) * 3, GONE), "failed", (True, False, True)),
    ],
)
def test_success_is_success_in_every_reader(look, logits, status, held):
    seen = look(dict(zip(READERS, logits, strict=True)), make_found())
    assert seen.status == status
    assert tuple(bool(seen.readers[name].all()) for name in READERS) == held
    assert seen.held.tolist() == torch.cat(list(seen.readers.values())).all(0, keepdim=True).tolist()
    assert seen.passes == 3


def test_a_label_that_is_flipped_in_every_reader_is_partial_though_another_is_not(look):
    both = make_found(flip=(True, False, True))
    assert look(dict.fromkeys(READERS, GONE), both).status == "partial"
    shared = dict(zip(READERS, (SPOILT, GONE, SPOILT), strict=True))
    assert look(shared, both).status == "partial"
    apart = dict(zip(READERS, (GONE, (1.0, -1.0, -1.0), GONE), strict=True))  # each reader loses another label
    assert look(apart, both).status == "failed"


def test_each_compression_counts_in_every_reader(monkeypatch):
    settings = replace(SETTINGS, survive=parse_survival(["median:3"]))
    calls: list[str] = []

    def read(_, __, reader) -> torch.Tensor:
        calls.append(reader.name)
        compressed = len(calls) > 3
        return torch.tensor([STILL if compressed and reader.name == "torchvision" else GONE])

    monkeypatch.setattr(verdict, "read_columns", read)
    seen = verdict.look(cast(Classifier, None), GREY, BLACK, make_found(), settings)
    assert calls == [*READERS, *READERS]
    assert seen.passes == 6
    assert seen.held.all()
    assert seen.survival["median:3"].tolist() == [[False, True, True]]
    assert seen.status == "partial"


def test_a_photo_as_asked_is_unchanged_only_where_its_pixels_are(look):
    nothing = (False, False, False)
    assert look(dict.fromkeys(READERS, BEFORE), make_found(nothing, BLACK.copy())).status == "unchanged"
    assert look(dict.fromkeys(READERS, BEFORE), make_found(nothing, GREY)).status == "success"
    broken = dict.fromkeys(READERS, BEFORE) | {"pillow": SPOILT}
    assert look(broken, make_found(nothing, BLACK.copy())).status == "partial"


def to_record(name: str, statuses: dict[str, bool], status: Status) -> Record:
    readers = {key: {"held": 3, "total": 3, "violated": [] if held else ["cat"]} for key, held in statuses.items()}
    constraints = {"held": 2, "total": 3, "violated": ["cat"]}
    return Record(source=name, status=status, readers=readers, constraints=constraints)


def test_the_line_and_the_advice_on_a_file_name_the_readers_in_which_it_does_not_hold():
    record = to_record("a.png", {"float": True, "pillow": False, "torchvision": False}, "partial")
    assert image_line(record).plain.endswith("; does not hold in pillow, torchvision")
    assert advice(record, SETTINGS).startswith("the file holds in some readers, but not in pillow, torchvision; try")
    nowhere = to_record("a.png", dict.fromkeys(READERS, False), "partial")
    assert "some readers" not in advice(nowhere, SETTINGS)
    assert "does not hold" not in image_line(to_record("a.png", dict.fromkeys(READERS, True), "success")).plain


def test_a_summary_says_the_share_that_holds_in_each_reader_without_unchanged_photos():
    summary = Summary()
    summary.add(to_record("a", {"float": True, "pillow": True}, "success"))
    summary.add(to_record("b", {"float": True, "pillow": False}, "partial"))
    summary.add(to_record("c", {"float": True, "pillow": True}, "unchanged"))
    summary.add(Record(source="d", status="failed"))
    summary.add(Record(source="e"))
    assert summary.to_dict(1.0)["readers"] == {"float": pytest.approx(2 / 3), "pillow": pytest.approx(1 / 3)}
    assert (summary.attacked, summary.success_rate) == (3, pytest.approx(1 / 3))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(summary.to_dict(1.0)))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["unchanged", "1"] in lines
    assert ["hold", "in", "float", "67%"] in lines
    assert ["hold", "in", "pillow", "33%"] in lines
    assert readers_line(summary.to_dict(1.0)).plain == "hold in float 67%, pillow 33%"


def test_a_summary_names_every_reader_also_where_all_hold_but_no_single_reader():
    def texts(*names: str, status: Status = "success") -> tuple[str, Text | None]:
        summary = Summary()
        summary.add(to_record("a", dict.fromkeys(names, True), status))
        console = Console(width=80, file=io.StringIO(), record=True)
        console.print(summary_table(summary.to_dict(1.0)))
        return console.export_text(), readers_line(summary.to_dict(1.0))

    table, line = texts("float", "pillow")
    assert [row.split() for row in table.splitlines() if "hold in" in row] == [
        ["hold", "in", "float", "100%"],
        ["hold", "in", "pillow", "100%"],
    ]
    assert line.plain == "hold in float 100%, pillow 100%"
    for table, line in (texts("float"), texts("float", "pillow", status="unchanged")):
        assert "hold in" not in table
        assert line is None


def test_the_mean_passes_are_those_of_attacked_photos():
    summary = Summary()
    for status, forward, backward in (("success", 60, 40), ("partial", 30, 20), ("unchanged", 6, 0)):
        record = to_record("a", {"float": True}, status)
        summary.add(replace(record, cost={"forward": forward, "backward": backward, "seconds": 1.0}))
    summary.add(Record(source="e"))
    values = summary.to_dict(1.0)
    assert (values["forward"], values["backward"]) == (96, 60)
    assert values["passes"] == {"forward": 45, "backward": 30}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary_table(values))
    assert "passes an attacked photo  45 + 30" in console.export_text()
    nothing = Summary()
    nothing.add(to_record("a", {"float": True}, "unchanged"))
    assert nothing.to_dict(1.0)["passes"] is None


@pytest.mark.parametrize(
    ("survived", "words"),
    [
        ({"jpeg:75": True}, "; holds after jpeg:75"),
        ({"jpeg:75": False}, "; does not hold after jpeg:75"),
        (
            {"jpeg:75": True, "bits:5": False, "jpeg:90": True},
            "; holds after jpeg:75, jpeg:90; does not hold after bits:5",
        ),
        ({f"jpeg:{n}": True for n in range(60, 70)}, "; holds after 10 of 10 compressions"),
        (
            {f"jpeg:{n}": n > 62 for n in range(60, 70)},
            "; holds after 7 of 10 compressions; does not hold after 3 of 10 compressions",
        ),
    ],
)
def test_the_line_on_a_file_names_the_compressions_after_which_it_holds(survived, words):
    record = to_record("a.png", {"float": True}, "success")
    survival = {name: {"violated": [] if held else ["cat"]} for name, held in survived.items()}
    assert image_line(replace(record, survival=survival)).plain == "a.png: success" + words


def test_a_file_made_for_floats_alone_is_judged_in_all_readers_by_their_real_code(tiny, tmp_path):
    """Photos attacked in floats, judged in three readers: some hold in floats only, and the record says where not."""
    classifier = load_checkpoint(tiny, device="cpu")[0]
    every = Settings("ml-ddn", "balanced", parse_request(TINY_LABELS, flip=["cat"], keep=["rest"]))
    floats = replace(every, readers=parse_readers(["float"]))
    generator = np.random.default_rng(2)
    found_here = 0
    for number in range(6):
        rgb = np.kron(np.roll(TINY_PIXELS, number, 0), np.ones((3, 3, 1), np.uint8))
        rgb = np.clip(rgb + generator.integers(-9, 10, rgb.shape), 0, 255).astype(np.uint8)
        photo, path = Photo(rgb, None, "0" * 64), tmp_path / f"{number}.png"
        Image.fromarray(rgb).save(path)
        (job,) = plan_outputs([path])
        (found,) = search(classifier, [photo], [every.request], floats)
        clean = torch.cat([verdict.read_columns(classifier, rgb, reader) for reader in every.readers])
        found = replace(found, before=clean, after=None)
        saved = verdict.save(job, photo, found, tmp_path, every)
        record = verdict.judge(classifier, job, photo, found, saved, tmp_path, every)
        seen = verdict.look(classifier, found.pixels, rgb, found, every)
        lost = [name for name in READERS if not seen.readers[name].all()]
        assert (record.status == "success") == (not lost)
        if lost and "float" not in lost:
            found_here += 1
            assert record.status in ("partial", "failed")
            expected = {label for name in lost for label in np.array(TINY_LABELS)[~seen.readers[name][0].numpy()]}
            assert set(record.constraints["violated"]) == expected
            kept = record.status == "partial"
            assert (tmp_path / job.adversarial).exists() == kept
            if kept:
                assert [name for name, one in record.readers.items() if one["violated"]] == lost
    assert found_here > 0


@pytest.fixture
def mixed(cli, tiny, tmp_path):
    """Attack three photos, of which the grey photo is as asked; return the folder, stdout, the report and the wish."""
    (tmp_path / "photos").mkdir()
    classifier = load_checkpoint(tiny, device="cpu")[0]
    with torch.no_grad():
        greys = classifier(torch.linspace(0, 1, 52).view(52, 1, 1, 1).expand(52, 3, 24, 24))
        now = classifier([torch.from_numpy(TINY_PIXELS).permute(2, 0, 1) / 255])[0]
    other = (greys * now.sign() < -1).nonzero()  # a label of which a grey photo and the photo differ
    level, column = other[0].tolist()
    wish = ("--remove" if now[column] > 0 else "--add", TINY_LABELS[column])
    photos = {"a": TINY_PIXELS, "b": np.roll(TINY_PIXELS, 1, 1), "plain": np.full((24, 24, 3), 5 * level, np.uint8)}
    for name, pixels in photos.items():
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    out = tmp_path / "out"
    code, text, err = cli("attack", tmp_path / "photos", *wish, "--budget", "fast", "--html",
                          "--checkpoint", tiny, "--out", out, "--device", "cpu", "--margin", "0.5")  # fmt: skip
    assert code == 0, err
    return out, text, json.loads((out / "report.json").read_text()), wish


def test_unchanged_photos_are_counted_apart_everywhere(mixed, cli, tiny, tmp_path):
    out, text, report, wish = mixed
    records = {image["source"].rsplit("/", 1)[1]: image for image in report["images"]}
    assert {name: record["status"] for name, record in records.items()} == {
        "a.png": "success",
        "b.png": "success",
        "plain.png": "unchanged",
    }
    plain, pixels = records["plain.png"], np.array(Image.open(tmp_path / "photos" / "plain.png"))
    assert np.array_equal(np.array(Image.open(out / plain["files"]["adversarial"])), pixels)
    assert plain["distortion"]["l2"] == 0
    assert (plain["cost"]["forward"], plain["cost"]["backward"]) == (6, 0)
    summary, sizes = report["summary"], [records[name]["distortion"]["rmsd"] for name in ("a.png", "b.png")]
    assert (summary["images"], summary["success"], summary["unchanged"], summary["success_rate"]) == (3, 2, 1, 1.0)
    assert summary["rmsd"]["mean"] == pytest.approx(np.mean(sizes))
    assert summary["rmsd"]["median"] == pytest.approx(np.median(sizes))
    assert min(sizes) > 0
    page = (out / "index.html").read_text()
    assert '<dt>unchanged</dt><dd class="unchanged">1</dd>' in page
    assert "<option>unchanged</option>" in page
    assert '<span class="badge unchanged">unchanged</span>' in page
    assert "plain.png: unchanged" in text.replace("\n", "")
    for number in range(3):  # many photos get a table
        Image.fromarray(pixels).save(tmp_path / "photos" / f"plain{number}.png")
    code, text, _ = cli("attack", tmp_path / "photos", *wish, "--budget", "fast", "--checkpoint", tiny,
                        "--out", out, "--device", "cpu", "--overwrite")  # fmt: skip
    assert code == 0
    assert any(line.split() == ["unchanged", "4"] for line in text.splitlines())


def test_the_pixels_that_the_search_found_cost_no_pass_and_other_pixels_a_pass_a_reader(tiny):
    classifier = load_checkpoint(tiny, device="cpu")[0]
    settings = Settings("ml-ddn", "fast", parse_request(TINY_LABELS, flip=["cat"], keep=["rest"]))
    photo = Photo(TINY_PIXELS, None, "0" * 64)
    (found,) = search(classifier, [photo], [settings.request], settings)
    assert found.after is not None
    seen = verdict.look(classifier, found.pixels.copy(), photo.rgb, found, settings)
    assert seen.passes == 0
    fresh = torch.cat([verdict.read_columns(classifier, found.pixels, reader) for reader in settings.readers])
    torch.testing.assert_close(seen.logits, fresh, atol=1e-4, rtol=1e-4)
    other = found.pixels.copy()
    other[0, 0, 0] ^= 1
    assert verdict.look(classifier, other, photo.rgb, found, settings).passes == 3
