"""Softmax networks as networks of sigmoids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import mlperturb
from mlperturb.errors import CheckpointError, UsageError
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.softmax import SoftmaxLogits, apply_activation, softmax_logits


def test_the_sigmoids_are_the_softmax_and_the_gradient_is_that_of_its_logit():
    scores = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    scores[5] = 1.0  # all equal
    expected = torch.logit(scores.softmax(1))
    torch.testing.assert_close(softmax_logits(scores), expected)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: softmax_logits(z[None])[0]))(scores)
    p = scores.softmax(1)
    closed = torch.eye(5, dtype=torch.float64) - p[:, None, :] / (1 - p[:, :, None]) * (1 - torch.eye(5))
    torch.testing.assert_close(jacobian, closed)  # d z_j = 1; d z_k = -p_k / (1 - p_j)


def test_probabilities_near_0_and_1_keep_their_logits_and_their_gradients():
    scores = torch.tensor([[300.0, 0.0, -300.0], [0.0, 40.0, 39.0]], requires_grad=True)
    logits = softmax_logits(scores)
    torch.testing.assert_close(logits.detach(), torch.tensor([[300.0, -300.0, -600.0], [-40.3133, 1.0, -1.0]]))
    (gradient,) = torch.autograd.grad(logits.sum(), scores)
    assert bool(gradient.isfinite().all())


def _network(outputs=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 11 * 11, outputs))


def test_an_attack_moves_the_label_of_a_softmax_network():
    network = _network()
    labels, read = ("cat", "dog", "hen", "cow"), Preprocess((24, 24))
    classifier = mlperturb.Classifier(SoftmaxLogits(network), labels, preprocess=read)
    photo = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    before = mlperturb.predict(classifier, [photo])[0]
    torch.testing.assert_close(before.sum(), torch.tensor(1.0))
    least = labels[int(before.argmin())]
    result = mlperturb.attack(classifier, [photo], add=least, budget="fast")
    assert bool(result.success[0])
    assert result.after[0][labels.index(least)] >= 0.5
    torch.testing.assert_close(result.after.sum(), torch.tensor(1.0))
    plain = mlperturb.Classifier(network, labels, preprocess=read)
    torch.testing.assert_close(mlperturb.predict(plain, [photo])[0].logit().softmax(0), before)


def test_an_activation_is_sigmoid_or_a_softmax_of_two_labels_or_more():
    network = _network()
    assert apply_activation(network, "sigmoid", 1) is network
    with pytest.raises(UsageError, match="expected `activation` sigmoid or softmax, got 'relu'"):
        mlperturb.load(activation="relu")
    with pytest.raises(CheckpointError, match="expected at least 2 labels of a softmax network, got 1"):
        apply_activation(network, "softmax", 1)
