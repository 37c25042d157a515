from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mlperturb.errors import CheckpointError, DatasetError, OutputError, UsageError
from mlperturb.metrics import classifier_metrics
from mlperturb.model.checkpoints import build_network, load_checkpoint, read_metadata, read_tensors, save_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess
from mlperturb.photos.datasets import Dataset
from mlperturb.training import train as training
from mlperturb.training.fitter import Fitter, Progress, block_depths
from mlperturb.training.initial import initialise
from mlperturb.training.loading import PhotoDataset, augmentation, predict_dataset
from mlperturb.training.probe import DECAYS, find_head
from mlperturb.training.recipe import Recipe
from mlperturb.training.stem import cut, pick
from mlperturb.training.train import choose_preprocess, train

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


def test_a_fresh_head_takes_nothing_from_the_initial_weights(data, start, tmp_path):
    nothing = replace(RECIPE, epochs=0, head_only=True, shift="none")
    for name, fresh in (("own", False), ("fresh", True)):
        _train(replace(nothing, fresh_head=fresh), data, tmp_path / f"{name}.safetensors", initial=[start])
    given = read_tensors(start)
    own, fresh = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("own", "fresh"))
    assert {name for name, value in own.items() if not torch.equal(value, given[name])} == set()
    assert {name for name, value in fresh.items() if not torch.equal(value, given[name])} == {"fc.weight", "fc.bias"}


def test_a_head_is_written_over_the_checkpoint_it_was_trained_on(data, start, tmp_path):
    whole, small = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    _train(replace(RECIPE, epochs=1), data, whole, initial=[start], half=True)
    metadata = _train(replace(RECIPE, head_only=True, fresh_head=True), data, small, initial=[whole], base=whole)
    assert small.stat().st_size < whole.stat().st_size / 20
    classifier, _ = load_checkpoint(small)
    logits = predict_dataset(classifier.network, data, classifier.preprocess, device="cpu")
    assert (
        classifier_metrics(logits, torch.from_numpy(data.truth), torch.zeros(2), data.labels)
        == metadata.metrics["again"]
    )


def test_a_state_from_before_a_setting_existed_goes_on(data, start, tmp_path):
    output = tmp_path / "m.safetensors"
    recipe = replace(RECIPE, epochs=3)
    _interrupt(recipe, data, output, initial=[start])
    state = torch.load(f"{output}.resume.pt", weights_only=True)
    for name in ("shift", "fresh_head"):
        del state["recipe"][name]
    torch.save(state, f"{output}.resume.pt")
    with pytest.raises(CheckpointError, match="another shift"):
        _train(replace(recipe, shift="none"), data, output, initial=[start], resume=True)
    _train(recipe, data, output, initial=[start], resume=True)
    assert read_metadata(output).provenance["recipe"]["epochs"] == 3


def test_an_unknown_shift_is_refused():
    with pytest.raises(UsageError, match="unknown `shift` 'two': expected label, one, none"):
        Recipe(shift="two")


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


# --- linear probe, then fine-tuning


def _fitter(data: Dataset, **change: Any) -> Fitter:
    return Fitter(replace(RECIPE, **change), build_network(ARCHITECTURE, 2), data, Preprocess((32, 32)), "cpu")


def test_a_probe_without_an_epoch_changes_the_head_alone_and_tells_what_it_chose(data, start, tmp_path):
    metadata = _train(replace(RECIPE, probe=True, epochs=0), data, tmp_path / "m.safetensors", initial=[start])
    trained = read_tensors(tmp_path / "m.safetensors")
    changed = {name for name, value in read_tensors(start).items() if not torch.equal(trained[name], value)}
    assert changed == {"fc.weight", "fc.bias"}
    assert metadata.provenance["probe"]["decay"] in DECAYS
    assert metadata.metrics["again"]["map"] == 1.0  # two labels, told apart by their colours


def test_fine_tuning_begins_from_the_probe_and_at_its_own_rate(data, start, tmp_path):
    recipe = replace(RECIPE, probe=True, epochs=0)
    _train(recipe, data, tmp_path / "probe.safetensors", initial=[start])
    slow = replace(recipe, epochs=1, learning_rate=1e-9, fresh_rate=1e7, norm_momentum=0.0)
    _train(slow, data, tmp_path / "tuned.safetensors", initial=[start])
    probe, tuned = (read_tensors(tmp_path / f"{name}.safetensors") for name in ("probe", "tuned"))
    torch.testing.assert_close(tuned["fc.weight"], probe["fc.weight"], atol=1e-6, rtol=0)


def test_a_resumed_run_does_not_fit_the_probe_again(data, start, tmp_path, monkeypatch):
    recipe = replace(RECIPE, probe=True, blend=True)
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    _train(recipe, data, whole, initial=[start])
    _interrupt(recipe, data, resumed, initial=[start])
    monkeypatch.setattr(training, "fit_probe", None)
    assert "probe" in _train(recipe, data, resumed, resume=True).provenance
    expected, got = read_tensors(whole), read_tensors(resumed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_resumed_run_may_have_more_epochs_but_not_fewer_than_are_done(data, tmp_path):
    output = tmp_path / "m.safetensors"
    _train(RECIPE, data, output)
    steps: list[Progress] = []
    metadata = _train(replace(RECIPE, epochs=4), data, output, resume=True, report=steps.append)
    assert {step.epoch for step in steps} == {3, 4}
    assert metadata.provenance["recipe"]["epochs"] == 4
    with pytest.raises(CheckpointError, match="has 4 epochs done, expected at most 3"):
        _train(replace(RECIPE, epochs=3), data, output, resume=True)


def test_the_state_goes_when_the_training_is_done_and_more_epochs_go_on_from_the_checkpoint(data, start, tmp_path):
    output = tmp_path / "m.safetensors"
    recipe = replace(RECIPE, blend=True, probe=True)
    _train(recipe, data, output, initial=[start], half=True)
    assert [path.name for path in tmp_path.iterdir() if "resume" in path.name] == []
    done = read_tensors(output)
    again = _train(recipe, data, output, resume=True)  # nothing is left to train
    assert "probe" in again.provenance
    now = read_tensors(output)
    assert all(torch.equal(now[name], value) and now[name].dtype == value.dtype for name, value in done.items())
    fitter = _fitter(data, epochs=3, blend=True, probe=True)
    fitter.load_trained(output)
    assert fitter.epoch == RECIPE.epochs
    assert torch.equal(fitter.network.state_dict()["conv1.0.weight"], fitter.start["conv1.0.weight"])
    torch.testing.assert_close(fitter.start["conv1.0.weight"], done["conv1.0.weight"].float())
    with pytest.raises(CheckpointError, match="another learning_rate: expected the same"):
        _train(replace(recipe, learning_rate=1.0), data, output, resume=True)


def test_blocks_are_counted_from_the_head_down():
    names = [
        "conv_stem.weight",
        "blocks.0.0.conv.weight",
        "blocks.0.1.conv.weight",
        "blocks.1.0.conv.weight",
        "fc.bias",
    ]
    assert list(block_depths(names).values()) == [3, 2, 2, 1, 0]
    depths = block_depths([name for name, _ in build_network("resnet18", 2, meta=True).named_parameters()])
    assert [depths[name] for name in ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.bias", "fc.weight")] == [
        6,
        4,
        1,
        0,
    ]


def test_the_learning_rate_shrinks_with_the_distance_from_the_head(data):
    fitter = _fitter(data, layer_decay=0.5)
    fitter._set_learning_rate(fitter.steps)
    rates = {id(value): group["lr"] for group in fitter.optimiser.param_groups for value in group["params"]}
    assert rates[id(fitter.network.conv5[0].weight)] == pytest.approx(rates[id(fitter.network.fc.weight)] / 2)
    assert rates[id(fitter.network.conv1[0].weight)] == pytest.approx(rates[id(fitter.network.fc.weight)] / 32)


def test_frozen_parameters_and_statistics_stay_as_they_are(data, start, tmp_path):
    recipe = replace(RECIPE, freeze=("stage*", "conv1.*"), norm_momentum=0.0, average=0.0, weight_decay=1.0)
    _train(recipe, data, tmp_path / "m.safetensors", initial=[start])
    before, after = read_tensors(start), read_tensors(tmp_path / "m.safetensors")
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"conv5", "fc"}
    assert torch.equal(after["conv5.1.running_mean"], before["conv5.1.running_mean"])


@pytest.mark.parametrize(
    ("pattern", "message"), [("blocks.*", "no parameter to freeze is called"), ("*", "every param")]
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(data, pattern, message):
    with pytest.raises(CheckpointError, match=message):
        _fitter(data, freeze=(pattern,))


def test_a_small_momentum_moves_the_statistics_a_little(data, start, tmp_path):
    moved = []
    for momentum in (0.3, 0.003):
        recipe = replace(RECIPE, epochs=1, norm_momentum=momentum, average=0.0, learning_rate=0.0)
        _train(recipe, data, tmp_path / "m.safetensors", initial=[start])
        after = read_tensors(tmp_path / "m.safetensors")["conv5.1.running_var"]
        moved.append(float((after - read_tensors(start)["conv5.1.running_var"]).norm()))
    assert 0 < moved[1] < moved[0] / 10


def test_mixed_precision_on_the_cpu_trains_much_the_same_and_computes_in_bfloat16(data, start, tmp_path):
    kinds = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: kinds.add((type(module), output.dtype))
    )
    try:
        losses = []
        for amp in (False, True):
            steps: list[Progress] = []
            recipe = replace(RECIPE, amp=amp, epochs=1, norm_momentum=0.0)
            _train(recipe, data, tmp_path / "m.safetensors", initial=[start], report=steps.append)
            losses.append([step.loss for step in steps if step.validation is None])
            assert ((nn.Linear, torch.bfloat16) in kinds) == amp
    finally:
        hook.remove()
    assert losses[0] != losses[1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.1)


def test_mixup_trains_on_photos_laid_over_each_other_and_weighs_both_truths(data, monkeypatch):
    fitter = _fitter(data, mixup=1.0, batch_size=2)
    monkeypatch.setattr(torch, "randperm", lambda count: torch.arange(count - 1, -1, -1))
    seen = []
    monkeypatch.setattr(fitter, "trained", lambda inputs: seen.append(inputs) or inputs[:, :, 0, 0] @ torch.eye(3, 2))
    first, second = torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), -1.0)
    rows = torch.tensor([0, 3])
    torch.manual_seed(1)
    loss = fitter._loss(torch.stack([first, second]), rows)
    share = (float(seen[0][0, 0, 0, 0]) + 1) / 3
    assert 0 < share < 1
    torch.testing.assert_close(seen[0][1], torch.full((3, 4, 4), -1.0 * share + 2.0 * (1 - share)))
    logits = seen[0][:, :, 0, 0] @ torch.eye(3, 2)
    expected = share * fitter._compare(logits, rows) + (1 - share) * fitter._compare(logits, rows.flip(0))
    torch.testing.assert_close(loss, expected)
    assert float(fitter._compare(logits, rows)) != pytest.approx(float(fitter._compare(logits, rows.flip(0))))


def test_the_teachers_mean_probability_is_learnt(data, start, tmp_path):
    """Teachers that say the contrary of every annotation, with all the weight, turn a network round."""
    teachers = []
    for number, data_set in enumerate((replace(data, truth=-data.truth), data)):
        teachers.append(tmp_path / f"teacher-{number}.safetensors")
        _train(replace(RECIPE, probe=True, epochs=0), data_set, teachers[-1], initial=[start])
    recipe = replace(RECIPE, probe=True, epochs=0, teacher_weight=1.0, instance_weight=0.0, calibration_weight=100.0)
    contrary = _train(recipe, data, tmp_path / "m.safetensors", initial=[start], teachers=[teachers[0]])
    assert contrary.metrics["again"]["map"] < 0.6
    logits = [load_checkpoint(path)[0] for path in teachers]
    words = [predict_dataset(one.network, data, one.preprocess, device="cpu") for one in logits]
    expected = torch.logit(sum(torch.sigmoid(word) for word in words) / 2)
    begun = training._Start(recipe, data, Preprocess((32, 32)), "cpu", training.Share())
    torch.testing.assert_close(begun.ask_teachers(teachers), expected, atol=1e-3, rtol=1e-3)


def test_a_teacher_of_other_labels_is_refused(data, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    other = replace(data, labels=("red", "dark"))
    train(replace(RECIPE, epochs=0), other, other, {}, output=teacher)
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors has other labels: expected red, bright"):
        _train(RECIPE, data, tmp_path / "m.safetensors", teachers=[teacher])


def test_the_blend_takes_the_share_of_the_trained_weights_that_is_best_on_validation_photos(data, start, tmp_path):
    """A learning rate that wrecks the network: the blend goes back to the probe."""
    recipe = replace(RECIPE, probe=True, blend=True, learning_rate=30.0, average=0.0)
    metadata = _train(recipe, data, tmp_path / "m.safetensors", initial=[start])
    blend = metadata.provenance["blend"]
    assert blend["share"] < 1
    scores = {name: value for name, value in blend.items() if name != "share"}
    assert len(scores) == 5
    assert blend[f"validation map at {blend['share']}"] == max(scores.values()) == 1.0
    probe = _train(replace(recipe, epochs=0), data, tmp_path / "probe.safetensors", initial=[start])
    assert probe.provenance["blend"]["share"] == 1.0  # of equals, all of it
    if blend["share"] == 0:
        assert torch.equal(
            read_tensors(tmp_path / "m.safetensors")["fc.weight"],
            read_tensors(tmp_path / "probe.safetensors")["fc.weight"],
        )


def test_matrices_in_float16_are_what_was_measured(data, start, tmp_path):
    metadata = _train(replace(RECIPE, probe=True), data, tmp_path / "m.safetensors", initial=[start], half=True)
    tensors = read_tensors(tmp_path / "m.safetensors")
    assert {value.dtype for value in tensors.values() if value.dim() > 1} == {torch.float16}
    assert tensors["fc.bias"].dtype == torch.float32
    classifier, _ = load_checkpoint(tmp_path / "m.safetensors")
    logits = predict_dataset(classifier.network, data, classifier.preprocess, device="cpu")
    measured = classifier_metrics(logits, torch.from_numpy(data.truth), torch.zeros(2), data.labels)
    assert measured == metadata.metrics["again"]


def test_a_crop_keeps_at_least_the_share_that_is_asked_for():
    ramp = torch.arange(100, dtype=torch.uint8).repeat(3, 100, 1)
    torch.manual_seed(2)
    transforms = [augmentation(Preprocess((100, 100)), (100, 100), least) for least in (1.0, 0.1)]
    widths = [min(int((transform(ramp)[0, 50].unique()).numel()) for _ in range(10)) for transform in transforms]
    assert widths[0] > 2 * widths[1]


def test_the_input_is_normalised_as_asked_for_or_as_the_architecture_has_it():
    assert choose_preprocess(replace(RECIPE, mean=0.4, std=0.3)) == Preprocess((32, 32), None, (0.4,) * 3, (0.3,) * 3)
    assert choose_preprocess(replace(RECIPE, size=0)).mean == (0.485, 0.456, 0.406)


def test_several_processes_read_a_data_set_in_parts(data, monkeypatch):
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda into, _own: into.__setitem__(slice(None), [*parts])
    )

    def read(part: Dataset) -> torch.Tensor:
        return torch.tensor([[float(path.stem)] for path in part.paths])

    recipe, preprocess = RECIPE, Preprocess((32, 32))
    parts += [read(data.subset(range(rank, 12, 5))) for rank in range(5)]
    shared = training._Start(recipe, data, preprocess, "cpu", training.Share(1, 5))._share_out(read, data)
    alone = training._Start(recipe, data, preprocess, "cpu", training.Share())._share_out(read, data)
    assert shared.flatten().tolist() == alone.flatten().tolist() == list(range(12))


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "timm/test_efficientnet", "shufflenet_v2_x0_5"])
def test_a_network_is_cut_after_its_frozen_first_layers_and_shares_what_is_above(name):
    network = build_network(name, 2).eval()
    blocks = block_depths([key for key, _ in network.named_parameters()])
    for key, value in network.named_parameters():
        value.requires_grad_(blocks[key] < 3)
    below, above = cut(network)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(above(below(images)), network(images), atol=1e-5, rtol=1e-3)
    own = {id(value) for value in network.parameters()}
    assert {id(value) for value in above.parameters()} < own
    assert all(value.requires_grad for value in above.parameters())
    assert not {id(value) for value in below.parameters()} & own


def test_a_network_that_is_no_chain_or_whose_first_layer_is_trained_is_not_cut():
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(3, 2)

        def forward(self, images):
            return self.head((self.first(images) * self.second(images)).mean((2, 3)))

    network = Forked()
    with pytest.raises(CheckpointError, match="first layer is trained"):
        cut(network)
    network.first.requires_grad_(False)
    network.second.requires_grad_(False)
    with pytest.raises(CheckpointError, match="not a chain"):
        cut(network)


def test_training_on_kept_views_changes_what_is_above_the_cut_and_is_resumed(data, start, tmp_path):
    recipe = replace(
        RECIPE, freeze=("conv1.*", "stage*"), views=2, norm_momentum=0.0, epochs=3, train_size=64, average=0.0
    )
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    _train(recipe, data, whole, initial=[start])
    _interrupt(recipe, data, resumed, initial=[start])
    _train(recipe, data, resumed, resume=True)
    before, expected, got = read_tensors(start), read_tensors(whole), read_tensors(resumed)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(got[name], value)}
    assert changed == {"conv5", "fc"}


def test_kept_views_need_statistics_that_do_not_move(data):
    with pytest.raises(UsageError, match="expected `views` with `norm_momentum` 0"):
        _fitter(data, freeze=("conv1.*",), views=1)


def test_each_photo_of_a_batch_is_seen_in_a_view_of_its_own():
    views = torch.arange(12.0).view(2, 6, 1, 1, 1)
    torch.manual_seed(0)
    picked = torch.stack([pick(views, torch.tensor([5, 0])) for _ in range(40)]).flatten(1)
    assert set(picked[:, 0].tolist()) == {5.0, 11.0}
    assert set(picked[:, 1].tolist()) == {0.0, 6.0}
    assert len(set(map(tuple, picked.tolist()))) == 4


# --- adversarial training


@pytest.mark.parametrize(("clean_share", "clean"), [(0.0, 0), (0.5, 6), (1.0, 12)])
def test_the_clean_share_of_a_batch_is_left_and_the_rest_raises_the_loss(data, start, clean_share, clean):
    torch.manual_seed(0)
    change = {"clean_share": clean_share, "batch_size": 12, "norm_momentum": 0.0}
    fitter = _fitter(data, adversarial="linf:0.05", adversarial_steps=4, **change)
    initialise(fitter.network, [start])
    photos, rows = PhotoDataset(data, fitter.preprocess.reference()), torch.arange(12)
    inputs = torch.stack([photos[number][0] for number in range(12)])
    fitter._set_mode()
    state = {name: value.clone() for name, value in fitter.network.state_dict().items()}
    moved = fitter._perturb(inputs, rows, rows, 1.0)
    changed = (moved != inputs).flatten(1).any(1)
    assert changed.tolist() == [False] * clean + [True] * (12 - clean)
    assert float((moved - inputs).abs().max()) <= 0.05 / 255 / 0.5 + 1e-5
    assert all(torch.equal(value, state[name]) for name, value in fitter.network.state_dict().items())
    assert fitter.network.training
    assert all(value.grad is None for value in fitter.network.parameters())
    if clean < 12:
        worst = rows[clean:]
        before, after = (
            float(fitter._mixed_loss(fitter.network, images[clean:], worst, worst, 1.0).detach())
            for images in (inputs, moved)
        )
        assert after > before


def test_adversarial_training_lowers_the_loss_under_attack(data, start, tmp_path):
    recipe = replace(RECIPE, epochs=40, batch_size=12, learning_rate=3e-3, adversarial="l2:1", adversarial_steps=2)
    steps: list[Progress] = []
    metadata = _train(recipe, data, tmp_path / "m.safetensors", initial=[start], report=steps.append)
    losses = [step.loss for step in steps if step.validation is None]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])  # photos are drawn anew: a single loss says little
    assert metadata.provenance["recipe"]["adversarial"] == "l2:1"


@pytest.mark.parametrize("change", [{"head_only": True}, {"views": 1, "norm_momentum": 0.0, "freeze": ("conv1.*",)}])
def test_adversarial_training_needs_whole_photos(data, change):
    with pytest.raises(UsageError, match="expected `adversarial` without `head_only` and `views`"):
        _fitter(data, adversarial="linf:2", **change)
