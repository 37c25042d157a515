"""The last layer alone, on cached features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlperturb.training.losses import cross_entropy, eq12_loss
from mlperturb.training.probe import Probe, fit_probe


def _problem(noise: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return features and truth of 40 training and 400 validation photos: three labels, each a direction, and noise."""
    generator = torch.Generator().manual_seed(4)
    directions = torch.randn(3, 60, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        features = torch.randn(count, 60, generator=generator)
        scores = features @ directions.T + noise * torch.randn(count, 3, generator=generator)
        return features * 5 + 2, (scores > 4).long() * 2 - 1

    return draw(40), draw(400)


def _fit(training, validation, **options) -> Probe:
    return fit_probe(training, validation, instance_weight=0.5, calibration_weight=1.0, **options)


def test_the_weight_decay_with_the_best_validation_precision_is_taken(monkeypatch):
    decays = (1e-5, 0.05, 10.0)
    monkeypatch.setattr("mlperturb.training.probe.DECAYS", decays)
    training, validation = _problem(6)
    best = _fit(training, validation)
    every = {}
    for decay in decays:
        monkeypatch.setattr("mlperturb.training.probe.DECAYS", (decay,))
        every[decay] = _fit(training, validation).mean_precision
    assert best.decay == max(every, key=lambda decay: every[decay])
    assert best.mean_precision == pytest.approx(max(every.values()), abs=0.005)
    assert max(every.values()) > min(every.values()) + 0.01  # so there was something to choose


def test_the_layer_is_where_the_regularised_loss_is_least(monkeypatch):
    monkeypatch.setattr("mlperturb.training.probe.DECAYS", (0.05,))
    (features, truth), validation = _problem(1)
    probe = _fit((features, truth), validation)
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt()
    weight = (probe.weight * scale).requires_grad_()
    bias = (probe.bias + probe.weight @ mean).requires_grad_()
    logits = (features - mean) / scale @ weight.T + bias
    loss = eq12_loss(logits, truth, 0.5) + cross_entropy(logits, truth) + 0.05 / 2 * weight.square().sum()
    loss.backward()
    assert float(weight.grad.norm()) < 1e-3
    assert float(bias.grad.norm()) < 1e-3
    torch.testing.assert_close(logits, features @ probe.weight.T + probe.bias, atol=1e-4, rtol=1e-4)


def test_a_teacher_that_knows_better_helps():
    (features, noisy), validation = _problem(6)
    (same, clean), _ = _problem(0)
    assert torch.equal(features, same)
    right = []
    for options in ({}, {"teacher": 8.0 * clean, "teacher_weight": 1.0}):
        probe = _fit((features, noisy), validation, **options)
        right.append(float(((features @ probe.weight.T + probe.bias > 0) == (clean > 0)).float().mean()))
    assert right[1] > right[0] + 0.05


def test_validation_photos_without_any_label_leave_the_choice_open_and_fit_all_the_same():
    training, (features, truth) = _problem(1)
    probe = _fit(training, (features, -torch.ones_like(truth)))
    assert math.isnan(probe.mean_precision)
    assert bool(probe.weight.isfinite().all())
