"""Labels by prompts: a model of images and texts, CLIP or SigLIP, is a classifier of whatever a user names.

Each label gets its texts, `a photo of {}` with the label in place of `{}`. Names and texts are checked here without
torch; `mlperturb.model.towers` builds the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlperturb.errors import CheckpointError, UsageError
from mlperturb.labels import list_names

DEFAULT_PROMPT = "a photo of {}"
PLACE = "{}"  # of the label in a prompt
ACTIVATION = {"clip": "softmax", "siglip": "sigmoid"}  # by model_type: what the model was trained with
_VARIABLE = "siglip2"  # takes patches of photos of any shape
_MAX_LABELS, _MAX_PROMPTS, _MAX_TEXTS = 10_000, 100, 100_000
_MAX_LETTERS = 500  # of a text


def is_prompted(config: Mapping[str, Any]) -> bool:
    """Say whether config.json describes a model of images and texts, not a classifier made of its image tower."""
    if isinstance(config.get("architecture"), str) or config.get("model_type") not in (*ACTIVATION, _VARIABLE):
        return False  # a timm model has an architecture
    made = config.get("architectures")
    names = [name for name in made if isinstance(name, str)] if isinstance(made, list) else []
    if names:
        return not any(name.endswith("ForImageClassification") for name in names)
    return "id2label" not in config


def need_labels(folder: Path, config: Mapping[str, Any], labels: Sequence[str] | None) -> None:
    """Refuse a model of images and texts that cannot be a classifier, or that nobody has named labels for.

    Raises:
        CheckpointError: if it takes photos of any shape, or there are no labels.
    """
    kind = config["model_type"]
    if kind == _VARIABLE:
        raise CheckpointError(
            f"{folder} is a siglip2 model of photos of any shape (NaFlex): expected one with a fixed input size, whose "
            "model_type is siglip"
        )
    if labels is None:
        raise CheckpointError(
            f"{folder} is a {kind} model of images and texts, which has no labels of its own: give `labels`, the names "
            "to look for"
        )


def refuse_prompts(prompts: Sequence[str] | None, path: Path) -> None:
    """Refuse prompts for a checkpoint that takes none.

    Raises:
        CheckpointError: if there are prompts.
    """
    if prompts is not None:
        raise CheckpointError(
            f"expected no `prompt` for {path}: only a model of images and texts, clip or siglip, takes one"
        )


def read_prompts(
    folder: Path, config: Mapping[str, Any], prompts: tuple[str, ...] | None, labels: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the prompts of a folder, and where they come from; nothing for a folder that takes none.

    Args:
        folder: of a timm or a transformers model.
        config: its config.json.
        prompts: that a user gives; None for the default.
        labels: L names.

    Raises:
        CheckpointError: if there are prompts for a folder that takes none.
        UsageError: see `fill_prompts`.
    """
    if not is_prompted(config):
        refuse_prompts(prompts, folder)
        return (), {}
    found = prompts or (DEFAULT_PROMPT,)
    fill_prompts(found, labels)
    return found, {"prompts": "given" if prompts else "the default"}


def check_prompts(prompts: object) -> tuple[str, ...]:
    """Return prompts, a text or several, each with the place of the label.

    Raises:
        UsageError: if there is none, or one has not exactly one `{}`, or is too long.
    """
    found = tuple(list_names(prompts, "prompt"))
    if not 1 <= len(found) <= _MAX_PROMPTS or len(set(found)) != len(found):
        raise UsageError(f"expected 1 to {_MAX_PROMPTS} different texts for `prompt`, got {len(found)}")
    for prompt in found:
        if prompt.count(PLACE) != 1:
            raise UsageError(f"expected {PLACE} once in `prompt`, in place of the label, got {prompt!r:.80}")
        if len(prompt) > _MAX_LETTERS:
            raise UsageError(f"expected at most {_MAX_LETTERS} letters in `prompt`, got {len(prompt)}")
    return found


def fill_prompts(prompts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the texts of the labels, those of the first label first.

    Args:
        prompts: P texts with `{}`.
        labels: L names.

    Returns:
        L P texts.

    Raises:
        UsageError: if there are too many labels or texts, or a text is too long.
    """
    if len(labels) > _MAX_LABELS or len(labels) * len(prompts) > _MAX_TEXTS:
        raise UsageError(
            f"expected at most {_MAX_LABELS} names for `labels`, and {_MAX_TEXTS} texts of labels and prompts, got "
            f"{len(labels)} and {len(labels) * len(prompts)}"
        )
    texts = [prompt.replace(PLACE, label) for label in labels for prompt in prompts]
    longest = max(texts, key=len)
    if len(longest) > _MAX_LETTERS:
        raise UsageError(f"expected at most {_MAX_LETTERS} letters of a prompt with its label, got {longest!r:.80}")
    return texts
