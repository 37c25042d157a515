"""Small folders of CLIP and SigLIP models that transformers itself writes, each with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from support.transformers_folders import load_library

SIDE = 48
NAMES = ("a dog", "a cat", "two Cows", "a hen-house")
PLACES = 32  # of tokens
KINDS = ("clip", "siglip", "siglip2")  # siglip2 of a fixed input size: a SigLIP with another tokenizer
_VIEW = {"image_size": SIDE, "patch_size": 16}
_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_TEXTS = ["a photo of a dog", "a drawing of a cat, two cows and a hen-house.", "it's the best picture of them all"]


def make_tokenizer(kind: str) -> Any:
    """Return a tokenizer of the library, trained on a few words."""
    return {"clip": _clip_tokenizer, "siglip": _siglip_tokenizer, "siglip2": _siglip2_tokenizer}[kind]()


def _clip_tokenizer() -> Any:
    import transformers
    from tokenizers import pre_tokenizers, trainers

    words = transformers.CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|startoftext|>", "<|endoftext|>"], end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    return transformers.CLIPTokenizer(**_trained(words, trainer), model_max_length=PLACES)


def _siglip_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    words = Tokenizer(models.Unigram())
    steps = [normalizers.Lowercase(), normalizers.Replace(".", ""), normalizers.Strip()]
    words.normalizer = normalizers.Sequence(steps)
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    words.train_from_iterator(_TEXTS, trainer)
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="</s>", eos_token="</s>", unk_token="<unk>", model_max_length=PLACES,
        model_input_names=["input_ids"],
    )  # fmt: skip


def _siglip2_tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    words = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    return transformers.Siglip2Tokenizer(
        **_trained(words, trainer), padding_side="right", model_input_names=["input_ids"]
    )


def _trained(words: Any, trainer: Any) -> dict[str, Any]:
    """Return the vocabulary and merges of a tokenizer after training."""
    words.train_from_iterator(_TEXTS, trainer)
    model = json.loads(words.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def make_model(kind: str, tokenizer: Any) -> Any:
    """Return a model of images and texts with random weights, large enough that logits depend on the photo."""
    import transformers

    text = {**_BLOCKS, "vocab_size": len(tokenizer), "max_position_embeddings": PLACES, "pad_token_id": None}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "clip":
        vision = {**_BLOCKS, "hidden_size": 24, **_VIEW}
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config={**_BLOCKS, **_VIEW})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config).eval()
        for name, parameter in model.named_parameters():  # small weights give all photos the same logits
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 1.7 * parameter[0].numel() ** -0.5)
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
            if kind != "clip":
                model.logit_bias.fill_(-0.2)
            _centre(model, kind, tokenizer)
    return model


def _centre(model: Any, kind: str, tokenizer: Any) -> None:
    """Move the embeddings of texts and of photos about 0: those of random weights lie all in one direction."""
    fill: dict[str, Any] = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": PLACES}
    words = tokenizer([f"a photo of {name}" for name in NAMES], return_tensors="pt", **fill)
    photos = torch.rand(16, 3, SIDE, SIDE) * 4 - 2
    texts, seen = model.text_model(**words).pooler_output, model.vision_model(pixel_values=photos).pooler_output
    if kind == "clip":
        ends = model.text_model.final_layer_norm.bias, model.vision_model.post_layernorm.bias
    else:
        ends = model.text_model.head.bias, model.vision_model.head.mlp.fc2.bias
    for bias, pooled in zip(ends, (texts, seen), strict=True):
        bias.sub_(0.95 * pooled.mean(0))


def write_model(folder: Path, kind: str = "siglip") -> Any:
    """Write a model and its processor; return the model."""
    transformers = load_library()
    tokenizer = make_tokenizer(kind)
    model = make_model(kind, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    if kind == "clip":
        transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessor(size=square).save_pretrained(folder)
    return model
