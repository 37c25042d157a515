from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mlperturb.model.span as span
from mlperturb.attacks.ddn import ml_ddn
from mlperturb.attacks.geometry import norms
from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.lattice import PIXELS
from mlperturb.attacks.problem import Problem, observe
from mlperturb.attacks.untargeted import nearest_label
from mlperturb.model.classifier import Classifier
from mlperturb.model.linear import resize_back
from mlperturb.model.preprocess import Preprocess, pad_batch
from mlperturb.model.readers import parse_readers
from mlperturb.model.span import SpanLattice
from mlperturb.model.views import ViewedModel
from mlperturb.photos.purify import Purification
from mlperturb.targets import Targets, decide

READERS = "float,pillow,torchvision"


def _classifier(**fields) -> Classifier:
    torch.manual_seed(3)
    head = nn.Linear(24, 6)
    net = nn.Sequential(nn.Conv2d(3, 6, 5, 2), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head)
    with torch.no_grad():
        head.weight *= 30
    return Classifier(
        net, [f"label {place}" for place in range(6)], preprocess=Preprocess(**{"resize": (24, 32), **fields})
    )


def _problem(sizes=((301, 407), (260, 420)), readers=READERS, opening=True, **fields) -> Problem:
    """Photos, of which the second has saturated pixels; the first label is flipped and the others are kept."""
    classifier = _classifier(**fields)
    generator = torch.Generator().manual_seed(1)
    photos = [torch.rand(3, *(side // 8 for side in size), generator=generator) for size in sizes]
    photos = [nn.functional.interpolate(one[None], size)[0] for one, size in zip(photos, sizes, strict=True)]
    photos[-1] = (photos[-1] * 1.6 - 0.3).clamp(0, 1)
    images, _ = pad_batch([(one * 255).round() / 255 for one in photos])
    model = ViewedModel.bind(classifier, parse_readers(readers.split(",")), sizes)
    clean, meter, opened = observe(model, images, opening=opening)
    truth = decide(clean[:, 0], classifier.boundary)
    flip = torch.zeros_like(truth, dtype=torch.bool)
    flip[:, 0] = True
    goal = ClassificationGoal(Targets(flip, ~flip, truth, classifier.boundary))
    return Problem(model, images, goal, meter=meter, clean=clean, opening=opened)


def _surviving() -> ViewedModel:
    model = _problem().model
    assert isinstance(model, ViewedModel)
    return replace(model, purifications=(Purification("jpeg", 75),))


@pytest.fixture
def spanned() -> tuple[Problem, SpanLattice, torch.Tensor, torch.Tensor]:
    """Return a problem, its lattice, coordinates, and the perturbation that they stand for."""
    problem = _problem().in_span()
    lattice = problem.lattice
    assert isinstance(lattice, SpanLattice)
    latent = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(2))
    inner = torch.stack(
        [rows.inverse @ one @ columns.inverse for one, (rows, columns) in zip(latent, lattice.axes, strict=True)]
    )
    return problem, lattice, latent, resize_back(inner, lattice.linear)


def test_coordinates_are_as_long_as_the_perturbation(spanned):
    _, _, latent, moved = spanned
    torch.testing.assert_close(norms(latent), norms(moved), rtol=1e-4, atol=0)


def test_points_are_those_of_the_pixel_lattice(spanned):
    problem, lattice, latent, moved = spanned
    points = lattice.points(problem.images, latent)
    assert points.dtype == torch.uint8
    expected = (PIXELS.points(problem.images, moved) * 255).round()
    assert (points - expected).abs().max() <= 1  # a value in the middle between two levels may go either way
    assert (points != expected).float().mean() < 1e-4
    assert not points[0, :, 301:].any()
    assert not points[1, :, 260:].any()
    assert not points[0, :, :, 407:].any()


def test_the_gradient_in_coordinates_is_that_of_the_points(spanned):
    problem, lattice, latent, moved = spanned
    gradient = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(4))
    pulled = lattice.pull(gradient, problem.images)
    full = resize_back(gradient, lattice.linear)
    torch.testing.assert_close((pulled * latent).sum((1, 2, 3)), (full * moved).sum((1, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(norms(pulled), norms(full), rtol=1e-4, atol=0)


def test_the_fall_and_the_largest_change_are_those_of_the_pixels(spanned):
    _, lattice, latent, moved = spanned
    gradient = -latent  # as in the first step
    scale = torch.full((2,), 0.02)
    wanted = PIXELS.fall(scale, moved, -moved)
    torch.testing.assert_close(lattice.fall(scale, latent, gradient), wanted, rtol=0.05, atol=0)
    ratio = lattice.largest(latent) / PIXELS.largest(moved)
    assert ((ratio > 0.85) & (ratio < 1 + 1e-4)).all()


def test_some_photos_of_a_batch_have_their_own_lattice(spanned):
    problem, lattice, latent, _ = spanned
    both = lattice.points(problem.images, latent)
    rows = torch.tensor([1])
    assert torch.equal(lattice.select(rows).points(problem.images[rows], latent[rows]), both[rows])


def test_pixels_resize_as_the_floats_that_they_stand_for(spanned):
    problem, lattice, latent, _ = spanned
    points = lattice.points(problem.images, latent)
    torch.testing.assert_close(lattice.linear.down(points), lattice.linear.down(points / 255), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: _problem(sizes=((90, 120),)),
        lambda: _problem(readers="float,opencv:area"),
        lambda: _problem(readers="float,pillow:bicubic"),
        lambda: _problem(square=True),
        lambda: replace(_problem(), bound=0.1),
        lambda: replace(_problem(), region=torch.ones(2, 1, 301, 420)),
        lambda: replace(_problem(), model=_surviving()),
        lambda: replace(_problem(), model=lambda images: images.mean((2, 3))),
    ],
    ids=["small", "opencv", "two filters", "border", "bound", "region", "survive", "no views"],
)
def test_other_problems_stay_among_pixels(changed):
    problem = changed()
    assert problem.in_span() is problem


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("readers", [READERS, "float", "torchvision"])
def test_the_attack_on_large_photos_is_as_good_as_among_pixels(monkeypatch, opening, readers):
    found = ml_ddn(_problem(readers=readers, opening=opening), iterations=40)
    assert found.kept.dtype == torch.uint8
    assert found.met.all()
    problem = _problem(readers=readers)
    for view in range(problem.views):
        assert problem.goal.met(problem.model(found.images, view)).all()
    monkeypatch.setattr(span, "_LARGE", 10**9)
    plain = ml_ddn(problem, iterations=40)
    assert plain.kept.dtype == torch.float32
    here, there = (norms(one.images - problem.images) for one in (found, plain))
    torch.testing.assert_close(here, there, rtol=0.1, atol=0)


def test_a_grey_photo_stays_grey():
    problem = _problem()
    images = problem.images.mean(1, keepdim=True).mul(255).round().div(255).expand(-1, 3, -1, -1).contiguous()
    clean, meter, opening = observe(problem.model, images, opening=True)
    truth = decide(clean[:, 0], problem.targets.boundary)
    goal = ClassificationGoal(replace(problem.targets, truth=truth))
    grey = Problem(
        problem.model, images, goal, meter=meter, clean=clean, opening=opening, grey=torch.tensor([True, True])
    )
    found = ml_ddn(grey, iterations=20)
    assert found.kept.dtype == torch.uint8
    assert (found.kept[:, :1] == found.kept).all()


def test_the_nearest_label_is_that_of_the_gradients_of_the_photos(monkeypatch):
    candidates = torch.ones(2, 6, dtype=torch.bool)
    here = nearest_label(_problem(), candidates)
    monkeypatch.setattr(span, "_LARGE", 10**9)
    assert torch.equal(here, nearest_label(_problem(), candidates))
