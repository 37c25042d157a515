"""Files of a folder from elsewhere: their JSON is small and sane, or refused, and so is a network that they name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlperturb.errors import CheckpointError

MAX_BYTES = 100_000_000  # of a JSON file or a table
_MAX_NUMBER = 10**7  # of a field that becomes a size
_MAX_DEPTH = 50  # levels of nested values
_MAX_PARTS = 50_000  # parameters and modules of a network


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: if it is missing, is too large, or is not a JSON object; or names code of its own.
    """
    try:
        if not path.is_file():  # reading a pipe may block for ever
            raise CheckpointError(f"expected a {path.name} in {path.parent}: no such file")
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"expected a {path.name} in {path.parent}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    if "auto_map" in found:
        raise CheckpointError(f"{path} names code of its own (auto_map): mlperturb does not run code of a checkpoint")
    return found


def check_values(value: object, path: Path) -> None:
    """Refuse values that no network or processor of images has: sizes beyond reason, NaN, deep nesting.

    Args:
        value: what a JSON file holds.
        path: of the file, for the message.

    Raises:
        CheckpointError: if there is such a value; the message names its field.
    """
    left: list[tuple[str, object, int]] = [("", value, 0)]
    while left:
        name, one, depth = left.pop()
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{path} is nested more than {_MAX_DEPTH} deep")
        if isinstance(one, dict):
            left += [(str(key), inner, depth + 1) for key, inner in one.items()]
            if "auto_map" in one:
                raise CheckpointError(
                    f"{path} names code of its own (auto_map): mlperturb does not run code of a checkpoint"
                )
        elif isinstance(one, list):
            left += [(name, inner, depth + 1) for inner in one]
        elif isinstance(one, int | float) and not (math.isfinite(one) and abs(one) <= _MAX_NUMBER):
            raise CheckpointError(f"expected numbers up to {_MAX_NUMBER} in {path}, got {name:.60} {one!r:.30}")


@contextmanager
def bounded() -> Iterator[None]:
    """Stop a network that is being built when it has more parts than any real network.

    Raises:
        CheckpointError: if it has.
    """
    from torch.nn.modules import module

    parts = 0

    def count(*_: object) -> None:
        nonlocal parts
        parts += 1
        if parts > _MAX_PARTS:
            raise CheckpointError(f"expected a network of at most {_MAX_PARTS} parameters and modules")

    handles = [
        module.register_module_parameter_registration_hook(count),
        module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
