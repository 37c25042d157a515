from __future__ import annotations

import pytest
import torch

from mlperturb.errors import UsageError
from mlperturb.labels import Request
from mlperturb.targets import Targets, decide, make_targets


def _targets(flip, keep, truth, boundary, margin=0.0):
    return Targets(
        torch.tensor(flip, dtype=torch.bool),
        torch.tensor(keep, dtype=torch.bool),
        torch.tensor(truth, dtype=torch.float32),
        torch.tensor(boundary, dtype=torch.float32),
        margin,
    )


def _random(margin: float) -> tuple[Targets, torch.Tensor]:
    sets = torch.randint(0, 3, (200, 8))
    truth = torch.randint(0, 2, (200, 8)) * 2.0 - 1
    targets = Targets(sets == 0, sets == 1, truth, torch.randn(8), margin)
    return targets, torch.randn(200, 8) * 2


def test_desired_reverses_the_flip_labels_alone():
    targets = _targets([[1, 0, 0]], [[0, 1, 0]], [[1, -1, 1]], [0, 0, 0])
    assert targets.desired.tolist() == [[-1, -1, 1]]
    assert targets.constrained.tolist() == [[True, True, False]]


@pytest.mark.parametrize("boundary", [0.0, 1.5, -0.7])
def test_a_logit_on_its_boundary_is_present(boundary):
    targets = _targets([[1, 1]], [[0, 0]], [[-1, 1]], [boundary, boundary])  # wanted: present, absent
    edge = torch.tensor(boundary)
    below = torch.nextafter(edge, torch.tensor(-torch.inf))
    assert targets.holds(edge.expand(1, 2)).tolist() == [[True, False]]
    assert targets.holds(below.expand(1, 2)).tolist() == [[False, True]]
    assert decide(torch.stack([edge, below])[None], torch.tensor([boundary] * 2)).tolist() == [[1, -1]]


def test_a_margin_moves_the_boundary_of_each_sign_away_from_it():
    targets = _targets([[1, 1]], [[0, 0]], [[-1, 1]], [0.0, 0.0], margin=0.25)
    assert targets.holds(torch.tensor([[0.25, -0.25]])).tolist() == [[True, False]]
    assert targets.holds(torch.tensor([[0.2499, -0.2501]])).tolist() == [[False, True]]


def test_keep_labels_hold_where_the_decision_is_unchanged():
    targets = _targets([[0, 0]], [[1, 1]], [[1, -1]], [0.0, 0.0])
    assert targets.holds(torch.tensor([[0.1, 0.1]])).tolist() == [[True, False]]


def test_holding_agrees_with_the_decisions_of_the_model():
    targets, logits = _random(0.0)
    same = decide(logits, targets.boundary) == targets.desired
    assert torch.equal(targets.holds(logits), same | ~targets.constrained)


def test_a_nan_never_holds_and_free_labels_always_do():
    targets = _targets([[1, 1, 0, 0]], [[0, 0, 1, 0]], [[-1, 1, 1, 1]], [0.0] * 4)
    assert targets.holds(torch.full((1, 4), torch.nan)).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_a_violation_is_positive_exactly_where_a_constraint_does_not_hold(space, margin):
    targets, logits = _random(margin)
    violations = targets.violations(logits, space)
    holds = targets.holds(logits)
    assert torch.equal(violations > 0, ~holds)
    assert 100 < int((~holds).sum()) < 1500
    assert bool((violations[~targets.constrained] == -torch.inf).all())


def test_violations_are_distances_in_their_space():
    targets = _targets([[1]], [[0]], [[-1]], [1.0], margin=0.5)
    logits = torch.tensor([[-1.0]])
    assert targets.violations(logits).item() == pytest.approx(2.5)
    expected = torch.sigmoid(torch.tensor(1.5)) - torch.sigmoid(torch.tensor(-1.0))
    assert targets.violations(logits, "probability").item() == pytest.approx(expected.item())


def test_a_confident_label_keeps_its_gradient_on_the_logits_alone():
    targets = _targets([[1]], [[0]], [[-1]], [0.0])
    for space, size in (("logit", 1.0), ("probability", 0.0)):
        logits = torch.tensor([[-200.0]], requires_grad=True)
        targets.violations(logits, space).sum().backward()
        assert logits.grad.abs().item() == size


def test_selecting_images_keeps_boundary_and_margin():
    targets, logits = _random(0.1)
    rows = torch.tensor([3, 5])
    chosen = targets.select(rows)
    assert chosen.margin == 0.1
    assert torch.equal(chosen.holds(logits[rows]), targets.holds(logits)[rows])


def test_sets_that_overlap_are_refused():
    with pytest.raises(UsageError, match="disjoint"):
        _targets([[1, 0]], [[1, 0]], [[1, 1]], [0, 0])


@pytest.mark.parametrize("truth", [[[1.0]], [1.0, 1.0]])
def test_masks_of_another_shape_than_the_labels_are_refused(truth):
    with pytest.raises(UsageError, match="one shape"):
        _targets([[1, 0]], [[0, 1]], truth, [0, 0])


def test_add_and_remove_keep_what_is_already_so():
    truth = torch.tensor([[1.0, -1, 1, -1], [-1, 1, 1, 1]])
    targets = make_targets(Request(add=(0, 1), remove=(2, 3)), truth, torch.zeros(4))
    assert targets.flip.tolist() == [[False, True, True, False], [True, False, True, True]]
    assert targets.keep.tolist() == [[True, False, False, True], [False, True, False, False]]
    assert targets.desired.tolist() == [[1, 1, -1, -1]] * 2


def test_flip_and_keep_do_not_depend_on_the_present_labels():
    truth = torch.tensor([[1.0, -1, 1], [-1, 1, 1]])
    targets = make_targets(Request(flip=(0,), keep=(2,)), truth, torch.zeros(3), margin=0.5)
    assert targets.flip.tolist() == [[True, False, False]] * 2
    assert targets.keep.tolist() == [[False, False, True]] * 2
    assert targets.desired.tolist() == [[-1, -1, 1], [1, 1, 1]]
    assert targets.margin == 0.5


def test_each_image_may_have_its_own_request():
    truth = torch.tensor([[1.0, -1, 1], [1, -1, 1]])
    targets = make_targets([Request(flip=(0,), keep=(1,)), Request(remove=(2,), add=(0,))], truth, torch.zeros(3))
    assert targets.flip.tolist() == [[True, False, False], [False, False, True]]
    assert targets.keep.tolist() == [[False, True, False], [True, False, False]]


def test_each_image_of_a_batch_may_have_its_own_sets():
    targets = _targets([[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 0, 0]], [[1, 1, -1], [1, -1, -1]], [0.0, 0.0, 0.0])
    logits = torch.tensor([[-1.0, 1, -1], [-9, 1, -1]])
    assert targets.holds(logits).tolist() == [[True, True, True], [True, True, False]]
