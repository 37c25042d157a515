"""A folder in the form of a WD tagger, attacked end to end: 10,861 labels, white squares, BGR, categories."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

COUNT = 10861


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """Return the folder, its photo, and the file of what no file of a WD tagger records.

    Weights are random; the head's bias is set so that the photo has a few labels.
    """
    folder = tmp_path_factory.mktemp("wd")
    names = [f"tag_{number}" for number in range(COUNT)]
    names[:6] = ["general", "sensitive", "1girl", "solo", "hat, red", "sky"]
    groups = [9, 9] + [0 if number % 3 else 4 for number in range(2, COUNT)]
    rows = [f'{number},"{name}",{group},1' for number, (name, group) in enumerate(zip(names, groups, strict=True))]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]) + "\n")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    photo = folder / "photo.png"
    Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC).save(photo)
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=COUNT).eval()
    canvas = Image.new("RGB", (120, 120), (255, 255, 255))
    canvas.paste(Image.open(photo), (0, 15))
    seen = np.array(canvas.resize((160, 160), Image.Resampling.BICUBIC))[:, :, ::-1].copy()
    with torch.no_grad():
        network.head.weight.mul_(20)
        logits = network((torch.from_numpy(seen).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)[0]
        wanted = torch.where(torch.arange(COUNT) % 400 == 2, 2.0, -2.0) + 0.5 * torch.rand(COUNT) - 0.25
        wanted[2], wanted[5] = 0.4, -0.4  # 1girl and sky
        network.head.bias.add_(wanted - logits)
    config = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}}
    save_for_hf(network, folder, model_config=config, safe_serialization=True)
    (folder / "wd.json").write_text(
        json.dumps({"resize": [160, 160], "crop": None, "fit": "stretch", "square": True, "fill": [255] * 3}
                   | {"alpha": [255] * 3, "channels": "bgr", "interpolation": "bicubic", "readers": ["pillow"]})
    )  # fmt: skip
    return folder


def test_a_wd_tagger_is_attacked_end_to_end(tagger, cli, tmp_path):
    given = ("--checkpoint", tagger, "--preprocess", tagger / "wd.json", "--thresholds", ".5", "--device", "cpu")
    out = tmp_path / "out"
    code, shown, said = cli(
        "attack", tagger / "photo.png", "--flip", "1girl", "--add", "sky", "--keep", "rest", *given, "--out", out
    )
    assert (code, said) == (0, "")
    report = json.loads((out / "report.json").read_text())
    (image,) = report["images"]
    assert image["status"] == "success"
    assert image["constraints"]["total"] == COUNT
    assert image["keep"] == ["rest"]
    assert sum(image["truth"].values()) == 28
    assert len(json.dumps(image)) < 60_000
    assert report["classifier"]["origin"]["thresholds"] == "given"
    assert list(report["settings"]["readers"]) == ["pillow"]
    assert len(shown.splitlines()) < 45
    assert "others" in shown
    code, shown, said = cli("predict", out / image["files"]["adversarial"], *given, "--json")
    assert (code, said) == (0, "")
    present = json.loads(shown)["images"][0]["labels"]
    before = {label for label, there in image["truth"].items() if there}
    assert set(present) == before - {"1girl"} | {"sky"}


def test_its_labels_are_calm_and_its_gallery_and_defence_read_the_report(tagger, cli, tmp_path):
    given = ("--checkpoint", tagger, "--preprocess", tagger / "wd.json")
    code, shown, _ = cli("labels", *given)
    assert code == 0
    assert len(shown.splitlines()) < 70
    assert "and 10831 others" in shown
    assert "labels: 10861, by category 0: " in shown
    assert "  thresholds: 0.5: the folder records none" in shown
    out = tmp_path / "out"
    code, _, said = cli(
        "attack", tagger / "photo.png", "--remove", "category:9", "--flip", "1girl", "--keep", "present", *given,
        "--budget", "fast", "--html", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert said == f"mlperturb: {tagger} records no thresholds: 0.5 is used for every label; --thresholds sets others\n"
    (image,) = json.loads((out / "report.json").read_text())["images"]
    assert image["status"] == "success"
    assert image["constraints"]["total"] == 28 + 2
    assert (out / "index.html").stat().st_size < 300_000
    code, shown, said = cli("jpeg-defend", out, "--quality", "80", "--json")
    assert code == 0, said
    assert json.loads(shown)["qualities"][0]["recovered"]["total"] == 1
