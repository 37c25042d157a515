from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlperturb.errors import CheckpointError, DatasetError, OutputError
from mlperturb.metrics import classifier_metrics
from mlperturb.model.checkpoints import build_network, load_checkpoint, read_metadata, read_tensors, save_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import Dataset
from mlperturb.training import train as training
from mlperturb.training.fitter import Fitter, Progress, Recipe
from mlperturb.training.loading import PhotoDataset, augmentation, predict_dataset
from mlperturb.training.probe import find_head
from mlperturb.training.train import initialise, train

ARCHITECTURE = "shufflenet_v2_x0_5"
RECIPE = Recipe(ARCHITECTURE, epochs=2, batch_size=4, learning_rate=2e-3, size=32, average=0.5, seed=3)


def test_initialising_copies_what_fits_and_later_files_win(tmp_path):
    torch.manual_seed(1)
    network = build_network(ARCHITECTURE, 2)
    own = {name: value.clone() for name, value in network.state_dict().items()}
    first = {"conv1.0.weight": torch.ones(24, 3, 3, 3), "fc.weight": torch.ones(1000, 1024), "other": torch.ones(1)}
    torch.save(first, tmp_path / "first.pt")
    torch.save({"fc.bias": torch.full((2,), 7.0).double()}, tmp_path / "second.pt")
    torch.save({"fc.bias": torch.full((2,), 8.0)}, tmp_path / "third.pt")
    names = initialise(network, [tmp_path / name for name in ("first.pt", "second.pt", "third.pt")])
    assert names == {"first.pt": {"conv1.0.weight"}, "second.pt": {"fc.bias"}, "third.pt": {"fc.bias"}}
    state = network.state_dict()
    assert bool((state["conv1.0.weight"] == 1).all())
    assert state["fc.bias"].tolist() == [8, 8]
    assert torch.equal(state["fc.weight"], own["fc.weight"])


def test_initial_weights_of_which_nothing_fits_are_refused(tmp_path):
    torch.save({"other": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt has no tensor that fits"):
        initialise(nn.Linear(2, 2), [tmp_path / "x.pt"])


def test_the_head_is_the_last_linear_layer():
    assert find_head(build_network("mobilenet_v3_small", 5, meta=True))[0] == "classifier.3"
    assert find_head(build_network("inception_v3", 5, meta=True))[0] == "fc"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    """Make twelve photos of mixed sizes: `red` ones are red, `bright` ones bright; one label is difficult."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    paths, truth = [], []
    for number in range(12):
        red, bright = number % 2, number // 2 % 2
        pixels = random.integers(0, 60, (30 + number, 45 - number, 3)) + 120 * bright
        pixels[..., 0] += 70 * red
        paths.append(folder / f"{number:02}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
        truth.append([2 * red - 1, 2 * bright - 1])
    truth[5][1] = 0
    return Dataset(tuple(paths), ("red", "bright"), np.array(truth, dtype=np.int8))


@pytest.fixture(scope="module")
def start(data, tmp_path_factory) -> Path:
    """Save random weights whose batch statistics are those of the photos, so that features tell photos apart."""
    torch.manual_seed(5)
    network = build_network(ARCHITECTURE, 2)
    photos = PhotoDataset(data, Preprocess((32, 32)).reference())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over what was seen
            module.reset_running_stats()
    network(torch.stack([photos[number][0] for number in range(12)]))
    path = tmp_path_factory.mktemp("weights") / "start.pt"
    torch.save(network.state_dict(), path)
    return path


def _train(recipe: Recipe, data: Dataset, output: Path, **options):
    return train(recipe, data, data, {"again": data}, output=output, **options)


def test_a_photo_and_its_labels_come_together(data):
    inputs, truth = PhotoDataset(data, Preprocess((8, 8)).reference())[3]
    assert inputs.shape == (3, 8, 8)
    assert truth.tolist() == data.truth[3].tolist()


def test_augmentation_is_random_in_torch_and_gives_network_input():
    photo = torch.randint(0, 256, (3, 50, 40), dtype=torch.uint8)
    transform = augmentation(Preprocess((16, 16)), (16, 24))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(photo))
    assert results[0].shape == (3, 16, 24)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert float(results[0].abs().max()) <= 1


def test_predictions_of_a_data_set_do_not_depend_on_the_batch_size(data):
    network = build_network(ARCHITECTURE, 2)
    preprocess = Preprocess((32, 32))
    one, all_at_once = (
        predict_dataset(network, data, preprocess, device="cpu", batch_size=size).clone() for size in (1, 64)
    )
    assert one.shape == (12, 2)
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_only", [False, True])
def test_training_lowers_the_loss_and_writes_a_checkpoint_that_loads(data, start, tmp_path, head_only):
    recipe = replace(RECIPE, epochs=12, batch_size=12, head_only=head_only, learning_rate=1e-2, average=0.0)
    steps = []
    output = tmp_path / "new" / "folder" / "model.safetensors"
    metadata = _train(recipe, data, output, initial=[start], provenance={"data": "made up"}, report=steps.append)
    losses = [step.loss for step in steps if step.validation is None]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert [step.epoch for step in steps if step.validation is not None] == [2, 4, 6, 8, 10]
    classifier, read = load_checkpoint(output)
    assert isinstance(classifier, Classifier)
    assert classifier.labels == ("red", "bright")
    assert classifier.preprocess == Preprocess((32, 32))
    assert read.metrics == metadata.metrics
    assert read.provenance == {"data": "made up", "recipe": metadata.provenance["recipe"]}
    logits = predict_dataset(classifier.network, data, classifier.preprocess, device="cpu")
    measured = classifier_metrics(logits, torch.from_numpy(data.truth), torch.zeros(2), data.labels)
    assert measured == read.metrics["again"]


def test_training_the_head_alone_leaves_the_rest_as_it_was(data, start, tmp_path):
    _train(replace(RECIPE, head_only=True), data, tmp_path / "m.safetensors", initial=[start])
    trained = read_tensors(tmp_path / "m.safetensors")
    changed = {name for name, value in read_tensors(start).items() if not torch.allclose(trained[name], value)}
    assert changed == {"fc.weight", "fc.bias"}


def test_the_calibrating_bias_is_added_to_the_head_and_to_nothing_else(data, start, tmp_path, monkeypatch):
    recipe = replace(RECIPE, epochs=1, head_only=True)
    for name, bias in (("plain", [0.0, 0.0]), ("moved", [5.0, -3.0])):
        monkeypatch.setattr(training, "calibrate", lambda *_, bias=bias: torch.tensor(bias))
        _train(recipe, data, tmp_path / f"{name}.safetensors", initial=[start])
    plain, moved = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("plain", "moved"))
    torch.testing.assert_close(moved.pop("fc.bias") - plain.pop("fc.bias"), torch.tensor([5.0, -3.0]))
    assert all(torch.equal(moved[name], value) for name, value in plain.items())


class _InterruptedError(Exception):
    pass


def _interrupt(recipe: Recipe, data: Dataset, output: Path, **options) -> None:
    """Train, and stop in the middle of the second epoch."""

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            raise _InterruptedError

    with pytest.raises(_InterruptedError):
        _train(recipe, data, output, report=stop, **options)
    assert not output.exists()


@pytest.mark.parametrize("head_only", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(data, tmp_path, head_only):
    recipe = replace(RECIPE, epochs=3, head_only=head_only, train_size=24)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    _train(recipe, data, whole)
    _interrupt(recipe, data, resumed)
    epochs = []
    _train(recipe, data, resumed, resume=True, report=lambda progress: epochs.append(progress.epoch))
    assert epochs[0] == 2
    expected, got = read_tensors(whole), read_tensors(resumed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert read_metadata(whole) == read_metadata(resumed)


def test_a_head_resumed_without_its_initial_weights_is_trained_on_the_features_it_had(data, start, tmp_path):
    recipe = replace(RECIPE, head_only=True)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    _train(recipe, data, whole, initial=[start])
    _interrupt(recipe, data, resumed, initial=[start])
    _train(recipe, data, resumed, resume=True)
    assert torch.equal(read_tensors(whole)["fc.weight"], read_tensors(resumed)["fc.weight"])


def test_resuming_with_another_recipe_is_refused_and_names_what_differs(data, tmp_path):
    output = tmp_path / "m.safetensors"
    _interrupt(RECIPE, data, output)
    with pytest.raises(CheckpointError, match="another learning_rate, seed: expected the same"):
        _train(replace(RECIPE, learning_rate=1.0, seed=4), data, output, resume=True)
    more_workers = replace(RECIPE, workers=1)
    fitter = Fitter(more_workers, build_network(ARCHITECTURE, 2), data, Preprocess((32, 32)), "cpu")
    fitter.load(Path(f"{output}.resume.pt"))
    assert fitter.epoch == 1


def test_resuming_on_a_data_set_of_other_labels_is_refused(data, tmp_path):
    output = tmp_path / "m.safetensors"
    _interrupt(RECIPE, data, output)
    other = Dataset(data.paths, ("a", "b", "c"), np.ones((12, 3), dtype=np.int8))
    with pytest.raises(CheckpointError, match="another training set"):
        _train(RECIPE, other, output, resume=True)


@pytest.mark.parametrize("content", [None, b"", b"garbage", "other"])
def test_resuming_from_nothing_or_garbage_is_a_checkpoint_error(data, tmp_path, content):
    state = tmp_path / "m.safetensors.resume.pt"
    if content == "other":
        torch.save({"a": torch.zeros(1)}, state)
    elif content is not None:
        state.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot resume from"):
        _train(RECIPE, data, tmp_path / "m.safetensors", resume=True)


def test_a_network_without_a_linear_head_is_refused_before_it_is_trained(data, tmp_path):
    steps = []
    with pytest.raises(CheckpointError, match="a network without linear layers"):
        _train(replace(RECIPE, architecture="squeezenet1_1"), data, tmp_path / "m.safetensors", report=steps.append)
    assert steps == []


def test_an_output_that_cannot_be_written_is_an_output_error(data, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        _train(replace(RECIPE, epochs=1), data, tmp_path / "file" / "m.safetensors")


def test_data_sets_of_other_labels_or_too_few_photos_are_refused(data, tmp_path):
    other = Dataset(data.paths, ("red", "dark"), data.truth)
    output = tmp_path / "m.safetensors"
    with pytest.raises(DatasetError, match="expected the labels"):
        train(RECIPE, data, data, {"test": other}, output=output)
    with pytest.raises(DatasetError, match="expected at least 13 training photos, a batch, got 12"):
        _train(replace(RECIPE, batch_size=13), data, output)


def test_a_trained_checkpoint_can_start_another_training(data, tmp_path):
    network = build_network(ARCHITECTURE, 2)
    first = tmp_path / "first.safetensors"
    metadata = _train(replace(RECIPE, epochs=1), data, first)
    save_checkpoint(tmp_path / "copy.safetensors", read_tensors(first), metadata)
    assert initialise(network, [tmp_path / "copy.safetensors"]) == {"copy.safetensors": frozenset(network.state_dict())}


def test_what_the_last_initial_file_did_not_give_learns_at_the_fresh_rate(data, start, tmp_path):
    state = {name: value for name, value in torch.load(start, weights_only=True).items() if not name.startswith("fc")}
    torch.save(state, tmp_path / "backbone.pt")
    recipe = replace(RECIPE, epochs=1, learning_rate=1e-9, fresh_rate=1e7, average=0.0)
    _train(recipe, data, tmp_path / "x.safetensors", initial=[start, tmp_path / "backbone.pt"])
    before, after = torch.load(start, weights_only=True), read_tensors(tmp_path / "x.safetensors")
    assert not torch.allclose(after["fc.weight"], before["fc.weight"], atol=1e-3)
    torch.testing.assert_close(after["conv1.0.weight"], before["conv1.0.weight"], atol=1e-6, rtol=0)


def test_what_another_data_set_left_is_not_gone_on_with(data, tmp_path):
    output = tmp_path / "m.safetensors"
    _train(RECIPE, data, output)
    other = replace(data, truth=-data.truth)
    with pytest.raises(CheckpointError, match="another training set"):
        _train(RECIPE, other, output, resume=True)
