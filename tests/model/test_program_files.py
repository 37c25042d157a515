from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_LABELS, TINY_PIXELS
from support.programs import BESIDE, PREPROCESS, SIZE, Gated, export_onnx, export_program, write_beside

import mlperturb
from mlperturb.errors import CheckpointError, UsageError
from mlperturb.model.preprocess import Preprocess, to_tensor
from mlperturb.model.readers import parse_reader
from mlperturb.model.views import read_logits

PHOTOS = [TINY_PIXELS, *np.random.default_rng(0).integers(0, 256, (2, 50, 21, 3), dtype=np.uint8)]
READERS = ["float", "pillow", "pillow-12", "torchvision", "torchvision-cuda", "pillow:lanczos", "float:no-antialias"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder of programs that torch made: logits or probabilities, a free batch or a fixed one."""
    folder = tmp_path_factory.mktemp("programs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        export_program(folder / "logits.pt2", Gated())
        export_program(folder / "chances.pt2", Gated(probabilities=True))
        export_program(folder / "one.pt2", Gated(), batch=1)
        export_onnx(folder / "logits.onnx", Gated())
        export_onnx(folder / "one.onnx", Gated(probabilities=True), batch=1)
    return folder


def load(path: Path) -> mlperturb.Classifier:
    if path.suffix == ".onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx2pytorch")
    return mlperturb.load(path)


def library_logits(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    """Return the logits of the library that owns the file."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path).module()(inputs).detach()


@pytest.mark.parametrize("name", ["logits.pt2", "logits.onnx"])
def test_a_program_gives_the_logits_of_its_own_library_in_every_reader(exported, name):
    classifier = load(exported / name)
    for rgb in PHOTOS:
        for reader in map(parse_reader, READERS):
            inputs = reader.bind(classifier.preprocess, [rgb.shape[:2]], "cpu")(
                to_tensor(rgb, torch.device("cpu"))[None]
            )
            expected = library_logits(exported / name, inputs)
            torch.testing.assert_close(read_logits(classifier, rgb, reader), expected, rtol=1e-4, atol=1e-4)
    photo = Image.fromarray(PHOTOS[0]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)  # by Pillow alone
    mean, std = (torch.tensor(PREPROCESS[field]).view(3, 1, 1) for field in ("mean", "std"))
    inputs = ((torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255 - mean) / std)[None]
    probabilities = mlperturb.predict(classifier, [PHOTOS[0]], reader="pillow")
    torch.testing.assert_close(probabilities, library_logits(exported / name, inputs).sigmoid(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["chances.pt2", "one.pt2", "one.onnx"])
def test_the_sigmoid_at_the_end_is_left_out_and_a_batch_of_one_is_called_for_each(exported, name):
    classifier, plain = load(exported / name), load(exported / "logits.pt2")
    batch = torch.rand(3, 3, 20, 30)
    torch.testing.assert_close(classifier(batch), plain(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["logits.pt2", "chances.pt2", "one.onnx"])
def test_an_attack_on_a_program_succeeds_in_its_own_library(exported, name):
    classifier = load(exported / name)
    result = mlperturb.attack(classifier, PHOTOS[:2], flip=["dog"], keep="rest", reader=["pillow"])
    assert bool(result.success.all())
    boundary = torch.logit(torch.tensor(BESIDE["thresholds"]))
    for before, after in zip(PHOTOS, result.images, strict=False):
        wanted, found = (
            library_logits(exported / name, parse_reader("pillow").bind(classifier.preprocess, [rgb.shape[:2]], "cpu")(
                to_tensor(np.asarray(rgb), torch.device("cpu"))[None]
            ))[0] for rgb in (before, after)
        )  # fmt: skip
        if name != "logits.pt2":
            wanted, found = torch.logit(wanted), torch.logit(found)
        flipped = (wanted > boundary) != (found > boundary)
        assert flipped.tolist() == [False, True, False, False]


def test_a_program_and_its_json_serve_at_the_command_line(cli, exported, tmp_path, save_photo):
    photo = save_photo("photo.png", Image.fromarray(TINY_PIXELS))
    code, out, err = cli("labels", "--checkpoint", exported / "chances.pt2", "--json")
    described = json.loads(out)
    assert (code, err) == (0, "")
    assert described["thresholds"] == dict(zip(TINY_LABELS, BESIDE["thresholds"], strict=True))
    assert described["architecture"] == "torch.export"
    code, _, err = cli(
        "attack", photo, "--checkpoint", exported / "chances.pt2", "--flip", "dog", "--out", tmp_path / "o"
    )
    assert code == 0, err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["images"][0]["status"] == "success"
    code, out, _ = cli("predict", tmp_path / "o" / "photo.adv.png", "--checkpoint", exported / "chances.pt2")
    assert code == 0
    assert "dog" in out


def test_a_json_file_may_give_one_threshold_or_none(exported, tmp_path):
    for given, expected in ((0.3, 0.3), (None, 0.5)):
        path = tmp_path / f"{given}.pt2"
        path.write_bytes((exported / "logits.pt2").read_bytes())
        write_beside(path, thresholds=given)
        assert mlperturb.load(path).thresholds == (expected,) * 4
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=r"expected None.json beside .*None.pt2, such as"):
        mlperturb.load(path)
    given = mlperturb.load(path, labels=TINY_LABELS, preprocess=Preprocess.from_dict(PREPROCESS))
    assert given.labels == TINY_LABELS


def test_an_onnx_file_with_its_tensors_beside_it_is_read(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported / "logits.onnx")
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    write_beside(tmp_path / "big.onnx")
    batch = torch.rand(2, 3, 20, 30)
    torch.testing.assert_close(load(tmp_path / "big.onnx")(batch), load(exported / "logits.onnx")(batch))


def test_an_onnx_file_that_is_converted_wrongly_is_refused(exported):
    classifier = load(exported / "logits.onnx")
    from mlperturb.model import onnx_program

    good = onnx_program.read_onnx(exported / "logits.onnx", 4)
    bias = next(value for name, value in good.network.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(CheckpointError, match=r"differ from ONNX Runtime's by .*, expected at most .*torch\.export"):
        good.compare(torch.rand(2, 3, SIZE, SIZE))
    assert classifier.tried


def test_without_the_extra_an_onnx_file_is_refused_in_a_line_that_names_it(exported, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx2pytorch", None)
    with pytest.raises(CheckpointError, match=r"expected the extra `onnx` for .*: pip install 'mlperturb\[onnx\]'"):
        mlperturb.load(exported / "logits.onnx")


def test_export_writes_what_load_reads(tmp_path):
    preprocess = Preprocess(resize=(SIZE, SIZE), channels="bgr", mean=(0.1, 0.2, 0.3))
    classifier = mlperturb.Classifier(Gated(), TINY_LABELS, [0.2, 0.3, 0.4, 0.5], preprocess)
    mlperturb.export(classifier, tmp_path / "own.pt2")
    back = mlperturb.load(tmp_path / "own.pt2")
    assert (back.labels, back.thresholds, back.preprocess) == (TINY_LABELS, (0.2, 0.3, 0.4, 0.5), preprocess)
    batch = torch.rand(3, 3, 30, 40)
    torch.testing.assert_close(back(batch), classifier(batch), rtol=1e-4, atol=1e-4)


def test_export_refuses_what_it_cannot_write(tmp_path):
    class Branching(Gated):
        def forward(self, photos: torch.Tensor) -> torch.Tensor:
            return super().forward(photos) if photos.mean() > 0 else -super().forward(photos)

    size = Preprocess(resize=(SIZE, SIZE))
    with pytest.raises(UsageError, match=r"ends in \.pt2, got '.*own\.pt'"):
        mlperturb.export(mlperturb.Classifier(Gated(), TINY_LABELS, preprocess=size), tmp_path / "own.pt")
    with pytest.raises(UsageError, match="one height and width"):
        mlperturb.export(mlperturb.Classifier(Gated(), TINY_LABELS, preprocess=Preprocess(SIZE)), tmp_path / "own.pt2")
    with pytest.raises(CheckpointError, match=r"torch\.export cannot follow the network"):
        mlperturb.export(mlperturb.Classifier(Branching(), TINY_LABELS, preprocess=size), tmp_path / "own.pt2")
    assert not list(tmp_path.iterdir())
