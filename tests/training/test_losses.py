from __future__ import annotations

import math

import pytest
import torch

from mlperturb.training.losses import calibrate, cross_entropy, eq12_loss


def _truth() -> torch.Tensor:
    """Return labels, some of them difficult; some images and labels have one sign only, or are wholly difficult."""
    truth = torch.randint(-1, 2, (7, 5))
    truth[0], truth[1], truth[2] = -1, 1, 0
    truth[:, 0], truth[:, 1] = -1, 1
    truth[3] = torch.tensor([-1, 1, 0, 1, -1])
    return truth


def _eq12_by_loops(logits: torch.Tensor, truth: torch.Tensor, weight: float) -> float:
    """Evaluate Eq. 12 as the paper prints it: two means of means over pairs."""
    f = torch.sigmoid(logits.double()).tolist()
    y = truth.tolist()
    images, labels = range(len(y)), range(len(y[0]))
    total = 0.0
    for i in images:
        pairs = [math.exp(f[i][q] - f[i][p]) for p in labels for q in labels if y[i][p] == 1 and y[i][q] == -1]
        total += weight * sum(pairs) / max(len(pairs), 1) / len(images)
    for j in labels:
        pairs = [math.exp(f[q][j] - f[p][j]) for p in images for q in images if y[p][j] == 1 and y[q][j] == -1]
        total += sum(pairs) / max(len(pairs), 1) / len(labels)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_eq12_equals_a_double_loop_over_the_pairs(seed, weight):
    torch.manual_seed(seed)
    logits, truth = torch.randn(7, 5, dtype=torch.float64) * 3, _truth()
    assert eq12_loss(logits, truth, weight).item() == pytest.approx(_eq12_by_loops(logits, truth, weight), rel=1e-12)


def test_eq12_weighs_the_instance_term_by_half():
    logits, truth = torch.randn(7, 5), _truth()
    assert eq12_loss(logits, truth).item() == pytest.approx(_eq12_by_loops(logits, truth, 0.5), rel=1e-5)


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_eq12_without_any_pair_is_zero_with_zero_gradient(sign):
    logits = torch.randn(3, 4, requires_grad=True)
    loss = eq12_loss(logits, torch.full((3, 4), sign))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def test_eq12_gives_difficult_labels_no_gradient():
    truth = _truth()
    logits = torch.randn(7, 5, requires_grad=True)
    eq12_loss(logits, truth).backward()
    assert not logits.grad[truth == 0].any()
    assert bool((logits.grad[3, [0, 1, 3, 4]] * truth[3, [0, 1, 3, 4]] < 0).all())


def test_the_gradient_of_eq12_equals_finite_differences():
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    truth = _truth()
    assert torch.autograd.gradcheck(lambda z: eq12_loss(z, truth), (logits,))


@pytest.mark.parametrize("boundary", [0.0, 1.2])
def test_calibration_moves_a_shifted_label_to_its_threshold(boundary):
    truth = torch.randint(0, 2, (400, 4)) * 2 - 1
    edge = torch.full((4,), boundary)
    shift = torch.tensor([8.0, -5.0, 0.0, 2.0])
    logits = truth * 3 + torch.randn(400, 4) + shift + edge
    moved = logits + calibrate(logits, truth, edge)
    wrong = ((moved >= edge) != (truth > 0)).float().mean(0)
    assert bool((((logits >= edge) != (truth > 0)).float().mean(0)[:2] > 0.4).all())
    assert bool((wrong < 0.01).all())
    middle = (moved * (truth > 0)).sum(0) / (truth > 0).sum(0) + (moved * (truth < 0)).sum(0) / (truth < 0).sum(0)
    assert bool(((middle / 2 - edge).abs() < 0.8).all())


def test_one_shift_for_all_labels_moves_them_together_and_no_shift_moves_none():
    truth = torch.randint(0, 2, (400, 4)) * 2 - 1
    logits = truth * torch.tensor([1.0, 0.5, 2.0, 1.0]) + 4.5 + 0.3 * torch.randn(400, 4)
    moved = calibrate(logits, truth, torch.zeros(4), "one")
    assert bool((moved == moved[0]).all())
    assert float(moved[0]) == pytest.approx(-4.5, abs=0.25)
    assert torch.equal(calibrate(logits, truth, torch.zeros(4), "none"), torch.zeros(4))


def test_calibration_leaves_a_calibrated_model_almost_alone():
    truth = torch.randint(0, 2, (600, 3)) * 2 - 1
    logits = truth * 2 + torch.randn(600, 3) * 2**0.5  # log odds of two normals: twice the mean over the variance
    assert bool((calibrate(logits, truth, torch.zeros(3)).abs() < 0.5).all())


def test_calibration_ignores_difficult_labels():
    truth = torch.randint(0, 2, (200, 3)) * 2 - 1
    logits = truth * 2 + torch.randn(200, 3)
    more = torch.cat([logits, torch.full((50, 3), 40.0)])
    padded = torch.cat([truth, torch.zeros(50, 3, dtype=torch.long)])
    torch.testing.assert_close(calibrate(more, padded, torch.zeros(3)), calibrate(logits, truth, torch.zeros(3)))


@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_calibration_on_labels_of_one_sign_stays_small_and_on_no_labels_moves_nothing(sign):
    bias = calibrate(torch.randn(50, 3), torch.full((50, 3), sign), torch.zeros(3))
    assert bool((bias.abs() < 5).all())
    assert bool((bias * sign >= 0).all())
    if sign == 0:
        assert torch.equal(bias, torch.zeros(3))


def test_cross_entropy_leaves_difficult_labels_out_unless_a_teacher_speaks():
    logits, truth = torch.randn(7, 5, dtype=torch.float64), _truth()
    teacher = torch.randn(7, 5, dtype=torch.float64)
    plain = taught = 0.0
    for z, y, t in zip(logits.flatten().tolist(), truth.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, soft = 1 / (1 + math.exp(-z)), 1 / (1 + math.exp(-t))
        hard = float(y > 0)
        target = soft if y == 0 else 0.7 * hard + 0.3 * soft
        taught -= target * math.log(p) + (1 - target) * math.log(1 - p)
        plain -= 0 if y == 0 else hard * math.log(p) + (1 - hard) * math.log(1 - p)
    assert cross_entropy(logits, truth).item() == pytest.approx(plain / 7 / 2)
    assert cross_entropy(logits, truth, teacher, 0.3).item() == pytest.approx(taught / 7 / 2)
