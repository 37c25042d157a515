"""Texts -> token numbers, by the tokenizer of a folder of transformers, as the library's own processor does it.

A tokenizer.json is a small program: its normaliser may replace each letter by a million, and its patterns may take for
ever. So a process of its own reads it, with little memory and time. That process gets a copy of the file and of the
fields named here, and nothing else of the folder: no code, no path and no sentencepiece model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperturb.errors import CheckpointError
from mlperturb.model.untrusted import MAX_BYTES, check_values, read_json

FILE = "tokenizer.json"
_MEMORY, _SECONDS = 2 << 30, 120  # of the process: a tokenizer of 256,000 tokens takes 0.4 GB and 6 s
_KINDS = {  # of the library, by the name in tokenizer_config.json; a SigLIP folder's own reads only sentencepiece
    "CLIPTokenizer": "CLIPTokenizer",
    "GemmaTokenizer": "GemmaTokenizer",
    "Siglip2Tokenizer": "Siglip2Tokenizer",
    "SiglipTokenizer": "TokenizersBackend",
    "PreTrainedTokenizer": "TokenizersBackend",
    "TokenizersBackend": "TokenizersBackend",
}
_USUAL = {"clip": "CLIPTokenizer", "siglip": "TokenizersBackend"}  # by model_type, where no name is recorded
_SPECIAL = ("pad_token", "eos_token", "bos_token", "unk_token", "mask_token", "sep_token", "cls_token")
_FIELDS = (
    *_SPECIAL, "padding_side", "add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", "do_lower_case", "model_input_names", "add_prefix_space", "split_special_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """The token numbers of N texts.

    Attributes:
        ids: N rows of one length.
        mask: 1 for a token, 0 for a filling; None where the text tower is to see the filling.
    """

    ids: list[list[int]]
    mask: list[list[int]] | None


def tokenise(folder: Path, kind: str, texts: Sequence[str], longest: int) -> Tokens:
    """Return the token numbers of texts; texts of a SigLIP are filled up to the longest, as it was trained.

    Args:
        folder: with tokenizer.json.
        kind: the model_type of the folder.
        texts: N texts.
        longest: the number of tokens that the text tower has places for.

    Raises:
        CheckpointError: if there is no tokenizer, it is damaged, takes too much memory or time, or a text has more
            tokens than `longest`.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"expected a {FILE} in {folder}, which the library tokenizers reads: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    fields = _read_fields(folder / "tokenizer_config.json")
    named = str(fields.pop("tokenizer_class", "")).removesuffix("Fast")
    if named and named not in _KINDS:
        raise CheckpointError(f"expected a tokenizer_class of {', '.join(_KINDS)} in {folder}, got {named!r:.60}")
    special = {name: value for name, value in _read_fields(folder / "special_tokens_map.json").items() if value}
    with tempfile.TemporaryDirectory() as place:
        shutil.copyfile(path, Path(place, FILE))
        Path(place, "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
        Path(place, "special_tokens_map.json").write_text(
            json.dumps({name: special[name] for name in _SPECIAL if name in special}), encoding="utf-8"
        )
        asked = {
            "folder": place, "kind": _KINDS[named] if named else _USUAL[kind], "texts": list(texts), "longest": longest,
            "whole": kind != "clip", "memory": _MEMORY, "seconds": _SECONDS,
        }  # fmt: skip
        return _answer(asked, folder)


def _read_fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file that decide token numbers, and the name of the tokenizer's class."""
    if not path.exists():
        return {}
    values = read_json(path)
    kept = {name: value for name, value in values.items() if name in (*_FIELDS, "tokenizer_class")}
    check_values(kept, path)
    return kept


def _answer(asked: Mapping[str, Any], folder: Path) -> Tokens:
    """Return what the process of the tokenizer answers.

    Raises:
        CheckpointError: if it answers with an error, or ends without an answer.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("tokens_child.py"))]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked).encode(), capture_output=True, timeout=4 * _SECONDS, env=environment
        )
        answer: Any = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired, ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise CheckpointError(f"the tokenizer of {folder} takes too much memory or time, or breaks off")
    if "error" in answer:
        raise CheckpointError(f"{answer['error']!s:.300}, of {folder}")
    return Tokens(answer["ids"], answer["mask"])
