from __future__ import annotations

import pytest
import torch
from support.models import TINY_PIXELS
from torch import Tensor, nn

import mlperturb
from mlperturb.errors import CheckpointError
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.trial import bounded, try_network

SIZE = Preprocess(resize=(12, 12))


class Net(nn.Module):
    """A small network; `change` makes something else of its logits."""

    def __init__(self, change=lambda logits, _: logits) -> None:
        super().__init__()
        self.body, self.change = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(400, 2)), change

    def forward(self, photos: Tensor) -> Tensor:
        return self.change(self.body(photos), photos)


class Counting(Net):
    """Counts its calls."""

    calls = 0

    def forward(self, photos: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(photos)


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def classifier(network: nn.Module) -> mlperturb.Classifier:
    return mlperturb.Classifier(network, ["cat", "dog"], preprocess=SIZE)


REFUSED = {
    "a dictionary": (lambda z, _: {"scores": z}, "expected a tensor of logits.* got a dict with scores"),
    "two outputs": (lambda z, _: (z, z), "expected a tensor of logits.* got a tuple of 2"),
    "one number": (lambda z, _: z.sum(1), r"expected logits of shape \(2, 2\).* got \(2,\)"),
    "too many": (lambda z, _: torch.cat([z, z], 1), r"expected logits of shape \(2, 2\).* got \(2, 4\)"),
    "not finite": (lambda z, _: z / 0, "logits are not finite"),
    "detached": (lambda z, _: z.detach(), "no gradient reaches the photo"),
    "a constant": (lambda z, _: torch.zeros_like(z, requires_grad=True), "no gradient reaches the photo"),
    "rounded": (lambda z, _: z * 0 + z.round(), "gradient of the photo is zero everywhere"),
    "nan": (lambda z, x: z + (x.sum((1, 2, 3)) * 0).abs().sqrt()[:, None], "gradient of the photo is not finite"),
    "batch mean": (lambda z, _: z - z.mean(0), "depend on the others in its batch"),
    "dropout": (lambda z, _: nn.functional.dropout(z + 1, 0.5), "change from pass to pass"),
    "noise": (lambda z, _: z + torch.randn_like(z), "change from pass to pass"),
    "wrong size": (lambda z, _: z @ torch.ones(3, 3), "the network fails on photos of 12 x 12: RuntimeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_attacks_cannot_work_on_is_refused_in_a_line(name):
    change, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message) as refused:
        mlperturb.attack(classifier(Net(change)), [TINY_PIXELS], flip=["cat"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [lambda z, _: Output(z), lambda z, _: {"logits": z}, lambda z, _: (z,)])
def test_logits_that_are_clearly_meant_are_found(change):
    torch.manual_seed(1)
    network = Net(change)
    plain = Net()
    plain.load_state_dict(network.state_dict())
    photos = torch.rand(2, 3, 20, 20)
    torch.testing.assert_close(classifier(network)(photos), classifier(plain)(photos))
    try_network(classifier(network))


def test_half_precision_is_refused_with_advice():
    with pytest.raises(CheckpointError, match=r"expected a network in float32.* got float16 .*network\.float\(\)"):
        mlperturb.attack(classifier(Net().half()), [TINY_PIXELS], flip=["cat"])
    assert mlperturb.attack(classifier(Net().half().float()), [TINY_PIXELS], flip="any").status


def test_a_network_is_tried_once_and_its_passes_are_not_counted():
    torch.manual_seed(2)
    counting = Counting()
    tried = classifier(counting)
    before = torch.get_rng_state()
    try_network(tried)
    assert torch.equal(torch.get_rng_state(), before)
    assert counting.calls == 2
    try_network(tried)
    assert counting.calls == 2
    result = mlperturb.attack(tried, [TINY_PIXELS], flip=["cat"], method="fgs", budget="fast")
    assert int(result.passes[0]) <= 2 * (counting.calls - 2)  # a forward pass, with or without a backward pass


def test_the_bundled_classifier_is_not_tried():
    assert mlperturb.load().tried


def test_untrusted_code_gets_at_most_half_of_the_memory():
    with pytest.raises(CheckpointError, match="too much memory"), bounded():
        torch.zeros(10**7, 10**7)
    with bounded():
        torch.zeros(100)
