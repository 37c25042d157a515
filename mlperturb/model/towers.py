"""CLIP and SigLIP as classifiers: the image tower, and a matrix that the text tower has made of the prompts.

The logits of a photo x are z = exp(s) e(x) T' + b, with the image embedding e(x) of length 1, the text embeddings T of
length 1, (L, D), and the model's own scale s and bias b (0 for CLIP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError
from mlperturb.model.prompts import fill_prompts
from mlperturb.model.tokens import tokenise
from mlperturb.model.transformers_folders import build_filled, reported
from mlperturb.system.devices import free_memory
from mlperturb.system.memory import limited_memory

if TYPE_CHECKING:
    from pathlib import Path

_TOWERS = ("text_model.", "vision_model.")
_MOST_TOKENS = 512  # of a text; CLIP has 77, SigLIP 64
_AT_ONCE = 64  # texts


class PromptScores(nn.Module):
    """A function from (N, 3, h, w) to scores for L labels, (N, L).

    Args:
        tower: the image tower.
        projection: of its embeddings, to D numbers.
        texts: the embeddings of the labels, of length 1, (L, D).
        scale: s.
        bias: b.
    """

    texts: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, tower: nn.Module, projection: nn.Module, texts: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection
        for name, tensor in (("texts", texts), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores."""
        seen = self.projection(self.tower(pixel_values=inputs, return_dict=True).pooler_output)
        return normalise(seen) @ self.texts.T * self.scale.exp() + self.bias


def normalise(embeddings: Tensor) -> Tensor:
    """Return rows of length 1."""
    lengths: Tensor = torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    return embeddings / lengths


def build_prompted(
    config: Mapping[str, Any], labels: Sequence[str], prompts: Sequence[str], weights: Path
) -> PromptScores:
    """Return the classifier of a model of images and texts, for these labels.

    Args:
        config: config.json of the folder.
        labels: L names.
        prompts: P texts with the place of a label. The embedding of a label is the mean of those of its P texts, each
            of length 1, made that long again.
        weights: the file of the weights.

    Raises:
        CheckpointError: if the model cannot be built or filled, has no text tower or tokenizer, or gives numbers that
            are not finite.
        UsageError: if there are too many labels, or a text is too long.
    """
    kind, folder = config["model_type"], weights.parent
    texts = fill_prompts(prompts, labels)
    network: Any = build_filled(config, "AutoModel", weights, parts=_TOWERS)
    longest = network.config.text_config.max_position_embeddings
    if not 1 <= longest <= _MOST_TOKENS:
        raise CheckpointError(f"expected a text tower of at most {_MOST_TOKENS} tokens in {folder}, got {longest}")
    with reported(f"transformers cannot embed prompts with the {kind} of {folder}"):
        rows = _embed(network, folder, kind, texts, longest).view(len(labels), len(prompts), -1)
        embedded = normalise(normalise(rows).mean(1))
        scale = network.logit_scale.detach().reshape(())
        bias = network.logit_bias.detach().reshape(()) if kind == "siglip" else torch.zeros(())
    for name, tensor in {"logit_scale": scale.exp(), "logit_bias": bias, "text embeddings": embedded}.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"expected finite numbers in {name} of {folder}")
    projection = network.visual_projection if kind == "clip" else nn.Identity()
    width = network.config.projection_dim if kind == "clip" else network.config.vision_config.hidden_size
    if embedded.shape[1] != width:
        raise CheckpointError(
            f"expected embeddings of images and texts of one size in {folder}, got {width} and {embedded.shape[1]}"
        )
    return PromptScores(network.vision_model, projection, embedded, scale, bias)


@torch.no_grad()
def _embed(network: Any, folder: Path, kind: str, texts: Sequence[str], longest: int) -> Tensor:
    """Return the embeddings of N texts by the text tower, (N, D), in bounded memory.

    Raises:
        CheckpointError: if the tokenizer does not fit the tower, or this would take much of the memory.
    """
    found = tokenise(folder, kind, texts, longest)
    ids = torch.tensor(found.ids)
    known = network.config.text_config.vocab_size
    if ids.dim() != 2 or ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise CheckpointError(f"expected a tokenizer of at most {known} tokens, as the text tower has, in {folder}")
    masks = None if found.mask is None else torch.tensor(found.mask)
    rows = []
    try:
        with limited_memory(free_memory(torch.device("cpu"))):
            for start in range(0, len(texts), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                said = {} if masks is None else {"attention_mask": masks[part]}
                rows.append(network.get_text_features(input_ids=ids[part], return_dict=True, **said).pooler_output)
    except MemoryError as error:
        raise CheckpointError(f"the text tower of {folder} would take too much memory") from error
    return torch.cat(rows)
