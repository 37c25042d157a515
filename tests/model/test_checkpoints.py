from __future__ import annotations

import io
import json
import pickle
import struct
import tomllib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from mlperturb.errors import CheckpointError, OutputError
from mlperturb.model import checkpoints
from mlperturb.model.checkpoints import (
    Metadata,
    build_network,
    bundled_checkpoint,
    default_preprocess,
    find_checkpoint,
    load_checkpoint,
    read_metadata,
    read_tensors,
    save_checkpoint,
)
from mlperturb.model.classifier import Classifier
from mlperturb.model.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = "shufflenet_v2_x0_5"
LABELS = ("cat", "dog", "pérson, or people")
PREPROCESS = json.loads(json.dumps(Preprocess((32, 32)).to_dict()))
METADATA = Metadata(ARCHITECTURE, LABELS, (0.3, 0.5, 0.75), PREPROCESS, {"data": "none"}, {"test": {"map": 0.5}})


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = build_network(ARCHITECTURE, 3)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return network.eval()


@pytest.fixture
def saved(tmp_path, network) -> Path:
    save_checkpoint(tmp_path / "model.safetensors", network.state_dict(), METADATA)
    return tmp_path / "model.safetensors"


@pytest.fixture
def save_plain(tmp_path, network):
    """Save the state dict after a change to it."""

    def save(change=lambda state: state, name: str = "plain.pt") -> Path:
        torch.save(change(OrderedDict(network.state_dict())), tmp_path / name)
        return tmp_path / name

    return save


def _load_plain(path: Path) -> Classifier:
    return load_checkpoint(path, architecture=ARCHITECTURE, labels=LABELS)[0]


def _write(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return path


def _write_metadata(path: Path, **change: str | None) -> Path:
    values = {
        "format": checkpoints.FORMAT,
        "architecture": ARCHITECTURE,
        "labels": '["a", "b"]',
        "thresholds": "[0.5, 0.5]",
        "preprocess": "{}",
        "provenance": "{}",
        "metrics": "{}",
        **change,
    }
    kept = {name: value for name, value in values.items() if value is not None}
    return _write(path, json.dumps({"__metadata__": kept}).encode())


def test_a_saved_classifier_gives_the_same_logits_when_loaded(saved, network):
    images = torch.rand(2, 3, 40, 28)
    classifier, metadata = load_checkpoint(saved)
    original = Classifier(network, LABELS, METADATA.thresholds, Preprocess((32, 32)))
    torch.testing.assert_close(classifier(images), original(images), atol=1e-5, rtol=1e-5)
    assert metadata == METADATA
    assert (classifier.labels, classifier.thresholds) == (LABELS, METADATA.thresholds)
    assert not any(value.is_meta for value in classifier.state_dict().values())


def test_metadata_is_read_as_written(saved):
    assert read_metadata(saved) == METADATA


def test_metadata_is_read_without_torch(saved, run_python):
    code = (
        "import sys; from pathlib import Path; from mlperturb.model.checkpoints import read_metadata;"
        f"print(read_metadata(Path({str(saved)!r})).architecture, 'torch' in sys.modules)"
    )
    assert run_python(code) == f"{ARCHITECTURE} False"


def test_a_checkpoint_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / "x.safetensors", {"a": torch.zeros(1)}, METADATA)


def test_a_transposed_tensor_is_saved_whole(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    save_checkpoint(tmp_path / "x.safetensors", {"a": base.T}, METADATA)
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["a"], base.T)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {name: value for name, value in state.items() if "num_batches_tracked" not in name},
        lambda state: {name: value.double() for name, value in state.items()},
    ],
    ids=["plain", "nested", "data-parallel", "without-counters", "double"],
)
def test_a_plain_state_dict_loads_with_architecture_and_labels(save_plain, network, change):
    classifier, metadata = load_checkpoint(save_plain(change), architecture=ARCHITECTURE, labels=LABELS)
    prepared = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(classifier.network(prepared), network(prepared), atol=1e-5, rtol=1e-4)
    assert metadata.thresholds == (0.5, 0.5, 0.5)
    assert classifier.preprocess == default_preprocess(ARCHITECTURE)


def test_plain_weights_without_architecture_or_labels_say_what_is_missing(save_plain):
    path = save_plain()
    with pytest.raises(CheckpointError, match="give `architecture` and `labels`"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="expected both"):
        load_checkpoint(path, architecture=ARCHITECTURE)
    with pytest.raises(CheckpointError, match="expected both"):
        load_checkpoint(path, labels=LABELS)


def test_another_number_of_labels_is_told_as_such(save_plain):
    with pytest.raises(CheckpointError, match="expected a head of 2 outputs, one for each label, got 3"):
        load_checkpoint(save_plain(), architecture=ARCHITECTURE, labels=("a", "b"))


def test_a_wrong_shape_elsewhere_is_named_with_both_shapes(save_plain):
    path = save_plain(lambda state: {**state, "conv1.0.weight": torch.zeros(2, 3, 3, 3)})
    with pytest.raises(CheckpointError, match=r"expected conv1.0.weight of shape \(24, 3, 3, 3\), got \(2, 3, 3, 3\)"):
        _load_plain(path)


def test_a_scalar_in_place_of_the_head_is_a_wrong_shape(save_plain):
    path = save_plain(lambda state: {**state, "fc.bias": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"expected fc.bias of shape \(3,\), got \(\)"):
        _load_plain(path)


def test_missing_and_unexpected_tensors_are_named(save_plain):
    def change(state):
        state["classifier.weight"] = state.pop("fc.weight")
        return state

    with pytest.raises(CheckpointError, match=r"missing fc\.weight, unexpected classifier\.weight$"):
        _load_plain(save_plain(change))


def test_of_many_missing_tensors_five_are_named_and_the_rest_counted(save_plain):
    with pytest.raises(CheckpointError, match=r"missing (\S+, ){4}\S+ and \d+ more, unexpected nothing"):
        _load_plain(save_plain(lambda state: {"fc.bias": state["fc.bias"]}))


class _Touch:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "torch-legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, how):
    victim, path = tmp_path / "executed", tmp_path / "evil.pt"
    state = {"fc.weight": torch.zeros(1), "evil": _Touch(victim)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        read_tensors(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(_Touch(victim)))
    assert victim.exists()  # so the pickle would have worked


@pytest.mark.parametrize("value", [{}, [1, 2], {"a": 1}, {"a": torch.zeros(1), "b": "text"}, torch.zeros(3)])
def test_a_file_of_other_things_than_named_tensors_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is not a state dict"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"x", b"garbage " * 40, b"\x80\x02", b"PK\x03\x04" + bytes(60)])
def test_garbage_is_a_checkpoint_error(tmp_path, suffix, data):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        read_tensors(path)
    with pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", "folder.pt", "folder.safetensors"])
def test_a_missing_file_or_a_folder_is_a_checkpoint_error(tmp_path, name):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_a_checkpoint_error(saved, save_plain, share):
    for path in (saved, save_plain()):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="safetensors"):
        load_checkpoint(saved)
    message = r"(not a plain state dict|cannot read).*plain\.pt|plain\.pt is not a plain"
    with pytest.raises(CheckpointError, match=message):
        _load_plain(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_weights_give_tensors_or_a_checkpoint_error(tmp_path, new_format):
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2, 2), "b": torch.ones(3)}, stream, _use_new_zipfile_serialization=new_format)
    positions = torch.randint(0, len(stream.getvalue()), (150, 4)).tolist()
    refused = 0
    for damage in positions:
        data = bytearray(stream.getvalue())
        for position in damage:
            data[position] = (data[position] * 7 + 13) % 256
        (tmp_path / "x.pt").write_bytes(data)
        try:
            tensors = read_tensors(tmp_path / "x.pt")
        except CheckpointError:
            refused += 1
        else:
            assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    assert refused > 20


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 90_000_000, 1000])
def test_a_header_length_that_lies_is_refused_without_reading_that_much(tmp_path, length):
    with pytest.raises(CheckpointError, match="header length is wrong"):
        read_metadata(_write(tmp_path / "x.safetensors", b"{}    ", length))


@pytest.mark.parametrize("header", [b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe\xfd", b"{'a': 1}", b"{}}"])
def test_a_header_that_is_not_json_is_refused_however_deep(tmp_path, header):
    with pytest.raises(CheckpointError, match="header is not JSON"):
        read_metadata(_write(tmp_path / "x.safetensors", header))


def test_deeply_nested_metadata_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="damaged metadata"):
        read_metadata(_write_metadata(tmp_path / "x.safetensors", metrics="[" * 200_000))


@pytest.mark.parametrize("header", [b"[]", b"12", b'"text"', b"null"])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_metadata(_write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__": {"format": "pt"}}', b'{"__metadata__": 3}'])
def test_a_safetensors_file_of_others_is_told_from_ours(tmp_path, header):
    with pytest.raises(CheckpointError, match=r"has no mlperturb metadata.*`architecture` and `labels`"):
        read_metadata(_write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"labels": "[]"},
        {"labels": '["a", "a"]'},
        {"labels": "[1, 2]"},
        {"labels": '"ab"'},
        {"labels": '{"a": 1, "b": 2}'},
        {"labels": "not json"},
        {"thresholds": "[0.5]"},
        {"thresholds": "[0.5, 1.0]"},
        {"thresholds": "[0.5, NaN]"},
        {"thresholds": '[0.5, "x"]'},
        {"thresholds": f"[0.5, {10**400}]"},
        {"thresholds": "0.5"},
        {"preprocess": None},
        {"preprocess": "[]"},
        {"metrics": "3"},
        {"architecture": None},
    ],
    ids=str,
)
def test_damaged_metadata_is_refused(tmp_path, change):
    assert read_metadata(_write_metadata(tmp_path / "good.safetensors")).labels == ("a", "b")
    with pytest.raises(CheckpointError, match="damaged metadata"):
        read_metadata(_write_metadata(tmp_path / "x.safetensors", **change))


@pytest.mark.parametrize(("architecture", "head"), [("inception_v3", "AuxLogits."), ("googlenet", "aux1.")])
def test_the_auxiliary_heads_of_training_are_dropped(architecture, head):
    network = build_network(architecture, 4, meta=True)
    names = list(network.state_dict())
    assert not any(name.startswith(head) for name in names)
    given = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in network.state_dict().items()}
    checkpoints._fill(network, {**given, f"{head}fc.weight": torch.zeros(9)}, Path("x.pt"), 4)
    assert not any(value.is_meta for value in network.state_dict().values())
    assert network.fc.out_features == 4
    assert not network.aux_logits


def test_a_network_on_the_meta_device_takes_no_memory():
    assert all(value.is_meta for value in build_network("vit_h_14", 20, meta=True).state_dict().values())


def test_an_unknown_architecture_suggests_close_ones(save_plain):
    with pytest.raises(CheckpointError, match=r"unknown architecture 'mobilenet_v22': did you mean .*mobilenet_v2"):
        build_network("mobilenet_v22", 3)
    with pytest.raises(CheckpointError, match=r"unknown architecture 'inceptionv3': did you mean .*inception_v3"):
        load_checkpoint(save_plain(), architecture="inceptionv3", labels=LABELS)


def test_default_preprocessing_is_that_of_torchvisions_weights():
    inception = default_preprocess("inception_v3")
    assert (inception.resize, inception.crop) == (342, (299, 299))
    assert inception.mean == inception.std == (0.5, 0.5, 0.5)


def test_a_missing_bundled_checkpoint_is_a_checkpoint_error(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "mlperturb" / "model" / "checkpoints.py"))
    with pytest.raises(CheckpointError, match=r"bundled checkpoint .* is missing"):
        bundled_checkpoint()


@pytest.mark.parametrize("folder", ["weights", "mlperturb/weights"])
@pytest.mark.parametrize("name", checkpoints.BUNDLED)
def test_a_bundled_checkpoint_lies_in_the_wheel_or_the_source_tree(monkeypatch, tmp_path, folder, name):
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "mlperturb" / "model" / "checkpoints.py"))
    (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / folder / checkpoints.BUNDLED[name]
    file.write_bytes(b"")
    assert bundled_checkpoint(name) == find_checkpoint(name) == file


def test_each_bundled_checkpoint_is_there_and_goes_into_the_wheel():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = named["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for name, file in checkpoints.BUNDLED.items():
        assert read_metadata(find_checkpoint(name)).labels[0] == "aeroplane"
        assert included[f"weights/{file}"] == f"mlperturb/weights/{file}"


def test_a_file_comes_before_the_bundled_checkpoint_of_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "robust").write_bytes(b"")
    assert find_checkpoint("robust") == Path("robust")
    assert find_checkpoint(None) == bundled_checkpoint("efficientnet-lite2")
    with pytest.raises(CheckpointError, match=r"no such checkpoint: rubost; bundled are efficientnet-lite2, .*robust"):
        find_checkpoint("rubost")
    with pytest.raises(CheckpointError, match=r"no such checkpoint: rubost.safetensors$"):
        find_checkpoint("./rubost.safetensors")
