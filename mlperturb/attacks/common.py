"""What every attack shares: the problem and its count of passes, the goal, the best iterate of each image."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mlperturb.errors import UsageError
from mlperturb.targets import Space, Targets

MAX_COMPARED = 20  # labels whose gradients a non-targeted attack compares


class Model(Protocol):
    """Images in [0, 1], (N, 3, H, W), to logits, (N, L).

    A model whose answer depends on the place of an image in the batch (as one bound to mixed photo sizes does) has a
    method `select(rows)` that returns the model of some images. One call is one pass, or as many as its attribute
    `passes` says.
    """

    def __call__(self, images: Tensor, /) -> Tensor:
        """Return the logits."""
        ...


def narrow(model: Model, rows: Tensor) -> Model:
    """Return the model of some images of the batch: the same one, unless it has a `select`."""
    narrower = getattr(model, "select", None)
    narrowed: Model = narrower(rows) if narrower else model
    return narrowed


class Goal(Protocol):
    """What an attack is after, apart from how it gets there."""

    def violations(self, logits: Tensor) -> Tensor:
        """Return how far each constraint is from holding: positive if violated, -inf if absent; (N, K)."""
        ...

    def met(self, logits: Tensor) -> Tensor:
        """Say for which images every constraint holds, (N,)."""
        ...

    def score(self, logits: Tensor) -> Tensor:
        """Return how good each image is, distortion apart, (N,); images that meet the goal score highest."""
        ...

    def select(self, rows: Tensor) -> Goal:
        """Return the goal of some images."""
        ...


@dataclass(frozen=True)
class ClassificationGoal:
    """Eq. 1: every label of A flipped, every label of B kept; the more constraints hold, the better."""

    targets: Targets
    space: Space = "logit"

    def violations(self, logits: Tensor) -> Tensor:
        """Return y'_j F'_j - c_j of Eq. 4, (N, L)."""
        return self.targets.violations(logits, self.space)

    def met(self, logits: Tensor) -> Tensor:
        """Say for which images every constraint holds, (N,)."""
        return self.targets.holds(logits).all(1)

    def score(self, logits: Tensor) -> Tensor:
        """Count the constraints that hold, (N,)."""
        return self.targets.holds(logits).sum(1).to(logits.dtype)

    def select(self, rows: Tensor) -> ClassificationGoal:
        """Return the goal of some images."""
        return replace(self, targets=self.targets.select(rows))


@dataclass
class Meter:
    """The forward and backward passes spent on each image of a batch, on the CPU.

    Attributes:
        forward: (N,).
        backward: (N,).
        limit: no image may spend more passes, forward and backward together; None for no limit.
    """

    forward: Tensor
    backward: Tensor
    limit: int | None = None


@dataclass(frozen=True)
class Problem:
    """A batch to attack, or some images of it.

    Attributes:
        model: maps images in [0, 1] to logits.
        images: the clean photos x, (n, 3, H, W), in [0, 1].
        targets: A, B and y of these images.
        rows: their places in the whole batch, (n,), on the CPU.
        meter: the passes spent, shared by all parts of the batch.
        cap: the largest ||x* - x||_2 allowed, in [0, 1] units, (n,); None for no cap.
        bound: the largest ||x* - x||_infinity allowed, in [0, 1] units; None for no bound.
        region: the pixels that may change, 1 or 0, (n, 1, H, W); None for all. Gradients vanish outside it.
    """

    model: Model
    images: Tensor
    targets: Targets
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    meter: Meter = field(default_factory=lambda: Meter(torch.empty(0), torch.empty(0)))
    cap: Tensor | None = None
    bound: float | None = None
    region: Tensor | None = None

    @classmethod
    def start(
        cls,
        model: Model,
        images: Tensor,
        targets: Targets,
        *,
        limit: int | None = None,
        cap: Tensor | None = None,
        bound: float | None = None,
        region: Tensor | None = None,
    ) -> Problem:
        """Return the problem of a whole batch, nothing spent.

        Raises:
            UsageError: if the images are not (N, 3, H, W) with one row of targets each.
        """
        if images.dim() != 4 or len(images) != len(targets.truth):
            shape = tuple(images.shape)
            raise UsageError(f"expected images (N, 3, H, W) with {len(targets.truth)} targets, got {shape}")
        count = len(images)
        meter = Meter(torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long), limit)
        return cls(model, images, targets, torch.arange(count), meter, cap, bound, region)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def cost(self) -> int:
        """Passes of the network for one call of the model."""
        return int(getattr(self.model, "passes", 1))

    def select(self, keep: Tensor) -> Problem:
        """Return the problem of some of these images: `keep` is boolean, (n,)."""
        chosen = keep.nonzero().flatten()
        return Problem(
            narrow(self.model, chosen),
            self.images[chosen],
            self.targets.select(chosen),
            self.rows[chosen.cpu()],
            self.meter,
            None if self.cap is None else self.cap[chosen],
            self.bound,
            None if self.region is None else self.region[chosen],
        )

    def logits(self, images: Tensor) -> Tensor:
        """Return z, (n, L): one forward pass for each image."""
        self.meter.forward[self.rows] += self.cost
        return self.model(images)

    def gradient(self, losses: Tensor, images: Tensor) -> Tensor:
        """Return the gradient of each image's own loss, (n,), at `images`: one backward pass for each."""
        self.meter.backward[self.rows] += self.cost
        return self.within_region(torch.autograd.grad(losses.sum(), images)[0])

    def jacobian(self, outputs: Tensor, images: Tensor, present: Tensor) -> Tensor:
        """Return d outputs / d images, (n, K, 3, H, W); zero where `present`, (n, K), is false.

        A backward pass is counted for each output present. On CUDA they run as one batched pass; on the CPU, where
        that measures slower, one after the other.
        """
        self.meter.backward[self.rows] += self.cost * present.sum(1).cpu()
        slots = int(present.sum(1).max())
        order = present.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
        seeds = torch.zeros(slots, *outputs.shape, dtype=outputs.dtype, device=outputs.device)
        seeds.scatter_(2, order.T.unsqueeze(2), present.gather(1, order).T.unsqueeze(2).to(outputs.dtype))
        if outputs.is_cuda:
            packed = torch.autograd.grad(outputs, images, seeds, is_grads_batched=True)[0]
        else:
            packed = torch.stack([torch.autograd.grad(outputs, images, s, retain_graph=True)[0] for s in seeds])
        full = packed.new_zeros(outputs.shape[1], *images.shape)
        rows = torch.arange(len(images), device=images.device).expand(slots, -1)
        full[order.T, rows] = packed * present.gather(1, order).T.view(slots, -1, 1, 1, 1)
        jacobian = full.transpose(0, 1)
        return jacobian if self.region is None else jacobian * self.region.unsqueeze(1)

    def within_region(self, values: Tensor) -> Tensor:
        """Return gradients or perturbations, (n, 3, H, W), that are 0 where nothing may change."""
        return values if self.region is None else values * self.region

    @cached_property
    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value that each pixel may take, to be broadcast to (n, 3, H, W)."""
        if self.bound is None:
            return self.images.new_zeros(()), self.images.new_ones(())
        return (self.images - self.bound).clamp(min=0), (self.images + self.bound).clamp(max=1)

    def clip(self, images: Tensor) -> Tensor:
        """Clip iterates, (n, 3, H, W), to the pixel range and the bound."""
        return images.clamp(*self.pixel_range)

    def within_cap(self, images: Tensor) -> Tensor:
        """Pull iterates, (n, 3, H, W), back toward the clean photos until none lies beyond the cap; differentiable."""
        if self.cap is None:
            return images
        difference = images - self.images
        share = (self.cap * (1 - 1e-6) / (norms(difference) + 1e-12)).clamp(max=1)
        return self.images + spread(share) * difference

    def affordable(self, passes: int | Tensor) -> Tensor:
        """Say which images may spend so many more calls of the model, (n,), on the images' device."""
        return self._affordable(passes).to(self.images.device)

    def runs_short(self, passes: int) -> bool:
        """Say whether some image may not spend so many more calls; unlike `affordable`, never waits for the device."""
        return not bool(self._affordable(passes).all())

    def _affordable(self, passes: int | Tensor) -> Tensor:
        spent = (self.meter.forward + self.meter.backward)[self.rows]
        limit = torch.iinfo(torch.long).max if self.meter.limit is None else self.meter.limit
        return spent + self.cost * passes <= limit

    def iterations_left(self, iterations: int) -> Tensor:
        """Return how many iterations of two calls each image may still have, (n,), at most so many."""
        if self.meter.limit is None:
            return torch.full((len(self),), float(iterations), device=self.images.device)
        spent = (self.meter.forward + self.meter.backward)[self.rows]
        return ((self.meter.limit - spent) // (2 * self.cost)).clamp(1, max(iterations, 1)).to(self.images)


class Best:
    """The best iterate of each image of a batch: the highest score, then the least L2 distortion, within the cap.

    Attributes:
        images: (N, 3, H, W); the clean photos until something better comes.
        score: (N,), of `Goal.score`.
        norm: ||x* - x||_2 in [0, 1] units, (N,).
        met: whether the goal is met, (N,).
    """

    def __init__(self, images: Tensor) -> None:
        count = len(images)
        self.images = images.clone()
        self.score = images.new_full((count,), -torch.inf)
        self.norm = images.new_full((count,), torch.inf)
        self.met = torch.zeros(count, dtype=torch.bool, device=images.device)

    @torch.no_grad()
    def update(self, problem: Problem, goal: Goal, images: Tensor, logits: Tensor) -> Tensor:
        """Take over the iterates that beat those held; return which images meet the goal now, (n,)."""
        rows = problem.rows.to(images.device)
        score, norm, met = goal.score(logits), norms(images - problem.images), goal.met(logits)
        held_score, held_norm = self.score[rows], self.norm[rows]
        better = (score > held_score) | ((score == held_score) & (norm < held_norm))
        if problem.cap is not None:
            better &= norm <= problem.cap
        self.score[rows] = torch.where(better, score, held_score)
        self.norm[rows] = torch.where(better, norm, held_norm)
        self.met[rows] = torch.where(better, met, self.met[rows])
        self.images[rows] = torch.where(spread(better), images, self.images[rows])
        return met


@dataclass(frozen=True)
class Outcome:
    """What an attack found.

    Attributes:
        images: the best iterates x*, float, in [0, 1], (N, 3, H, W).
        met: whether the goal is met, (N,).
        goal: what the attack was after; the search for an 8-bit photo is after the same.
        on_lattice: whether the images are 8-bit already, found with the rounding inside the attack.
    """

    images: Tensor
    met: Tensor
    goal: Goal
    on_lattice: bool = False


def to_lattice(images: Tensor) -> Tensor:
    """Round images in [0, 1] to multiples of 1/255."""
    return (images * 255).round().clamp(0, 255) / 255


def norms(images: Tensor) -> Tensor:
    """Return the L2 norm of each image, (n,)."""
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths


def spread(values: Tensor) -> Tensor:
    """Shape one value an image, (n,), to meet images, (n, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def nearest_label(problem: Problem, candidates: Tensor, *, compared: int = MAX_COMPARED) -> Tensor:
    """Return, for a non-targeted attack (Section II), the label nearest to its threshold, one-hot boolean, (N, L).

    Nearest is by the linearised distance |z_j - logit(t_j)| / ||grad z_j||, as DeepFool measures it.

    Args:
        problem: the batch.
        candidates: labels that may be flipped, boolean, (N, L).
        compared: how many of them, those of the least |z_j - logit(t_j)|, are compared: a backward pass each.
    """
    images = problem.images.clone().requires_grad_()
    logits = problem.logits(images)
    margins = (logits.detach() - problem.targets.boundary).abs().masked_fill(~candidates, torch.inf)
    least = margins.argsort(1).argsort(1) < max(compared, 1)
    gradients = torch.linalg.vector_norm(problem.jacobian(logits, images, candidates & least).flatten(2), dim=2)
    nearest = (margins / gradients.clamp(min=1e-12)).masked_fill(~(candidates & least), torch.inf).argmin(1)
    chosen = torch.zeros_like(candidates)
    chosen[torch.arange(len(chosen), device=chosen.device), nearest] = True
    return chosen & candidates
