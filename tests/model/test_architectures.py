"""The networks that a checkpoint may name, of torchvision and of timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from mlperturb.errors import CheckpointError
from mlperturb.model.architectures import build_network, check_architecture, default_preprocess
from mlperturb.model.checkpoints import Metadata, load_checkpoint, read_tensors, save_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import VOC_LABELS
from mlperturb.training.probe import find_head

LABELS = ("cat", "dog", "person")


def test_a_network_of_timms_has_as_many_logits_as_asked_for():
    network = build_network("timm/test_efficientnet", 5)
    assert network(torch.rand(2, 3, 40, 40)).shape == (2, 5)
    assert find_head(network)[0] == "classifier"


@pytest.mark.parametrize(
    "name", ["timm/", "timm/nothing", "timm/hf-hub:timm/resnet18", "timm/resnet18.a1_in1k", "timm/../resnet18"]
)
def test_a_name_that_timm_does_not_list_is_refused_and_nothing_is_downloaded(name, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    with pytest.raises(CheckpointError, match="unknown architecture"):
        build_network(name, 3)


def test_a_model_that_timm_alone_has_is_suggested_under_its_full_name():
    with pytest.raises(CheckpointError, match=r"did you mean timm/tf_efficientnet_lite2[?]"):
        check_architecture("tf_efficientnet_lite2")


def test_what_timm_cannot_build_is_a_checkpoint_error(monkeypatch):
    def fail(*_: object, **__: object) -> nn.Module:
        raise NotImplementedError("no such thing on the meta device")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(CheckpointError, match="timm cannot build timm/test_vit: no such thing"):
        build_network("timm/test_vit", 3, meta=True)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_weights_fine_tuned_from_torchvisions_give_the_logits_of_torchvisions_own_module(name, tmp_path):
    """torchvision builds its pretrained networks with `transform_input`, which no state dict records."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = models.get_model(name, weights=None, init_weights=False, aux_logits=True, transform_input=True).eval()
        theirs.fc = nn.Linear(theirs.fc.in_features, 3)
    torch.save(theirs.state_dict(), tmp_path / "tuned.pt")
    classifier, _ = load_checkpoint(tmp_path / "tuned.pt", architecture=name, labels=LABELS)
    photo = torch.rand(3, 400, 350)
    expected = theirs(models.get_model_weights(name).DEFAULT.transforms()(photo)[None])
    torch.testing.assert_close(classifier(photo[None]), expected, atol=1e-5, rtol=1e-4)
    assert expected.std() > 1e-3


def test_default_preprocessing_is_that_of_timms_weights():
    lite = default_preprocess("timm/tf_efficientnet_lite2")
    assert (lite.resize, lite.crop, lite.interpolation) == (292, (260, 260), "bicubic")
    assert lite.mean == lite.std == (0.5, 0.5, 0.5)
    assert default_preprocess("timm/resnet18").mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_vit_relpos"])
def test_a_checkpoint_of_a_network_of_timms_gives_the_same_logits_when_loaded(name, tmp_path):
    """The second has buffers that no file holds."""
    side = 160 if "vit" in name else 40
    network = build_network(name, 3).eval()
    path = tmp_path / "x.safetensors"
    preprocess = Preprocess((side, side))
    save_checkpoint(path, network.state_dict(), Metadata(name, LABELS, (0.5,) * 3, preprocess.to_dict()))
    classifier, metadata = load_checkpoint(path)
    images = torch.rand(2, 3, 50, 60)
    expected = Classifier(network, LABELS, None, preprocess)(images)
    torch.testing.assert_close(classifier(images), expected, atol=1e-5, rtol=1e-4)
    assert metadata.architecture == name
    assert not any(value.is_meta for value in [*classifier.buffers(), *classifier.parameters()])
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == ("vit" not in name)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())  # folded


def test_plain_weights_of_a_network_of_timms_load_with_its_own_preprocessing(tmp_path):
    network = build_network("timm/test_efficientnet", 3)
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    classifier, _ = load_checkpoint(tmp_path / "plain.pt", architecture="timm/test_efficientnet", labels=LABELS)
    assert classifier.preprocess == default_preprocess("timm/test_efficientnet")
    with pytest.raises(CheckpointError, match="expected a head of 2 outputs, one for each label, got 3"):
        load_checkpoint(tmp_path / "plain.pt", architecture="timm/test_efficientnet", labels=LABELS[:2])
    assert read_tensors(tmp_path / "plain.pt")["classifier.bias"].shape == (3,)


def test_the_lite2_checkpoint_of_the_repository_loads_folded_with_its_figures():
    path = Path(__file__).resolve().parents[2] / "weights" / "voc-efficientnet-lite2.safetensors"
    classifier, metadata = load_checkpoint(path)
    assert classifier.labels == VOC_LABELS
    assert classifier.preprocess.resize == (288, 288)
    assert metadata.metrics["VOC2012 val"]["map"] > 0.85
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())
    assert bool(classifier(torch.rand(1, 3, 60, 80)).isfinite().all())
