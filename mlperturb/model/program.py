"""A program of `torch.export` as a network: its operators are called one after the other.

The file's graph is data: names of operators of PyTorch (`mlperturb.model.operators`), numbers, and names of values.
Nothing of it is evaluated or becomes Python code, as it does in `torch.export.load` (`mlperturb.model.archive`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlperturb.errors import CheckpointError
from mlperturb.model.archive import read_archive
from mlperturb.model.graphs import Block, Name, Step, read_block
from mlperturb.model.operators import changes
from mlperturb.model.shaped import Form, Shaped

_SCHEMA = 8  # the file's major version
_FLOAT32 = 7
_LOGISTIC = {"aten::sigmoid": "sigmoid", "aten::softmax": "softmax", "aten::_softmax": "softmax"}
ADVICE = "see docs/checkpoints.md for how to export one"


class Program(nn.Module):
    """The operators of a program, with their tensors; maps input to logits.

    Args:
        block: the operators.
        tensors: the tensors of the file by the names that the block has for them.
    """

    def __init__(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.block = block
        self._names = tuple(tensors)
        for number, tensor in enumerate(tensors.values()):
            self.register_buffer(f"tensor_{number}", tensor)
        self._writes = any(changes(step.call) for step in block.all_steps())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, (N, L)."""
        values: dict[str, Any] = dict(zip(self._names, self.buffers(), strict=True))
        images = inputs.clone() if self._writes else inputs  # an operator may change its argument
        (logits,) = self.block.run({**values, self.block.inputs[0]: images}, inputs.device)
        result: Tensor = logits
        return result


def read_program(path: Path, outputs: int) -> Shaped:
    """Read a program of `torch.export` from a `.pt2` file; nothing in it is executed.

    Args:
        path: of the file.
        outputs: L, the number of labels.

    Raises:
        CheckpointError: if the file is damaged or unsafe, has operators that mlperturb does not know, or is not a
            program from one batch of photos to L logits.
    """
    described, tensors = read_archive(path)
    try:
        version = described["schema_version"]["major"]
        if version != _SCHEMA:
            raise CheckpointError(
                f"{path} is a program of version {version!r:.20}, expected {_SCHEMA}: export it again with this torch "
                f"({torch.__version__})"
            )
        module = described["graph_module"]
        graph, signature = module["graph"], module["signature"]
        inputs, photo = _read_inputs(signature["input_specs"], tensors)
        block = read_block(graph, [*inputs, photo])
        form = _input_form(graph["tensor_values"][photo])
        output = _read_output(signature["output_specs"], graph["tensor_values"], outputs)
    except KeyError as error:
        raise CheckpointError(f"{path} is not a program of torch.export: it lacks {error.args[0]!r:.80}") from error
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: {reason:.300}; {ADVICE}") from error
    _refuse_writes(block, inputs, path)
    steps, output, activation = _logits(block.steps, output)
    steps = tuple(_needed(steps, output))
    used = {name for step in steps for name in step.names}
    kept = {name: tensor for name, tensor in inputs.items() if name in used}
    block = Block(_with_ends(steps, output), (photo,), (output,))
    return Shaped(Program(block, kept), form.with_activation(activation))


def _read_inputs(specs: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Name]:
    """Return the graph's tensors of the file by its names for them, and its name for the photos."""
    found: dict[str, Tensor] = {}
    photos = []
    keys = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    for spec in specs:
        ((kind, value),) = spec.items()
        if kind == "user_input" and "as_tensor" in value["arg"]:
            photos.append(Name(value["arg"]["as_tensor"]["name"]))
        elif kind in keys:
            stored = value[keys[kind]]
            if stored not in tensors:
                raise ValueError(f"the file lacks the tensor {stored!r:.80}")
            found[Name(value["arg"]["name"])] = tensors[stored]
        else:
            raise ValueError(f"expected a batch of photos as the only input, got {kind} too")
    if len(photos) != 1:
        raise ValueError(f"expected a batch of photos as the only input, got {len(photos)} inputs")
    return found, photos[0]


def _input_form(meta: Mapping[str, Any]) -> Form:
    if meta["dtype"] != _FLOAT32:
        raise ValueError("the program expects numbers that are not float32: export the network after network.float()")
    return Form(_sizes(meta))


def _sizes(meta: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the sizes of a value; None for one that is free."""
    return tuple(size.get("as_int") for size in meta["sizes"])


def _read_output(specs: Sequence[Mapping[str, Any]], values: Mapping[str, Any], outputs: int) -> Name:
    """Return the name of the only output of L columns."""
    found = []
    for spec in specs:
        ((kind, value),) = spec.items()
        if kind != "user_output":
            raise ValueError("expected a program that changes nothing: export the network after network.eval()")
        if "as_tensor" in value["arg"]:
            found.append(Name(value["arg"]["as_tensor"]["name"]))
    shapes = [_sizes(values[name]) for name in found]
    fitting = [
        name for name, shape in zip(found, shapes, strict=True) if len(shape) == 2 and shape[1] in (outputs, None)
    ]
    if len(fitting) != 1:
        shown = " and ".join("x".join(str(size or "N") for size in shape) for shape in shapes[:5]) or "none"
        raise ValueError(f"expected one output of {outputs} logits, one for each label, got {shown:.100}")
    return fitting[0]


def _refuse_writes(block: Block, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a program that changes its own tensors."""
    for step in block.all_steps():
        for place in changes(step.call):
            if place < len(step.arguments) and step.arguments[place] in inputs:
                raise CheckpointError(f"{path} changes its own tensors: export the network after network.eval()")


def _logits(steps: tuple[Step, ...], output: Name) -> tuple[tuple[Step, ...], Name, str | None]:
    """Return the steps up to the logits, their name, and the activation that the program applied to them, if any."""
    if steps and steps[-1].results == (output,):
        last = steps[-1]
        schema = getattr(last.call, "_schema", None)
        activation = _LOGISTIC.get(schema.name if schema is not None else "")
        along_labels = activation == "sigmoid" or last.arguments[1:2] in ((1,), (-1,))
        if activation is not None and along_labels and isinstance(last.arguments[0], Name):
            return steps[:-1], last.arguments[0], activation
    return steps, output, None


def _needed(steps: Sequence[Step], output: Name) -> list[Step]:
    """Return the steps on which the output depends, and those that change a value."""
    wanted: set[Any] = {output}
    kept = []
    for step in reversed(steps):
        if changes(step.call) or wanted & set(step.made):
            wanted |= set(step.names)
            kept.append(step)
    return kept[::-1]


def _with_ends(steps: Sequence[Step], output: Name) -> tuple[Step, ...]:
    """Return the steps, each with the values that no later step needs."""
    seen: set[Any] = {output}
    ended = []
    for step in reversed(steps):
        last = tuple(name for name in dict.fromkeys((*step.names, *step.made)) if name not in seen)
        seen |= set(step.names)
        ended.append(step.ending(last))
    return tuple(reversed(ended))
