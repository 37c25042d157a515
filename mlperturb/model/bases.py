"""Checkpoints that hold only what differs from another checkpoint, their base, which lies beside them.

A last layer is small and its body is not: classifiers that share a body need it on the disk once. The metadata names
the base's file and its SHA-256. A base has no base of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlperturb.errors import CheckpointError
from mlperturb.system.files import file_sha256

if TYPE_CHECKING:
    from torch import Tensor

KEY = "base"  # in the metadata of a safetensors file


def describe_base(base: Path) -> str:
    """Return the metadata that names a base."""
    return json.dumps({"file": base.name, "sha256": file_sha256(base)})


def differing(tensors: Mapping[str, Tensor], base: Path) -> dict[str, Tensor]:
    """Return the tensors that a base does not have, or has with other values.

    Raises:
        CheckpointError: if the base cannot be read, has a base itself, or is of another architecture.
    """
    held, named = _read(base)
    if named is not None or held.keys() - tensors.keys():
        raise CheckpointError(f"expected a whole checkpoint of the same architecture as the base, got {base}")
    return {name: tensor for name, tensor in tensors.items() if not _same(held.get(name), tensor)}


def _same(held: Tensor | None, tensor: Tensor) -> bool:
    return held is not None and held.shape == tensor.shape and bool((held.to(tensor) == tensor).all())


def read_with_base(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, over those of its base where it names a base.

    Raises:
        CheckpointError: if a file is damaged, or the base is missing, is another file, or has a base itself.
        OSError: if the file cannot be read.
    """
    tensors, described = _read(path)
    if described is None:
        return tensors
    try:
        wanted = json.loads(described)
        name, digest = str(wanted["file"]), str(wanted["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} has damaged metadata: expected the file and sha256 of its base") from error
    base = path.parent / name
    if Path(name).name != name or base.suffix != ".safetensors":
        raise CheckpointError(f"{path} has damaged metadata: expected the name of a base beside it, got {name!r:.80}")
    if not base.is_file():
        raise CheckpointError(f"{path} holds only what differs from {name:.80}: expected that file beside it")
    if file_sha256(base) != digest:
        raise CheckpointError(f"{base} is not the file that {path} builds on: its SHA-256 is another")
    held, chained = _read(base)
    if chained is not None:
        raise CheckpointError(f"{base}, the base of {path}, has a base itself")
    return held | tensors


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a safetensors file, and the base that its metadata names.

    Raises:
        CheckpointError: if it is not such a file.
        OSError: if it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
