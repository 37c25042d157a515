"""On a linear classifier every attack has an answer in closed form: the nearest point of a polyhedron."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from support.models import Linear, linear_problem, mask
from torch import Tensor

from mlperturb.attacks.carlini_wagner import ml_cw
from mlperturb.attacks.ddn import count_first, ml_ddn
from mlperturb.attacks.deepfool import ml_dp, solve_dual, solve_step
from mlperturb.attacks.fast_gradient import MAX_EPSILON, fg, fgs
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.ranking import rank_1, rank_2
from mlperturb.attacks.schedule import Schedule
from mlperturb.targets import Targets, decide

LONG = Schedule(1.0, 10, 200, 5e-3, final_rate=0.005, patience=0.0, precision=0.01)
TINY = 1e-7  # without overshoot the step may end on the boundary itself, where no label is flipped
COUNTS = pytest.mark.parametrize("count", [1, 3, 8])


def make(count: int, labels: int, flip: list[int], keep: list[int], *, seed: int = 0, size=(4, 4), scale: float = 1.0):
    """Return a linear model, its problem and its targets."""
    model, images, truth = linear_problem(count, labels, size=size, seed=seed, scale=scale)
    zeros = torch.zeros(labels, dtype=images.dtype)
    targets = Targets(mask(count, labels, flip), mask(count, labels, keep), truth, zeros)
    return model, Problem(model, images, ClassificationGoal(targets)), targets


def moved(problem: Problem, images: Tensor) -> np.ndarray:
    """Return the L2 norm of each perturbation."""
    assert 0.01 < float(images.min()) <= float(images.max()) < 0.99, "a clipped pixel spoils the closed form"
    return (images - problem.images).flatten(1).norm(dim=1).numpy()


def nearest(rows: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the shortest r with rows @ r <= q, by SLSQP on the primal, in the span of the rows."""
    basis = np.linalg.qr(rows.T)[0]  # the answer lies in the span
    reduced = rows @ basis
    found = minimize(
        lambda u: u @ u / 2,
        np.linalg.lstsq(reduced, q, rcond=None)[0],
        jac=lambda u: u,
        constraints={"type": "ineq", "fun": lambda u: q - reduced @ u, "jac": lambda _: -reduced},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return basis @ found.x


def nearest_ldp(rows: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the shortest r with rows @ r <= q, by Lawson and Hanson's Least Distance Programming."""
    stacked = np.vstack([-rows.T, -q[None]])
    target = np.zeros(len(stacked))
    target[-1] = 1
    residual = stacked @ nnls(stacked, target)[0] - target
    return -residual[:-1] / residual[-1]


def nearest_within(rows: np.ndarray, q: np.ndarray, bound: float) -> np.ndarray:
    """Return the shortest r with rows @ r <= q and no entry beyond the bound, by SLSQP."""
    found = minimize(
        lambda r: r @ r / 2,
        np.clip(nearest(rows, q), -bound, bound),
        jac=lambda r: r,
        bounds=[(-bound, bound)] * rows.shape[1],
        constraints={"type": "ineq", "fun": lambda r: q - rows @ r, "jac": lambda _: -rows},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert found.success, found.message
    return found.x


def constraints(model: Linear, problem: Problem, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return P^T and q of one image, P^T r <= q, from the definition."""
    targets, logits = problem.targets, model(problem.images)
    chosen = targets.constrained[row]
    signs = targets.desired[row, chosen]
    return (-signs[:, None] * model.weight[chosen]).numpy(), (signs * logits[row, chosen]).numpy()


# --- FGS and FG


@COUNTS
@pytest.mark.parametrize(("grid", "refinements"), [(20, 5), (50, 0), (10, 8)])
@pytest.mark.parametrize("attack", [fgs, fg])
def test_one_step_finds_the_least_epsilon_of_one_label(attack, count, grid, refinements):
    model, problem, targets = make(count, 3, [1], [], scale=2.0)
    margin = model(problem.images)[:, 1].abs()
    w = model.weight[1]
    # fgs: epsilon * ||w||_1 = margin; fg: a step of RMS epsilon gains epsilon * sqrt(d) * ||w||_2.
    slope = w.abs().sum() if attack is fgs else len(w) ** 0.5 * w.norm()
    least = (255 * margin / slope).numpy()
    assert least.max() < MAX_EPSILON
    outcome = attack(problem, grid=grid, refinements=refinements)
    assert bool(outcome.met.all())
    epsilon = 255 * moved(problem, outcome.images) / len(w) ** 0.5  # every pixel moves by epsilon, in RMS
    resolution = MAX_EPSILON / grid / 2**refinements
    assert np.all(epsilon >= least - 1e-9)
    assert np.all(epsilon <= least + resolution + 1e-9)
    if attack is fgs:
        steps = (outcome.images - problem.images).flatten(1) * targets.desired[:, 1:2] * w.sign()
        assert torch.allclose(steps, steps[:, :1].expand_as(steps))


@pytest.mark.parametrize("attack", [fgs, fg])
def test_one_step_keeps_the_epsilon_with_the_most_constraints_then_the_least(attack):
    model, problem, targets = make(8, 6, [0, 1, 2], [3, 4, 5], seed=3, scale=2.0)
    outcome = attack(problem, grid=40, refinements=0)
    logits = model(problem.images)
    slope = (torch.sigmoid(logits) - (targets.desired > 0).double()) @ model.weight  # of the cross-entropy
    step = -slope.sign() if attack is fgs else -slope * slope.shape[1] ** 0.5 / slope.norm(dim=1, keepdim=True)
    for row in range(8):
        best = (int(targets.holds(logits)[row].sum()), 0.0)
        for number in range(1, 41):
            epsilon = number * MAX_EPSILON / 40
            tried = model((problem.images[row].flatten() + epsilon / 255 * step[row])[None])
            held = int(targets.select(torch.tensor([row])).holds(tried).sum())
            best = max(best, (held, -epsilon))
        got = targets.holds(model(outcome.images))[row].sum()
        assert int(got) == best[0]
        assert 255 * moved(problem, outcome.images)[row] / len(slope[0]) ** 0.5 == pytest.approx(-best[1], abs=1e-6)


@pytest.mark.parametrize("attack", [fgs, fg])
def test_one_step_stays_at_the_clean_photo_where_no_epsilon_helps(attack):
    model, problem, targets = make(3, 3, [1], [])
    far = Linear(model.weight, torch.full((3,), 1e3, dtype=torch.double))
    present = Targets(targets.flip, targets.keep, torch.ones_like(targets.truth), targets.boundary)
    outcome = attack(Problem(far, problem.images, ClassificationGoal(present)))
    assert torch.equal(outcome.images, problem.images)
    assert not bool(outcome.met.any())


# --- ML-DP


@COUNTS
def test_ml_dp_crosses_one_boundary_at_its_distance(count):
    model, problem, _ = make(count, 3, [2], [])
    outcome = ml_dp(problem, solver="nnls", overshoot=TINY)
    wanted = (model(problem.images)[:, 2].abs() / model.weight[2].norm()).numpy()
    assert moved(problem, outcome.images) == pytest.approx(wanted, rel=1e-6)


@COUNTS
@pytest.mark.parametrize("size", [(4, 4), (6, 6)])
@pytest.mark.parametrize(("flip", "keep"), [([0], [1, 2, 3]), ([0, 1], [2, 3, 4]), ([0, 1, 2, 3, 4], []), ([3], [4])])
def test_ml_dp_reaches_the_nearest_point_of_the_polyhedron(count, size, flip, keep):
    model, problem, _ = make(count, 5, flip, keep, seed=4, size=size)
    outcome = ml_dp(problem, solver="nnls", overshoot=TINY)
    distances = moved(problem, outcome.images)
    for row in range(count):
        rows, q = constraints(model, problem, row)
        step = (outcome.images[row] - problem.images[row]).flatten().numpy()
        assert np.all(rows @ step <= q + 1e-9)
        assert step == pytest.approx(nearest(rows, q), abs=1e-5)
        assert distances[row] == pytest.approx(np.linalg.norm(nearest_ldp(rows, q)), rel=1e-6)


def test_ml_dp_meets_the_goal_with_a_margin_at_the_margins_distance():
    model, problem, targets = make(8, 4, [1], [2], seed=2)
    wider = Targets(targets.flip, targets.keep, targets.truth, targets.boundary, margin=0.05)
    outcome = ml_dp(Problem(model, problem.images, ClassificationGoal(wider)), overshoot=TINY)
    logits = model(outcome.images)
    assert bool(targets.holds(logits).all())
    gap = (logits[:, 1] * wider.desired[:, 1]).numpy()
    assert gap == pytest.approx(0.05, abs=1e-6)


def test_ml_dp_overshoots_the_violated_constraints_by_the_share_asked_for():
    model, problem, targets = make(8, 3, [2], [])
    wanted = (model(problem.images)[:, 2].abs() / model.weight[2].norm()).numpy()
    outcome = ml_dp(problem, overshoot=0.1)
    assert bool(outcome.met.all())
    assert moved(problem, outcome.images) == pytest.approx(1.1 * wanted, rel=1e-6)
    assert bool(ml_dp(Problem(model, problem.images, ClassificationGoal(targets))).met.all()), (
        "with the default overshoot"
    )


@COUNTS
def test_the_papers_solver_takes_the_step_of_the_pseudo_inverse(count):
    model, problem, _ = make(count, 5, [0, 1], [2, 3], seed=5)
    seen = []

    def recording(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    ml_dp(
        Problem(recording, problem.images, ClassificationGoal(problem.targets)),
        solver="pinv",
        overshoot=0.0,
        iterations=1,
    )
    assert torch.equal(seen[0], problem.images)
    for row in range(count):
        rows, q = constraints(model, problem, row)
        wanted = np.linalg.pinv(rows) @ q
        assert (seen[1] - problem.images)[row].flatten().numpy() == pytest.approx(wanted, abs=1e-9)


def test_the_exact_solver_never_moves_further_than_the_papers():
    model, problem, _ = make(8, 6, [0, 1], [2, 3, 4, 5], seed=6)
    for row in range(8):
        rows, q = constraints(model, problem, row)
        exact = np.linalg.norm(nearest(rows, q))
        assert moved(problem, ml_dp(problem, overshoot=TINY).images)[row] == pytest.approx(exact, rel=1e-5)
        assert exact < np.linalg.norm(np.linalg.pinv(rows) @ q)


def test_ml_dp_in_probability_space_follows_the_slope_of_the_sigmoid():
    model, problem, _ = make(3, 3, [2], [], scale=0.5)
    outcome = ml_dp(problem, space="probability", overshoot=0.0)
    assert bool(outcome.met.all())
    # (f - 1/2) / f' = sinh(z): the sigmoid is flatter at z than on the way to its centre, so one step is enough.
    wanted = model(problem.images)[:, 2].abs().sinh() / model.weight[2].norm()
    assert moved(problem, outcome.images) == pytest.approx(wanted.numpy(), rel=1e-9)


# --- the solvers alone


@pytest.mark.parametrize("solver", ["pinv", "nnls"])
def test_solve_step_solves_ragged_systems_each_on_its_own(solver):
    rng = np.random.default_rng(0)
    present = torch.tensor(rng.random((12, 6)) < 0.5)
    present[0], present[1] = True, False
    matrix = torch.from_numpy(rng.normal(size=(12, 6, 40))) * present[:, :, None]
    q = torch.from_numpy(rng.normal(size=(12, 6))) * present
    steps = solve_step(matrix, q, present, solver)
    assert steps.shape == (12, 40)
    assert not bool(steps[1].any())
    for row in range(12):
        chosen = present[row].numpy()
        rows, right = matrix[row].numpy()[chosen], q[row].numpy()[chosen]
        if not len(rows):
            continue
        if solver == "pinv":
            wanted = np.linalg.pinv(rows) @ right
        else:
            wanted = nearest(rows, right) if right.min() < 0 else np.zeros(40)
        assert steps[row].numpy() == pytest.approx(wanted, abs=1e-6)


def test_solve_step_takes_no_step_where_every_constraint_holds():
    matrix = torch.randn(3, 4, 20, dtype=torch.double)
    q = torch.rand(3, 4, dtype=torch.double)
    step = solve_step(matrix, q, torch.ones(3, 4, dtype=torch.bool), "nnls")
    assert float(step.abs().max()) < 1e-12


@pytest.mark.parametrize("solver", ["pinv", "nnls"])
def test_solve_step_bears_constraints_that_depend_on_each_other(solver):
    rng = np.random.default_rng(1)
    base = rng.normal(size=(2, 30))
    rows = np.vstack([base, base[0], 2 * base[1], base[0] + base[1], np.zeros(30)])
    q = rows @ rng.normal(size=30)  # consistent
    present = torch.ones(1, 6, dtype=torch.bool)
    step = solve_step(torch.from_numpy(rows)[None], torch.from_numpy(q)[None], present, solver)[0].numpy()
    if solver == "pinv":
        assert step == pytest.approx(np.linalg.pinv(rows) @ q, abs=1e-6)
    else:
        assert np.all(rows @ step <= q + 1e-5)
        assert np.linalg.norm(step) == pytest.approx(np.linalg.norm(nearest(base, q[:2])), rel=1e-4)


@pytest.mark.parametrize("solver", ["pinv", "nnls"])
def test_solve_step_stays_finite_where_constraints_contradict_each_other(solver):
    row = torch.randn(20, dtype=torch.double)
    matrix, q = torch.stack([row, -row])[None], torch.tensor([[-1.0, -1.0]], dtype=torch.double)
    assert bool(solve_step(matrix, q, torch.ones(1, 2, dtype=torch.bool), solver).isfinite().all())


def test_solve_dual_is_optimal_by_the_kkt_conditions():
    rng = np.random.default_rng(2)
    for _ in range(30):
        present = rng.random(8) < 0.7
        rows, q = rng.normal(size=(8, 25)) * present[:, None], rng.normal(size=8) * present
        gram = rows @ rows.T
        mu = solve_dual(gram, q, present)
        slack = q + gram @ mu  # q - P^T dr, dr = -P mu
        assert np.all(mu >= 0)
        assert np.all(mu[~present] == 0)
        assert np.all(slack[present] >= -1e-6)
        assert np.abs(mu * slack).max() < 1e-6


def test_solve_dual_of_no_constraint_and_of_a_broken_gram_matrix_is_zero():
    assert solve_dual(np.eye(3), np.full(3, -1.0), np.zeros(3, dtype=bool)).tolist() == [0, 0, 0]
    assert solve_dual(np.full((2, 2), np.nan), np.full(2, -1.0), np.ones(2, dtype=bool)).tolist() == [0, 0]
    assert solve_dual(np.zeros((0, 0)), np.zeros(0), np.zeros(0, dtype=bool)).shape == (0,)


def test_solve_step_of_a_constraint_without_gradient_is_finite():
    matrix, q = torch.zeros(1, 2, 10, dtype=torch.double), torch.tensor([[-1.0, 1.0]], dtype=torch.double)
    for solver in ("pinv", "nnls"):
        assert not bool(solve_step(matrix, q, torch.ones(1, 2, dtype=torch.bool), solver).any())


# --- ML-CW


@COUNTS
@pytest.mark.parametrize(("flip", "keep"), [([0], []), ([0, 1], [2, 3, 4])])
def test_ml_cw_comes_close_to_the_nearest_point_of_the_polyhedron(count, flip, keep):
    model, problem, targets = make(count, 5, flip, keep, seed=4)
    outcome = ml_cw(problem, schedule=LONG)
    assert bool(outcome.met.all())
    assert bool(targets.holds(model(outcome.images)).all())
    for row, distance in enumerate(moved(problem, outcome.images)):
        exact = np.linalg.norm(nearest(*constraints(model, problem, row)))
        assert exact * (1 - 1e-6) <= distance <= exact * 1.03


def test_ml_cw_with_a_hinge_on_probabilities_finds_the_same_point():
    model, problem, _ = make(3, 4, [0], [1, 2], seed=7)
    outcome = ml_cw(problem, space="probability", schedule=LONG)
    for row, distance in enumerate(moved(problem, outcome.images)):
        exact = np.linalg.norm(nearest(*constraints(model, problem, row)))
        assert exact * (1 - 1e-6) <= distance <= exact * 1.05


# --- ML-DDN


@COUNTS
@pytest.mark.parametrize(("flip", "keep"), [([0], []), ([0], [1, 2]), ([0, 3], [1, 2, 4])])
def test_ml_ddn_comes_close_to_the_nearest_point_of_the_polyhedron(count, flip, keep):
    model, problem, targets = make(count, 5, flip, keep, seed=4)
    outcome = ml_ddn(problem, rounding="after", iterations=200)
    assert bool(outcome.met.all())
    assert not outcome.on_lattice
    assert bool(targets.holds(model(outcome.images)).all())
    for row, distance in enumerate(moved(problem, outcome.images)):
        exact = np.linalg.norm(nearest(*constraints(model, problem, row)))
        assert exact * (1 - 1e-6) <= distance <= exact * 1.03


def test_ml_ddn_meets_a_linear_goal_in_a_few_passes():
    model, problem, _ = make(8, 5, [0, 3], [1, 2, 4], seed=4)
    outcome = ml_ddn(problem, rounding="after", iterations=10)
    assert bool(outcome.met.all())
    assert int((problem.meter.forward + problem.meter.backward).max()) == 21
    for row, distance in enumerate(moved(problem, outcome.images)):
        assert distance <= 1.5 * np.linalg.norm(nearest(*constraints(model, problem, row)))


def test_ml_ddn_holds_all_that_can_hold_where_one_label_is_out_of_reach():
    model, problem, targets = make(4, 5, [0, 1, 2, 3, 4], [], seed=4)
    logits = model(problem.images)
    boundary = targets.boundary.clone()
    boundary[2] = 1e6  # absent, and out of reach
    targets = Targets(targets.flip, targets.keep, decide(logits, boundary), boundary)
    outcome = ml_ddn(Problem(model, problem.images, ClassificationGoal(targets)), rounding="after", iterations=60)
    assert not bool(outcome.met.any())
    assert targets.holds(model(outcome.images)).sum(1).tolist() == [4] * 4


@pytest.mark.parametrize("name", ["ml-ddn", "ml-cw"])
def test_under_a_bound_on_each_pixel_the_distance_is_that_of_the_quadratic_programme(name):
    model, problem, targets = make(3, 5, [0, 3], [1, 2, 4], seed=4)
    free = ml_ddn(problem, rounding="after", iterations=150)
    bound = 0.6 * float((free.images - problem.images).abs().max())
    bounded = Problem(model, problem.images, ClassificationGoal(targets), bound=bound)
    if name == "ml-ddn":
        outcome = ml_ddn(bounded, rounding="after", iterations=300)
    else:
        outcome = ml_cw(bounded, schedule=Schedule(searches=8, iterations=200))
    assert bool(outcome.met.all())
    assert float((outcome.images - problem.images).abs().max()) <= bound * (1 + 1e-9)
    for row, distance in enumerate(moved(problem, outcome.images)):
        rows, q = constraints(model, problem, row)
        exact = np.linalg.norm(nearest_within(rows, q, bound))
        assert exact > 1.001 * np.linalg.norm(nearest(rows, q)), "the bound binds"
        assert exact * (1 - 1e-6) <= distance <= exact * 1.05


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ml_ddn_holds_all_but_one_of_labels_that_exclude_each_other(seed):
    # Eight directions whose sum is 0: z_i > 0 is impossible for all eight, and possible for any seven.
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(48, 8, generator=generator, dtype=torch.double))[0].T
    weight = weight - weight.mean(0)
    images = torch.full((3, 3, 4, 4), 0.5, dtype=torch.double)
    bias = -0.02 * torch.arange(1, 9, dtype=torch.double) - weight @ images[0].flatten()
    model, truth = Linear(weight, bias), -torch.ones(3, 8, dtype=torch.double)
    targets = Targets(mask(3, 8, list(range(8))), mask(3, 8, []), truth, torch.zeros(8, dtype=torch.double))
    outcome = ml_ddn(Problem(model, images, ClassificationGoal(targets)), rounding="after", iterations=150)
    assert targets.holds(model(outcome.images)).sum(1).tolist() == [7] * 3


def test_counting_pushes_what_holds_and_the_nearest_others():
    violations = torch.tensor([[0.5, 6.0, -1.0, 8.0], [-1.0, -2.0, -3.0, -4.0], [9.0, 10.0, 40.0, 50.0]])
    assert count_first(violations, torch.tensor([2, 2, 1])).tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


# --- Rank I and Rank II


def ranking_distance(model: Linear, image: Tensor, pairs: list[tuple[int, int]]) -> float:
    """Return the least ||r|| with z_i <= z_j for every pair (i, j)."""
    logits = model(image[None])[0]
    rows = np.stack([(model.weight[i] - model.weight[j]).numpy() for i, j in pairs])
    q = np.array([float(logits[j] - logits[i]) for i, j in pairs])
    return float(np.linalg.norm(nearest(rows, q))) if q.min() < 0 else 0.0


@COUNTS
def test_rank_1_equalises_two_logits_at_their_distance(count):
    model, problem, _ = make(count, 2, [0], [1], seed=1)
    ahead = torch.tensor([0.5, -0.5], dtype=torch.double)
    model = Linear(model.weight, model.bias - model(problem.images).mean(0) + ahead)
    truth = torch.ones_like(problem.targets.truth)  # A_1 = {0} below B_1 = {1}
    targets = Targets(problem.targets.flip, problem.targets.keep, truth, problem.targets.boundary)
    outcome = rank_1(Problem(model, problem.images, ClassificationGoal(targets)), between="none", schedule=LONG)
    logits = model(problem.images)
    wanted = ((logits[:, 0] - logits[:, 1]).clamp(min=0) / (model.weight[0] - model.weight[1]).norm()).numpy()
    assert wanted.min() > 0.03
    distances = moved(problem, outcome.images)
    assert np.all(distances >= wanted - 1e-9)
    assert np.all(distances <= wanted * 1.03)
    assert bool(outcome.met.all())


def test_rank_1_ranks_the_sets_around_the_rest_at_the_least_distance():
    model, problem, _ = make(3, 5, [0], [1], seed=2)
    truth = torch.ones_like(problem.targets.truth)
    targets = Targets(problem.targets.flip, problem.targets.keep, truth, problem.targets.boundary)
    outcome = rank_1(Problem(model, problem.images, ClassificationGoal(targets)), schedule=LONG)
    assert bool(outcome.met.all())
    pairs = [(0, label) for label in (2, 3, 4)] + [(label, 1) for label in (2, 3, 4)]
    for row, distance in enumerate(moved(problem, outcome.images)):
        exact = ranking_distance(model, problem.images[row], pairs)
        assert exact * (1 - 1e-6) <= distance <= exact * 1.08


def test_rank_2_also_ranks_the_flipped_labels_outermost_at_the_least_distance():
    model, problem, _ = make(3, 4, [0, 3], [1, 2], seed=3)
    truth = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.double).expand(3, 4)  # A_1, B_-1, B_1, A_-1
    targets = Targets(problem.targets.flip, problem.targets.keep, truth, problem.targets.boundary)
    outcome = rank_2(Problem(model, problem.images, ClassificationGoal(targets)), between="none", schedule=LONG)
    assert bool(outcome.met.all())
    order = model(outcome.images)
    assert bool((order[:, :-1] <= order[:, 1:]).all())
    for row, distance in enumerate(moved(problem, outcome.images)):
        exact = ranking_distance(model, problem.images[row], [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3)])
        assert exact * (1 - 1e-6) <= distance <= exact * 1.08


def test_rank_1_with_a_threshold_reaches_the_classification_goal_at_its_distance():
    model, problem, targets = make(3, 4, [0], [1, 2], seed=7)
    outcome = rank_1(problem, between="threshold", schedule=LONG)
    assert bool(targets.holds(model(outcome.images)).all())
    for row, distance in enumerate(moved(problem, outcome.images)):
        exact = np.linalg.norm(nearest(*constraints(model, problem, row)))
        assert exact * (1 - 1e-6) <= distance <= exact * 1.05
