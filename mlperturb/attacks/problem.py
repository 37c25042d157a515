"""The problem that every attack solves: a batch, its goal and limits, and the count of its passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self, cast

import torch
from torch import Tensor

from mlperturb.attacks.geometry import is_all, norms, spread
from mlperturb.attacks.goals import Goal
from mlperturb.attacks.lattice import PIXELS, Lattice
from mlperturb.errors import UsageError
from mlperturb.model.protocol import Model, Readable, Viewed, narrow
from mlperturb.targets import Targets


@dataclass(frozen=True)
class Meter:
    """The forward and backward passes spent on each image of a batch, and those still owed, on the CPU.

    Attributes:
        forward: forward passes, (N,), counted in place.
        backward: backward passes, (N,), counted in place.
        owed: forward passes that the decision on the file will cost, (N,), set in place. A limit on passes holds with
            them. An attack that has computed every view of its best file owes less.
    """

    forward: Tensor
    backward: Tensor
    owed: Tensor

    @classmethod
    def of(cls, count: int) -> Meter:
        """Return the meter of `count` images, with no passes spent or owed."""
        return cls(*torch.zeros(3, count, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.forward)

    @property
    def spent(self) -> Tensor:
        """Forward and backward passes together, (N,)."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Opening:
    """The forward pass at the clean photos, whose backward pass is still to come.

    Attributes:
        images: the clean photos, (N, 3, H, W), a leaf of the graph.
        logits: their logits in the first view, (N, L), with the graph.
        rows: the places of the images of a problem in it, integers, (n,).
        inputs: the network's input before it is normalised, (N, 3, h, w), in the graph; None if it is not known.
    """

    images: Tensor
    logits: Tensor
    rows: Tensor
    inputs: Tensor | None = None

    @classmethod
    def of(cls, images: Tensor, model: Model | Viewed) -> Opening:
        """Compute the logits of photos, (N, 3, H, W)."""
        leaf = images.detach().requires_grad_()
        places = torch.arange(len(images), device=images.device)
        with torch.enable_grad():
            if not can_read(model):
                return cls(leaf, call(model, leaf, 0), places)
            inputs = cast(Readable, model).resize(leaf)
            return cls(leaf, cast(Readable, model).judge(inputs), places, inputs)

    def select(self, rows: Tensor) -> Opening:
        """Return the opening of some images."""
        return replace(self, rows=self.rows[rows])


def observe(model: Model | Viewed, images: Tensor, *, opening: bool = False) -> tuple[Tensor, Meter, Opening | None]:
    """Look at clean photos in each of V views.

    Args:
        model: maps images in [0, 1] to logits.
        images: the clean photos, (N, 3, H, W).
        opening: keep the graph of the first view, for an attack whose first backward pass is at the clean photos.

    Returns:
        The logits, (N, V, L); the meter that counted the passes; and the opening, or None.
    """
    meter, count = Meter.of(len(images)), views_of(model)
    meter.forward.add_(count * passes_of(model))
    kept = Opening.of(images, model) if opening else None
    with torch.no_grad():
        first = call(model, images, 0) if kept is None else kept.logits.detach()
        return torch.stack([first, *(call(model, images, view) for view in range(1, count))], dim=1), meter, kept


def passes_of(model: Model | Viewed) -> int:
    """Return how many passes of the network a call of the model costs for each image."""
    return int(getattr(model, "passes", 1))


def can_read(model: Model | Viewed) -> bool:
    """Say whether a model is `Readable` and makes a single pass of what it read."""
    return hasattr(model, "judge") and passes_of(model) == 1


def views_of(model: Model | Viewed) -> int:
    """Return how many views a model has; 1 for a model that knows no views."""
    return int(getattr(model, "views", 1))


def sizes_of(model: Model | Viewed, images: Tensor) -> list[tuple[int, int]]:
    """Return the (height, width) of each photo of a batch, as its model knows it; else that of the batch itself."""
    whole = (int(images.shape[2]), int(images.shape[3]))
    return list(getattr(model, "sizes", [whole] * len(images)))


def call(model: Model | Viewed, images: Tensor, view: int) -> Tensor:
    """Return the logits of one view, (n, L)."""
    return model(images) if views_of(model) == 1 else cast(Viewed, model)(images, view)


def each_view(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return a function of logits, (n, L), for every view of (n, V, L), stacked at place 1."""
    return torch.stack([function(logits[:, view]) for view in range(logits.shape[1])], dim=1)


@dataclass(frozen=True)
class Problem:
    """A batch to attack, or some images of it.

    Attributes:
        model: maps images in [0, 1] to logits.
        images: the clean photos x, (n, 3, H, W), in [0, 1].
        goal: the goal of the attack, with a row of targets for each image.
        limit: the most passes for an image, forward and backward together; None for no limit.
        cap: the largest ||x* - x||_2 allowed, in [0, 1] units, (n,); None for no cap.
        bound: the largest ||x* - x||_infinity allowed, in [0, 1] units; None for no bound.
        region: the pixels that may change, 1 or 0, (n, 1, H, W); None for all. Gradients vanish outside it.
        grey: which images have a single channel of colour, boolean, (n,); None for none. Their three channels are
            equal and stay so: gradients are averaged over the channels.
        lattice: the points that the files can hold.
        meter: the passes spent, shared by all parts of the batch; by default a new meter.
        rows: the places of the images in the whole batch, as the meter counts them, (n,), on the CPU; by default all.
        clean: the logits of the clean photos in each of V views, (n, V, L), if they are known, see `observe`.
        opening: the forward pass at the clean photos, if it was kept, see `observe`. It serves a single backward pass.

    Raises:
        UsageError: if the images are not (n, 3, H, W) with a row of targets for each image.
    """

    model: Model | Viewed
    images: Tensor
    goal: Goal
    limit: int | None = None
    cap: Tensor | None = None
    bound: float | None = None
    region: Tensor | None = None
    grey: Tensor | None = None
    lattice: Lattice = PIXELS
    meter: Meter = field(default_factory=lambda: Meter.of(0))
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    clean: Tensor | None = None
    opening: Opening | None = None

    def __post_init__(self) -> None:
        count, wanted = len(self.images), len(self.targets.truth)
        if self.images.dim() != 4 or count != wanted:
            raise UsageError(f"expected images (N, 3, H, W) with {wanted} targets, got {tuple(self.images.shape)}")
        if not len(self.meter):
            object.__setattr__(self, "meter", Meter.of(count))
        if not len(self.rows):
            object.__setattr__(self, "rows", torch.arange(count))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def targets(self) -> Targets:
        """A, B and y of these images."""
        return self.goal.targets

    @property
    def cost(self) -> int:
        """Passes of the network for one call of the model."""
        return passes_of(self.model)

    @property
    def views(self) -> int:
        """In how many views the goal must hold; an attack that knows no views sees the first."""
        return views_of(self.model)

    @property
    def spent(self) -> Tensor:
        """The passes spent on each image, (n,), on the CPU."""
        return self.meter.spent[self.rows]

    def aim(self, goal: Goal) -> Self:
        """Return the same problem with another goal."""
        return replace(self, goal=goal)

    def select(self, rows: Tensor) -> Self:
        """Return the problem of some of these images; `rows` are their places here, integers, (m,)."""
        if is_all(rows, len(self)):
            return self
        return replace(
            self,
            model=narrow(self.model, rows),
            images=self.images[rows],
            goal=self.goal.select(rows),
            cap=None if self.cap is None else self.cap[rows],
            region=None if self.region is None else self.region[rows],
            grey=None if self.grey is None else self.grey[rows],
            lattice=self.lattice.select(rows),
            rows=self.rows[rows.cpu()],
            clean=None if self.clean is None else self.clean[rows],
            opening=None if self.opening is None else self.opening.select(rows),
        )

    def logits(self, images: Tensor, view: int = 0) -> Tensor:
        """Return z in one view, (n, L): one forward pass for each image."""
        self.meter.forward[self.rows] += self.cost
        return call(self.model, images, view)

    def look(self, images: Tensor, views: Tensor) -> Tensor:
        """Return z of each image in a view of its own, (n,); (n, L): one forward pass for each image."""
        self.meter.forward[self.rows] += self.cost
        return self.model(images) if self.views == 1 else cast(Viewed, self.model).look(images, views)

    def in_span(self) -> Self:
        """Return the problem in the coordinates of the network's input, see `mlperturb.model.span`, or else itself.

        They serve large photos on the CPU whose readers all resize by the same linear map, without a bound on single
        pixels, a region, or compressions to survive, in files of 8-bit pixels.
        """
        if self.lattice is not PIXELS or self.bound is not None or self.region is not None or not can_read(self.model):
            return self
        lattice = cast(Readable, self.model).span(self.images)
        return self if lattice is None else replace(self, lattice=lattice)

    def trace(self, points: Tensor, views: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a leaf of the graph, for `gradient`, and z, (n, L): one forward pass for each image.

        The leaf is the points themselves; of 8-bit pixels, the network's input before it is normalised, (n, 3, h, w).

        Args:
            points: the images, (n, 3, H, W), in floats or, if the model can `read`, in 8-bit pixels.
            views: the view of each image, (n,); None for the first.
        """
        if points.dtype == torch.uint8:
            model = cast(Readable, self.model)
            leaf = model.read(points, views).requires_grad_()
            self.meter.forward[self.rows] += self.cost
            return leaf, model.judge(leaf)
        points.requires_grad_()
        return points, self.logits(points) if views is None else self.look(points, views)

    @torch.no_grad()
    def look_at_clean(self) -> Tensor:
        """Return the logits of the clean photos in every view, (n, V, L): a forward pass each if they are unknown."""
        if self.clean is not None:
            return self.clean
        return torch.stack([self.logits(self.images, view) for view in range(self.views)], dim=1)

    def open(self) -> Opening:
        """Return the forward pass at the clean photos, in the first view: one pass for each image, if it is not known.

        A backward pass through it gives a gradient for all images of `Opening.images`; those of this problem are at
        `Opening.rows`.
        """
        if self.opening is not None:
            return self.opening
        self.meter.forward[self.rows] += self.cost
        return Opening.of(self.images, self.model)

    def leaf_of(self, opening: Opening) -> Tensor:
        """Return where the lattice wants the opening's gradient: at the clean photos, or at the network's input."""
        return opening.inputs if opening.inputs is not None and self.lattice.small else opening.images

    def gradient(self, losses: Tensor, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the gradient of each image's own loss, (n,), as (n, 3, H, W): one backward pass for each image.

        Args:
            losses: (n,).
            images: the images of the graph, (N, 3, H, W), or another leaf of it, see `trace`.
            rows: where the images of this problem are among them, integers, (n,); None if they are the same.
        """
        self.meter.backward[self.rows] += self.cost
        gradient = torch.autograd.grad(losses.sum(), images)[0]
        return self.within_region(gradient if rows is None or is_all(rows, len(gradient)) else gradient[rows])

    def jacobian(self, outputs: Tensor, images: Tensor, present: Tensor) -> Tensor:
        """Return d outputs / d images, (n, K, 3, H, W); zero where `present`, (n, K), is false.

        A backward pass is counted for each output present. On CUDA the passes run as one batched pass; on the CPU one
        after the other, which is faster there.
        """
        self.meter.backward[self.rows] += self.cost * present.sum(1).cpu()
        seeds, order = _seeds(outputs, present)
        if outputs.is_cuda:
            packed = torch.autograd.grad(outputs, images, seeds, is_grads_batched=True)[0]
        else:
            packed = torch.stack([torch.autograd.grad(outputs, images, s, retain_graph=True)[0] for s in seeds])
        full = packed.new_zeros(outputs.shape[1], *images.shape)
        rows = torch.arange(len(images), device=images.device).expand(len(seeds), -1)
        full[order, rows] = packed * present.gather(1, order.T).T.view(len(seeds), -1, 1, 1, 1)
        return self.within_region(full.transpose(0, 1))

    def gradient_norms(self, outputs: Tensor, images: Tensor, present: Tensor) -> Tensor:
        """Return ||d outputs / d images||_2, (n, K); 0 where `present`, (n, K), is false.

        The passes are counted and run as those of `jacobian`; on the CPU, a single gradient is in memory. The images
        may be another leaf of the graph, see `trace`.
        """
        if outputs.is_cuda:
            lengths: Tensor = torch.linalg.vector_norm(self.jacobian(outputs, images, present).flatten(2), dim=2)
            return lengths
        self.meter.backward[self.rows] += self.cost * present.sum(1).cpu()
        lengths = torch.zeros_like(outputs)
        for seed, places in zip(*_seeds(outputs, present), strict=True):
            gradient = self.within_region(torch.autograd.grad(outputs, images, seed, retain_graph=True)[0])
            gradient = self.lattice.pull(gradient, images) if self.lattice.small else gradient
            lengths.scatter_(1, places.unsqueeze(1), norms(gradient).unsqueeze(1))
            del gradient  # before the next one is made
        return lengths

    def within_region(self, values: Tensor) -> Tensor:
        """Return gradients or perturbations, (n, ..., 3, H, W), set to 0 outside the region, and grey where asked."""
        between = (1,) * (values.dim() - 4)
        if self.grey is not None:
            values = torch.where(self.grey.view(-1, 1, 1, 1, *between), values.mean(-3, keepdim=True), values)
        return values if self.region is None else values * self.region.view(-1, *between, *self.region.shape[1:])

    @cached_property
    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """The least and the largest value of each pixel, in [0, 1]; they broadcast to (n, 3, H, W)."""
        if self.bound is None:
            return self.images.new_zeros(()), self.images.new_ones(())
        return (self.images - self.bound).clamp(min=0), (self.images + self.bound).clamp(max=1)

    def clip(self, images: Tensor) -> Tensor:
        """Clip iterates, (n, 3, H, W), to the pixel range and the bound."""
        return images.clamp(*self.pixel_range)

    def within_cap(self, images: Tensor) -> Tensor:
        """Scale perturbations, (n, 3, H, W), down to the cap where they are longer; return images; differentiable."""
        if self.cap is None:
            return images
        difference = images - self.images
        share = (self.cap * (1 - 1e-6) / (norms(difference) + 1e-12)).clamp(max=1)
        return self.images + spread(share) * difference

    def affordable(self, passes: int | Tensor) -> Tensor:
        """Return which images may spend so many more calls of the model, (n,), on the images' device."""
        return self._affordable(passes).to(self.images.device)

    def runs_short(self, passes: int) -> bool:
        """Say whether an image may not spend so many more calls; unlike `affordable`, does not wait for the device."""
        return not bool(self._affordable(passes).all())

    def _affordable(self, passes: int | Tensor) -> Tensor:
        limit = torch.iinfo(torch.long).max if self.limit is None else self.limit
        return self.spent + self.meter.owed[self.rows] + self.cost * passes <= limit

    def settle(self, rows: Tensor) -> None:
        """Owe no look at the files of these images, booleans, (n,): every view of them is computed."""
        places, looks = self.rows[rows.cpu()], self.views * getattr(self.model, "networks", 1)
        self.meter.owed[places] = (self.meter.owed[places] - looks).clamp(min=0)

    def iterations_left(self, iterations: int) -> Tensor:
        """Return how many iterations, a backward and a forward pass, each image can afford, 1 to `iterations`, (n,).

        The first forward pass comes before them. What is owed is left out: it falls away if the attack succeeds.
        """
        if self.limit is None:
            return torch.full((len(self),), float(iterations), device=self.images.device)
        left = self.limit - self.spent - self.cost * (self.opening is None)
        return (left // (2 * self.cost)).clamp(1, max(iterations, 1)).to(self.images)


def _seeds(outputs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return the seeds of the backward passes for the outputs `present`, (n, K), of each image.

    Returns:
        The seeds, (S, n, K), each 1 at one output present of each image, 0 for an image that has no more; and the
        places of those outputs, (S, n).
    """
    slots = int(present.sum(1).max())
    order = present.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :slots]
    seeds = torch.zeros(slots, *outputs.shape, dtype=outputs.dtype, device=outputs.device)
    seeds.scatter_(2, order.T.unsqueeze(2), present.gather(1, order).T.unsqueeze(2).to(outputs.dtype))
    return seeds, order.T
