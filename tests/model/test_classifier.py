from __future__ import annotations

import pytest
import torch
from torch import nn

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.model.checkpoints import build_network
from mlperturb.model.classifier import Classifier, fold_batch_norm
from mlperturb.model.preprocess import Preprocess

PREPROCESS = Preprocess((8, 8))


def _classifier(thresholds=(0.5, 0.2, 0.9)) -> Classifier:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
    return Classifier(network, ("a", "b", "c"), thresholds, PREPROCESS)


def test_logits_are_those_of_the_network_on_reference_preprocessing():
    classifier = _classifier()
    photo = torch.randint(0, 256, (3, 20, 13), dtype=torch.uint8)
    expected = classifier.network(PREPROCESS.reference()(photo)[None])
    torch.testing.assert_close(classifier(photo[None] / 255), expected, rtol=1e-4, atol=1e-5)


def test_the_boundary_is_the_logit_of_the_threshold():
    torch.testing.assert_close(torch.sigmoid(_classifier().boundary), torch.tensor([0.5, 0.2, 0.9]))
    assert torch.equal(_classifier(None).boundary, torch.zeros(3))


def test_a_photo_gets_the_same_logits_alone_and_in_a_batch_of_mixed_sizes():
    classifier = _classifier()
    photos = [torch.rand(3, *size) for size in [(20, 13), (5, 40), (8, 8)]]
    alone = torch.cat([classifier(photo[None]) for photo in photos])
    torch.testing.assert_close(classifier(photos), alone)


def test_a_backward_pass_reaches_the_photo_and_no_parameter():
    classifier = _classifier()
    photo = torch.rand(1, 3, 20, 13, requires_grad=True)
    classifier(photo).sum().backward()
    assert bool((photo.grad != 0).all())
    assert all(not value.requires_grad and value.grad is None for value in classifier.parameters())


def test_training_mode_is_never_entered():
    classifier = _classifier()
    assert classifier.train() is classifier
    assert not any(module.training for module in classifier.modules())
    photo = torch.rand(1, 3, 9, 9)
    assert torch.equal(classifier(photo), classifier(photo))


def test_selected_photos_of_a_bound_batch_get_their_own_logits():
    classifier = _classifier()
    bound = classifier.bind([(20, 13), (5, 40)])
    batch = torch.zeros(2, 3, 20, 40)
    batch[0, :, :20, :13] = torch.rand(3, 20, 13)
    batch[1, :, :5] = torch.rand(3, 5, 40)
    rows = torch.tensor([1])
    torch.testing.assert_close(bound.select(rows)(batch[rows]), bound(batch)[rows])


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 8, 8, 3)])
def test_images_of_another_layout_are_refused(shape):
    with pytest.raises(UsageError, match="expected images"):
        _classifier()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("labels", "thresholds", "message"),
    [
        (("a", "a"), None, "distinct"),
        ((), None, "distinct"),
        (("a", "b"), (0.5,), "expected 2 thresholds, got 1"),
        (("a", "b"), (0.5, 1.0), "inside"),
        (("a", "b"), (0.0, 0.5), "inside"),
        (("a", "b"), (float("nan"), 0.5), "inside"),
    ],
)
def test_labels_and_thresholds_that_do_not_fit_are_refused(labels, thresholds, message):
    with pytest.raises(CheckpointError, match=message):
        Classifier(nn.Identity(), labels, thresholds)


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "resnet18",
        "inception_v3",
        "shufflenet_v2_x0_5",
        "timm/tf_efficientnet_lite0",
        "timm/test_efficientnet",
        "timm/ghostnet_050",
    ],
)
def test_folding_batch_norm_leaves_logits_and_gradients_as_they_were(name):
    network = build_network(name, 3).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    results = []
    for net in (network, folded):
        images = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
        logits = net(images)
        results.append((logits.detach(), torch.autograd.grad(logits[:, 0].sum(), images)[0]))
    (logits, gradient), (folded_logits, folded_gradient) = results
    torch.testing.assert_close(folded_logits, logits, atol=1e-5 * float(logits.abs().max()), rtol=1e-4)
    assert float((folded_gradient - gradient).norm()) < 1e-3 * float(gradient.norm())


def test_a_network_that_cannot_be_traced_is_used_as_it_is():
    class Branching(nn.Module):
        def forward(self, images):
            return images.flatten(1) if images.sum() > 0 else -images.flatten(1)

    network = Branching()
    assert fold_batch_norm(network) is network


def test_a_normalisation_whose_convolution_is_used_elsewhere_too_is_not_folded():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images):
            once = self.convolution(images)
            return (self.norm(once) + once).flatten(1)

    network = Shared().eval()
    network.norm.running_var.fill_(4)
    images = torch.rand(1, 3, 4, 4)
    folded = fold_batch_norm(network)
    assert torch.equal(folded(images), network(images))
    assert isinstance(folded.norm, nn.BatchNorm2d)
