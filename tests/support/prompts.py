"""Small folders of CLIP and SigLIP models that transformers itself writes, each with a tokenizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 48
NAMES = ("a dog", "a cat", "two cows", "a hen-house")
PLACES = 20  # of tokens
_VIEW = {"image_size": SIDE, "patch_size": 16}
_TEXTS = ["a photo of a dog", "a drawing of a cat, two cows and a hen-house.", "it's the best picture of them all"]
_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = ("clip", "siglip", "siglip2")  # siglip2 of a fixed input size: a SigLIP with another tokenizer


def make_tokenizer(kind: str) -> Any:
    """Return a tokenizer of the library, trained on a few words."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "clip":
        seed = transformers.CLIPTokenizer()
        words, letters = seed.backend_tokenizer, pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=["<|startoftext|>", "<|endoftext|>"], initial_alphabet=letters,
            end_of_word_suffix="</w>", show_progress=False,
        )  # fmt: skip
        words.train_from_iterator(_TEXTS, trainer)
        trained = words.to_str()
        import json

        model = json.loads(trained)["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        return transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=PLACES)
    if kind == "siglip2":
        words = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        words.normalizer = normalizers.Replace(" ", "▁")
        trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
                                      show_progress=False)  # fmt: skip
        words.train_from_iterator(_TEXTS, trainer)
        import json

        model = json.loads(words.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        return transformers.Siglip2Tokenizer(
            vocab=model["vocab"], merges=merges, padding_side="right", model_input_names=["input_ids"]
        )
    words = Tokenizer(models.Unigram())
    words.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(".", ""), normalizers.Strip()]
    )
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(
        _TEXTS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="</s>", eos_token="</s>", unk_token="<unk>", model_max_length=PLACES,
        model_input_names=["input_ids"],
    )  # fmt: skip


def make_model(kind: str, tokenizer: Any) -> Any:
    """Return a model of images and texts with random weights, large enough that logits depend on the photo."""
    import transformers

    text = {**_BLOCKS, "vocab_size": len(tokenizer), "max_position_embeddings": PLACES}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if kind == "clip":
        config: Any = transformers.CLIPConfig(
            text_config=text, vision_config={**_BLOCKS, "hidden_size": 24, **_VIEW}, projection_dim=12
        )
    else:
        config = transformers.SiglipConfig(text_config=text, vision_config={**_BLOCKS, **_VIEW})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = (transformers.CLIPModel if kind == "clip" else transformers.SiglipModel)(config)
        for name, parameter in model.named_parameters():  # small weights give all photos the same logits
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 1.7 * parameter[0].numel() ** -0.5)
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
            if kind != "clip":
                model.logit_bias.fill_(-0.2)
    return model.eval()


def write_model(folder: Path, kind: str = "siglip") -> Any:
    """Write a model and its processor; return the model."""
    import transformers

    tokenizer = make_tokenizer(kind)
    model = make_model(kind, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "clip":
        transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model
