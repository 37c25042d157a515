from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem
from mlperturb.model import survival
from mlperturb.model.preprocess import pad_batch
from mlperturb.model.survival import SurvivingModel, compress, repeat_targets
from mlperturb.photos.purify import Purification
from mlperturb.targets import Targets

SIZES = [(21, 34), (16, 40), (5, 3)]


def photos() -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Return smooth photos of odd sizes, padded to one batch."""
    images = []
    for number, (height, width) in enumerate(SIZES):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        planes = [0.5 + 0.4 * torch.sin((rows * (1 + k) + columns * (2 + number)) / 9) for k in range(3)]
        images.append((torch.stack(planes) * 255).round() / 255)
    return pad_batch(images)


def test_compressed_views_are_those_of_the_codec_and_padding_stays_zero():
    images, sizes = photos()
    views = compress(images, sizes, Purification("jpeg", 60))
    for row, (height, width) in enumerate(sizes):
        rgb = (images[row, :, :height, :width] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        expected = Purification("jpeg", 60).apply(rgb)[0]
        assert np.array_equal((views[row, :, :height, :width] * 255).round().permute(1, 2, 0).numpy(), expected)
        assert not views[row, :, height:].any()
        assert not views[row, :, :, width:].any()


def test_the_linear_parts_are_jpeg_s(monkeypatch):
    """With the rounding put back, they give the codec's own pixels, except for the enlargement of chroma."""
    images, sizes = photos()
    monkeypatch.setattr(survival, "_sensitivity", lambda c: torch.where(c.abs() > 1e-9, c.round() / c, 0.0))
    real = compress(images, sizes, Purification("jpeg", 50))
    for row, (height, width) in enumerate(sizes[:2]):
        image = images[row, :, :height, :width]
        data = Purification("jpeg", 50).encode((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        tables = Image.open(__import__("io").BytesIO(data)).quantization
        mine = survival._linear_jpeg(image, [tables[0], tables[1]], halve=True)
        error = (mine - real[row, :, :height, :width]).abs().mean() * 255
        change = (image - real[row, :, :height, :width]).abs().mean() * 255
        assert error < 0.6 * change


def test_where_rounding_is_deaf_little_gradient_passes():
    values = torch.tensor([0.0, 3.0, 0.5, 2.5, 0.25])
    slopes = survival._sensitivity(values)
    assert slopes[0] < 0.1
    assert slopes[1] < 0.1
    assert slopes[2] > 1.5
    assert slopes[3] > 1.5
    spread = survival._sensitivity(torch.linspace(0, 1, 1001))
    assert float(spread[:-1].mean()) == pytest.approx(1.0, abs=0.01)  # on average, rounding has the slope 1


def test_every_view_is_a_set_of_constraints_and_costs_its_passes():
    images, sizes = photos()
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def model(batch):
        return batch.mean((2, 3)) @ weight.T

    both = SurvivingModel(model, sizes, (Purification("jpeg", 30), Purification("jpeg", 90)))
    logits = both(images)
    assert logits.shape == (3, 6)
    assert torch.equal(logits[:, :2], model(images))
    assert torch.equal(logits[:, 2:4], model(compress(images, sizes, Purification("jpeg", 30))))
    rows = torch.tensor([2, 0])
    assert torch.allclose(both.select(rows)(images[rows]), logits[rows])
    ones = torch.ones(3, 2)
    targets = repeat_targets(Targets(ones.bool(), ~ones.bool(), ones, torch.tensor([0.1, 0.2])), 3)
    assert targets.flip.shape == (3, 6)
    assert targets.boundary.tolist() == pytest.approx([0.1, 0.2] * 3)
    problem = Problem(both, images, ClassificationGoal(targets), limit=10)
    variable = images.clone().requires_grad_()
    problem.gradient(problem.logits(variable).sum(1), variable)
    assert problem.meter.forward.tolist() == problem.meter.backward.tolist() == [3, 3, 3]
    assert problem.affordable(1).all()
    assert not problem.affordable(2).any()


@pytest.mark.parametrize("method", ["ml-ddn", "ml-cw", "rank-2"])
def test_attacks_survive_the_quality_they_saw(cli, tiny, tmp_path, method):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(TINY_PIXELS).save(photo)
    options = ["--between", "threshold"] if method == "rank-2" else []
    code, text, err = cli(
        *("attack", photo, "--flip", "cat", "--keep", "rest", "--survive", "jpeg:75", "--method", method),
        *("--budget", "fast", "--checkpoint", tiny, "--out", out, "--device", "cpu", *options),
    )
    assert code == 0, err
    record = json.loads((out / "report.json").read_text())["images"][0]
    assert record["status"] == "success"
    assert "holds after jpeg:75" in text
    assert record["survival"] == {"jpeg:75": {"held": 4, "total": 4, "violated": []}}
    cost = record["cost"]
    assert cost["forward"] > cost["backward"] > 0
    compressed = tmp_path / "compressed.png"
    Image.fromarray(Purification("jpeg", 75).apply(np.array(Image.open(out / "photo.adv.png")))[0]).save(compressed)
    _, text, _ = cli("predict", compressed, "--checkpoint", tiny, "--json", "--device", "cpu")
    assert "cat" not in json.loads(text)["images"][0]["labels"]


def test_a_limit_on_passes_counts_every_view_and_check(cli, tiny, tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(TINY_PIXELS).save(photo)
    arguments = ["attack", photo, "--flip", "cat", "--checkpoint", tiny, "--out", out, "--device", "cpu"]
    code, _, err = cli(*arguments, "--survive", "jpeg:60-69", "--passes", 90)
    assert code == 0, err
    record = json.loads((out / "report.json").read_text())["images"][0]
    assert record["cost"]["forward"] + record["cost"]["backward"] <= 90
    assert len(record["survival"]) == 10
    code, _, err = cli(*arguments, "--overwrite", "--survive", "jpeg:60-69", "--passes", 30)
    assert code == 2
    assert "--passes" in err
