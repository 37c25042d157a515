"""Success against RMSD: closed forms, the integral, the bootstrap, and the records that curves are made of."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest

from mlperturb.experiment.cases import Case, Protocol, Variant
from mlperturb.experiment.curves import by_case, read_curves, summarise, trace
from mlperturb.show.curves import draw_curves
from mlperturb.show.grids import curves_csv
from mlperturb.system.journal import Journal

INF = math.inf


def test_a_failure_counts_as_infinite():
    values, _ = summarise(np.array([10.0, INF, 0.1, 1.0]))
    assert values == {"rmsd_50": 1.0, "rmsd_90": None, "area": pytest.approx((2 / 3 + 1 / 3) / 4)}
    values, _ = summarise(np.array([3.0] * 9 + [INF]))
    assert (values["rmsd_50"], values["rmsd_90"]) == (3.0, 3.0)
    assert summarise(np.array([INF, INF]))[0] == {"rmsd_50": None, "rmsd_90": None, "area": 0.0}
    assert summarise(np.array([0.0, 0.001]))[0]["area"] == 1.0  # nothing is gained below the range


def test_the_area_is_the_integral_of_the_curve_over_log_rmsd():
    rng = np.random.default_rng(3)
    sizes = np.where(rng.random(40) < 0.8, np.exp(rng.normal(-1, 1.5, 40)), INF)
    grid = np.linspace(-2, 1, 30_001)  # log10 of 0.01 to 10
    shares = (sizes[:, None] <= 10**grid).mean(0)
    assert summarise(sizes)[0]["area"] == pytest.approx(np.trapezoid(shares, grid) / 3, abs=1e-4)


def test_half_the_rmsd_on_every_photo_is_a_tenth_more_area():
    sizes = np.linspace(0.1, 5, 30)
    gain = summarise(sizes / 2)[0]["area"] - summarise(sizes)[0]["area"]
    assert gain == pytest.approx(math.log10(2) / 3)


def test_the_steps_are_the_empirical_distribution():
    sizes = np.array([0.5, INF, 0.2, 0.5, 2.0])
    steps = trace(sizes)
    assert steps["rmsd"] == [0.2, 0.5, 2.0]
    assert steps["success"] == pytest.approx([0.2, 0.6, 0.8])
    assert steps == trace(sizes[::-1])  # seeded, and blind to the order of the photos
    assert trace(np.array([INF, INF])) == {"rmsd": [], "success": [], "low": [], "high": []}


def test_the_band_is_as_wide_as_a_binomial_one():
    sizes = np.random.default_rng(0).permutation(np.arange(1.0, 401.0))
    steps = trace(sizes)
    for place in (100, 200, 300):
        share, low, high = (steps[name][place] for name in ("success", "low", "high"))
        assert low < share < high
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 400), rel=0.12)


def test_the_intervals_cover_what_they_are_of():
    rng = np.random.default_rng(1)
    inside = dict.fromkeys(("rmsd_50", "rmsd_90"), 0)
    for _ in range(60):
        _, intervals = summarise(rng.exponential(1.0, 80))
        for name, level in (("rmsd_50", 0.5), ("rmsd_90", 0.9)):
            low, high = intervals[name]
            assert low is not None
            assert high is not None
            inside[name] += low < -math.log(1 - level) < high
    assert min(inside.values()) >= 51  # 95% of the intervals, less a margin for chance


def test_an_interval_that_reaches_infinity_has_no_upper_end():
    _, intervals = summarise(np.array([1.0] * 11 + [INF] * 9))
    assert intervals["rmsd_50"] == [1.0, None]
    assert intervals["rmsd_90"] == [None, None]


def _record(status: str, rmsd: float | None, rmsd_float: float | None = None) -> dict:
    return {
        "status": status,
        "success_float": rmsd_float is not None,
        "distortion": None if rmsd is None else {"rmsd": rmsd},
        "distortion_float": {"rmsd": 9.0 if rmsd_float is None else rmsd_float},
    }


@pytest.fixture
def curves(tmp_path) -> list[dict]:
    protocol = Protocol((Case("random", "random"),), (Variant("a", "a"), Variant("b", "b"), Variant("c", "c")))
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        first = [_record("failed", None), _record("success", 0.5, 0.25), _record("partial", 0.1)]
        journal.append({"case": "random", "method": "a", "rows": [4, 2, 9], "records": first})
        journal.append({"case": "random", "method": "a", "rows": [4], "records": [_record("success", 2.0, 1.0)]})
        journal.append({"case": "random", "method": "b", "rows": [4], "records": [_record("partial", 0.1)]})
        journal.append({"case": "random", "method": "a", "rows": [5], "records": [_record("success", 3.0, 3.0)]})
        return read_curves(journal, protocol, {"random": {2, 4, 9}})


def test_curves_are_read_from_the_latest_record_of_each_photo_that_counts(curves):
    assert [(curve["method"], curve["result"], curve["images"]) for curve in curves] == [
        ("a", "float", 3),
        ("a", "saved", 3),
        ("b", "float", 1),
        ("b", "saved", 1),
    ]
    assert [curve["rmsd"] for curve in curves] == [[0.25, 1.0], [0.5, 2.0], [], []]
    assert curves[1]["success"] == pytest.approx([1 / 3, 2 / 3])
    lines = list(csv.DictReader(io.StringIO(curves_csv(curves))))
    assert [(line["result"], float(line["rmsd"])) for line in lines] == [
        ("float", 0.25), ("float", 1.0), ("saved", 0.5), ("saved", 2.0),
    ]  # fmt: skip


def test_the_picture_has_a_line_for_each_method_that_ends_at_its_success_rate(curves):
    ((case, mine),) = by_case(curves, "saved")
    (axes,) = draw_curves(case, mine).axes
    assert axes.get_xscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    assert [line.get_ydata()[-1] for line in axes.lines] == pytest.approx([2 / 3, 0.0])
    assert axes.lines[0].get_xdata()[1:-1] == pytest.approx([0.5, 2.0])


def test_a_narrow_range_has_several_ticks():
    curve = {
        "method": "a",
        "images": 2,
        "rmsd": [1.1, 1.3],
        "success": [0.5, 1.0],
        "low": [0.0, 1.0],
        "high": [1.0, 1.0],
    }
    (axes,) = draw_curves("random", [curve]).axes
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 3
