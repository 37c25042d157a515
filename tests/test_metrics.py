from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats
from sklearn import metrics as sklearn

from mlperturb.metrics import (
    auc,
    average_precision,
    classifier_metrics,
    distortion,
    f1_scores,
    hamming,
    kendall_tau,
    pixel_distortion,
    ranking_loss,
)

SHAPE = (12, 7)


def _scores() -> torch.Tensor:
    """Return scores with many ties."""
    return torch.randint(-3, 4, SHAPE) / 3


def _signs(difficult: bool = False) -> torch.Tensor:
    return torch.randint(-1, 2, SHAPE) if difficult else torch.randint(0, 2, SHAPE) * 2 - 1


def _split(values: torch.Tensor, truth: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the values and the truth of each row without its difficult labels."""
    return [(v[t != 0].numpy(), t[t != 0].numpy()) for v, t in zip(values, truth, strict=True)]


def _close(ours: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def _is_mixed(truth: np.ndarray) -> bool:
    return 0 < (truth > 0).sum() < len(truth)


def test_distortion_is_measured_on_the_0_255_scale():
    measured = distortion(torch.tensor([[3, -4], [0, 0]], dtype=torch.int16))
    assert (measured.rmsd, measured.l2, measured.linf) == (2.5, 5.0, 4.0)


@given(arrays.arrays(np.int16, (4, 5, 3), elements=st.integers(-255, 255)))
def test_distortion_equals_numpy(difference):
    measured = distortion(torch.from_numpy(difference))
    assert measured.rmsd == pytest.approx(np.sqrt(np.mean(difference.astype(float) ** 2)))
    assert measured.l2 == pytest.approx(np.linalg.norm(difference.astype(float)))
    assert measured.linf == np.abs(difference).max()


def test_pixels_of_another_shape_are_refused_and_others_measured():
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    moved = np.ascontiguousarray(photo[::-1])
    exact = distortion(torch.from_numpy(moved.astype(np.int16) - photo))
    assert pixel_distortion(photo[::-1], photo) == pixel_distortion(moved, photo) == exact
    with pytest.raises(ValueError, match=r"expected pixels of shape \(40, 30, 3\), got \(30, 40, 3\)"):
        pixel_distortion(photo.reshape(30, 40, 3), photo)


def test_distortion_does_not_overflow_or_round_on_8_bit_integers():
    assert distortion(torch.full((3, 400, 500), 200, dtype=torch.uint8)).rmsd == pytest.approx(200.0, abs=1e-9)


def test_no_pixel_is_no_distortion():
    assert distortion(torch.zeros(0, 3)).rmsd == 0.0


def test_hamming_equals_scikit_learn():
    decisions, truth = _signs(), _signs()
    assert hamming(decisions, truth) == pytest.approx(sklearn.hamming_loss(truth > 0, decisions > 0))


def test_hamming_leaves_difficult_labels_out():
    decisions, truth = _signs(), _signs(difficult=True)
    pairs = [(d != t).tolist() for d, t in _split(decisions, truth)]
    assert hamming(decisions, truth) == pytest.approx(np.mean([wrong for pair in pairs for wrong in pair]))
    assert math.isnan(hamming(decisions, torch.zeros_like(truth)))


@pytest.mark.parametrize("seed", range(5))
def test_f1_scores_equal_scikit_learn_where_rows_and_columns_are_empty(seed):
    torch.manual_seed(seed)
    decisions, truth = _signs(), _signs()
    decisions[0], truth[0] = -1, -1  # nothing present nor predicted
    truth[1], decisions[:, 2], truth[:, 3] = -1, -1, -1
    decisions[:, 4], truth[:, 4] = -1, -1
    ours = f1_scores(decisions, truth)
    for name, average in (("instance_f1", "samples"), ("micro_f1", "micro"), ("macro_f1", "macro")):
        expected = sklearn.f1_score(truth > 0, decisions > 0, average=average, zero_division=0)
        assert ours[name] == pytest.approx(expected), name


def test_f1_scores_leave_difficult_labels_out():
    decisions, truth = _signs(), _signs(difficult=True)
    truth[:, 0] = truth[0] = -1  # scikit-learn wants a label that counts in every row and column
    by_image = [sklearn.f1_score(t > 0, d > 0, zero_division=0) for d, t in _split(decisions, truth)]
    by_label = [sklearn.f1_score(t > 0, d > 0, zero_division=0) for d, t in _split(decisions.T, truth.T)]
    decided, true = (np.concatenate(part) for part in zip(*_split(decisions, truth), strict=True))
    ours = f1_scores(decisions, truth)
    assert ours["instance_f1"] == pytest.approx(np.mean(by_image))
    assert ours["macro_f1"] == pytest.approx(np.mean(by_label))
    assert ours["micro_f1"] == pytest.approx(sklearn.f1_score(true > 0, decided > 0))


@pytest.mark.parametrize("difficult", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_ranking_metrics_equal_scikit_learn_on_tied_scores(difficult, seed):
    torch.manual_seed(seed)
    scores, truth = _scores(), _signs(difficult)
    truth[0], truth[1] = 1, -1
    rows = _split(scores, truth)
    precisions = [sklearn.average_precision_score(t > 0, s) if (t > 0).any() else math.nan for s, t in rows]
    losses = [sklearn.label_ranking_loss(t[None] > 0, s[None]) if _is_mixed(t) else math.nan for s, t in rows]
    areas = [sklearn.roc_auc_score(t > 0, s) if _is_mixed(t) else math.nan for s, t in rows]
    _close(average_precision(scores, truth), precisions)
    _close(ranking_loss(scores, truth), losses)
    _close(auc(scores, truth), areas)


@pytest.mark.parametrize("score", [-math.inf, 0.0, 1e30])
def test_where_every_score_is_tied_difficult_labels_still_do_not_count(score):
    scores, truth = torch.full((1, 5), score), torch.tensor([[1, -1, 0, -1, 0]])
    _close(average_precision(scores, truth), [1 / 3])
    _close(ranking_loss(scores, truth), [1.0])
    _close(auc(scores, truth), [0.5])


def test_rows_that_have_nothing_to_rank_are_nan_and_the_others_are_not():
    scores = _scores()[:4]
    truth = torch.tensor([[-1] * 7, [1] * 7, [0] * 7, [1, -1, 0, 0, 0, 0, 0]])
    assert average_precision(scores, truth).isnan().tolist() == [True, False, True, False]
    for metric in (ranking_loss, auc):
        assert metric(scores, truth).isnan().tolist() == [True, True, True, False]


@given(
    arrays.arrays(np.int64, (3, 6), elements=st.integers(-3, 3)),
    arrays.arrays(np.int64, (3, 6), elements=st.integers(-2, 2)),
)
def test_kendall_tau_equals_scipy_on_ties_and_is_nan_on_constant_rows(scores, ranks):
    ours = kendall_tau(torch.from_numpy(scores / 7), torch.from_numpy(ranks))
    expected = [stats.kendalltau(s, r).statistic for s, r in zip(scores, ranks, strict=True)]
    _close(ours, expected)


def test_kendall_tau_of_float32_scores_keeps_close_scores_apart():
    scores = torch.tensor([[0.5, 0.5 + 2**-24, 0.5 + 2**-23]]).to(torch.float32)
    ranks = torch.tensor([[0, 1, 2]])
    expected = stats.kendalltau(scores[0].numpy(), ranks[0].numpy()).statistic
    assert kendall_tau(scores, ranks).item() == pytest.approx(expected)


def test_classifier_metrics_are_those_of_table_3_and_each_label():
    logits, truth = torch.randn(30, 3), torch.randint(0, 2, (30, 3)) * 2 - 1
    truth[:, 2] = -1
    boundary = torch.tensor([0.0, 1.0, 0.5])
    result = classifier_metrics(logits, truth, boundary, ("a", "b", "c"))
    decided = (logits >= boundary).numpy()
    present = (truth > 0).numpy()
    precisions = [sklearn.average_precision_score(present[:, j], logits[:, j]) for j in (0, 1)]
    assert result["images"] == 30
    assert result["hamming"] == pytest.approx(sklearn.hamming_loss(present, decided))
    assert result["micro_f1"] == pytest.approx(sklearn.f1_score(present, decided, average="micro"))
    assert result["map"] == pytest.approx(np.mean(precisions))
    mixed = [row for row in range(30) if _is_mixed(truth[row].numpy())]
    assert result["ranking_loss"] == pytest.approx(sklearn.label_ranking_loss(present[mixed], logits[mixed]))
    assert result["per_label"]["b"] == {
        "positives": int(present[:, 1].sum()),
        "average_precision": round(precisions[1], 4),
        "f1": round(sklearn.f1_score(present[:, 1], decided[:, 1]), 4),
    }
    assert result["per_label"]["c"] == {"positives": 0, "average_precision": None, "f1": 0.0}
