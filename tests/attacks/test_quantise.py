from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import ATTACKS, Linear, linear_problem, make_net, mask, ragged_targets
from torch import Tensor

from mlperturb.attacks.best import Outcome
from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.deepfool import ml_dp
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.lattice import PIXELS, lattice_scale, to_lattice
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.quantise import quantise
from mlperturb.targets import Targets, decide

NET = make_net()
MARGIN = 1e-4


def on_lattice(images: Tensor) -> bool:
    scaled = images * 255
    return bool(((scaled - scaled.round()).abs() < 1e-3).all() and (images >= 0).all() and (images <= 1).all())


def linear_case(count: int, labels: int, flip: list[int], keep: list[int], *, gap: float = 0.02, seed: int = 0):
    """Return a linear model whose boundaries lie `gap` from the photos: far less than half a grey level away."""
    model, images, _ = linear_problem(count, labels, size=(16, 16), seed=seed)
    images = to_lattice(images)
    logits = model(images)
    # Each photo's logits are shifted to +-gap by its own boundary; boundaries are shared, so take one photo's.
    signs = torch.where(torch.arange(labels) % 2 == 0, 1.0, -1.0).double()
    boundary = logits[0] - gap * signs * (1 + torch.arange(labels) / labels)
    images = images[:1].expand(count, -1, -1, -1).clone()
    truth = decide(model(images), boundary)
    targets = Targets(mask(count, labels, flip), mask(count, labels, keep), truth, boundary, MARGIN)
    return model, images, targets


def test_to_lattice_rounds_to_the_nearest_multiple_of_1_255():
    assert (to_lattice(torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2, -0.1])) * 255).tolist() == pytest.approx(
        [0, 0, 1, 255, 255, 0]
    )


@pytest.mark.parametrize("gap", [0.2, 0.02])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("flip", "keep"), [([0], []), ([0], [1, 2, 3]), ([0, 1], [2, 3, 4, 5]), ([0, 1, 2, 3, 4, 5], [])]
)
def test_a_goal_that_plain_rounding_loses_is_met_on_the_lattice(flip, keep, seed, gap):
    model, images, targets = linear_case(1, 6, flip, keep, gap=gap / len(flip) ** 0.5, seed=seed)
    problem = Problem(model, images, ClassificationGoal(targets))
    outcome = ml_dp(problem)
    assert bool(outcome.met.all())
    assert float((outcome.images - images).abs().max()) < 0.5 / 255
    assert not bool(outcome.goal.met(model(to_lattice(outcome.images))).any())
    lattice = quantise(problem, outcome)
    assert on_lattice(lattice.images)
    assert bool(lattice.met.all())
    assert bool(targets.holds(model(lattice.images)).all())


def gap_of(model, images, targets) -> float:
    return float((model(images)[0, 0] - targets.boundary[0]).abs()) + MARGIN


def least_steps(model, images, targets) -> float:
    """Return the least sum of squared grey steps that flips label 0 of one photo on the lattice."""
    # Least sum of n^2, n integer, with sum n |w| / 255 > gap: again and again, raise the pixel whose next grey level
    # gains the most for its cost, |w| / (2 n + 1). All n are small, so that the greedy sum is close to the least.
    wanted = gap_of(model, images, targets)
    sizes = np.sort(model.weight[0].abs().numpy())[::-1] / 255
    gains = np.array([(size / (2 * n + 1), size, 2 * n + 1) for n in range(4) for size in sizes])
    gains = gains[np.argsort(-gains[:, 0], kind="stable")]
    steps = int(np.searchsorted(np.cumsum(gains[:, 1]), wanted)) + 1
    return float(gains[:steps, 2].sum())


@pytest.mark.parametrize("gap", [0.01, 0.05, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_for_one_label_the_distortion_comes_near_the_least_on_the_lattice(gap, seed):
    model, images, targets = linear_case(1, 2, [0], [], gap=gap, seed=seed)
    problem = Problem(model, images, ClassificationGoal(targets))
    lattice = quantise(problem, ml_dp(problem))
    assert bool(lattice.met.all())
    got = float((lattice.images - images).mul(255).square().sum())
    least = least_steps(model, images, targets)
    wanted = gap_of(model, images, targets)
    relaxed = 255**2 * wanted**2 / float(model.weight[0].square().sum())  # without the lattice
    assert relaxed <= got
    assert got <= 1.25 * least + 1


@pytest.mark.parametrize("gap", [1e-5, 1e-3, 0.05, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ml_ddn_on_the_lattice_comes_near_the_least_for_one_label(gap, seed):
    model, images, targets = linear_case(1, 2, [0], [], gap=gap, seed=seed)
    outcome = ml_ddn(Problem(model, images, ClassificationGoal(targets)), iterations=48)
    assert outcome.on_lattice
    assert bool(outcome.met.all())
    assert on_lattice(outcome.images)
    assert float((outcome.images - images).mul(255).square().sum()) <= 1.3 * least_steps(model, images, targets) + 1


def test_a_result_on_the_lattice_is_taken_as_it_is_at_no_cost():
    model, images, targets = linear_case(2, 3, [0], [1])
    problem = Problem(model, images, ClassificationGoal(targets))
    outcome = ml_ddn(problem)
    spent = problem.meter.forward.clone()
    lattice = quantise(problem, outcome)
    assert torch.equal(lattice.images, outcome.images)
    assert torch.equal(lattice.met, outcome.met)
    assert torch.equal(problem.meter.forward, spent)


@pytest.mark.parametrize("name", ["ml-ddn", "ml-ddn after", "ml-cw", "ml-dp nnls", "rank-1", "rank-2", "fgs"])
def test_on_a_network_the_goal_stays_met_on_the_lattice(name):
    images, targets = ragged_targets(NET, margin=1e-3)
    images = to_lattice(images)
    problem = Problem(NET, images, ClassificationGoal(targets))
    outcome = ATTACKS[name](problem)
    lattice = quantise(problem, outcome)
    assert on_lattice(lattice.images)
    assert int(outcome.met.sum()) >= 2
    assert bool(lattice.met[outcome.met].all())
    assert lattice.met.tolist() == outcome.goal.met(NET(lattice.images)).tolist()


def test_on_a_network_on_which_plain_rounding_fails_the_goal_is_met_on_the_lattice():
    images, targets = ragged_targets(NET)
    images = to_lattice(images)[:1]
    logits = NET(images)
    gaps = torch.tensor([0.01, -0.01, 0.012, -0.012, 0.015, -0.015], dtype=torch.double)
    boundary = logits[0] - gaps
    targets = Targets(mask(1, 6, [0]), mask(1, 6, [1, 2, 3, 4, 5]), decide(logits, boundary), boundary, MARGIN)
    problem = Problem(NET, images, ClassificationGoal(targets))
    outcome = ml_dp(problem)
    assert bool(outcome.met.all())
    assert not bool(outcome.goal.met(NET(to_lattice(outcome.images))).any())
    lattice = quantise(problem, outcome, iterations=100)
    assert bool(lattice.met.all())
    assert on_lattice(lattice.images)
    assert bool(targets.holds(NET(lattice.images)).all())


def test_a_result_that_falls_short_still_comes_back_with_its_best_score():
    model, images, targets = linear_case(1, 3, [0, 1], [2], gap=0.3)
    impossible = targets.boundary.clone()
    impossible[1] = model(images)[0, 1] + 1e6  # label 1 is absent, and no photo of this size makes it present
    targets = Targets(targets.flip, targets.keep, decide(model(images), impossible), impossible, MARGIN)
    goal = ClassificationGoal(targets)
    problem = Problem(model, images, ClassificationGoal(targets))
    one = Targets(targets.flip & mask(1, 3, [0]), targets.keep, targets.truth, targets.boundary, MARGIN)
    reached = ml_dp(Problem(model, images, ClassificationGoal(one)))
    assert bool(reached.met.all())
    lattice = quantise(problem, Outcome(reached.images, goal.met(model(reached.images)), goal))
    assert on_lattice(lattice.images)
    assert not bool(lattice.met.any())
    score = goal.score(model(lattice.images))
    assert float(score) == 2  # as many as the float result, one more than the photo
    assert float(goal.score(model(images))) == 1


def test_a_result_equal_to_its_photo_stays_so_at_the_cost_of_a_pass():
    model, images, targets = linear_case(3, 3, [0], [1])
    problem = Problem(model, images, ClassificationGoal(targets))
    lattice = quantise(problem, Outcome(images.clone(), torch.zeros(3, dtype=torch.bool), ClassificationGoal(targets)))
    assert torch.equal(lattice.images, images)
    assert not bool(lattice.met.any())
    assert problem.meter.forward.tolist() == [1, 1, 1]
    assert problem.meter.backward.tolist() == [0, 0, 0]


def test_a_coarse_result_is_not_made_worse():
    model, images, targets = linear_case(2, 4, [0], [1, 2], gap=0.3)
    problem = Problem(model, images, ClassificationGoal(targets))
    outcome = ml_dp(problem)
    further = (images + 3 * (outcome.images - images)).clamp(0, 1)  # far beyond the boundary
    goal = outcome.goal
    lattice = quantise(problem, Outcome(further, goal.met(model(further)), goal))
    plain = to_lattice(further)
    assert bool(lattice.met.all())
    size = (lattice.images - images).flatten(1).norm(dim=1)
    assert bool((size <= (plain - images).flatten(1).norm(dim=1)).all())
    assert bool((size < 0.8 * (further - images).flatten(1).norm(dim=1)).all())


def test_in_single_precision_the_saved_grey_levels_are_those_that_were_judged():
    model, images, targets = linear_case(1, 4, [0], [1, 2, 3])
    single = Targets(targets.flip, targets.keep, targets.truth.float(), targets.boundary.float(), 0.01)
    model = Linear(model.weight.float(), model.bias.float())
    problem = Problem(model, images.float(), ClassificationGoal(single))
    lattice = quantise(problem, ml_dp(problem))
    levels = (lattice.images * 255).round().to(torch.uint8)
    assert torch.equal(levels.float() / 255, lattice.images)
    assert bool(lattice.met.all()) == bool(single.holds(model(levels.float() / 255)).all())


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_black_and_white_photos_stay_in_range(size):
    images, targets = ragged_targets(NET)
    images = torch.full_like(images, size)
    targets = Targets(targets.flip, targets.keep, decide(NET(images), targets.boundary), targets.boundary, 1e-3)
    problem = Problem(NET, images, ClassificationGoal(targets))
    lattice = quantise(problem, ml_dp(problem, iterations=5))
    assert on_lattice(lattice.images)
    assert float((lattice.images - images).abs().max()) > 0


def test_no_iterations_leave_the_search_for_a_scale_alone():
    model, images, targets = linear_case(1, 3, [0], [], gap=0.3)
    problem = Problem(model, images, ClassificationGoal(targets))
    outcome = ml_dp(problem)
    before = problem.meter.backward.clone()
    lattice = quantise(problem, outcome, scales=6, iterations=0)
    assert torch.equal(problem.meter.backward, before)
    assert on_lattice(lattice.images)
    assert bool(lattice.met.all())


def test_a_first_step_is_as_long_as_rounding_needs():
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(4, 3, 40, 40, generator=generator) ** 3  # heavy tails, as in gradients of photos
    latent = -gradient * torch.tensor([1e-4, 1e-3, 1e-2, 1.0]).view(-1, 1, 1, 1) / 255
    needed = -(latent * gradient).flatten(1).sum(1)
    scale = lattice_scale(PIXELS, latent, gradient, needed)
    effect = -((scale.view(-1, 1, 1, 1) * latent * 255).round() / 255 * gradient).flatten(1).sum(1)
    assert bool((effect >= needed).all())
    assert bool((scale >= 1).all())
    shorter = (0.9 * scale).clamp(min=1).view(-1, 1, 1, 1)
    less = -((shorter * latent * 255).round() / 255 * gradient).flatten(1).sum(1)
    assert bool((less < needed)[:3].all())  # it is not longer than needed


@pytest.mark.parametrize("gap", [1e-3, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ml_ddn_flips_one_label_in_30_passes_however_little_it_needs(gap, seed):
    model, images, targets = linear_case(1, 2, [0], [], gap=gap, seed=seed)
    problem = Problem(model, images, ClassificationGoal(targets), limit=30)
    outcome = ml_ddn(problem, iterations=500)
    assert bool(outcome.met.all())
    assert int(problem.meter.forward + problem.meter.backward) <= 30
    assert float((outcome.images - images).mul(255).square().sum()) <= 1.5 * least_steps(model, images, targets) + 2
