from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from support.counting import Counting
from support.models import Views, make_net, ragged_targets
from torch import Tensor

from mlperturb.attacks.best import Best, Outcome
from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.geometry import norms
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.panel import Panel, verify, verify_waiting
from mlperturb.attacks.problem import Problem, each_view, observe
from mlperturb.attacks.quantise import quantise

NET = make_net()
OFFSETS = torch.tensor([[0.0] * 6, [0.05, -0.05] * 3, [-0.04, 0.0, 0.06] * 2], dtype=torch.double)
VIEWED = Views(NET, OFFSETS)  # views that differ by the same amount on every image
FADED = Views(NET, OFFSETS, fade=0.01)  # views that differ by a little more or less from image to image


@dataclass(frozen=True)
class Liar(Views):
    """Views of which the last is right about the photos, and wrong about every other image."""

    photos: Tensor = field(default_factory=lambda: torch.empty(0))

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        logits = super().look(images, views)
        moved = (images.detach() != self.photos).flatten(1).any(1) & (views == 2)
        return torch.where(moved.unsqueeze(1), super().look(self.photos, views), logits)

    def select(self, rows: Tensor) -> Liar:
        return replace(self, photos=self.photos[rows])


def make_problem(model, **more) -> Problem:
    images, targets = ragged_targets(NET)
    return Problem(model, images, ClassificationGoal(targets), **more)


def in_every_view(model, images: Tensor) -> Tensor:
    return torch.stack([model(images, view) for view in range(model.views)], dim=1)


def test_a_panel_begins_with_the_differences_on_the_clean_photos_and_counts_what_it_computes():
    problem = make_problem(FADED)
    panel = Panel(problem)
    clean = in_every_view(FADED, problem.images)
    torch.testing.assert_close(panel.offsets, clean - clean[:, :1])
    assert not panel.learned.any()
    assert problem.meter.forward.tolist() == [3] * 9
    seen, meter, _ = observe(FADED, problem.images)
    assert meter.forward.tolist() == [3] * 9
    known = replace(problem, clean=seen, meter=meter)
    assert torch.equal(Panel(known).offsets, panel.offsets)
    assert meter.forward.tolist() == [3] * 9  # known clean photos cost nothing more
    assert Panel.of(make_problem(NET)) is None


def test_expected_logits_are_those_of_every_view_where_the_differences_are_constant():
    problem = make_problem(VIEWED)
    panel = Panel(problem)
    views = torch.arange(9) % 3
    images = (problem.images * 0.9).clamp(0, 1)
    expected = panel.expect(problem, VIEWED.look(images, views), views)
    torch.testing.assert_close(expected, in_every_view(VIEWED, images))
    some = torch.tensor([7, 2])  # of a part of the batch too
    part = panel.expect(problem.select(some), VIEWED.look(images[some], views[some]), views[some])
    torch.testing.assert_close(part, expected[some])


def test_the_first_difference_on_an_iterate_replaces_that_of_the_photo_and_later_ones_are_averaged():
    problem = make_problem(VIEWED)
    panel = Panel(problem)
    base, other = torch.ones(9, dtype=torch.long), torch.full((9,), 2)
    logits = torch.zeros(9, 6, dtype=torch.double)
    untouched = panel.offsets[:, 1].clone()
    for found, held in ((0.3, 0.3), (0.5, 0.4), (0.0, 0.2)):
        panel.learn(problem, logits, base, other, logits + found)
        torch.testing.assert_close(panel.expect(problem, logits, base)[:, 2], logits + held)
    assert torch.equal(panel.offsets[:, 1], untouched)
    assert panel.learned.tolist() == [[False, False, True]] * 9
    assert panel.unknown(problem).tolist() == [[True, True, False]] * 9


def test_only_images_of_the_part_are_learned():
    problem = make_problem(VIEWED)
    panel = Panel(problem)
    before = panel.offsets.clone()
    rows = torch.tensor([5, 1])
    one = torch.ones(2, dtype=torch.long)
    logits = torch.zeros(2, 6, dtype=torch.double)
    panel.learn(problem.select(rows), logits, 0 * one, one, logits + 7)
    assert (panel.offsets != before).flatten(1).any(1).nonzero().flatten().tolist() == [1, 5]
    assert bool((panel.offsets[rows, 1] == 7).all())


def test_early_views_take_turns_and_late_the_worst_is_computed():
    problem = make_problem(VIEWED)
    panel = Panel(problem)
    late = torch.zeros(9, dtype=torch.bool)
    turns = [panel.choose(problem, step, late).unique().tolist() for step in range(8)]
    assert turns == [[0], [1], [0], [2], [0], [1], [0], [2]]
    panel.remember(problem, torch.tensor([[0.0, 3.0, 1.0]] * 8 + [[0.0, -1.0, 2.0]]).double())
    late[[0, 8]] = True
    assert panel.choose(problem, 0, late).tolist() == [1, *[0] * 7, 2]


def test_an_iterate_that_one_view_refuses_is_never_found():
    """The last view is expected to agree, as it does on the photos; it is asked before anything counts as found."""
    model = Liar(NET, OFFSETS * 0, photos=make_problem(NET).images)
    alone = ml_ddn(make_problem(NET), iterations=20)
    assert alone.met.any()
    problem = make_problem(model)
    outcome = ml_ddn(problem, iterations=20)
    assert not outcome.met.any()
    for name in ("inside", "after"):
        outcome = ml_ddn(make_problem(model), rounding=name, iterations=20)
        assert not (quantise(make_problem(model), outcome, scales=4, iterations=8).met).any()


def found_images(problem: Problem) -> Tensor:
    """Return iterates that meet the goal in every view, where ml-ddn finds them."""
    outcome = ml_ddn(replace(problem, model=VIEWED), iterations=30)
    assert int(outcome.met.sum()) >= 7
    return outcome.images


@pytest.mark.parametrize(("limit", "last", "passes"), [(None, 0, 2), (5, 0, 2), (4, 0, 0), (4, 1, 2), (3, 1, 0)])
def test_verify_counts_an_iterate_only_where_every_view_is_computed(limit, last, passes):
    images = found_images(make_problem(VIEWED))
    counted = Counting(VIEWED, 9)
    problem = make_problem(counted, clean=in_every_view(VIEWED, make_problem(VIEWED).images), limit=limit)
    first = torch.zeros(9, dtype=torch.long)
    problem.meter.forward.add_(2)
    logits = in_every_view(VIEWED, images)[:, 0]
    best, panel = Best(problem), Panel(problem)
    met = each_view(problem.goal.met, in_every_view(VIEWED, images)).all(1)
    seen, whole = verify(problem, best, panel, images, logits, first, torch.ones(9, dtype=torch.bool), last=bool(last))
    torch.testing.assert_close(seen, in_every_view(VIEWED, images))  # computed or expected
    assert whole.tolist() == (met & (passes == 2)).tolist()
    spent = counted.tally.forward
    assert problem.meter.forward.tolist() == (2 + spent).tolist()
    assert spent[met].unique().tolist() == [passes]
    expected = best.update(problem, images, seen, whole)
    assert expected.tolist() == met.tolist()
    assert best.met.tolist() == (met & (passes == 2)).tolist()


def test_verify_asks_nothing_early_nor_of_iterates_that_are_no_better():
    images = found_images(make_problem(VIEWED))
    counted = Counting(VIEWED, 9)
    problem = make_problem(counted, clean=in_every_view(VIEWED, make_problem(VIEWED).images))
    first, logits = torch.zeros(9, dtype=torch.long), in_every_view(VIEWED, images)[:, 0]
    best, panel = Best(problem), Panel(problem)
    verify(problem, best, panel, images, logits, first, torch.zeros(9, dtype=torch.bool))
    assert counted.tally.forward.sum() == 0
    verify(
        problem, best, panel, problem.images, panel.expect(problem, NET(problem.images), first)[:, 0], first, first == 0
    )
    assert counted.tally.forward.sum() == 0  # the photos do not meet the goal
    best.update(problem, images, in_every_view(VIEWED, images))
    verify(problem, best, panel, images, logits, first, first == 0)
    assert counted.tally.forward[best.met].sum() == 0  # they are no nearer than the best


@pytest.mark.parametrize("limit", [None, 60, 41])
@pytest.mark.parametrize("rounding", ["inside", "after"])
def test_what_is_found_holds_in_every_view_and_every_pass_is_counted(limit, rounding):
    counted = Counting(FADED, 9)
    problem = make_problem(counted, limit=limit)
    outcome = ml_ddn(problem, rounding=rounding, iterations=30)
    seen = in_every_view(FADED, outcome.images)
    assert outcome.met.tolist() == each_view(outcome.goal.met, seen).all(1).tolist()
    assert int(outcome.met.sum()) >= 7
    assert problem.meter.forward.tolist() == counted.tally.forward.tolist()
    assert bool((problem.meter.forward > problem.meter.backward).all())


def test_the_first_view_alone_would_not_hold_in_the_others():
    """Without the other views the nearest result breaks in them: the tests above could fail."""
    outcome = ml_ddn(make_problem(NET), iterations=30)
    held = each_view(outcome.goal.met, in_every_view(FADED, outcome.images))
    assert int(held[:, 0].sum()) > int(held.all(1).sum())


@pytest.mark.parametrize("rounding", ["inside", "after"])
def test_a_model_of_one_view_is_attacked_as_a_model_that_knows_none(rounding):
    outcomes, meters = [], []
    for model in (NET, Views(NET, OFFSETS[:1])):
        problem = make_problem(model, limit=40)
        outcomes.append(quantise(problem, ml_ddn(problem, rounding=rounding, iterations=12), scales=3, iterations=4))
        meters.append(problem.meter.spent.tolist())
    assert torch.equal(outcomes[0].images, outcomes[1].images)
    assert meters[0] == meters[1]


def test_a_photo_as_asked_in_the_first_view_alone_is_attacked_in_the_others():
    images, targets = ragged_targets(NET)
    photo, logits = images[:1], NET(images[:1])[0]
    label = int(logits.argmin())  # absent, and to stay so; the second view sees it a little above its threshold
    offsets = torch.zeros(2, len(logits), dtype=torch.double)
    offsets[1, label] = 0.05 - logits[label]
    keep = torch.zeros_like(targets.keep[:1])
    keep[0, label] = True
    goal = ClassificationGoal(
        replace(
            targets.select(torch.tensor([0])), flip=torch.zeros_like(keep), keep=keep, truth=2 * (NET(photo) > 0) - 1
        )
    )
    problem = Problem(Views(NET, offsets), photo, goal)
    asked = Outcome(photo.clone(), goal.met(NET(photo)), goal)
    assert bool(asked.met)
    found = quantise(problem, asked)
    assert bool(found.met)
    assert bool(each_view(goal.met, in_every_view(problem.model, found.images)).all())


def test_an_iterate_a_little_nearer_waits_for_the_end():
    images = found_images(make_problem(VIEWED))
    counted = Counting(VIEWED, 9)
    problem = make_problem(counted, clean=in_every_view(VIEWED, make_problem(VIEWED).images))
    first, end = torch.zeros(9, dtype=torch.long), torch.ones(9)
    best, panel = Best(problem, files=True), Panel(problem)
    best.update(problem, problem.images + 1.01 * (images - problem.images), in_every_view(VIEWED, images))
    kept, shorter = best.norm.clone(), best.met & (norms(images - problem.images) < best.norm)
    assert int(shorter.sum()) >= 6
    verify(problem, best, panel, images, in_every_view(VIEWED, images)[:, 0], first, end)
    assert counted.tally.forward.sum() == 0
    assert torch.equal(best.norm, kept)
    verify_waiting(problem, best, panel)
    assert counted.tally.forward[shorter].tolist() == [2] * int(shorter.sum())
    assert bool((best.norm[shorter] < kept[shorter]).all())
    torch.testing.assert_close(best.logits[best.met], in_every_view(VIEWED, best.images)[best.met])


@pytest.mark.parametrize("model", [NET, FADED], ids=["one view", "views"])
def test_no_pass_is_spent_on_the_photo_twice_nor_on_a_gradient_that_is_not_used(model):
    images, targets = ragged_targets(NET)
    counted = Counting(model, 9)
    clean, meter, opening = observe(counted, images, opening=True)
    looks = clean.shape[1]
    meter.owed.add_(looks)
    problem = Problem(counted, images, ClassificationGoal(targets), limit=40, meter=meter, clean=clean, opening=opening)
    outcome = ml_ddn(problem, iterations=100)
    assert meter.forward.tolist() == counted.tally.forward.tolist()
    assert meter.backward.tolist() == counted.tally.used.tolist() or looks > 1
    assert bool((meter.spent + meter.owed <= 40).all())
    moved = (outcome.images != images).flatten(1).any(1)
    assert meter.owed[outcome.met].tolist() == [0] * int(outcome.met.sum())  # every view of the file is known
    torch.testing.assert_close(outcome.logits[outcome.met], in_every(model, outcome.images)[outcome.met])
    if looks == 1:
        assert meter.spent[outcome.met & moved].unique().tolist() == [39]  # 1 at the photo, 19 of two passes
    else:
        assert int(meter.spent[outcome.met & moved].min()) >= 40 - looks


def in_every(model, images: Tensor) -> Tensor:
    return in_every_view(model, images) if isinstance(model, Views) else model(images).unsqueeze(1)
