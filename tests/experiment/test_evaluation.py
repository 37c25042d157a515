from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn import metrics as reference

from mlperturb.attacks.methods import METHODS
from mlperturb.errors import StorageError, UsageError
from mlperturb.experiment import statistics
from mlperturb.experiment.cases import Protocol, parse_cases, parse_variants
from mlperturb.experiment.evaluate import Results, predict_photos, run
from mlperturb.experiment.records import failures
from mlperturb.experiment.statistics import METRICS, make_row, measure
from mlperturb.limits import Limits
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.readers import parse_readers
from mlperturb.photos.datasets import Dataset
from mlperturb.photos.images import read_photo
from mlperturb.show.grids import evaluation_grid, to_csv, to_latex, to_markdown
from mlperturb.system.journal import Journal

LABELS = ("cat", "dog", "potted plant", "hen", "cow")
BOUNDARY = torch.logit(torch.tensor([0.5, 0.4, 0.6, 0.5, 0.5]))


def made_up_record(rng: np.random.Generator, flipped: int) -> dict:
    """Return a record with random probabilities, ties among them, and `flipped` labels in A."""
    truth = {label: bool(rng.random() < 0.4) for label in LABELS}
    order = [LABELS[number] for number in rng.permutation(5)]
    probabilities = {
        when: {label: round(float(rng.random()), 1) for label in LABELS} for when in ("before", "float", "after")
    }
    return {
        "status": "success" if rng.random() < 0.5 else "partial",
        "success_float": bool(rng.random() < 0.5),
        "truth": truth,
        "flip": order[:flipped],
        "keep": order[flipped:],
        "probabilities": probabilities,
        "distortion": {"rmsd": float(rng.random())},
        "distortion_float": {"rmsd": float(rng.random())},
        "cost": {"forward": 3, "backward": int(rng.integers(9))},
        "error": None,
    }


@pytest.fixture
def records() -> list[dict]:
    rng = np.random.default_rng(0)
    return [made_up_record(rng, flipped) for flipped in (1, 2, 5, 1, 3) for _ in range(8)]


def desired(record: dict, label: str) -> bool:
    return record["truth"][label] != (label in record["flip"])


def test_every_metric_agrees_with_scikit_learn_and_scipy(records):
    figures = measure(records, LABELS, BOUNDARY)
    thresholds = torch.sigmoid(BOUNDARY.double()).numpy()
    for row, record in enumerate(records):
        scores = np.array([record["probabilities"]["after"][label] for label in LABELS])
        wanted = np.array([desired(record, label) for label in LABELS])
        decided = scores >= thresholds
        ranks = (2 * wanted - 1) * np.array([1 + (label in record["flip"]) for label in LABELS])
        for name, members in (("hamming_a", "flip"), ("hamming_b", "keep")):
            chosen = np.array([label in record[members] for label in LABELS])
            value = reference.hamming_loss(wanted[chosen], decided[chosen]) if chosen.any() else np.nan
            assert figures[f"saved.{name}"][row] == pytest.approx(value, nan_ok=True)
        f1 = reference.f1_score(wanted, decided, zero_division=0)
        assert figures["saved.f1"][row] == pytest.approx(f1)
        if wanted.any():
            precision = reference.average_precision_score(wanted, scores)
            assert figures["saved.map"][row] == pytest.approx(precision)
        if wanted.any() and not wanted.all():
            assert figures["saved.auc"][row] == pytest.approx(reference.roc_auc_score(wanted, scores))
            loss = reference.label_ranking_loss(wanted[None], scores[None])
            assert figures["saved.ranking_loss"][row] == pytest.approx(loss)
        else:
            assert np.isnan([figures["saved.auc"][row], figures["saved.ranking_loss"][row]]).all()
        tau = stats.kendalltau(scores, ranks).statistic
        assert figures["saved.kendall_tau"][row] == pytest.approx(tau, nan_ok=True)
        assert figures["saved.rmsd"][row] == record["distortion"]["rmsd"]
        assert figures["float.rmsd"][row] == record["distortion_float"]["rmsd"]


def test_a_row_averages_what_is_known_and_leaves_the_rest_out(records):
    figures = measure(records, LABELS, BOUNDARY)
    row = make_row("extreme", "x", [measure(records[:7], LABELS, BOUNDARY), measure(records[7:], LABELS, BOUNDARY)])
    assert row["images"] == 40
    assert row["ranked_images"] == int((~np.isnan(figures["saved.auc"])).sum()) < 40
    assert row["success_rate"] == np.mean([record["status"] == "success" for record in records])
    assert row["passes"] == np.mean([3 + record["cost"]["backward"] for record in records])
    for which in ("float", "saved"):
        for metric in METRICS:
            assert row[which][metric] == pytest.approx(np.nanmean(figures[f"{which}.{metric}"]))
            low, high = row["intervals"][which][metric]
            assert low < row[which][metric] < high


def test_an_empty_b_and_an_error_are_not_available_rather_than_zero(records):
    extreme = [{**record, "flip": list(LABELS), "keep": []} for record in records]
    row = make_row("extreme", "x", [measure(extreme, LABELS, BOUNDARY)])
    assert row["saved"]["hamming_b"] is None
    assert row["intervals"]["saved"]["hamming_b"] is None
    broken = {**records[0], "probabilities": None, "distortion": None, "distortion_float": None, "error": {"type": "x"}}
    row = make_row("random", "x", [measure([broken], LABELS, BOUNDARY)])
    assert row["errors"] == 1
    assert set(row["saved"].values()) == set(row["float"].values()) == {None}


def test_the_bootstrap_interval_covers_a_known_mean():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        low, high = statistics._mean(rng.exponential(2.0, 80))[1]
        inside += low < 2.0 < high
    assert inside >= 51  # 95% of the intervals, less a margin for chance and skew


@pytest.fixture(scope="module")
def classifier(tiny):
    return load_checkpoint(tiny, device="cpu")[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory, classifier) -> Dataset:
    """Return fourteen photos; the annotations are the classifier's decisions, but wrong for two of them."""
    rng = np.random.default_rng(2)
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{number}.png" for number in range(14)]
    for path in paths:
        smooth = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize(tuple(rng.integers(20, 50, 2))).save(path)
    seen = Dataset(tuple(paths), classifier.labels, np.zeros((14, 4), dtype=np.int8))
    truth = np.where(predict_photos(classifier, seen) >= classifier.boundary, 1, -1).astype(np.int8)
    truth[3, 0] *= -1
    truth[8, 2] *= -1
    truth[5, 1] = 0
    return replace(seen, truth=truth)


def make_protocol(**more) -> Protocol:
    options = {"images": 3, "budget": "fast", "limits": Limits(passes=20), "batch_size": 2, **more}
    cases = parse_cases(["random,extreme"], ["cat"], [], ("cat", "dog", "potted plant", "hen"))
    return Protocol(cases, parse_variants(["fgs,ml-dp:solver=pinv"], "fast"), **options)


def strip(entries: list[dict]) -> list[dict]:
    """Drop the seconds, which differ from run to run."""
    for entry in entries:
        for record in entry.get("records", ()):
            del record["cost"]["seconds"]
    return entries


def test_photos_are_decided_on_at_their_own_sizes_and_bad_ones_left_out(classifier, data, tmp_path):
    (tmp_path / "5.png").write_bytes(b"nonsense")
    paths = tuple(tmp_path / "5.png" if row == 5 else path for row, path in enumerate(data.paths))
    logits = predict_photos(classifier, replace(data, paths=paths))
    assert logits[5].isnan().all()
    assert logits.isfinite().all(1).sum() == 13
    for row in (0, 13):
        alone = classifier([torch.from_numpy(read_photo(data.paths[row]).rgb).permute(2, 0, 1) / 255])[0]
        torch.testing.assert_close(logits[row], alone, atol=1e-3, rtol=1e-4)


def test_the_first_reader_decides_what_the_classifier_gets_right(classifier, tmp_path):
    rng = np.random.default_rng(0)
    paths = tuple(tmp_path / f"{number}.png" for number in range(14))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(path)
    plain = parse_readers(["float:no-antialias", "float"])
    data = Dataset(paths, classifier.labels, np.zeros((14, 4), dtype=np.int8))
    seen = predict_photos(classifier, data, reader=plain[0])
    for row, path in enumerate(paths):
        pixels = torch.from_numpy(read_photo(path).rgb).permute(2, 0, 1)[None] / 255
        small = torch.nn.functional.interpolate(pixels, (40, 40), mode="bilinear", antialias=False)
        torch.testing.assert_close(seen[row], classifier.network((small - 0.5) / 0.5)[0], atol=1e-3, rtol=1e-4)
    truth = np.where(seen >= classifier.boundary, 1, -1).astype(np.int8)
    truth[4] = np.where(predict_photos(classifier, data)[4] >= classifier.boundary, 1, -1)
    data = replace(data, truth=truth)
    found = []
    for number, readers in enumerate((plain, plain[::-1])):
        with Journal(tmp_path / f"{number}.jsonl", {}) as journal:
            run(classifier, data, make_protocol(readers=readers, images=1), journal)
            found += [entry["correct"] for entry in journal.entries() if "correct" in entry]
    logits = [predict_photos(classifier, data, reader=reader) for reader in plain]
    right = [(np.where(one >= classifier.boundary, 1, -1) == truth).all(1) for one in logits]
    assert found == [np.flatnonzero(one).tolist() for one in right]
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def whole(classifier, data, tmp_path_factory) -> tuple[Results, list[dict], Path]:
    """Evaluate without a stop; return the results, the journal and the folder."""
    folder = tmp_path_factory.mktemp("whole")
    with Journal(folder / "j.jsonl", {}) as journal:
        results = run(classifier, data, make_protocol(), journal)
        assert results is not None
        return results, strip(list(journal.entries())), folder


def test_an_evaluation_attacks_what_the_classifier_gets_right_and_counts_it(data, whole):
    results, (first, *batches), folder = whole
    rows = results.rows
    assert set(range(14)) - set(first["correct"]) == {3, 8}
    assert [(row["case"], row["method"]) for row in rows] == [
        (case, method) for case in ("random", "extreme", "reduce cat") for method in ("fgs", "ml-dp:solver=pinv")
    ]
    wrong = {str(data.paths[3]), str(data.paths[8])}
    for row in rows:
        mine = [r for e in batches if (e["case"], e["method"]) == (row["case"], row["method"]) for r in e["records"]]
        assert len(mine) == row["images"] <= 3
        assert not {record["source"] for record in mine} & wrong
        assert row["success_rate"] == sum(record["status"] == "success" for record in mine) / len(mine)
        assert row["saved"]["rmsd"] == pytest.approx(np.mean([record["distortion"]["rmsd"] for record in mine]))
        assert all(record["cost"]["forward"] + record["cost"]["backward"] <= 20 for record in mine)
    assert not (folder / "images").exists()


def test_a_case_that_flips_one_label_has_its_probabilities_before_and_after(data, whole):
    results, (_, *batches), _ = whole
    (found,) = results.distributions
    assert (found.case, data.labels[found.label]) == ("reduce cat", "cat")
    mine = {method: {} for method in ("fgs", "ml-dp:solver=pinv")}
    for entry in batches:
        if entry["case"] == "reduce cat":
            mine[entry["method"]] |= dict(zip(entry["rows"], entry["records"], strict=True))
    assert list(found.series) == ["clean", *mine]
    for method, records in mine.items():
        seen = [record["probabilities"] for _, record in sorted(records.items())]
        assert found.series["clean"] == [one["before"]["cat"] for one in seen]
        assert found.series[method] == [one["after"]["cat"] for one in seen]
    assert found.series["fgs"] != found.series["clean"]


class StopError(Exception):
    pass


@pytest.mark.parametrize("batches", [0, 3, 7])
def test_a_stopped_evaluation_goes_on_to_the_identical_tables(classifier, data, whole, tmp_path, batches):
    protocol = make_protocol()
    expected, entries, _ = whole
    count = 0

    def stop(*_: object) -> None:
        nonlocal count
        count += 1
        if count > batches:
            raise StopError

    with pytest.raises(StopError), Journal(tmp_path / "j.jsonl", {}) as journal:
        run(classifier, data, protocol, journal, done=stop)
    with (tmp_path / "j.jsonl").open("ab") as stream:
        stream.write(b'{"case": "random", "rec')  # as a killed process leaves it
    left = []
    with Journal(tmp_path / "j.jsonl", {}) as again:
        results = run(classifier, data, protocol, again, planned=lambda total, had: left.append(total - had))
        found = list(again.entries())
    assert again.torn
    assert results == expected
    assert strip(found) == entries
    sources = [(e["case"], e["method"], record["source"]) for e in found if "records" in e for record in e["records"]]
    assert len(set(sources)) == len(sources)
    assert 0 < left[0] < len(sources)


@pytest.mark.parametrize(
    ("limit", "distance", "least", "most"),
    [({"rmsd": 0.7}, "rmsd", 0.6, 0.7), ({"linf": 2}, "linf", 1.9, 2 + 1e-5)],
)
def test_a_limit_holds_for_every_method_and_both_results(classifier, data, tmp_path, limit, distance, least, most):
    cases = parse_cases(["extreme"], [], [], classifier.labels)
    protocol = Protocol(cases, parse_variants(["all"], "fast"), images=3, budget="fast", limits=Limits(60, **limit))
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        run(classifier, data, protocol, journal)
        records = [record for entry in journal.entries() for record in entry.get("records", ())]
    reached = [record[which][distance] for record in records for which in ("distortion", "distortion_float")]
    assert len(reached) == 2 * 3 * len(METHODS)
    assert least < max(reached) <= most


def test_kept_images_are_the_ones_the_records_describe(classifier, data, tmp_path):
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        run(classifier, data, make_protocol(images=2, keep_images=True), journal)
        entries = list(journal.entries())
    for entry in entries:
        for record in entry.get("records", ()):
            folder = tmp_path / "images" / entry["case"].replace(" ", "_") / entry["method"].replace(":", "_")
            saved, photo = read_photo(folder / record["files"]["adversarial"]), read_photo(Path(record["source"]))
            difference = saved.rgb.astype(float) - photo.rgb
            assert np.sqrt((difference**2).mean()) == pytest.approx(record["distortion"]["rmsd"])


def test_a_data_set_that_fits_no_case_is_refused(classifier, data, tmp_path):
    nothing = replace(data, truth=-data.truth)
    with pytest.raises(UsageError, match="of the 0 photos"), Journal(tmp_path / "j.jsonl", {}) as journal:
        run(classifier, nothing, make_protocol(), journal)


@pytest.fixture
def own(data, tmp_path) -> Dataset:
    """Return a copy of the data set, to be damaged."""
    paths = tuple(Path(shutil.copy(path, tmp_path / path.name)) for path in data.paths)
    return replace(data, paths=paths)


def test_a_photo_that_changed_is_not_mixed_with_what_it_was(classifier, own, tmp_path):
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        run(classifier, own, make_protocol(images=1), journal)
        done = {Path(r["source"]) for e in journal.entries() for r in e.get("records", ())}
        rng = np.random.default_rng(9)
        for path in done:
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        with pytest.raises(UsageError, match="changed since"):
            run(classifier, own, make_protocol(images=1), journal)


def test_a_photo_that_failed_is_attacked_again_and_its_last_attempt_counts(classifier, own, tmp_path):
    protocol = make_protocol(images=2)
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        expected = run(classifier, own, protocol, journal)
    kept = {path: path.read_bytes() for path in own.paths}
    with Journal(tmp_path / "k.jsonl", {}) as journal:
        broken = []

        def damage(*_: object) -> None:
            for path in own.paths:
                path.write_bytes(b"gone")
            broken.append(True)

        rows = run(classifier, own, protocol, journal, planned=damage).rows
        assert broken
        assert all(row["errors"] == row["images"] for row in rows)
        assert len(failures(journal)) == sum(row["images"] for row in rows)
        for path, content in kept.items():
            path.write_bytes(content)
        assert run(classifier, own, protocol, journal) == expected
        assert failures(journal) == []


def test_photos_that_cannot_be_read_are_named(classifier, own, tmp_path):
    own.paths[5].write_bytes(b"nonsense")
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        run(classifier, own, make_protocol(images=1), journal)
        assert failures(journal) == [f"{own.paths[5]}: could not be read, and is left out"]


@pytest.mark.parametrize(
    "damage", [{"records": [{}]}, {"records": [5]}, {"records": 5}, {"rows": None}, {"rows": [999]}]
)
def test_damaged_records_stop_the_run_with_a_word(classifier, data, whole, tmp_path, damage):
    _, entries, _ = whole
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        for entry in entries:
            journal.append(entry)
        journal.append({**entries[-1], **damage})
        with pytest.raises(StorageError, match="damaged"):
            run(classifier, data, make_protocol(), journal)


@pytest.fixture
def rows(records) -> list[dict]:
    figures = [measure(records[start : start + 20], LABELS, BOUNDARY) for start in (0, 20)]
    return [
        make_row(case, method, [part])
        for case, method, part in (
            ("random", "a_b", figures[0]),
            ("random", "c|d", figures[1]),
            ("reduce <i>&\x1b", "a_b", figures[0]),
        )
    ]


def test_the_files_hold_the_figures_and_mark_the_best_of_each_case(rows):
    grid = evaluation_grid(rows, "saved")
    column = grid.columns.index("RMSD")
    best = min((0, 1), key=lambda number: rows[number]["saved"]["rmsd"])
    assert {(number, column) for number in range(3)} & grid.best == {(best, column), (2, column)}
    assert grid.rows[best][column] == f"{rows[best]['saved']['rmsd']:.4f}"
    column = grid.columns.index("F1")
    assert (max((0, 1), key=lambda number: rows[number]["saved"]["f1"]), column) in grid.best
    for text, line in zip(csv.DictReader(io.StringIO(to_csv(rows))), range(6), strict=True):
        source = rows[line // 2]
        which = ("float", "saved")[line % 2]
        assert text["result"] == which
        assert float(text["map"]) == source[which]["map"]
        rate = "success_rate" if which == "saved" else "success_rate_float"
        assert float(text["success_rate_high"]) == source["intervals"][rate][1]
        assert float(text["auc_low"]) == source["intervals"][which]["auc"][0]
    assert json.loads(json.dumps(rows)) == rows


def test_untrusted_names_are_harmless_in_markdown_and_latex(rows):
    grid = evaluation_grid(rows, "float")
    markdown, latex = to_markdown([grid]), to_latex([grid])
    assert "\\<i\\>" in markdown
    assert "c\\|d" in markdown
    assert "a\\_b" in markdown
    assert r"a\_b" in latex
    assert r"<i>\&" in latex
    assert "\x1b" not in markdown + latex
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(grid.columns) + 1}
    assert latex.count(r"\\") == 4
    assert latex.count("&") - latex.count(r"\&") == 4 * (len(grid.columns) - 1)
