from __future__ import annotations

import pytest
import torch

from mlperturb.errors import UsageError
from mlperturb.model.preprocess import Preprocess
from mlperturb.training.adversarial import Threat, perturb

PREPROCESS = Preprocess((6, 5), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
MEAN, STD = (torch.tensor(value).view(3, 1, 1) for value in (PREPROCESS.mean, PREPROCESS.std))


def _inputs(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels / 255 - MEAN) / STD


def _pixels(inputs: torch.Tensor) -> torch.Tensor:
    return 255 * (inputs * STD + MEAN)


def _rmsd(change: torch.Tensor) -> torch.Tensor:
    return change.square().mean((1, 2, 3)).sqrt()


def test_a_threat_is_read_from_its_name():
    assert Threat.parse("linf:2") == Threat("linf", 2.0)
    assert Threat.parse("l2:0.5") == Threat("l2", 0.5)


@pytest.mark.parametrize("text", ["linf", "linf:", "linf:0", "linf:-1", "linf:nan", "l2:256", "l1:2", "2", "l2:x"])
def test_what_is_no_threat_is_refused(text):
    with pytest.raises(UsageError, match=r"expected linf:RADIUS or l2:RMSD, above 0 and at most 255, got"):
        Threat.parse(text)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("text", ["linf:3", "l2:3"])
def test_a_linear_loss_rises_as_far_as_the_threat_allows(text, steps):
    """The maximum of a linear loss over the ball has a closed form: radius times the dual norm of its gradient."""
    torch.manual_seed(0)
    pixels, slope = torch.full((2, 3, 6, 5), 128.0), torch.randn(2, 3, 6, 5)
    moved = perturb(
        lambda inputs: (slope * _pixels(inputs)).sum(), _inputs(pixels), Threat.parse(text), PREPROCESS, steps
    )
    change = _pixels(moved) - pixels
    dual = slope.abs().sum((1, 2, 3)) if text.startswith("linf") else 90**0.5 * slope.square().sum((1, 2, 3)).sqrt()
    rise = (slope * change).sum((1, 2, 3)) / (3 * dual)
    size = change.abs().amax((1, 2, 3)) if text.startswith("linf") else _rmsd(change)
    torch.testing.assert_close(size, torch.full((2,), 3.0), atol=1e-3, rtol=0)
    assert float(rise.min()) > (0.9 if steps == 4 else 0.6)


@pytest.mark.parametrize("text", ["linf:9", "l2:9"])
def test_pixels_stay_within_their_range(text):
    pixels = torch.tensor([0.0, 255.0, 2.0]).view(1, 3, 1, 1).expand(2, 3, 6, 5)
    moved = perturb(lambda inputs: -inputs.square().sum(), _inputs(pixels), Threat.parse(text), PREPROCESS, 3)
    assert float(_pixels(moved).min()) > -1e-3
    assert float(_pixels(moved).max()) < 255 + 1e-3


@pytest.mark.parametrize("text", ["linf:2", "l2:2"])
def test_the_start_is_random_and_within_the_radius(text):
    torch.manual_seed(1)
    threat = Threat.parse(text)
    one, other = (threat.draw(torch.zeros(50, 3, 6, 5)) for _ in range(2))
    assert not torch.equal(one, other)
    assert float(one.abs().max() if text.startswith("linf") else _rmsd(one).max()) <= 2 + 1e-5
    assert float(_rmsd(one).std()) > 0.01


@pytest.mark.parametrize("text", ["linf:2", "l2:2"])
def test_a_gradient_of_nothing_moves_nothing_and_a_tiny_gradient_moves_as_far_as_any(text):
    threat = Threat.parse(text)
    assert not threat.ascend(torch.zeros(1, 3, 6, 5), 1.0).any()
    tiny = threat.ascend(torch.full((1, 3, 6, 5), 1e-25), 1.0)
    torch.testing.assert_close(tiny, torch.ones(1, 3, 6, 5))
