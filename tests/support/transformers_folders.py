"""Small folders of transformers models that transformers itself writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LABELS = ("cat", "dog", "hen", "cow")
SIDE = 48
_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_VIEW = {"image_size": SIDE, "patch_size": 16}
_STRETCH = {"size": {"height": SIDE, "width": SIDE}}
_CROP = {"size": {"shortest_edge": 53}, "crop_size": {"height": SIDE, "width": SIDE}}

KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # config, its fields, processor, its fields
    "vit": ("ViTConfig", {**_BLOCKS, **_VIEW}, "ViTImageProcessor", _STRETCH),
    "dinov2": (
        "Dinov2Config", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **_VIEW},
        "BitImageProcessor", _CROP,
    ),
    "resnet": (
        "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "ConvNextImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_pct": 0.9},
    ),
    "convnext": (
        "ConvNextConfig", {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]},
        "ConvNextImageProcessor", {"size": {"shortest_edge": 384}},
    ),
    "swin": (
        "SwinConfig", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": SIDE, "window_size": 3},
        "ViTImageProcessor", {**_STRETCH, "resample": 3},
    ),
    "mobilevit": (
        "MobileViTConfig",
        {"image_size": SIDE, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2},
        "MobileViTImageProcessor", {"size": {"shortest_edge": 55}, "crop_size": {"height": SIDE, "width": SIDE}},
    ),
    "efficientnet": (
        "EfficientNetConfig",
        {"image_size": SIDE, "width_coefficient": 0.2, "depth_coefficient": 0.1, "hidden_dim": 256},
        "EfficientNetImageProcessor", {**_STRETCH, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    ),
    "poolformer": (
        "PoolFormerConfig", {"depths": [1] * 4, "hidden_sizes": [8] * 4},
        "PoolFormerImageProcessor", {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    ),
}  # fmt: skip


def make_network(kind: str, *, multi: bool = True) -> torch.nn.Module:
    """Return a classifier of transformers with random weights, of 4 labels."""
    import transformers

    name, fields = KINDS[kind][:2]
    config = getattr(transformers, name)(**fields)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {label: n for n, label in enumerate(LABELS)}
    config.problem_type = "multi_label_classification" if multi else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = transformers.AutoModelForImageClassification.from_config(config).eval()
        for name, parameter in network.named_parameters():  # small weights give all photos the same logits
            if parameter.dim() > 1 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=1.7 * parameter[0].numel() ** -0.5)
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # statistics of the photos that follow
        if norms:
            network.train()
            network(pixel_values=torch.rand(8, 3, SIDE, SIDE))
        head = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        with torch.no_grad():
            spread = network.eval()(pixel_values=torch.rand(8, 3, SIDE, SIDE)).logits.std()
            head.weight.mul_((0.1 / spread).clamp(min=1))
    evaluated: torch.nn.Module = network.eval()
    return evaluated


def load_library() -> Any:
    """Return transformers, kept from drawing bars and from warning."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def write_folder(folder: Path, kind: str = "vit", *, multi: bool = True) -> torch.nn.Module:
    """Write a classifier and its processor; return the classifier."""
    transformers = load_library()
    network: Any = make_network(kind, multi=multi)
    network.save_pretrained(folder)
    name, fields = KINDS[kind][2:]
    getattr(transformers, name)(**fields).save_pretrained(folder)
    made: torch.nn.Module = network
    return made


def change(path: Path, **fields: object) -> None:
    """Change fields of a JSON file; a field that is None is dropped."""
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
