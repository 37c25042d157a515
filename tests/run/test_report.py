from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mlperturb.run.verdict
from mlperturb.attacks.methods import METHODS
from mlperturb.errors import OutputError, StorageError, UsageError
from mlperturb.labels import parse_request
from mlperturb.limits import MIN_PASSES, Limits
from mlperturb.metrics import Distortion
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.images import magnify, read_photo
from mlperturb.run.jobs import plan_outputs
from mlperturb.run.record import Failure, Record, Status, Summary
from mlperturb.run.report import read_schema, report_lines, to_json
from mlperturb.run.runner import run_attack
from mlperturb.run.settings import Settings, Words, read_settings

LABELS = ("cat", "dog", "cow", "hen")
SETTINGS = {
    "method": "x",
    "budget": "fast",
    "flip": [],
    "keep": [],
    "add": [],
    "remove": [],
    "seed": 0,
    "device": "cpu",
    "readers": ["float", "pillow", "torchvision"],
}
DESCRIBED = {
    "checkpoint": "x",
    "sha256": "0" * 64,
    "architecture": "tiny",
    "labels": list(LABELS),
    "thresholds": [0.5] * len(LABELS),
}


class Net(nn.Sequential):
    """A small network; two labels are present in most photos."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Flatten())
        self.append(nn.Linear(8 * 5 * 5, len(LABELS)))


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(5)
    net = Net()
    head = net[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.mul_(20)
        probe = (torch.rand(64, 3, 16, 16) * 2 - 1) * 0.6
        head.bias.sub_(net(probe).mean(0) - torch.tensor([0.4, -0.4, 0.3, -0.3]))
    return Classifier(net, LABELS, (0.5, 0.4, 0.6, 0.5), Preprocess(resize=(16, 16)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three good photos of different sizes, one of them with alpha."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (24, 31, 3)), ("b.png", (20, 17, 4)), ("c.bmp", (16, 16, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    return folder


def attack(classifier: Classifier, folder: Path, *, method: str = "ml-cw", flip=("cat",), keep=("rest",), **more):
    """Attack every file of a folder; return the records by file name, and the output folder."""
    out = folder.parent / "out"
    out.mkdir(exist_ok=True)
    request = parse_request(LABELS, flip=flip, keep=keep)
    settings = Settings(method, more.pop("budget", "fast"), request, **more)
    records: list[Record] = []
    run_attack(classifier, plan_outputs(sorted(folder.iterdir())), out, settings, records.extend)
    return {Path(record.source).name: record for record in records}, out


def predict(classifier: Classifier, rgb: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return classifier([torch.from_numpy(rgb).permute(2, 0, 1).float() / 255])[0]


def summarise(records, seconds: float) -> dict:
    return count(records).to_dict(seconds)


def exit_code(records) -> int:
    return count(records).exit_code


def count(records) -> Summary:
    summary = Summary()
    for record in records:
        summary.add(record)
    return summary


def check_schema(records) -> dict:
    text = "".join(report_lines(SETTINGS, DESCRIBED, records, 1.5))
    report = json.loads(text)
    assert text == to_json(report)  # in one piece or record by record, the text is the same
    jsonschema.Draft202012Validator(read_schema()).validate(report)
    return report


def test_the_schema_is_itself_valid():
    jsonschema.Draft202012Validator.check_schema(read_schema())


@pytest.mark.parametrize("method", list(METHODS))
def test_the_report_of_every_method_fits_the_schema(classifier, photos, method):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    records, _ = attack(classifier, photos, method=method)
    report = check_schema(records.values())
    assert [image["status"] for image in report["images"]].count("unreadable") == 1
    for image in report["images"]:
        ranked = image["status"] != "unreadable" and method.startswith("rank")
        assert (image["ranking"] is not None) == ranked


@pytest.mark.parametrize("margin", [0.01, 0.6])  # the margin is for the search: it plays no part in the verdict
@pytest.mark.parametrize("method", ["ml-dp", "ml-cw", "rank-2", "fgs"])
def test_the_numbers_are_those_of_the_png_as_read_back(classifier, photos, method, margin):
    records, out = attack(classifier, photos, method=method, margin=margin, keep=["rest"] if margin < 1 else ["hen"])
    written = [record for record in records.values() if record.files["adversarial"]]
    assert written
    for record in written:
        photo, saved = read_photo(Path(record.source)), read_photo(out / record.files["adversarial"])
        before, after = predict(classifier, photo.rgb), predict(classifier, saved.rgb)
        for logits, when in ((before, "before"), (after, "after")):
            wanted = dict(zip(LABELS, torch.sigmoid(logits.double()).tolist(), strict=True))
            assert record.probabilities[when] == pytest.approx(wanted, abs=1e-6)
        present_before, present_after = before >= classifier.boundary, after >= classifier.boundary
        assert record.truth == dict(zip(LABELS, present_before.tolist(), strict=True))
        changed = {label for label, x, y in zip(LABELS, present_before, present_after, strict=True) if x != y}
        violated = {label for label in record.flip if label not in changed}
        violated |= {label for label in record.keep if label in changed}
        assert set(record.constraints["violated"]) == violated
        assert record.constraints["total"] == len(record.flip) + len(record.keep)
        assert record.constraints["held"] == record.constraints["total"] - len(violated)
        assert (record.status == "success") == (not violated)
        difference = saved.rgb.astype(float) - photo.rgb
        assert record.distortion.rmsd == pytest.approx(np.sqrt(np.mean(difference**2)))
        assert record.distortion.l2 == pytest.approx(np.linalg.norm(difference))
        assert record.distortion.linf == np.abs(difference).max()


def test_the_png_has_the_photos_size_and_alpha_and_the_map_shows_the_difference(classifier, photos):
    records, out = attack(classifier, photos)
    assert {record.status for record in records.values()} == {"success"}
    for name, record in records.items():
        photo, saved = read_photo(photos / name), read_photo(out / record.files["adversarial"])
        assert saved.rgb.shape == photo.rgb.shape == (record.height, record.width, 3)
        assert (saved.alpha is None) == (photo.alpha is None) == (name != "b.png")
        if photo.alpha is not None:
            assert np.array_equal(saved.alpha, photo.alpha)
        shown = read_photo(out / record.files["map"])
        size = np.abs(saved.rgb.astype(int) - photo.rgb)
        assert np.array_equal(shown.rgb, np.rint(size * 255 / size.max()))
        assert shown.rgb.max() == 255
        assert np.array_equal(shown.rgb, magnify(saved.rgb, photo.rgb))
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{stem}.{kind}.png" for stem in "abc" for kind in ("adv", "map")
    )


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("passes", [MIN_PASSES, 17, 40])
def test_no_photo_costs_more_passes_than_asked_for(classifier, photos, method, passes):
    calls = []
    classifier.network.register_forward_hook(lambda _, __, output: calls.append(len(output)))
    for flip in ("cat", "all", "any"):
        calls.clear()
        records, _ = attack(classifier, photos, method=method, flip=[flip], keep=[], limits=Limits(passes))
        for record in records.values():
            assert 0 < record.cost["forward"] + record.cost["backward"] <= passes
        assert sum(calls) == sum(record.cost["forward"] for record in records.values())


@pytest.mark.parametrize("budget", ["fast", "balanced"])
def test_the_forward_passes_reported_are_those_the_network_made(classifier, photos, budget):
    calls = []
    classifier.network.register_forward_hook(lambda _, __, output: calls.append(len(output)))
    records, _ = attack(classifier, photos, method="ml-cw", budget=budget)
    assert sum(calls) == sum(record.cost["forward"] for record in records.values())


def test_the_result_of_a_photo_does_not_depend_on_its_batch(classifier, photos):
    together, out = attack(classifier, photos, batch_size=3)
    bytes_together = {path.name: path.read_bytes() for path in out.iterdir()}
    alone, out = attack(classifier, photos, batch_size=1)
    for name, record in together.items():
        assert record.status == alone[name].status
        assert record.probabilities["before"] == pytest.approx(alone[name].probabilities["before"], abs=1e-6)
        assert record.distortion.rmsd == pytest.approx(alone[name].distortion.rmsd, rel=0.05)
    assert set(bytes_together) == {path.name for path in out.iterdir()}


def test_the_same_run_twice_writes_the_same_bytes(classifier, photos):
    first, out = attack(classifier, photos, method="ml-cw")
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    second, _ = attack(classifier, photos, method="ml-cw")
    assert kept == {path.name: path.read_bytes() for path in out.iterdir()}
    assert [r.distortion for r in first.values()] == [r.distortion for r in second.values()]


def test_an_unreadable_photo_is_recorded_and_the_others_are_done(classifier, photos):
    (photos / "0.jpg").write_bytes(b"")
    (photos / "b2.png").write_bytes((photos / "b.png").read_bytes()[:60])
    (photos / "z.gif").write_text("no image at all")
    records, _ = attack(classifier, photos)
    unreadable = [name for name, record in records.items() if record.status == "unreadable"]
    assert sorted(unreadable) == ["0.jpg", "b2.png", "z.gif"]
    for name in unreadable:
        assert records[name].error.type == "ImageError"
        assert name in records[name].error.message
        assert records[name].files == {"adversarial": None, "map": None}
    assert [records[name].status for name in ("a.png", "b.png", "c.bmp")] == ["success"] * 3
    assert exit_code(list(records.values())) == 1
    check_schema(records.values())


class Broken(nn.Module):
    """NaN for dark photos, the network's logits for others."""

    def __init__(self, network: nn.Module, always: bool) -> None:
        super().__init__()
        self.network, self.always = network, always

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dark = (images.flatten(1).mean(1) < -0.9) | self.always
        return torch.where(dark[:, None], torch.nan, self.network(images))


@pytest.mark.parametrize("always", [True, False])
def test_a_network_that_gives_nan_is_an_error_of_that_photo(classifier, photos, always):
    Image.new("RGB", (18, 18)).save(photos / "b-dark.png")
    classifier.network = Broken(classifier.network, always)
    records, out = attack(classifier, photos)
    for name, record in records.items():
        if always or name == "b-dark.png":
            assert record.status == "failed"
            assert record.error == Failure("NumericalError", "the network's outputs are not finite")
            assert record.files["adversarial"] is None
            assert record.probabilities is None
            assert not (out / f"{Path(name).stem}.adv.png").exists()
        else:
            assert record.status == "success"
            assert record.error is None
    assert exit_code(list(records.values())) == 1
    check_schema(records.values())


class Constant(nn.Module):
    """Logits that no photo moves, though they have a gradient."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        moved = images.flatten(1).mean(1, keepdim=True) * 1e-6
        return moved + torch.tensor([3.0, -3.0, 3.0, -3.0])


@pytest.mark.parametrize("method", list(METHODS))
def test_a_failed_attack_leaves_no_file_and_is_no_error(photos, method):
    classifier = Classifier(Constant(), LABELS, None, Preprocess(resize=(16, 16)))
    out = photos.parent / "out"
    out.mkdir()
    (out / "a.adv.png").write_bytes(b"of an earlier run")
    records, _ = attack(classifier, photos, method=method, limits=Limits(passes=20))
    for record in records.values():
        assert record.status == "failed"
        assert record.error is None
        assert record.files == {"adversarial": None, "map": None}
        assert record.probabilities["after"] is None
        assert record.distortion is None
        assert record.success_float is False
        assert "cat" in record.constraints["violated"]
    assert list(out.iterdir()) == []
    assert exit_code(list(records.values())) == 0
    check_schema(records.values())


def test_a_photo_that_is_as_asked_is_unchanged_at_the_cost_of_a_look_before_and_after(classifier, photos):
    rgb = {path.name: read_photo(path).rgb for path in photos.iterdir()}
    for name in rgb:
        if name != "a.png":
            (photos / name).unlink()
    before = predict(classifier, rgb["a.png"]) >= classifier.boundary
    present = [label for label, there in zip(LABELS, before.tolist(), strict=True) if there]
    out = photos.parent / "out"
    out.mkdir()
    records: list[Record] = []
    request = parse_request(LABELS, add=present)
    run_attack(classifier, plan_outputs([photos / "a.png"]), out, Settings("ml-cw", "fast", request), records.extend)
    assert records[0].status == "unchanged"
    assert records[0].flip == []
    assert records[0].keep == present
    assert records[0].distortion.l2 == 0
    assert np.array_equal(read_photo(out / "a.adv.png").rgb, rgb["a.png"])
    assert read_photo(out / "a.map.png").rgb.max() == 0
    assert records[0].cost["forward"] == 2 * len(records[0].readers)
    assert records[0].cost["backward"] == 0
    check_schema(records)


def test_flip_any_flips_one_label_and_holds_what_is_named(classifier, photos):
    records, _ = attack(classifier, photos, flip=["any"], keep=["cat", "dog"])
    for record in records.values():
        assert len(record.flip) == 1
        assert record.flip[0] in ("cow", "hen")
        assert record.keep == ["cat", "dog"]
        assert record.status == "success"
    free, _ = attack(classifier, photos, flip=["any"], keep=[])
    for name, record in free.items():
        assert len(record.flip) == 1
        assert record.keep == []
        assert record.distortion.l2 <= records[name].distortion.l2 * 1.2
    rest, _ = attack(classifier, photos, flip=["any"], keep=["rest"])
    for record in rest.values():
        assert len(record.flip) == 1
        assert sorted([*record.flip, *record.keep]) == sorted(LABELS)


@pytest.mark.parametrize("which", ["write_pixels", "magnified"])
def test_a_full_disk_stops_the_run(classifier, photos, monkeypatch, which):
    calls = []

    def write(path, rgb, alpha=None, **more):
        calls.append(path)
        if len(calls) > (2 if which == "write_pixels" else 3):
            raise StorageError(f"cannot write {path}: No space left on device")
        real(path, rgb, alpha, **more)

    real = mlperturb.run.verdict.write_pixels
    monkeypatch.setattr(mlperturb.run.verdict, "write_pixels", write)
    with pytest.raises(StorageError, match="No space left"):
        attack(classifier, photos, batch_size=1)
    assert len(calls) == (3 if which == "write_pixels" else 4)


def test_a_file_that_cannot_be_written_is_an_error_of_that_photo(classifier, photos, monkeypatch):
    real = mlperturb.run.verdict.write_pixels

    def write(path, rgb, alpha=None, **more):
        if path.name.startswith("b."):
            raise OutputError(f"cannot write {path}: File name too long")
        real(path, rgb, alpha, **more)

    monkeypatch.setattr(mlperturb.run.verdict, "write_pixels", write)
    records, _ = attack(classifier, photos)
    assert records["b.png"].status == "failed"
    assert records["b.png"].error.type == "OutputError"
    assert records["a.png"].status == records["c.bmp"].status == "success"
    assert exit_code(list(records.values())) == 1
    check_schema(records.values())


def test_photos_of_one_name_get_outputs_of_different_names():
    paths = [Path(name) for name in ("x/a.png", "y/a.jpg", "z/y/A.gif", "z/a-2.png", "b.png")]
    jobs = plan_outputs(paths)
    names = [job.adversarial for job in jobs]
    assert names[:4] == ["a.adv.png", "y/a.adv.png", "A-2.adv.png", "z/a-2.adv.png"]
    assert names[-1] == "b.adv.png"
    assert len({name.casefold() for name in names}) == len(names)
    assert [job.map for job in jobs] == [name.replace(".adv.", ".map.") for name in names]
    assert [job.source for job in jobs] == paths


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"passes": MIN_PASSES - 1}, "expected `passes` of at least 10, got 9"),
        ({"rmsd": 0.0}, "expected a finite `rmsd` above 0, got 0.0"),
        ({"rmsd": float("nan")}, "expected a finite `rmsd` above 0, got nan"),
        ({"rmsd": float("inf")}, "expected a finite `rmsd` above 0, got inf"),
        ({"linf": 0}, "expected `linf` from 1 to 255 grey levels, got 0"),
        ({"linf": 256}, "expected `linf` from 1 to 255 grey levels, got 256"),
    ],
)
def test_a_limit_out_of_its_range_is_refused_by_its_name(limits, message):
    with pytest.raises(UsageError) as refused:
        Limits(**limits)
    assert str(refused.value) == message
    Limits(passes=MIN_PASSES, rmsd=0.1, linf=255)


def test_settings_say_in_a_report_what_was_asked_for_as_it_was_written():
    words = Words(flip=["cat,dog"], survive=["jpeg:70-72"], region="0,0,9,9")
    settings = read_settings(words, LABELS, limits=Limits(100, linf=4), options={"space": "logit", "solver": None})
    assert settings.request.flip == (0, 1)
    assert len(settings.survive[1]) == 3
    assert list(settings.describe(seed=3, device="cpu").items()) == [
        ("method", "ml-ddn"),
        ("budget", "balanced"),
        ("flip", ["cat,dog"]),
        ("keep", []),
        ("add", []),
        ("remove", []),
        ("seed", 3),
        ("device", "cpu"),
        ("passes", 100),
        ("max_rmsd", None),
        ("max_linf", 4),
        ("survive", ["jpeg:70-72"]),
        ("region", "0,0,9,9"),
        ("batch_size", "auto"),
        ("margin", 0.01),
        ("format", "png"),
        ("keep_metadata", False),
        ("readers", ["float", "pillow", "torchvision"]),
        ("space", "logit"),
    ]


def test_a_record_comes_back_from_its_json_whole_or_not_at_all(classifier, photos):
    (photos / "broken.png").write_bytes(b"nonsense")
    for one in attack(classifier, photos)[0].values():
        values = json.loads(to_json(asdict(one)))
        assert Record.from_dict(values) == one
        for damaged in ({**values, "more": 1}, {name: value for name, value in values.items() if name != "notes"}):
            with pytest.raises((KeyError, TypeError)):
                Record.from_dict(damaged)


def test_settings_that_cannot_be_carried_out_are_refused():
    request = parse_request(LABELS, flip=["cat"])
    with pytest.raises(UsageError, match="expected at least 40 `passes`, got 10: each reader"):
        read_settings(Words(flip=["cat"], survive=["jpeg:70-72"]), LABELS, limits=Limits(10))
    with pytest.raises(UsageError, match="unknown method"):
        Settings("nothing", "fast", request)
    with pytest.raises(UsageError, match="unknown budget"):
        Settings("ml-cw", "nothing", request)
    with pytest.raises(UsageError, match="`solver` is an option of ml-dp"):
        Settings("ml-cw", "fast", request, options={"solver": "nnls"})


def record(status: Status, rmsd: float | None = None, *, forward: int = 3, error: bool = False) -> Record:
    return Record(
        source="x",
        status=status,
        distortion=None if rmsd is None else Distortion(rmsd, 2 * rmsd, 3.0),
        cost={"forward": forward, "backward": 2, "seconds": 0.5},
        error=Failure("ImageError", "x") if error else None,
    )


def test_the_summary_counts_statuses_and_averages_the_successes():
    records = [record("success", 1.0), record("success", 2.0), record("success", 6.0), record("partial", 50.0)]
    records += [record("failed"), record("unchanged", 0.0), record("unreadable", forward=0, error=True)]
    summary = summarise(records, 12.3456)
    assert summary == {
        "images": 7,
        "success": 3,
        "unchanged": 1,
        "partial": 1,
        "failed": 1,
        "unreadable": 1,
        "success_rate": 0.6,
        "rmsd": {"mean": 3.0, "median": 2.0},
        "forward": 18,
        "backward": 14,
        "passes": {"forward": 3.0, "backward": 2.0},
        "seconds": 12.346,
        "readers": {},
    }


@pytest.mark.parametrize("records", [[], [record("unreadable", error=True)], [record("failed")]])
def test_a_summary_without_successes_has_no_average(records):
    summary = summarise(records, 0.0)
    assert summary["rmsd"] == {"mean": None, "median": None}
    assert summary["success_rate"] == (0.0 if records and records[0].status == "failed" else None)
    check_schema(records)


def test_the_exit_code_tells_errors_from_failures():
    assert exit_code([]) == 0
    assert exit_code([record("success", 1.0), record("partial", 1.0), record("failed")]) == 0
    assert exit_code([record("success", 1.0), record("unreadable", error=True)]) == 1
    assert exit_code([record("failed", error=True)]) == 1


def test_json_holds_no_nan_and_no_raw_control_character():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"x": float("nan")})
    text = to_json({"x": "a\x1b[31m\u202e\n"})
    assert text.isascii()
    assert "\x1b" not in text
    assert json.loads(text) == {"x": "a\x1b[31m\u202e\n"}


def test_the_schema_refuses_what_a_report_must_not_be():
    report = check_schema([record("success", 1.0)])
    validator = jsonschema.Draft202012Validator(read_schema())
    for place, value in (("status", "done"), ("sha256", "short"), ("extra", 1), ("width", 0)):
        broken = json.loads(json.dumps(report))
        broken["images"][0][place] = value
        assert not validator.is_valid(broken), place
    del report["summary"]
    assert not validator.is_valid(report)
