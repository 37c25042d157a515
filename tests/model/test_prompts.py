"""CLIP and SigLIP by prompts, against the processors and the logits of transformers itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.bad_folders import pipe, sparse
from support.prompts import KINDS, NAMES, PLACES, write_model
from support.transformers_folders import change

import mlperturb
from mlperturb.errors import CheckpointError, UsageError
from mlperturb.model import towers
from mlperturb.model.checkpoints import load_checkpoint
from mlperturb.model.prompts import DEFAULT_PROMPT, fill_prompts
from mlperturb.model.readers import parse_reader
from mlperturb.model.softmax import softmax_logits
from mlperturb.model.tokens import Tokens
from mlperturb.model.views import read_logits

transformers = pytest.importorskip("transformers")
SEVERAL = ("a photo of {}", "it's a drawing of {}.", "{}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder and its model for each kind."""
    places = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (place, write_model(place, kind)) for kind, place in places.items()}


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path)
    return tmp_path


@pytest.fixture
def instant(monkeypatch):
    """Spare the process of the tokenizer, where it is not what a test is about."""
    monkeypatch.setattr(towers, "tokenise", lambda _f, _k, texts, longest: Tokens([[1] * longest] * len(texts), None))


def photos() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*rng.integers(20, 300, 2), 3), dtype=np.uint8) for _ in range(20)]


def seen_by_library(folder, kind, backend, photo, texts):
    """Return what the library's own processor makes of a photo and texts."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend=backend)
    fill = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": PLACES}
    return processor(text=texts, images=Image.fromarray(photo), return_tensors="pt", **fill)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_odd_photos_equal_those_of_the_library_in_every_reader(kind, made):
    folder, model = made[kind]
    classifier, metadata = load_checkpoint(folder, labels=NAMES, prompt="A photo of {}.")
    assert classifier.preprocess.readers == ("torchvision", "pillow", "float")
    assert metadata.activation == ("softmax" if kind == "clip" else "sigmoid")
    assert metadata.prompts == ("A photo of {}.",)
    assert metadata.origin["labels"] == metadata.origin["prompts"] == "given"
    texts = [f"A photo of {name}." for name in NAMES]
    moved = []
    for backend, reader in (("torchvision", "torchvision"), ("pil", "pillow")):
        for photo in photos():
            with torch.no_grad():
                scores = model(**seen_by_library(folder, kind, backend, photo, texts)).logits_per_image
            expected = softmax_logits(scores) if kind == "clip" else scores
            moved.append(expected)
            torch.testing.assert_close(
                read_logits(classifier, photo, parse_reader(reader)), expected, rtol=1e-4, atol=2e-5
            )
            if kind == "clip":
                torch.testing.assert_close(expected.sigmoid(), scores.softmax(1))
    assert torch.cat(moved).std(0).min() > 1e-2  # the logits depend on the photo


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_several_prompts_are_averaged_as_embeddings_of_length_one(kind, made):
    folder, model = made[kind]
    classifier = mlperturb.load(folder, labels=NAMES, prompt=SEVERAL, activation="sigmoid")
    photo = photos()[0]
    seen = seen_by_library(folder, kind, "torchvision", photo, fill_prompts(SEVERAL, NAMES))
    with torch.no_grad():
        found = model(**seen)
    rows = found.text_embeds.view(len(NAMES), len(SEVERAL), -1).mean(1)
    bias = model.logit_bias if kind == "siglip" else 0
    expected = found.image_embeds @ (rows / rows.norm(dim=1, keepdim=True)).T * model.logit_scale.exp() + bias
    torch.testing.assert_close(
        read_logits(classifier, photo, parse_reader("torchvision")), expected.detach(), rtol=1e-4, atol=2e-5
    )


def test_a_siglip2_tokenizer_lower_cases_and_the_default_prompt_is_stated(made):
    folder, _ = made["siglip2"]
    classifier, metadata = load_checkpoint(folder, labels=["A DOG", "two Cows"])
    lower = mlperturb.load(folder, labels=["a dog", "two cows"], prompt=DEFAULT_PROMPT)
    assert metadata.prompts == (DEFAULT_PROMPT,)
    assert metadata.origin["prompts"] == "the default"
    torch.testing.assert_close(mlperturb.predict(classifier, photos()[:1]), mlperturb.predict(lower, photos()[:1]))


def test_an_exported_model_gives_the_same_probabilities(made, tmp_path):
    for kind in ("clip", "siglip"):
        classifier = mlperturb.load(made[kind][0], labels=NAMES)
        mlperturb.export(classifier, tmp_path / f"{kind}.pt2")
        back = mlperturb.load(tmp_path / f"{kind}.pt2")
        assert back.labels == NAMES
        torch.testing.assert_close(
            mlperturb.predict(back, photos()[:3]), mlperturb.predict(classifier, photos()[:3]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo", r"expected \{\} once in `prompt`, .* got 'a photo'"),
        ("{} and {}", r"expected \{\} once in `prompt`"),
        ([], "expected 1 to 100 different texts for `prompt`, got 0"),
        (["{}", "{}"], "expected 1 to 100 different texts"),
        (["{}", 3], "expected names for `prompt`, got 3"),
        ("{}" + "a" * 600, "expected at most 500 letters in `prompt`, got 602"),
    ],
)
@pytest.mark.usefixtures("instant")
def test_a_wrong_prompt_is_a_line(folder, prompt, message):
    with pytest.raises(UsageError, match=message):
        mlperturb.load(folder, labels=NAMES, prompt=prompt)


@pytest.mark.usefixtures("instant")
def test_labels_are_asked_for_and_bounded(folder):
    with pytest.raises(CheckpointError, match=r"siglip model of images and texts, .*: give `labels`, the names"):
        mlperturb.load(folder)
    with pytest.raises(UsageError, match="at most 500 letters of a prompt with its label"):
        mlperturb.load(folder, labels=["a" * 600])
    with pytest.raises(UsageError, match=r"at most 10000 names for `labels`, .* got 10001"):
        mlperturb.load(folder, labels=[str(number) for number in range(10_001)])
    with pytest.raises(CheckpointError, match="expected distinct label names"):
        mlperturb.load(folder, labels=["a", "a"])
    assert mlperturb.load(folder, labels=["a"], thresholds=0.3).thresholds == (0.3,)


def test_only_such_a_model_takes_prompts(folder):
    with pytest.raises(CheckpointError, match=r"expected no `prompt` for .*: only a model of images and texts"):
        mlperturb.load(prompt="{}")
    change(folder / "config.json", architectures=["SiglipForImageClassification"])
    with pytest.raises(CheckpointError, match="expected no `prompt` for"):
        mlperturb.load(folder, labels=NAMES, prompt="{}")


def _tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def _nested(folder, part, **fields):
    values = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", **{part: {**values[part], **fields}})


NAN = torch.full((1,), float("nan"))
BAD_MODELS = {
    "nan-scale": (lambda f: _tensors(f, lambda s: s.update(logit_scale=NAN)), "finite numbers in logit_scale"),
    "huge-scale": (lambda f: _tensors(f, lambda s: s.update(logit_scale=torch.full((1,), 99.0))),
                   "finite numbers in logit_scale"),
    "nan-bias": (lambda f: _tensors(f, lambda s: s.update(logit_bias=NAN)), "finite numbers in logit_bias"),
    "no-scale": (lambda f: _tensors(f, lambda s: s.pop("logit_scale")), "missing logit_scale"),
    "long-scale": (lambda f: _tensors(f, lambda s: s.update(logit_scale=torch.zeros(3))), "logit_scale of shape"),
    "nan-text": (lambda f: _tensors(f, lambda s: s["text_model.head.bias"].fill_(float("nan"))), "in text embeddings"),
    "no-text-tower": (
        lambda f: _tensors(f, lambda s: [s.pop(name) for name in list(s) if name.startswith("text_model.")]),
        "expected an image tower and a text tower in .*, got no text_model",
    ),
    "sizes": (lambda f: _nested(f, "text_config", projection_size=12), "does not fit its config.json"),
    "places": (lambda f: _nested(f, "text_config", max_position_embeddings=5000), "does not fit|at most 512 tokens"),
    "words": (lambda f: _nested(f, "text_config", vocab_size=9), "does not fit"),
    "towers": (lambda f: _nested(f, "vision_config", hidden_act="os.system"), "transformers cannot"),
    "text-list": (lambda f: change(f / "config.json", text_config=[1]), "transformers cannot"),
    "variable": (lambda f: change(f / "config.json", model_type="siglip2"), "photos of any shape"),
    "vision-only": (lambda f: change(f / "config.json", model_type="siglip_vision_model"), "no image classifier of"),
    "code": (lambda f: change(f / "config.json", auto_map={"AutoModel": "c.M"}), "does not run code of a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD_MODELS)
@pytest.mark.usefixtures("instant")
def test_a_bad_model_is_a_line(folder, damage):
    spoil, message = BAD_MODELS[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        mlperturb.load(folder, labels=NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("instant")
def test_embeddings_of_different_sizes_are_refused(folder):
    def shrink(state):
        state["text_model.head.weight"] = state["text_model.head.weight"][:12].clone()
        state["text_model.head.bias"] = state["text_model.head.bias"][:12].clone()

    _tensors(folder, shrink)
    _nested(folder, "text_config", projection_size=12)
    with pytest.raises(CheckpointError, match=r"embeddings of images and texts of one size in .*, got 16 and 12"):
        mlperturb.load(folder, labels=NAMES)


@pytest.mark.usefixtures("instant")
def test_kernels_named_inside_a_config_are_not_fetched(folder):
    _nested(folder, "vision_config", _attn_implementation="some/kernel", attn_implementation="some/kernel")
    assert mlperturb.load(folder, labels=NAMES).labels == NAMES


def _normaliser(*steps):
    def damage(folder):
        change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": list(steps)})

    return damage


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SLOW = {"type": "Replace", "pattern": {"Regex": "(?=(a|aa)+[^a])x|y"}, "content": ""}  # a tenth of a second
ENDLESS = {"type": "Replace", "pattern": {"Regex": "(a+)+[^a ]$"}, "content": ""}
BAD_TOKENIZERS = {
    "gone": (lambda f: (f / "tokenizer.json").unlink(), r"expected a tokenizer.json in .*: no such file"),
    "pipe": (pipe("tokenizer.json"), r"expected a tokenizer.json in"),
    "large": (sparse("tokenizer.json"), r"has 200000000 bytes, expected at most 100000000"),
    "text": (lambda f: (f / "tokenizer.json").write_text("not JSON"), "cannot read the tokenizer"),
    "empty": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot read the tokenizer"),
    "deep": (lambda f: (f / "tokenizer.json").write_text('{"a":' * 200_000), "cannot read|breaks off"),
    "binary": (lambda f: (f / "tokenizer.json").write_bytes(bytes(range(256))), "cannot read the tokenizer"),
    "bomb": (_normaliser(*[DOUBLE] * 40), "takes too much memory or time, or breaks off|cannot read the tokenizer"),
    "long": (_normaliser(*[DOUBLE] * 10), f"expected prompts of at most {PLACES} tokens, got"),
    "pattern": (_normaliser(ENDLESS), "cannot read the tokenizer"),
    "class": (lambda f: change(f / "tokenizer_config.json", tokenizer_class="TapasTokenizer"), "got 'TapasTokenizer'"),
    "code": (lambda f: change(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["c.T", None]}), "not run code"),
    "fields": (lambda f: change(f / "tokenizer_config.json", pad_token=[[1]]), "cannot read the tokenizer"),
    "number": (
        lambda f: change(f / "tokenizer_config.json", added_tokens_decoder={"1": {"content": 10**30}}), "numbers up to"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_a_line(folder, monkeypatch, damage):
    monkeypatch.setattr("mlperturb.model.tokens._MEMORY", 1 << 30)  # sooner full than what it is
    spoil, message = BAD_TOKENIZERS[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        mlperturb.load(folder, labels=[*NAMES, "a" * 100])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_takes_for_ever_is_stopped(folder, monkeypatch):
    monkeypatch.setattr("mlperturb.model.tokens._SECONDS", 3)
    _normaliser(*[SLOW] * 1000)(folder)
    with pytest.raises(CheckpointError, match="takes too much memory or time, or breaks off"):
        mlperturb.load(folder, labels=["a" * 28])


def test_paths_in_a_tokenizer_config_are_not_opened(folder, tmp_path):
    before = mlperturb.load(folder, labels=NAMES)
    (tmp_path / "other").mkdir()
    change(folder / "tokenizer_config.json", tokenizer_file="/dev/zero", gguf_file="x.gguf", vocab_file="/dev/zero",
           name_or_path="some/where", model_max_length=10**30)  # fmt: skip
    after = mlperturb.load(folder, labels=NAMES)
    torch.testing.assert_close(mlperturb.predict(after, photos()[:1]), mlperturb.predict(before, photos()[:1]))
