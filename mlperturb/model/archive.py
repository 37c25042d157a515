"""Read the archive of a `.pt2` file, as `torch.export.save` writes it: JSON and tensors, and nothing that executes.

`torch.export.load` runs what a file tells it to: it unpickles sample inputs, objects and weights with `use_pickle`, and
it evaluates the text of symbolic sizes with SymPy, which calls any Python. So it is not used. Here JSON is parsed,
tensors are taken from their raw bytes, and the rest of the archive is never opened.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlperturb.errors import CheckpointError

_PROGRAM, _WEIGHTS, _CONSTANTS = "models/model.json", "data/weights/", "data/constants/"
_CONFIGS = {_WEIGHTS: "model_weights_config.json", _CONSTANTS: "model_constants_config.json"}
_MAX_JSON = 2**25  # bytes; Python takes some twenty times as much
_MAX_MEMBERS = 100_000
_MAX_EXPANDED = 2**26  # bytes of a tensor that repeats its numbers
_OLD = "serialized_exported_program.json"  # of torch before 2.8
DTYPES = {  # the numbers that the file has for them
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON of the program of a `.pt2` file, and its tensors by name: parameters, buffers and constants.

    Raises:
        CheckpointError: if the file cannot be read, is not such an archive, is compressed, or has pickled tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _list_members(archive, path)
            if _PROGRAM not in members:
                old = "; export the program again, with torch 2.8 or newer" if _OLD in members else ""
                raise CheckpointError(f"{path} has no program: expected {_PROGRAM} in it{old}")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{path}: expected little-endian numbers")
            program = _read_json(archive, members, _PROGRAM, path)
            tensors: dict[str, Tensor] = {}
            for folder, config in _CONFIGS.items():
                if folder + config in members:
                    described = _read_json(archive, members, folder + config, path).get("config")
                    tensors |= _read_tensors(archive, members, folder, described, path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a program of torch.export: {_first_line(error)}") from error
    return program, tensors


def _list_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name, without the folder that all lie in.

    Raises:
        CheckpointError: if a member is compressed or encrypted, two have one name, or there are more bytes than in the
            file.
    """
    found = archive.infolist()
    if not found or len(found) > _MAX_MEMBERS:
        raise CheckpointError(f"{path} is not a program of torch.export: it has {len(found)} members")
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in found):
        raise CheckpointError(f"{path} is compressed or encrypted: expected an archive as torch.export.save writes it")
    if sum(member.file_size for member in found) > path.stat().st_size:
        raise CheckpointError(f"{path} says that it has more bytes than it has")
    members = {member.filename.partition("/")[2] or member.filename: member for member in found}
    if len(members) != len(found):
        raise CheckpointError(f"{path} has two members of one name")
    return members


def _read_json(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, path: Path
) -> dict[str, Any]:
    if members[name].file_size > _MAX_JSON:
        raise CheckpointError(f"{path}: expected at most {_MAX_JSON} bytes in {name}, got {members[name].file_size}")
    value = json.loads(archive.read(members[name]))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object in {name}, got {type(value).__name__}")
    return value


def _read_tensors(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: str, described: object, path: Path
) -> dict[str, Tensor]:
    """Return the tensors that a configuration describes; those of one member share its memory."""
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: expected the tensors of {folder} by name")
    storages: dict[str, bytearray] = {}
    tensors = {}
    for name, payload in described.items():
        try:
            member, meta = payload["path_name"], payload["tensor_meta"]
            if payload["use_pickle"] is not False or meta is None:
                raise CheckpointError(
                    f"{path} has a pickled object, {name!r:.80}: mlperturb reads plain tensors only, not subclasses of "
                    "Tensor (such as quantised weights) or objects"
                )
            if folder + member not in members:
                raise CheckpointError(f"{path} lacks {folder}{member!s:.80}")
            if member not in storages:
                storages[member] = bytearray(archive.read(members[folder + member]))
            tensors[name] = _view(storages[member], meta)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} describes the tensor {name!r:.80} wrongly: {_first_line(error)}") from error
    return tensors


def _view(storage: bytearray, meta: Mapping[str, Any]) -> Tensor:
    """Return the tensor that `meta` describes, in this memory.

    Raises:
        ValueError: if it does not lie in the memory, or is of a kind that we do not read.
    """
    dtype = DTYPES.get(meta["dtype"])
    if dtype is None or meta.get("layout", 7) != 7:
        raise ValueError(f"expected plain numbers, got dtype {meta['dtype']!r:.20}, layout {meta.get('layout')!r:.20}")
    sizes, strides = (tuple(_whole(value) for value in meta[key]) for key in ("sizes", "strides"))
    offset, width = _whole(meta["storage_offset"]), dtype.itemsize
    if len(sizes) != len(strides):
        raise ValueError(f"expected a stride for each size, got {strides} for {sizes}")
    count = 1
    for size in sizes:
        count *= size
    if count == 0:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if (last + 1) * width > len(storage):
        raise ValueError(f"expected at least {(last + 1) * width} bytes, got {len(storage)}")
    if count * width > max(len(storage), _MAX_EXPANDED):
        raise ValueError(f"expected at most {len(storage)} bytes, got a shape of {count * width}")
    flat = torch.frombuffer(storage, dtype=dtype, count=len(storage) // width)
    return flat.as_strided(sizes, strides, offset)


def _whole(value: object) -> int:
    """Return a size: `{"as_int": 3}`."""
    number = value.get("as_int") if isinstance(value, dict) else None
    if type(number) is not int or not 0 <= number < 2**48:
        raise ValueError(f"expected a whole number as a size, got {value!r:.80}")
    return number


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__
