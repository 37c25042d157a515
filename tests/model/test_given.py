"""What a user says of a checkpoint: thresholds, label files, preprocessing; in Python and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mlperturb
from mlperturb.errors import CheckpointError, UsageError
from mlperturb.labels import Categories
from mlperturb.model.checkpoints import describe_checkpoint, load_checkpoint, save_checkpoint
from mlperturb.model.classifier import Classifier
from mlperturb.model.given import read_label_file, read_thresholds
from mlperturb.model.metadata import Metadata, read_metadata
from mlperturb.model.preprocess import Preprocess
from mlperturb.model.readers import parse_reader
from mlperturb.model.views import read_logits

LABELS = ("sky", "hat, red", "miku")
CATEGORIES = Categories(("0", "0", "4"), {"0": "general", "4": "character"})


def _write(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_text("\ufeff" + text, encoding="utf-8")
    return path


def test_a_number_is_the_threshold_of_every_label():
    for value in (0.35, ".35", "0.35", np.float32(0.35)):
        assert read_thresholds(value).of(LABELS, Categories()) == pytest.approx((0.35,) * 3)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('name,threshold\nmiku,.9\nsky,.2\n"hat, red",.4\n', (0.2, 0.4, 0.9)),
        ("name,threshold\nmiku,.9\n*,.3\n", (0.3, 0.3, 0.9)),
        ("category,threshold\n0,.3\n4,.85\n", (0.3, 0.3, 0.85)),
        ("category,name,threshold\n0,general,.3\n4,character,.85\n", (0.3, 0.3, 0.85)),
        ("category,threshold\n4,.85\n*,.3\n", (0.3, 0.3, 0.85)),
        ('tag_id,name,category,best_threshold\n1,miku,4,.9\n2,sky,0,.2\n3,"hat, red",0,.4\n', (0.2, 0.4, 0.9)),
    ],
)
def test_a_table_gives_thresholds_by_label_or_by_category(tmp_path, table, expected):
    path = _write(tmp_path, table)
    assert read_thresholds(path).of(LABELS, CATEGORIES) == expected
    assert read_thresholds(str(path)).of(LABELS, CATEGORIES) == expected


def test_mappings_and_sequences_serve_in_python():
    assert read_thresholds({"miku": 0.9, "sky": 0.2, "hat, red": 0.4}).of(LABELS, Categories()) == (0.2, 0.4, 0.9)
    assert read_thresholds([0.1, 0.2, 0.3]).of(LABELS, Categories()) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,threshold\nsky,.3\n", r"expected a threshold for every label, got none for label 'hat, red', t.csv"),
        ("category,threshold\n0,.3\n", r"got none for category '4', t.csv, by category"),
        ("name,threshold\nskyy,.3\n*,.2\n", r"expected `thresholds` of the classifier's labels, got 'skyy', t.csv"),
        ("name,threshold\nsky,1\n", r"expected `thresholds` inside \(0, 1\), got '1' for 'sky'"),
        ("name,threshold\nsky,half\n", r"got 'half' for 'sky'"),
        ("name,threshold\nsky\n", r"expected `thresholds` inside \(0, 1\), got None for 'sky'"),
        ("name,threshold\nsky,.1\nsky,.2\n", r"expected a name once in each row of .*, got 'sky'"),
        ("label,value\nsky,.1\n", r"expected a table with the columns `threshold` and `name` or `category`"),
        ("name,threshold\n", r"at least one row"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, table, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_thresholds(_write(tmp_path, table)).of(LABELS, CATEGORIES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, 1.5, "2", -0.1, float("nan"), True, [0.5, 1.0, 0.5], {"sky": 0}])
def test_a_threshold_outside_0_and_1_is_refused(value):
    with pytest.raises(UsageError, match=r"expected `thresholds` inside \(0, 1\)"):
        read_thresholds(value)


def test_thresholds_that_do_not_fit_the_labels_are_refused(tmp_path):
    with pytest.raises(UsageError, match="expected 3 `thresholds`, got 2"):
        read_thresholds([0.5, 0.5]).of(LABELS, Categories())
    with pytest.raises(UsageError, match="expected labels with categories for thresholds by category"):
        read_thresholds(_write(tmp_path, "category,threshold\n0,.3\n")).of(LABELS, Categories())
    with pytest.raises(UsageError, match=r"no such file: nowhere.csv"):
        read_thresholds("nowhere.csv")


def test_label_files_are_texts_or_tables_with_categories(tmp_path):
    assert read_label_file(_write(tmp_path, "sky\n\nhat, red\n", "names.txt")) == (("sky", "hat, red"), Categories())
    table = _write(tmp_path, 'id,name,category\n1,sky,0\n2,"hat, red",9\n', "names.csv")
    assert read_label_file(table) == (("sky", "hat, red"), Categories(("0", "9")))
    for text, name in (("sky\nsky\n", "a.txt"), ("", "b.txt"), ("name\n\n", "c.csv")):
        with pytest.raises(UsageError, match=r"expected (distinct label names|a table with at least one row)"):
            read_label_file(_write(tmp_path, text, name))
    with pytest.raises(UsageError, match=r"expected a table with a column `name` in .*, got 'tag'"):
        read_label_file(_write(tmp_path, "tag\nsky\n", "d.csv"))


def test_a_checkpoint_of_ours_takes_thresholds_and_some_fields(tiny, tmp_path):
    own = read_metadata(tiny)
    path = _write(tmp_path, json.dumps({"channels": "bgr", "resize": [64, 64]}), "p.json")
    path.write_text(path.read_text(encoding="utf-8-sig"))
    classifier, metadata = load_checkpoint(tiny, thresholds=0.3, preprocess=path)
    assert classifier.thresholds == (0.3,) * len(own.labels)
    assert classifier.boundary.tolist() == pytest.approx([float(np.log(0.3 / 0.7))] * 4)
    assert (classifier.preprocess.resize, classifier.preprocess.channels) == ((64, 64), "bgr")
    assert list(classifier.preprocess.mean) == own.preprocess["mean"]
    assert metadata.origin == {"thresholds": "given", "preprocess": "given: channels, resize; the rest: the checkpoint"}
    assert mlperturb.load(tiny, preprocess={"channels": "bgr"}).preprocess.channels == "bgr"
    assert load_checkpoint(tiny)[1].origin == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chanels": "bgr"}, "unknown fields of `preprocess`: chanels: expected some of alpha, channels, corner"),
        ({"channels": "hsv"}, "expected channels rgb, bgr, grey, got 'hsv'"),
        ({"alpha": [0, 0, 256]}, "expected 3 values from 0 to 255 for alpha"),
        ({"alpha": "white"}, "expected preprocessing fields of the right types"),
        ({"channels": "grey", "mean": [0.1, 0.2, 0.3]}, "expected one mean and one std, three times, of one channel"),
    ],
)
def test_a_wrong_field_is_named(tiny, fields, message):
    with pytest.raises(CheckpointError, match=message):
        describe_checkpoint(tiny, preprocess=fields)


def test_a_file_of_fields_must_be_a_json_object(tiny, tmp_path):
    for text, got in (("{", "no JSON"), ("[1]", "list")):
        with pytest.raises(UsageError, match=f"expected a JSON object in .*, got {got}"):
            describe_checkpoint(tiny, preprocess=_write(tmp_path, text, "p.json"))


def test_categories_are_saved_with_a_checkpoint(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    metadata = Metadata("resnet18", LABELS, (0.5,) * 3, Preprocess((1, 1)).to_dict(), categories=CATEGORIES)
    save_checkpoint(tmp_path / "c.safetensors", network.state_dict(), metadata)
    assert read_metadata(tmp_path / "c.safetensors").categories == CATEGORIES
    short = Metadata("resnet18", LABELS, (0.5,) * 3, {}, categories=Categories(("0",)))
    save_checkpoint(tmp_path / "d.safetensors", network.state_dict(), short)
    with pytest.raises(CheckpointError, match="expected 3 categories"):
        read_metadata(tmp_path / "d.safetensors")


def test_a_network_of_one_channel_sees_the_luma_of_pillow():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2 * 64, 3))
    read = Preprocess((8, 8), channels="grey")
    classifier = Classifier(network, LABELS, None, read)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) / 255  # rounded to 8 bits
    seen = read_logits(classifier, pixels, parse_reader("float"))
    expected = network((torch.from_numpy(grey)[None, None] - 0.5) / 0.5)
    torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)
    result = mlperturb.attack(classifier, [pixels], flip="sky", keep="rest")
    assert result.success.all()


def test_a_transparent_photo_is_laid_over_the_colour_the_network_sees(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3))
    classifier = Classifier(network, LABELS, None, Preprocess((8, 8), alpha=(255, 255, 255)))
    rgba = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    photo = Image.fromarray(rgba)
    canvas = Image.new("RGBA", (8, 8), (255, 255, 255))
    canvas.alpha_composite(photo)
    over = canvas.convert("RGB")
    assert torch.equal(mlperturb.predict(classifier, [photo]), mlperturb.predict(classifier, [over]))
    photo.save(tmp_path / "t.png")
    result = mlperturb.attack(classifier, [tmp_path / "t.png"], flip="sky", keep="rest")
    assert result.success.all()
    written = result.images[0]
    assert isinstance(written, Image.Image)
    assert written.mode == "RGB"
    bare = Classifier(network, LABELS, None, Preprocess((8, 8)))
    assert not torch.equal(mlperturb.predict(bare, [photo]), mlperturb.predict(classifier, [photo]))


def test_categories_and_present_serve_in_python():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    with torch.no_grad():
        seen = read_logits(Classifier(network, LABELS, None, Preprocess((8, 8))), pixels, parse_reader("float"))[0]
        network[1].bias.add_(torch.tensor([0.5, -0.5, 0.5]) - seen)
    classifier = Classifier(network, LABELS, None, Preprocess((8, 8)), CATEGORIES)
    result = mlperturb.attack(classifier, [pixels], flip="category:character", keep="present")
    assert result.success.all()
    assert result.flip.tolist() == [[False, False, True]]
    assert result.keep.tolist() == [[True, False, False]]
    nearest = mlperturb.attack(classifier, [pixels], flip="any", keep="present")
    assert nearest.success.all()
    assert nearest.flip.tolist() == [[False, True, False]]


def test_a_name_with_a_rare_line_separator_stays_whole(tmp_path):
    assert read_label_file(_write(tmp_path, "name\na\u2028b\nc\n"))[0] == ("a\u2028b", "c")
