"""The strongest file within a limit, against closed forms on linear classifiers; and the copies of input diversity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from scipy.optimize import minimize
from support.models import Views, linear_problem, make_net, mask, ragged_targets

from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.diversity import PLAIN, diversify
from mlperturb.attacks.geometry import norms
from mlperturb.attacks.goals import ClassificationGoal, LargestMargin
from mlperturb.attacks.problem import Problem
from mlperturb.errors import UsageError
from mlperturb.limits import Limits
from mlperturb.run.settings import Words, read_settings
from mlperturb.targets import Targets, decide

SIZE = (24, 24)
PIXELS = 3 * SIZE[0] * SIZE[1]
ZERO = torch.zeros(5, dtype=torch.double)


def make_problem(flip: list[int], keep: list[int], *, rmsd: float | None = None, linf: int | None = None) -> Problem:
    """Return four photos of a linear model under a limit."""
    model, images, _ = linear_problem(4, 5, size=SIZE, seed=3)
    images = (images * 255).round() / 255  # files hold nothing else
    truth = decide(model(images), ZERO)
    targets = Targets(mask(4, 5, flip), mask(4, 5, keep), truth, ZERO)
    cap = None if rmsd is None else torch.full((4,), rmsd / 255 * PIXELS**0.5, dtype=torch.double)
    bound = None if linf is None else linf / 255
    return Problem(model, images, ClassificationGoal(targets), cap=cap, bound=bound)


def least_margins(problem: Problem, images: torch.Tensor) -> list[float]:
    return (-problem.goal.violations(problem.model(images)).amax(1)).tolist()


def largest_possible(problem: Problem, row: int) -> float:
    """Return max over ||r||_2 <= R of the least margin: by duality the min over the simplex of w.m + R ||w.a||."""
    targets, model, caps = problem.targets, cast(Any, problem.model), cast(torch.Tensor, problem.cap)
    chosen = targets.constrained[row].nonzero().flatten()
    slopes = targets.desired[row, chosen, None] * model.weight[chosen]
    margins = -targets.violations(model(problem.images))[row, chosen].numpy()
    gram, cap = (slopes @ slopes.T).numpy(), float(caps[row])
    count = len(chosen)
    found = minimize(
        lambda w: w @ margins + cap * max(w @ gram @ w, 1e-18) ** 0.5,
        [1 / count] * count,
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )
    return float(found.fun)


@pytest.mark.parametrize(("flip", "keep"), [([0], []), ([0, 1], [2, 3, 4]), ([0], [1, 2, 3, 4])])
@pytest.mark.parametrize("rmsd", [1.0, 3.0])
def test_the_least_margin_of_a_linear_classifier_comes_near_its_exact_largest_value(flip, keep, rmsd):
    problem = make_problem(flip, keep, rmsd=rmsd)
    outcome = ml_ddn(problem, aim="strongest", iterations=48)
    exact = [largest_possible(problem, row) for row in range(4)]
    assert outcome.met.all()
    for margin, best in zip(least_margins(problem, outcome.images), exact, strict=True):
        assert (0.92 if rmsd < 2 else 0.97) * best <= margin <= best + 1e-6  # rounding costs the rest


def test_without_a_limit_on_rmsd_every_pixel_moves_to_the_bound_along_the_gradient():
    """The closed form under ||r||_infinity <= B: the margin grows by B ||w||_1; no photo is near black."""
    problem = make_problem([0], [], linf=4)
    outcome = ml_ddn(problem, aim="strongest", iterations=30)
    sign = problem.targets.desired[:, 0]
    bounded = sign * problem.model(problem.images)[:, 0] + problem.bound * problem.model.weight[0].abs().sum()
    margins = torch.tensor(least_margins(problem, outcome.images))
    assert torch.allclose(margins, bounded.float(), rtol=0.01)
    assert float((outcome.images - problem.images).abs().max()) <= 4 / 255 + 1e-9


def test_rounding_stays_within_the_limits_and_uses_them():
    for rmsd in (0.3, 0.7, 2.0):
        problem = make_problem([0], [1, 2], rmsd=rmsd)
        outcome = ml_ddn(problem, aim="strongest", iterations=20)
        files = (outcome.images * 255).round() / 255
        assert torch.equal(files, outcome.images)
        share = norms(files - problem.images) / problem.cap
        assert (share <= 1).all()
        assert (share >= 0.97).all()


def test_it_is_stronger_than_the_least_perturbation_and_the_limit_is_what_it_costs():
    problem = make_problem([0], [1, 2, 3, 4], rmsd=2.0)
    least, strongest = ml_ddn(problem), ml_ddn(problem, aim="strongest")
    assert min(least_margins(problem, strongest.images)) > 20 * max(least_margins(problem, least.images))
    assert (norms(least.images - problem.images) < norms(strongest.images - problem.images)).all()


def test_where_the_limit_barely_suffices_the_file_holds_wherever_that_of_the_least_perturbation_does():
    problem = make_problem([0], [1, 2, 3, 4])
    needed = norms(ml_ddn(problem, iterations=48).images - problem.images)
    barely = replace(problem, cap=1.1 * needed)
    least = ml_ddn(barely, iterations=48)
    assert least.met.any()
    assert (ml_ddn(barely, aim="strongest", iterations=48).met >= least.met).all()
    assert not ml_ddn(replace(problem, cap=0.5 * needed), aim="strongest", iterations=13).met.any()


@pytest.mark.parametrize("diversity", ["none", "both"])
@pytest.mark.parametrize("limit", [24, 61])
def test_it_holds_in_every_view_and_no_photo_spends_more_than_its_limit(diversity, limit):
    net = make_net()
    images, targets = ragged_targets(net, margin=0.01)
    model = Views(net, torch.linspace(-0.1, 0.1, 18, dtype=torch.double).view(3, 6), fade=0.01)
    problem = Problem(
        model, images, ClassificationGoal(targets), limit=limit, cap=torch.full((9,), 3.0, dtype=torch.double)
    )
    problem.meter.owed.fill_(3)
    outcome = ml_ddn(problem, aim="strongest", diversity=diversity, iterations=48)
    assert outcome.met.sum() >= 7
    for view in range(3):
        assert problem.goal.met(model(outcome.images, view))[outcome.met].all()
    assert (problem.meter.spent <= limit).all()
    assert outcome.logits is not None
    seen = torch.stack([model(outcome.images, view) for view in range(3)], 1)
    assert torch.allclose(outcome.logits[outcome.met], seen[outcome.met])


def test_a_batch_gives_what_each_photo_gives_alone():
    net = make_net()
    images, targets = ragged_targets(net)
    cap = torch.full((9,), 2.0, dtype=torch.double)
    together = ml_ddn(
        Problem(net, images, ClassificationGoal(targets), cap=cap), aim="strongest", diversity="both", iterations=13
    )
    for row in range(0, 9, 4):
        rows = torch.tensor([row])
        problem = Problem(net, images[rows], ClassificationGoal(targets.select(rows)), cap=cap[rows])
        alone = ml_ddn(problem, aim="strongest", diversity="both", iterations=13)
        assert torch.allclose(alone.images[0], together.images[row])


def test_the_score_prefers_constraints_that_hold_then_the_larger_least_margin():
    goal = LargestMargin(Targets(mask(1, 2, [0]), mask(1, 2, [1]), torch.tensor([[1.0, 1.0]]), torch.zeros(2)))
    scores = [float(goal.score(torch.tensor([logits]))) for logits in ([5.0, 9.0], [-1.0, 9.0], [-9.0, 2.0])]
    assert scores == sorted(scores)
    assert scores[0] == 1
    assert scores[2] == pytest.approx(2 + 2 / 3)


def test_copies_keep_to_the_frame_of_their_photo_whatever_the_batch():
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, 12, 17, generator=generator)
    padded = torch.zeros(1, 3, 20, 30)
    padded[:, :, :12, :17] = photo
    for kind in ("resize", "shift", "both"):
        for step in range(1, 8):
            alone = diversify(photo, [(12, 17)], kind, step)
            beside = diversify(padded, [(12, 17)], kind, step)[:, :, :12, :17]
            assert torch.allclose(alone, beside, atol=1e-5)
            assert torch.equal(alone, photo) == (step % PLAIN == 0)
    assert torch.equal(diversify(photo, [(12, 17)], "none", 3), photo)


def test_a_resized_copy_is_smaller_whole_and_has_a_gradient():
    photo = torch.zeros(1, 3, 40, 50, requires_grad=True)
    copies = [diversify(photo, [(40, 50)], "resize", step) for step in range(1, 4)]
    areas = [float((copy[0, 0] < 0.25).double().mean()) for copy in copies]
    assert all(0.6 < area < 0.99 for area in areas)
    assert len(set(areas)) == 3
    sum(copy.sum() for copy in copies).backward()
    assert (photo.grad > 0).all()


@pytest.mark.parametrize(
    ("options", "limits", "words"),
    [
        ({"aim": "strongest"}, {}, "`rmsd` or `linf`"),
        ({"diversity": "both"}, {"rmsd": 2.0}, "`aim` strongest"),
        ({"aim": "strongest", "rounding": "after"}, {"rmsd": 2.0}, "`rounding` inside"),
        ({"aim": "strongest", "diversity": "zoom"}, {"rmsd": 2.0}, "none, resize, shift, both"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(options, limits, words):
    with pytest.raises(UsageError, match=words):
        read_settings(Words(flip=["a"]), ["a", "b"], limits=Limits(**limits), options=options)


def test_a_problem_without_a_limit_has_no_strongest_file():
    with pytest.raises(UsageError, match="`rmsd` or `linf`"):
        ml_ddn(make_problem([0], []), aim="strongest")
