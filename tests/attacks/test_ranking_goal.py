from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from mlperturb.attacks.goals import RankingGoal
from mlperturb.targets import Targets

BETWEEN = ("rest", "rest-positive", "rest-negative", "none", "threshold")
# A_1, A_-1, B_1, B_-1, C_1, C_-1, each empty or not: 64 images, of 12 labels, two to a set.
COMBINATIONS = list(itertools.product((False, True), repeat=6))


def every_combination(seed: int, *, margin: float = 0.0) -> tuple[torch.Tensor, Targets]:
    """Return logits and targets: an image for each combination of empty sets, labels in random places."""
    rng = np.random.default_rng(seed)
    flip, keep, truth = (np.zeros((64, 12), dtype=kind) for kind in (bool, bool, float))
    for row, filled in enumerate(COMBINATIONS):
        sets = [number for number in range(6) if filled[number]] or [4]
        where = rng.permutation(np.resize(sets, 12))
        flip[row], keep[row] = where < 2, (where == 2) | (where == 3)
        truth[row] = np.where(np.isin(where, (0, 2, 4)), 1.0, -1.0)
    boundary = torch.from_numpy(rng.normal(0, 0.5, 12))
    targets = Targets(torch.from_numpy(flip), torch.from_numpy(keep), torch.from_numpy(truth), boundary, margin)
    logits = torch.from_numpy(rng.normal(0, 2, (64, 12)))
    # Half of the images are in the order of the goal.
    for row in range(64):
        if row % 4 in (1, 2):
            continue
        ranks = truth[row] * np.where(flip[row], -2.0, np.where(keep[row], 1.0, 0.0))
        logits[row] = torch.from_numpy(3 * ranks + rng.normal(0, 0.3, 12))
    return logits, targets


def pairs_of_sets(targets: Targets, row: int, between: str, separate: bool) -> list[tuple[list[int], list[int]]]:
    """Return the pairs of Eq. 9, then of Eq. 10, as printed: (labels to be lower, labels to be higher)."""
    kinds: dict[str, list[int]] = {name: [] for name in ("A1", "A-1", "B1", "B-1", "C1", "C-1")}
    for label in range(targets.truth.shape[1]):
        letter = "A" if targets.flip[row, label] else "B" if targets.keep[row, label] else "C"
        kinds[letter + ("1" if targets.truth[row, label] > 0 else "-1")].append(label)
    low, high = kinds["A1"] + kinds["B-1"], kinds["A-1"] + kinds["B1"]
    middle = {
        "rest": kinds["C1"] + kinds["C-1"],
        "rest-positive": kinds["C1"],
        "rest-negative": kinds["C-1"],
        "none": [],
    }[between]
    pairs = [(low, high), (low, middle), (middle, high)]
    if separate:
        pairs += [(kinds["A1"], kinds["B-1"]), (kinds["B1"], kinds["A-1"])]
    return pairs


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("between", BETWEEN[:4])
def test_violations_equal_a_loop_over_pairs_of_labels(between, separate):
    logits, targets = every_combination(1)
    got = RankingGoal(targets, between, separate).violations(logits)
    exps = torch.sigmoid(logits).exp()
    for row in range(len(logits)):
        pairs = pairs_of_sets(targets, row, between, separate)
        if pairs[1][0] + pairs[1][1] != pairs[1][0]:  # where Omega0 is not empty the direct term is dropped
            pairs[0] = ([], [])
        wanted = [
            max((float(exps[row, i] - exps[row, j]) for i in low for j in high), default=-math.inf)
            for low, high in pairs
        ]
        assert got[row].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("between", BETWEEN[:4])
def test_met_says_that_every_pair_of_labels_is_in_order(between, separate):
    logits, targets = every_combination(2)
    met = RankingGoal(targets, between, separate).met(logits)
    wanted = [
        all(
            logits[row, i] <= logits[row, j]
            for low, high in pairs_of_sets(targets, row, between, separate)
            for i in low
            for j in high
        )
        for row in range(len(logits))
    ]
    assert met.tolist() == wanted
    assert 5 < sum(wanted) < 60


def test_a_fixed_threshold_in_the_middle_asks_for_the_classification_goal():
    logits, targets = every_combination(3)
    goal = RankingGoal(targets, "threshold")
    assert goal.met(logits).tolist() == targets.holds(logits).all(1).tolist()
    exps, edge = torch.sigmoid(logits).exp(), torch.sigmoid(targets.boundary).exp()
    for row in range(len(logits)):
        wanted = [-math.inf, -math.inf]
        for label in range(12):
            if not targets.constrained[row, label]:
                continue
            lower = bool(targets.desired[row, label] < 0)
            distance = float(exps[row, label] - edge[label])
            term = 0 if lower else 1
            wanted[term] = max(wanted[term], distance if lower else -distance)
        assert goal.violations(logits)[row].tolist() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("between", BETWEEN)
def test_zero_loss_and_met_say_the_same_of_unsaturated_logits(between, separate):
    logits, targets = every_combination(4)
    goal = RankingGoal(targets, between, separate)
    assert goal.met(logits).tolist() == (goal.violations(logits).clamp(min=0).sum(1) == 0).tolist()


@pytest.mark.parametrize(
    ("between", "margin"), [("rest", 2.5), ("rest-positive", 2.5), ("rest-negative", 2.5), ("none", 5.5)]
)
def test_a_margin_asks_the_lower_logits_to_stay_that_much_below(between, margin):
    logits, targets = every_combination(5, margin=margin)
    goal = RankingGoal(targets, between)
    wanted = []
    for row in range(len(logits)):
        pairs = pairs_of_sets(targets, row, between, False)
        if pairs[1][1]:
            pairs = pairs[1:]
        wanted.append(all(logits[row, i] + margin <= logits[row, j] for low, high in pairs for i in low for j in high))
    assert goal.met(logits).tolist() == wanted
    bare = RankingGoal(Targets(targets.flip, targets.keep, targets.truth, targets.boundary), between)
    assert sum(wanted) < int(bare.met(logits).sum())


def test_ranks_run_from_flipped_positives_to_flipped_negatives():
    truth = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0]])
    flip = torch.tensor([[True, False, False, False, False, True]])
    keep = torch.tensor([[False, True, False, False, True, False]])
    ranks = RankingGoal(Targets(flip, keep, truth, torch.zeros(6))).targets.ranks
    assert ranks.tolist() == [[-2, -1, 0, 0, 1, 2]]  # A_1, B_-1, C, C, B_1, A_-1


@pytest.mark.parametrize("between", ["rest", "threshold"])
def test_score_is_kendalls_tau_and_two_more_where_met(between):
    logits, targets = every_combination(6)
    goal = RankingGoal(targets, between, separate=True)
    ranks, met, score = goal.targets.ranks, goal.met(logits), goal.score(logits)
    for row in range(len(logits)):
        tau = 0.0
        if len(set(ranks[row].tolist())) > 1:
            tau = kendalltau(logits[row].numpy(), ranks[row].numpy()).statistic
        assert float(score[row]) == pytest.approx(tau + 2 * bool(met[row]), abs=1e-12)
    assert float(score[met].min()) > float(score[~met].max())


def test_the_papers_example_has_zero_rank_1_loss_but_not_rank_2():
    logits = torch.logit(torch.tensor([[0.01, 0.98, 0.99]], dtype=torch.double))
    truth = torch.tensor([[-1.0, 1.0, 1.0]], dtype=torch.double)
    flip = torch.tensor([[False, True, False]])
    targets = Targets(flip, ~flip, truth, torch.zeros(3, dtype=torch.double))
    assert targets.desired.tolist() == [[-1, -1, 1]]
    first, second = RankingGoal(targets), RankingGoal(targets, separate=True)
    assert float(first.violations(logits).clamp(min=0).sum()) == 0
    assert bool(first.met(logits))
    loss = float(second.violations(logits).clamp(min=0).sum())
    assert loss == pytest.approx(math.exp(0.98) - math.exp(0.01))
    assert not bool(second.met(logits))


def test_saturated_probabilities_do_not_fool_met():
    logits = torch.tensor([[60.0, 50.0], [50.0, 60.0], [-160.0, -150.0], [-150.0, -160.0]])
    truth = torch.tensor([[1.0, 1.0]]).expand(4, 2)
    flip = torch.tensor([[True, False]]).expand(4, 2)
    goal = RankingGoal(Targets(flip, ~flip, truth, torch.zeros(2)))
    assert torch.sigmoid(logits[:2]).unique().tolist() == [1.0]
    assert goal.met(logits).tolist() == [False, True, True, False]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_is_never_met(where):
    logits = torch.tensor([[-1.0, 0.0, 1.0]])
    truth = torch.tensor([[1.0, 1.0, 1.0]])
    flip, keep = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
    for between in BETWEEN[:2]:
        goal = RankingGoal(Targets(flip, keep, truth, torch.zeros(3)), between, separate=True)
        assert bool(goal.met(logits))
        broken = logits.clone()
        broken[0, where] = torch.nan
        assert not bool(goal.met(broken))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("between", BETWEEN)
def test_the_gradient_of_the_loss_is_finite_everywhere(between, dtype):
    _, targets = every_combination(8)
    targets = Targets(targets.flip, targets.keep, targets.truth.to(dtype), targets.boundary.to(dtype), 0.01)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 30.0, 1e4):
        logits = (scale * torch.randn(64, 12, generator=generator, dtype=dtype)).requires_grad_()
        losses = RankingGoal(targets, between, separate=True).violations(logits).clamp(min=0).sum(1)
        gradient = torch.autograd.grad(losses.sum(), logits)[0]
        assert bool(losses.isfinite().all())
        assert bool(gradient.isfinite().all())


def test_a_goal_of_some_images_judges_them_as_the_whole_does():
    logits, targets = every_combination(9)
    goal, rows = RankingGoal(targets, "rest-positive", True), torch.tensor([5, 0, 63])
    assert goal.select(rows).met(logits[rows]).tolist() == goal.met(logits)[rows].tolist()
    assert torch.equal(goal.select(rows).violations(logits[rows]), goal.violations(logits)[rows])
    assert torch.equal(goal.select(rows).score(logits[rows]), goal.score(logits)[rows])
