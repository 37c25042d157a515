"""Models with known answers, targets with empty sets, and every attack with a quick tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mlperturb.attacks.carlini_wagner import ml_cw
from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.deepfool import ml_dp
from mlperturb.attacks.fast_gradient import fg, fgs
from mlperturb.attacks.ranking import rank_1, rank_2
from mlperturb.attacks.schedule import FAST
from mlperturb.targets import Targets, decide

# Labels of the fixture `tiny`, and a photo in which it finds cat and potted plant.
TINY_LABELS = ("cat", "dog", "potted plant", "hen")
TINY_PIXELS = np.random.default_rng(1).integers(0, 256, (30, 36, 3), dtype=np.uint8)

# Every method, in every variant that runs other code, with a quick tuning.
ATTACKS: dict[str, Callable] = {
    "ml-ddn": lambda problem: ml_ddn(problem, iterations=20),
    "ml-ddn after": lambda problem: ml_ddn(problem, rounding="after", iterations=20),
    "fgs": lambda problem: fgs(problem, grid=8, refinements=3),
    "fg": lambda problem: fg(problem, grid=8, refinements=3),
    "ml-cw": lambda problem: ml_cw(problem, schedule=FAST),
    "ml-cw probability": lambda problem: ml_cw(problem, space="probability", schedule=FAST),
    "ml-dp nnls": lambda problem: ml_dp(problem, iterations=5),
    "ml-dp pinv": lambda problem: ml_dp(problem, solver="pinv", space="probability", iterations=5, stop_when_met=False),
    "rank-1": lambda problem: rank_1(problem, schedule=FAST),
    "rank-1 threshold": lambda problem: rank_1(problem, between="threshold", schedule=FAST),
    "rank-2": lambda problem: rank_2(problem, between="none", schedule=FAST),
}


@dataclass(frozen=True)
class Linear:
    """z = W flat(x) + b."""

    weight: Tensor  # (L, d)
    bias: Tensor  # (L,)

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Views:
    """A network in V views: view v sees v times `fade` less contrast, and adds row v of `offsets` to the logits."""

    net: Callable[[Tensor], Tensor]
    offsets: Tensor  # (V, L)
    fade: float = 0.0

    @property
    def views(self) -> int:
        """The number of views, V."""
        return len(self.offsets)

    def __call__(self, images: Tensor, view: int = 0) -> Tensor:
        return self.look(images, torch.full((len(images),), view))

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        contrast = (1 - self.fade * views).to(images).view(-1, 1, 1, 1)
        return self.net((images - 0.5) * contrast + 0.5) + self.offsets[views]


def linear_problem(
    count: int, labels: int, *, size: tuple[int, int] = (4, 4), seed: int = 0, scale: float = 1.0, dtype=torch.double
) -> tuple[Linear, Tensor, Tensor]:
    """Return a linear model, mid-grey photos and their labels; a small step crosses every margin."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.01 * torch.randn(count, 3, *size, generator=generator, dtype=dtype)
    weight = scale * torch.randn(labels, images[0].numel(), generator=generator, dtype=dtype)
    centre = torch.full_like(images[:1], 0.5)
    margin = (0.4 + 0.5 * torch.rand(labels, generator=generator, dtype=dtype)) * weight[:, -1].sign()
    model = Linear(weight, scale * margin - centre.flatten() @ weight.T)
    return model, images, decide(model(images), torch.zeros(labels, dtype=dtype))


def mask(count: int, labels: int, chosen: list[int]) -> Tensor:
    """Return a mask of these labels, the same for every image."""
    result = torch.zeros(count, labels, dtype=torch.bool)
    result[:, chosen] = True
    return result


def make_net(labels: int = 6, *, seed: int = 1, dtype=torch.double) -> nn.Module:
    """Return a small, smooth network whose logits come with both signs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(labels)
        ).to(dtype)
        images = torch.rand(64, 3, 10, 10, dtype=dtype)
        head = net[-1]
        assert isinstance(head, nn.LazyLinear)
        with torch.no_grad():
            head.initialize_parameters(net[:-1](images))
            head.reset_parameters()
            head.weight.mul_(6)
            head.bias.sub_(net(images).mean(0))
    return net.eval().requires_grad_(False)


def ragged_targets(net: nn.Module, labels: int = 6, *, dtype=torch.double, margin: float = 0.0):
    """Return 9 photos and targets in which A_1, A_-1, B_1, B_-1 and C are empty for some photos."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(400, 3, 10, 10, generator=generator, dtype=dtype)
    boundary = torch.zeros(labels, dtype=dtype)
    truth = decide(net(images), boundary)
    mixed = ((truth > 0).sum(1) >= 2) & ((truth < 0).sum(1) >= 2)
    images, truth = images[mixed][:9], truth[mixed][:9]
    assert len(images) == 9
    positive, first = truth > 0, torch.zeros_like(truth, dtype=torch.bool)
    first[:, 0] = True
    one_positive = positive & (positive.cumsum(1) == 1)
    one_negative = ~positive & ((~positive).cumsum(1) == 1)
    rows = [
        (one_positive, ~one_positive),  # C and A_-1 empty
        (one_negative, ~one_negative),  # C and A_1 empty
        (one_positive | one_negative, ~(one_positive | one_negative)),
        (one_positive, first & False),  # B empty
        (first | True, first & False),  # B and C empty
        (one_negative, positive),  # B_-1 empty
        (one_positive, ~positive),  # B_1 empty
        (positive, ~positive),  # A = A_1, B = B_-1
        (first, first & False),
    ]
    flip = torch.stack([rows[number][0][number] for number in range(9)])
    keep = torch.stack([rows[number][1][number] for number in range(9)])
    return images, Targets(flip, keep, truth, boundary, margin)
