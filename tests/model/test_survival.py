from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import TINY_PIXELS

from mlperturb.model import survival
from mlperturb.model.preprocess import pad_batch
from mlperturb.model.survival import compress
from mlperturb.photos.purify import Purification, parse_survival

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


@pytest.mark.parametrize("name", ["webp:80", "resize:50", "median:3", "bits:6"])
def test_attacks_survive_every_kind_of_purification_in_every_reader(cli, tiny, tmp_path, name):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(TINY_PIXELS).save(photo)
    code, text, err = cli(
        *("attack", photo, "--flip", "cat", "--survive", name, "--margin", "0.2"),
        *("--checkpoint", tiny, "--out", out, "--device", "cpu"),
    )
    assert code == 0, err
    record = json.loads((out / "report.json").read_text())["images"][0]
    assert record["status"] == "success"
    assert f"holds after {name}" in text
    assert record["survival"] == {name: {"held": 1, "total": 1, "violated": []}}
    compressed = tmp_path / "compressed.png"
    (purification,) = parse_survival([name])[1]
    Image.fromarray(purification.apply(np.array(Image.open(out / "photo.adv.png")))[0]).save(compressed)
    _, text, _ = cli("predict", compressed, "--checkpoint", tiny, "--json", "--device", "cpu", "--reader",
                     "float,pillow,torchvision")  # fmt: skip
    assert ["cat" in entry["labels"] for entry in json.loads(text)["images"]] == [False] * 3


@pytest.mark.parametrize(
    "name", ["jpeg:0", "jpeg:90-80", "png:3", "median:2", "bits:9", "webp:101", "resize:0", "jpeg"]
)
def test_a_purification_out_of_its_range_is_refused_in_one_line(cli, tiny, tmp_path, name):
    Image.fromarray(TINY_PIXELS).save(tmp_path / "photo.png")
    code, _, err = cli("attack", tmp_path / "photo.png", "--flip", "cat", "--survive", name, "--checkpoint", tiny)
    assert (code, err.count("\n")) == (2, 1)
    assert "--survive" in err
    assert name in err


@pytest.mark.parametrize(("readers", "passes"), [(["float"], 90), (["float", "pillow", "torchvision"], 220)])
def test_a_limit_on_passes_counts_every_view_and_check(cli, tiny, tmp_path, readers, passes):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(TINY_PIXELS).save(photo)
    arguments = ["attack", photo, "--flip", "cat", "--checkpoint", tiny, "--out", out, "--device", "cpu"]
    arguments += [part for name in readers for part in ("--reader", name)]
    code, _, err = cli(*arguments, "--survive", "jpeg:60-69", "--passes", passes)
    assert code == 0, err
    record = json.loads((out / "report.json").read_text())["images"][0]
    assert record["cost"]["forward"] + record["cost"]["backward"] <= passes
    assert len(record["survival"]) == 10
    least = 11 * len(readers) + 5 * len(readers) + 4 * 5  # the check of the file; a look at the photo; two iterations
    code, _, err = cli(*arguments, "--overwrite", "--survive", "jpeg:60-69", "--passes", least - 1)
    assert code == 2
    assert err.count("\n") == 1
    assert f"expected at least {least} --passes, got {least - 1}" in err
    code, _, err = cli(*arguments, "--overwrite", "--survive", "jpeg:60-69", "--passes", least)
    assert code == 0
    record = json.loads((out / "report.json").read_text())["images"][0]
    assert record["cost"]["forward"] + record["cost"]["backward"] <= least
