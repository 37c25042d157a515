from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_PIXELS
from torch import Tensor
from torchvision.transforms import v2

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem, observe
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import pad_batch
from mlperturb.model.readers import parse_readers
from mlperturb.model.views import ViewedModel, read_logits, repeat_targets
from mlperturb.photos.purify import Purification
from mlperturb.targets import Targets

READERS = parse_readers(["float", "pillow", "torchvision", "pillow:bicubic", "float:no-antialias"])
SIZES = [(30, 36), (21, 44), (64, 13), (40, 40), (5, 3)]
COMPRESSED = (Purification("jpeg", 40), Purification("median", 3))


@pytest.fixture
def classifier(tiny) -> Classifier:
    return load_checkpoint(tiny, device="cpu")[0]


def make_photos() -> list[np.ndarray]:
    """Return 8-bit photos, (H, W, 3)."""
    rows = [np.resize(np.roll(TINY_PIXELS, 7 * number, 0), (*size, 3)) for number, size in enumerate(SIZES)]
    return [np.ascontiguousarray(row) for row in rows]


def to_batch(photos: list[np.ndarray]) -> tuple[Tensor, list[tuple[int, int]]]:
    return pad_batch([torch.from_numpy(photo).permute(2, 0, 1).float() / 255 for photo in photos])


def by_library(classifier: Classifier, photo: np.ndarray, name: str) -> Tensor:
    """Return the logits, (L,), with the resize of the library itself; the network expects (x - 0.5) / 0.5."""
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    if name.startswith("pillow"):
        kernel = Image.Resampling.BICUBIC if name.endswith("bicubic") else Image.Resampling.BILINEAR
        resized = torch.from_numpy(np.array(Image.fromarray(photo).resize((40, 40), kernel))).permute(2, 0, 1) / 255
    elif name == "torchvision":
        resized = v2.Resize([40, 40], antialias=True)(tensor) / 255
    else:
        resized = v2.Resize([40, 40], antialias=name == "float")(tensor / 255)
    with torch.no_grad():
        logits: Tensor = classifier.network(((resized - 0.5) / 0.5)[None])[0]
    return logits


@pytest.mark.parametrize("number", range(len(READERS)))
def test_each_view_is_the_library_s_own_resize_and_the_network(classifier, number):
    photos, name = make_photos(), READERS[number].name
    batch, sizes = to_batch(photos)
    model = ViewedModel.bind(classifier, READERS, sizes)
    assert (model.views, model.passes) == (5, 1)
    logits = model(batch, number)
    for photo, row in zip(photos, logits, strict=True):
        expected = by_library(classifier, photo, name)
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(read_logits(classifier, photo, READERS[number])[0], expected, atol=2e-4, rtol=0)


def test_views_of_one_photo_differ_and_not_by_much(classifier):
    batch, sizes = to_batch(make_photos())
    model = ViewedModel.bind(classifier, READERS[:3], sizes)
    logits = torch.stack([model(batch, view) for view in range(3)])
    assert 1e-3 < float((logits[0] - logits[1]).abs().max()) < 3
    assert float((logits[1] - logits[2]).abs().max()) > 1e-4


@pytest.mark.parametrize("purifications", [(), COMPRESSED], ids=["alone", "compressed"])
def test_a_look_at_mixed_views_equals_a_call_for_each(classifier, purifications):
    batch, sizes = to_batch(make_photos())
    model = ViewedModel.bind(classifier, READERS, sizes, purifications)
    for views in ([0, 1, 2, 3, 4], [4, 0, 4, 1, 1], [2] * 5):
        looked = model.look(batch, torch.tensor(views))
        for row, view in enumerate(views):
            torch.testing.assert_close(looked[row], model(batch, view)[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("purifications", [(), COMPRESSED], ids=["alone", "compressed"])
def test_some_photos_of_a_batch_are_seen_as_they_were_in_it(classifier, purifications):
    batch, sizes = to_batch(make_photos())
    model = ViewedModel.bind(classifier, READERS, sizes, purifications)
    rows = torch.tensor([4, 1, 2])
    part = model.select(rows)
    assert part.sizes == tuple(sizes[row] for row in rows.tolist())
    for view in range(model.views):
        torch.testing.assert_close(part(batch[rows], view), model(batch, view)[rows], atol=1e-4, rtol=0)
    views = torch.tensor([3, 1, 0])
    expected = torch.stack([model(batch, view)[row] for row, view in zip(rows, views.tolist(), strict=True)])
    torch.testing.assert_close(part.look(batch[rows], views), expected, atol=1e-4, rtol=0)
    last = part.select(torch.tensor([2])).look(batch[[2]], views[2:])
    torch.testing.assert_close(last, expected[2:], atol=1e-4, rtol=0)


def test_a_look_has_the_gradient_of_each_photo_s_own_view(classifier):
    batch, sizes = to_batch(make_photos())
    model = ViewedModel.bind(classifier, READERS[:3], sizes)
    views = torch.tensor([2, 0, 1, 1, 0])
    together = batch.clone().requires_grad_()
    (seen,) = torch.autograd.grad(model.look(together, views)[:, 0].sum(), together)
    for row, view in enumerate(views.tolist()):
        alone = batch.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(model(alone, view)[row, 0], alone)
        assert float(wanted[row].abs().max()) > 0
        torch.testing.assert_close(seen[row], wanted[row], atol=1e-3, rtol=1e-3)


def test_a_compressed_photo_is_read_by_every_reader(classifier):
    photos = make_photos()
    batch, sizes = to_batch(photos)
    model = ViewedModel.bind(classifier, READERS[:3], sizes, COMPRESSED)
    assert (model.views, model.passes) == (3, 3)
    for view, reader in enumerate(READERS[:3]):
        logits = model(batch, view)
        assert logits.shape == (5, 12)
        for photo, row in zip(photos, logits, strict=True):
            seen = [photo, *(one.apply(photo)[0] for one in COMPRESSED)]
            expected = torch.cat([by_library(classifier, one, reader.name) for one in seen])
            torch.testing.assert_close(row, expected, atol=2e-4, rtol=0)


def test_the_passes_of_views_and_compressions_are_counted(classifier):
    calls: list[int] = []
    classifier.network.register_forward_hook(lambda _, __, output: calls.append(len(output)))
    batch, sizes = to_batch(make_photos())
    model = ViewedModel.bind(classifier, READERS[:3], sizes, COMPRESSED)
    clean, meter, _ = observe(model, batch)
    assert clean.shape == (5, 3, 12)
    assert meter.forward.tolist() == [9] * 5
    assert sum(calls) == 45
    signs = torch.ones(5, 4)
    targets = repeat_targets(Targets(signs > 0, signs < 0, signs, torch.tensor([0.1, 0.2, 0.3, 0.4])), 3)
    assert targets.flip.shape == targets.keep.shape == targets.truth.shape == (5, 12)
    assert targets.boundary.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4] * 3)
    problem = Problem(model, batch, ClassificationGoal(targets), limit=18, clean=clean, meter=meter)
    calls.clear()
    variable = batch.clone().requires_grad_()
    problem.gradient(problem.look(variable, torch.tensor([0, 1, 2, 0, 1])).sum(1), variable)
    assert sum(calls) == 15
    assert meter.forward.tolist() == [12] * 5
    assert meter.backward.tolist() == [3] * 5
    assert problem.affordable(1).all()
    assert not problem.affordable(2).any()
