from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.counting import Counting
from support.models import ATTACKS, Views, linear_problem, make_net, mask, ragged_targets
from torch import Tensor

from mlperturb.attacks.best import Best
from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.goals import ClassificationGoal, RankingGoal
from mlperturb.attacks.methods import METHODS, find_method
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.quantise import quantise
from mlperturb.attacks.schedule import Schedule
from mlperturb.attacks.untargeted import nearest_label
from mlperturb.errors import UsageError
from mlperturb.targets import Targets

every_attack = pytest.mark.parametrize("name", list(ATTACKS))
NET = make_net()
OFFSETS = torch.tensor([[0.0] * 6, [0.05, -0.05] * 3, [-0.04, 0.0, 0.06] * 2], dtype=torch.double)
VIEWED = Views(NET, OFFSETS, fade=0.01)
every_model = pytest.mark.parametrize("net", [pytest.param(NET, id="one view"), pytest.param(VIEWED, id="views")])


def row(targets: Targets, number: int) -> Targets:
    return targets.select(torch.tensor([number]))


def test_every_method_of_the_list_is_tested_here():
    assert {name.split()[0] for name in ATTACKS} == set(METHODS)


# --- an image's result does not depend on the other images of its batch


@every_model
@every_attack
def test_a_batch_equals_its_images_one_at_a_time(name, net):
    images, targets = ragged_targets(NET)
    whole = ATTACKS[name](Problem(net, images, ClassificationGoal(targets)))
    assert float((whole.images - images).abs().max()) > 0
    for number in range(len(images)):
        alone = ATTACKS[name](Problem(net, images[number : number + 1], ClassificationGoal(row(targets, number))))
        assert bool(alone.met[0]) == bool(whole.met[number])
        assert float((alone.images[0] - whole.images[number]).abs().max()) < 1e-6


@every_model
@pytest.mark.parametrize("name", ["fgs", "ml-dp nnls", "rank-2"])
def test_quantising_a_batch_equals_its_images_one_at_a_time(name, net):
    images, targets = ragged_targets(NET, margin=0.01)
    images = (images * 255).round() / 255
    problem = Problem(net, images, ClassificationGoal(targets))
    outcome = ATTACKS[name](problem)
    whole = quantise(problem, outcome, scales=4, iterations=6)
    for number in range(len(images)):
        part = Problem(net, images[number : number + 1], ClassificationGoal(row(targets, number)))
        goal = outcome.goal.select(torch.tensor([number]))
        alone = quantise(
            part, type(outcome)(outcome.images[[number]], outcome.met[[number]], goal), scales=4, iterations=6
        )
        assert bool(alone.met[0]) == bool(whole.met[number])
        assert torch.equal(alone.images[0], whole.images[number])


@every_attack
def test_the_order_of_a_batch_does_not_matter(name):
    images, targets = ragged_targets(NET)
    order = torch.tensor([4, 8, 0, 2, 6, 1, 3, 5, 7])
    first = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    second = ATTACKS[name](Problem(NET, images[order], ClassificationGoal(targets.select(order))))
    assert float((first.images[order] - second.images).abs().max()) < 1e-6


@every_attack
def test_the_same_seed_gives_the_same_result_twice(name):
    images, targets = ragged_targets(NET)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(ATTACKS[name](Problem(NET, images, ClassificationGoal(targets))).images)
    assert torch.equal(*results)


# --- results


@every_attack
def test_pixels_stay_in_range_and_the_clean_photos_stay_untouched(name):
    images, targets = ragged_targets(NET)
    images = (1.6 * images - 0.3).clamp(0, 1)  # more than a third is black or white
    copy = images.clone()
    outcome = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    assert torch.equal(images, copy)
    assert float(outcome.images.min()) >= 0
    assert float(outcome.images.max()) <= 1
    assert not outcome.images.requires_grad
    assert float((outcome.images - images).abs().max()) > 0


@every_attack
def test_a_photo_of_black_and_white_pixels_alone_can_be_attacked(name):
    images, targets = ragged_targets(NET)
    images = images.round()
    outcome = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    assert float((outcome.images - images).abs().max()) > 0


@every_attack
def test_met_is_what_the_goal_says_of_the_images_returned(name):
    images, targets = ragged_targets(NET)
    outcome = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    assert outcome.met.tolist() == outcome.goal.met(NET(outcome.images)).tolist()
    assert bool(outcome.met.any())


@every_attack
def test_no_result_scores_less_than_the_clean_photo(name):
    images, targets = ragged_targets(NET)
    outcome = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    assert bool((outcome.goal.score(NET(outcome.images)) >= outcome.goal.score(NET(images))).all())


@every_attack
def test_a_photo_that_meets_the_goal_already_comes_back_unchanged(name):
    images, truth = linear_problem(2, 3)[1:]
    model = linear_problem(2, 3)[0]
    order = model(images).argsort(1)
    images, truth = images[:1], truth[:1]
    lowest, highest = order[0, 0], order[0, -1]
    # The labels are the reverse of the model's decisions, so that the photo meets a flip already.
    flip = torch.zeros(1, 3, dtype=torch.bool)
    flip[0, [lowest, highest]] = True
    logits = model(images)
    middle = (logits[0, lowest] + logits[0, highest]) / 2
    signs = torch.ones_like(truth)
    signs[0, lowest], signs[0, highest] = 1.0, -1.0  # lowest is to be removed, highest to be added
    targets = Targets(flip, mask(1, 3, []), signs, middle.expand(3))
    problem = Problem(model, images, ClassificationGoal(targets))
    outcome = ATTACKS[name](problem)
    assert bool(outcome.met.all())
    assert torch.equal(outcome.images, images)
    few = 2 if not name.startswith("fg") else 2 + 8 + 3  # the one-step attacks try their whole grid
    assert int(problem.meter.forward[0] + problem.meter.backward[0]) <= few


# --- NaN


@every_attack
@pytest.mark.parametrize("kind", ["everywhere", "off the photo", "one image"])
def test_nan_logits_are_never_met_and_do_not_spoil_other_images(name, kind):
    images, targets = ragged_targets(NET)

    class Broken:
        """Give NaN for every image, for every image but the clean photos, or only for the photo at a place."""

        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def __call__(self, tried: Tensor) -> Tensor:
            logits = NET(tried)
            changed = (tried.detach() != images[self.rows]).flatten(1).any(1)
            broken = {"everywhere": changed | True, "off the photo": changed, "one image": self.rows == 2}[kind]
            return torch.where(broken[:, None], torch.nan, logits)

        def select(self, rows: Tensor) -> Broken:
            return Broken(self.rows[rows])

    outcome = ATTACKS[name](Problem(Broken(torch.arange(9)), images, ClassificationGoal(targets)))
    assert bool(outcome.images.isfinite().all())
    assert float(outcome.images.min()) >= 0
    assert float(outcome.images.max()) <= 1
    if kind != "one image":
        clean_met = outcome.goal.met(NET(images))
        assert not bool((outcome.met & ~clean_met).any())
        assert kind == "off the photo" or not bool(outcome.met.any())
    else:
        assert not bool(outcome.met[2])
        others = torch.arange(9) != 2
        usual = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
        assert torch.allclose(outcome.images[others], usual.images[others], atol=1e-6, rtol=0)


# --- the Jacobian


def test_the_jacobian_equals_finite_differences():
    images, targets = ragged_targets(NET)
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(9, 6, generator=generator) < 0.5
    present[0], present[1], present[2, 3:] = True, False, False
    problem = Problem(NET, images, ClassificationGoal(targets))
    inputs = images.clone().requires_grad_()
    got = problem.jacobian(problem.logits(inputs), inputs, present)
    assert got.shape == (9, 6, 3, 10, 10)
    assert not bool(got[~present].any())
    assert problem.meter.backward.tolist() == present.sum(1).tolist()
    step = 1e-6
    for _ in range(12):
        direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        slope = (NET(images + step * direction) - NET(images - step * direction)) / (2 * step)
        along = (got * direction[:, None]).flatten(2).sum(2)
        assert torch.allclose(along[present], slope[present], atol=1e-7, rtol=1e-6)


def test_the_jacobian_of_one_pixel_is_its_finite_difference():
    images, targets = ragged_targets(NET)
    problem = Problem(NET, images, ClassificationGoal(targets))
    inputs = images.clone().requires_grad_()
    got = problem.jacobian(problem.logits(inputs), inputs, torch.ones(9, 6, dtype=torch.bool))
    for place in ((0, 0, 0), (1, 4, 5), (2, 9, 7)):
        unit = torch.zeros_like(images)
        unit[(slice(None), *place)] = 1e-6
        slope = (NET(images + unit) - NET(images - unit)) / 2e-6
        assert torch.allclose(got[(slice(None), slice(None), *place)], slope, atol=1e-7, rtol=1e-6)


# --- passes


def check_meter(problem: Problem, counted: Counting) -> None:
    meter, tally = problem.meter, counted.tally
    assert meter.forward.tolist() == tally.forward.tolist()
    # An image with a zero gradient, or with fewer constraints than its neighbours, stays in the batch's pass.
    assert bool((tally.used <= meter.backward).all())
    assert bool((meter.backward <= tally.backward).all())


@every_model
@every_attack
def test_the_meter_counts_what_the_model_counts(name, net):
    images, targets = ragged_targets(NET)
    model = Counting(net, 9)
    problem = Problem(model, images, ClassificationGoal(targets))
    outcome = ATTACKS[name](problem)
    check_meter(problem, model)
    assert int(problem.meter.forward.min()) >= 1
    quantise(problem, outcome, scales=3, iterations=3)
    check_meter(problem, model)


def test_the_meter_counts_each_constraint_of_a_jacobian():
    images, targets = ragged_targets(NET)
    model = Counting(NET, 9)
    problem = Problem(model, images, ClassificationGoal(targets))
    find_method("ml-dp").load()(problem, iterations=1, stop_when_met=False)
    constrained = targets.constrained.sum(1)
    attacked = ~ClassificationGoal(targets).met(NET(images))
    assert model.tally.used.tolist() == torch.where(attacked, constrained, 0).tolist()
    assert problem.meter.backward.tolist() == model.tally.used.tolist()


@every_model
@pytest.mark.parametrize("limit", [2, 3, 5, 9, 14, 33])
@every_attack
def test_no_image_spends_more_passes_than_its_limit(name, limit, net):
    images, targets = ragged_targets(NET)
    model = Counting(net, 9)
    problem = Problem(model, images, ClassificationGoal(targets), limit=limit)
    outcome = ATTACKS[name](problem)
    check_meter(problem, model)
    assert int((problem.meter.forward + problem.meter.backward).max()) <= limit
    quantise(replace(problem, limit=limit + 7), outcome, scales=3, iterations=40)
    check_meter(problem, model)
    spent = problem.meter.forward + problem.meter.backward
    assert int(spent.max()) <= limit + 7


@every_attack
@pytest.mark.parametrize("cap", [0.1, 0.3])
def test_no_iterate_or_lattice_point_lies_beyond_the_cap(name, cap):
    images, targets = ragged_targets(NET)
    caps = torch.full((len(images),), cap, dtype=images.dtype)
    caps[::2] *= 2  # each image has its own cap
    problem = Problem(NET, images, ClassificationGoal(targets), cap=caps)
    outcome = ATTACKS[name](problem)
    moved = (outcome.images - images).flatten(1).norm(dim=1)
    assert bool((moved <= caps).all())
    assert name == "ml-dp pinv" or float(moved.max()) > 0
    lattice = quantise(problem, outcome, scales=6, iterations=20)
    assert bool(((lattice.images - images).flatten(1).norm(dim=1) <= caps).all())


@pytest.mark.parametrize("name", ["ml-cw", "ml-dp nnls", "fg"])
def test_a_generous_cap_changes_nothing(name):
    images, targets = ragged_targets(NET)
    free = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    capped = ATTACKS[name](
        Problem(NET, images, ClassificationGoal(targets), cap=torch.full((9,), 1e3, dtype=images.dtype))
    )
    torch.testing.assert_close(capped.images, free.images, atol=1e-6, rtol=0)
    assert torch.equal(capped.met, free.met)


@every_attack
@pytest.mark.parametrize("levels", [1, 4])
def test_no_pixel_of_a_float_result_or_a_lattice_point_moves_beyond_the_bound(name, levels):
    images, targets = ragged_targets(NET)
    images = (images * 255).round() / 255
    problem = Problem(NET, images, ClassificationGoal(targets), bound=levels / 255)
    outcome = ATTACKS[name](problem)
    assert float((outcome.images - images).abs().max()) <= levels / 255 * (1 + 1e-9)
    lattice = quantise(problem, outcome, scales=6, iterations=20)
    moved = ((lattice.images - images) * 255).round().abs()
    assert float(moved.max()) == levels or (name.startswith("ml-dp") and float(moved.max()) < levels)


@pytest.mark.parametrize("name", ["ml-cw", "ml-dp nnls", "fg", "ml-ddn"])
def test_a_generous_bound_changes_nothing(name):
    images, targets = ragged_targets(NET)
    free = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    bounded = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets), bound=1.0))
    torch.testing.assert_close(bounded.images, free.images, atol=1e-9, rtol=0)
    assert torch.equal(bounded.met, free.met)


def test_a_problem_runs_short_once_any_of_its_images_has_spent_the_limit():
    images, targets = ragged_targets(NET)
    problem = Problem(NET, images, ClassificationGoal(targets), limit=5)
    assert not problem.runs_short(5)
    assert problem.runs_short(6)
    problem.meter.forward[3] = 2
    assert problem.runs_short(4)
    assert problem.affordable(4).tolist() == [row != 3 for row in range(len(images))]
    others = (torch.arange(len(images)) != 3).nonzero().flatten()
    assert not problem.select(others).runs_short(5)
    assert not Problem(NET, images, ClassificationGoal(targets)).runs_short(10**9)


@pytest.mark.parametrize("name", ["ml-cw", "rank-1", "ml-dp nnls"])
def test_a_generous_limit_changes_nothing(name):
    images, targets = ragged_targets(NET)
    free = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets)))
    capped = ATTACKS[name](Problem(NET, images, ClassificationGoal(targets), limit=10_000))
    assert torch.equal(free.images, capped.images)


@pytest.mark.parametrize("name", ["ml-cw", "ml-dp nnls", "rank-1"])
def test_images_that_are_finished_leave_the_batch(name):
    images, targets = ragged_targets(NET)
    done = Targets(targets.flip & False, targets.keep & False, targets.truth, targets.boundary)
    few = torch.tensor([0, 4])
    flip, keep = done.flip.clone(), done.keep.clone()
    flip[few], keep[few] = targets.flip[few], targets.keep[few]
    model = Counting(NET, 9)
    ATTACKS[name](Problem(model, images, ClassificationGoal(Targets(flip, keep, targets.truth, targets.boundary))))
    assert model.tally.batches[0] == 9
    assert len(model.tally.batches) > 1
    assert max(model.tally.batches[1:]) <= 2


def test_ml_dp_narrows_the_batch_as_images_finish():
    images, targets = ragged_targets(NET)
    model = Counting(NET, 9)
    find_method("ml-dp").load()(Problem(model, images, ClassificationGoal(targets)))
    assert model.tally.batches == sorted(model.tally.batches, reverse=True)
    assert model.tally.batches[-1] < 9


def test_an_image_whose_descent_stalls_leaves_the_batch():
    images, targets = ragged_targets(NET)
    model = Counting(NET, 9)
    stalling = Schedule(1.0, 1, 200, 1e-2, patience=0.05)
    find_method("ml-cw").load()(Problem(model, images, ClassificationGoal(targets)), schedule=stalling)
    assert min(model.tally.batches) < 9
    assert model.tally.forward.unique().numel() > 1
    assert int(model.tally.forward.max()) <= 201


# --- the best iterate


def test_best_keeps_the_highest_score_then_the_least_norm():
    images, targets = ragged_targets(NET)
    problem = Problem(NET, images, ClassificationGoal(targets))
    best = Best(problem)

    class Scores:
        """A goal whose score and success are the first two logits."""

        def __init__(self, targets):
            self.targets = targets

        def met(self, logits):
            return logits[:, 1] > 0

        def score(self, logits):
            return logits[:, 0]

    rng = np.random.default_rng(0)
    tried = []
    for _ in range(40):
        scores, met = torch.tensor(rng.integers(0, 3, 9)).double(), torch.tensor(rng.integers(0, 2, 9)).double()
        moved = (images + 0.01 * torch.randn(images.shape, dtype=images.dtype) * rng.random()).clamp(0, 1)
        now = best.update(problem.aim(Scores(targets)), moved, torch.stack([scores, met], 1))
        assert now.tolist() == (met > 0).tolist()
        tried.append((scores, met, moved, (moved - images).flatten(1).norm(dim=1)))
    for number in range(9):
        wanted = max(tried, key=lambda entry: (float(entry[0][number]), -float(entry[3][number])))
        assert torch.equal(best.images[number], wanted[2][number])
        assert float(best.score[number]) == float(wanted[0][number])
        assert float(best.norm[number]) == pytest.approx(float(wanted[3][number]))
        assert bool(best.met[number]) == bool(wanted[1][number])


def test_best_of_part_of_a_batch_leaves_the_other_images_alone():
    images, targets = ragged_targets(NET)
    problem = Problem(NET, images, ClassificationGoal(targets))
    best = Best(problem)
    keep = torch.tensor([False, True, False, False, True, False, False, False, False])
    part = problem.select(keep.nonzero().flatten())
    moved = part.images * 0.9
    best.update(part, moved, NET(moved))
    assert torch.equal(best.images[keep], moved)
    assert torch.equal(best.images[~keep], images[~keep])
    assert best.norm.isinf().tolist() == (~keep).tolist()
    nested = part.select(torch.tensor([1]))
    assert nested.rows.tolist() == [4]
    assert torch.equal(nested.images[0], images[4])


def test_nan_scores_never_displace_a_finite_one():
    images, targets = ragged_targets(NET)
    problem = Problem(NET, images, ClassificationGoal(targets))
    best = Best(problem)
    best.update(problem, images, NET(images))
    moved = images * 0.9
    met = best.update(problem, moved, torch.full((9, 6), torch.nan, dtype=torch.double))
    assert not bool(met.any())
    assert torch.equal(best.images, images)


# --- the rest


def test_the_nearest_label_is_the_one_whose_boundary_is_nearest():
    model, images, truth = linear_problem(8, 6, seed=3)
    boundary = torch.linspace(-0.3, 0.3, 6, dtype=torch.double)
    targets = Targets(mask(8, 6, []), mask(8, 6, []), truth, boundary)
    distance = (model(images) - boundary).abs() / model.weight.norm(dim=1)
    for candidates in ([0, 1, 2, 3, 4, 5], [1, 4, 5], [2]):
        problem = Problem(model, images, ClassificationGoal(targets))
        nearest = nearest_label(problem, mask(8, 6, candidates))
        assert nearest.sum(1).tolist() == [1] * 8
        wanted = [min(candidates, key=lambda label, row=row: float(row[label])) for row in distance]
        assert nearest.int().argmax(1).tolist() == wanted
        assert problem.meter.backward.tolist() == [len(candidates)] * 8
    few = mask(8, 6, [0, 1])
    few[3] = False
    assert nearest_label(Problem(model, images, ClassificationGoal(targets)), few)[3].any().item() is False


def test_a_classification_goal_scores_the_constraints_that_hold():
    images, targets = ragged_targets(NET)
    logits = NET(images)
    goal = ClassificationGoal(targets)
    for number in range(9):
        held = [
            not targets.constrained[number, j] or bool((logits[number, j] >= 0) == (targets.desired[number, j] > 0))
            for j in range(6)
        ]
        assert int(goal.score(logits)[number]) == sum(held)
        assert bool(goal.met(logits)[number]) == all(held)


def test_the_best_of_part_of_a_batch_can_be_searched_alone():
    images, targets = ragged_targets(NET)
    problem = Problem(NET, images, ClassificationGoal(targets))
    rows = torch.tensor([4, 7])
    outcome = ml_ddn(problem.select(rows), iterations=12)
    whole = ml_ddn(Problem(NET, images[rows], ClassificationGoal(targets.select(rows))), iterations=12)
    assert torch.equal(outcome.images, whole.images)
    spent = problem.meter.spent.tolist()
    assert all((count > 0) == (row in (4, 7)) for row, count in enumerate(spent))


@pytest.mark.parametrize("shape", [(3, 10, 10), (8, 3, 10, 10)])
def test_images_that_do_not_fit_the_targets_are_refused(shape):
    _, targets = ragged_targets(NET)
    with pytest.raises(UsageError, match=r"expected images \(N, 3, H, W\) with 9 targets, got"):
        Problem(NET, torch.zeros(shape), ClassificationGoal(targets))


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("budget", ["fast", "balanced", "paper"])
def test_every_budget_is_a_tuning_that_the_method_takes(name, budget):
    images, targets = ragged_targets(NET)
    tuning = find_method(name).tuning(budget)
    done = Targets(targets.flip & False, targets.keep & False, targets.truth, targets.boundary)
    outcome = find_method(name).load()(Problem(NET, images, ClassificationGoal(done)), **tuning)
    assert isinstance(outcome.goal, RankingGoal if name.startswith("rank") else ClassificationGoal)
    assert bool(outcome.met.all())
    assert torch.equal(outcome.images, images)


def test_an_unknown_method_budget_or_option_is_refused():
    with pytest.raises(UsageError, match="unknown method 'cw': expected ml-ddn"):
        find_method("cw")
    with pytest.raises(UsageError, match="unknown budget 'long': expected fast, balanced, paper"):
        find_method("ml-cw").tuning("long")
    with pytest.raises(UsageError, match="`solver` is an option of ml-dp, not of this method"):
        find_method("ml-cw").tuning("fast", solver="nnls")
    with pytest.raises(UsageError, match="unknown `between` 'above': expected rest"):
        find_method("rank-1").tuning("fast", between="above")
    assert find_method("ml-dp").tuning("fast", solver=None, space="probability")["space"] == "probability"
