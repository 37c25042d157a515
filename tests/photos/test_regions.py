from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import ATTACKS, TINY_PIXELS, make_net, ragged_targets

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem
from mlperturb.attacks.quantise import quantise
from mlperturb.errors import ImageError, UsageError
from mlperturb.photos.regions import parse_region

NET = make_net()


@pytest.mark.parametrize("name", list(ATTACKS))
def test_no_attack_changes_a_pixel_outside_the_region(name):
    images, targets = ragged_targets(NET, margin=0.01)
    images = (images * 255).round() / 255
    region = torch.zeros_like(images[:, :1])
    region[:, :, 2:8, 1:6] = 1
    problem = Problem(NET, images, ClassificationGoal(targets), region=region)
    outcome = ATTACKS[name](problem)
    saved = quantise(problem, outcome, scales=4, iterations=6)
    outside = region.expand_as(images) == 0
    assert float((outcome.images - images)[outside].abs().max()) < 1e-5  # the error of tanh and its inverse
    assert torch.equal((saved.images * 255).round()[outside], (images * 255).round()[outside])
    assert not torch.equal(saved.images, images)


def test_a_rectangle_is_cut_at_the_edges_of_the_photo():
    inside = parse_region("3, 1,100,2").inside(4, 5)
    assert inside.shape == (4, 5)
    assert np.argwhere(inside).tolist() == [[1, 3], [1, 4], [2, 3], [2, 4]]


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "1,2,0,4", "-1,0,3,3", "", "nowhere.png"])
def test_what_is_no_region_is_refused(text):
    with pytest.raises(UsageError, match="`region`"):
        parse_region(text)


def test_a_mask_says_what_may_change_and_must_fit(save_photo):
    pixels = np.zeros((4, 5), dtype=np.uint8)
    pixels[1, 2] = 7
    region = parse_region(str(save_photo("mask.png", Image.fromarray(pixels))))
    assert np.argwhere(region.inside(4, 5)).tolist() == [[1, 2]]
    with pytest.raises(ImageError, match="5 x 4 pixels, expected the photo's 4 x 5"):
        region.inside(5, 4)
    with pytest.raises(UsageError, match="not all black"):
        parse_region(str(save_photo("black.png", Image.fromarray(0 * pixels))))


def test_attack_keeps_to_the_region_and_records_the_photos_it_misses(cli, tiny, tmp_path):
    photo, small, out = tmp_path / "photo.png", tmp_path / "small.png", tmp_path / "out"
    Image.fromarray(TINY_PIXELS).save(photo)
    Image.fromarray(TINY_PIXELS[:9]).save(small)
    code, _, err = cli("attack", photo, small, "--flip", "cat", "--region", "0,12,36,30", "--checkpoint", tiny,
                       "--out", out, "--device", "cpu")  # fmt: skip
    assert code == 1
    assert "outside the photo of 36 x 9" in err
    changed = np.asarray(Image.open(out / "photo.adv.png")) != TINY_PIXELS
    assert changed[12:].any()
    assert not changed[:12].any()
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["region"] == "0,12,36,30"
    assert [image["status"] for image in report["images"]] == ["success", "failed"]
