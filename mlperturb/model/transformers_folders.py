"""Folders of transformers models: config.json with `model_type`, model.safetensors, preprocessor_config.json.

The network is built from config.json by classes of the library; no code of a folder is ever run, and nothing is
fetched. Weights go through the library's own renaming, because the names of tensors change from version to version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError, MlperturbError
from mlperturb.model.untrusted import bounded, check_values, read_json

if TYPE_CHECKING:
    from mlperturb.model.preprocess import Preprocess

TRANSFORMERS = "transformers/"  # prefix of an architecture's name
_REFUSED = ("quantization_config", "transformers_weights")
_UNUSED = 0.05  # share of the numbers of a file that the network may leave, such as a pooler
_LEFT_OUT = (  # what concerns other programs, or would decide how this one computes
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "problem_type", "num_labels", "id2label",
    "label2id", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "fusion_config",
    "distributed_config", "gradient_checkpointing", "return_dict", "torchscript", "output_attentions",
    "output_hidden_states",
)  # fmt: skip


class Scores(nn.Module):
    """A classifier of transformers as a function from (N, 3, h, w) to its scores, (N, L).

    Args:
        network: the classifier.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores."""
        scores: Tensor = self.network(pixel_values=inputs, return_dict=True).logits
        return scores


def need_transformers() -> Any:
    """Return the module `transformers`.

    Raises:
        CheckpointError: if it is not; the message names the extra.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "expected the library transformers for such a checkpoint: pip install 'mlperturb[hf]'"
        ) from error
    return transformers


def transformers_preprocess(folder: Path) -> Preprocess:
    """Return what the folder's image processor does.

    Raises:
        CheckpointError: if there is none, transformers cannot read it, or `Preprocess` cannot express it.
    """
    from mlperturb.model.processors import FILES, express

    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} records no preprocessing, in {' or '.join(FILES)}: give `preprocess`")
    for path in found:
        check_values(read_json(path), path)
    library = need_transformers()
    try:
        with _alone():
            processor = library.AutoImageProcessor.from_pretrained(
                str(folder), backend="torchvision", local_files_only=True, trust_remote_code=False
            )
            return express(processor, folder)
    except CheckpointError:
        raise
    except Exception as error:  # transformers may raise anything at fields of the wrong types
        raise CheckpointError(f"transformers cannot read the preprocessing of {folder}: {_reason(error)}") from error


def build_transformers(config: Mapping[str, Any], labels: Sequence[str], weights: Path) -> nn.Module:
    """Return the classifier of config.json, filled: it maps (N, 3, h, w) to scores, (N, L).

    Args:
        config: of the folder.
        labels: L names.
        weights: the file of the weights.

    Raises:
        CheckpointError: if transformers has no such classifier, cannot build it, or the weights do not fit it.
    """
    library = need_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    kind = config["model_type"]
    if kind not in KNOWN:
        raise CheckpointError(f"transformers {library.__version__} has no image classifier of model_type {kind!r:.60}")
    named = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    return Scores(build_filled(config, "AutoModelForImageClassification", weights, fields=named))


def build_filled(
    config: Mapping[str, Any],
    made_by: str,
    weights: Path,
    *,
    fields: Mapping[str, Any] | None = None,
    parts: Sequence[str] = (),
) -> nn.Module:
    """Return the network of config.json by a class of the library, filled.

    Args:
        config: of the folder.
        made_by: the name of the library's class that knows the class for each configuration.
        weights: the file of the weights.
        fields: of the library's configuration, in place of those of `config`.
        parts: beginnings of names that must be among the names of the weights.

    Raises:
        CheckpointError: if transformers cannot build it, or the weights do not fit it.
    """
    library, kind = need_transformers(), config["model_type"]
    refused = [name for name in _REFUSED if config.get(name)]
    if refused:
        raise CheckpointError(f"expected plain weights, got a config.json with {refused[0]}, of {weights.parent}")
    with reported(f"transformers cannot build a {kind}"), _alone(), bounded():
        made = library.CONFIG_MAPPING[kind].from_dict({**_plain(config), **(fields or {})})
        with torch.device("meta"):
            empty = getattr(library, made_by).from_config(made, dtype=torch.float32)
    with reported(f"transformers cannot fill a {kind} from {weights}"), _alone():
        return _fill(empty, made, weights, parts)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json, and of the objects in it, that say what the network is."""
    kept = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    return {name: _plain(value) if isinstance(value, dict) else value for name, value in kept.items()}


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn what the library raises into an error of a line; the code of hundreds of models may raise anything.

    Raises:
        CheckpointError: that says what failed, and why.
    """
    try:
        yield
    except MlperturbError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {_reason(error)}") from error


def _fill(empty: nn.Module, config: Any, weights: Path, parts: Sequence[str]) -> nn.Module:
    """Return the network with the weights of a file, under the names that this version of transformers has for them.

    Raises:
        CheckpointError: if the weights do not fit.
    """
    from mlperturb.model.checkpoints import plain_tensors, read_tensors

    tensors = plain_tensors(read_tensors(weights), weights)
    for part in parts:
        if not any(name.startswith(part) for name in tensors):
            raise CheckpointError(f"expected an image tower and a text tower in {weights}, got no {part}*")
    wanted, given = (sum(one.numel() for one in each.values()) for each in (empty.state_dict(), tensors))
    if wanted > 2 * given + 1_000_000:  # what is missing would be allocated
        raise CheckpointError(f"{weights} does not fit its config.json: expected {wanted} numbers, got {given}")
    made: Any = type(empty)
    network: nn.Module
    network, found = made.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for name, got, expected in sorted(found["mismatched_keys"]):
        if not parts and tuple(expected)[:1] == (config.num_labels,) and tuple(got)[1:] == tuple(expected)[1:]:
            raise CheckpointError(
                f"expected a head of {config.num_labels} outputs, one for each label, got {got[0]} in {weights}"
            )
        raise CheckpointError(
            f"{weights} does not fit its config.json: expected {name} of shape {tuple(expected)}, got {tuple(got)}"
        )
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise CheckpointError(f"{weights} does not fit its config.json: missing {', '.join(names[:5])}")
    if given - wanted > _UNUSED * given:  # as where a damaged config.json has fewer layers
        raise CheckpointError(f"{weights} does not fit its config.json: expected {wanted} numbers, got {given}")
    return network


@contextmanager
def _alone() -> Iterator[None]:
    """Keep transformers quiet, and away from the network."""
    from huggingface_hub import constants

    logging = need_transformers().utils.logging
    verbosity, bars, offline = logging.get_verbosity(), logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    line = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
    return f"{line:.200}"
