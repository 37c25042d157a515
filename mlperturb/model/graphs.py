"""The graph of a program of `torch.export`: steps that call operators on values, read from the JSON of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mlperturb.model.archive import DTYPES
from mlperturb.model.operators import find_operator

_MAX_STEPS = 100_000
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
_GRAD, _AUTOCAST = (f"torch.ops.higher_order.wrap_with_{name}" for name in ("set_grad_enabled", "autocast"))


class Name(str):
    """The name of a value, among the arguments of a step."""

    __slots__ = ()


class _Device:
    """Stands for a device among the arguments: that of the photos, whatever the file says."""


DEVICE = _Device()


@dataclass(frozen=True)
class Step:
    """A call of an operator.

    Attributes:
        call: the operator, or the way in which a block is run.
        arguments: values, numbers, tuples of numbers, and lists that have names of values in them.
        keywords: the same by name.
        results: a name, a list of names, or None for each result.
        block: the inner graph, if the operator has one.
        last: the values that no later step needs.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[Any, ...]
    block: Block | None = None
    last: tuple[str, ...] = ()

    @property
    def names(self) -> list[Name]:
        """The names of the values that it takes."""
        return list(_find_names([*self.arguments, *self.keywords.values()]))

    @property
    def made(self) -> list[Name]:
        """The names of the values that it makes."""
        return list(_find_names(list(self.results)))

    def ending(self, last: tuple[str, ...]) -> Step:
        """Return the step with the values that no later step needs."""
        return replace(self, last=last)

    def run(self, values: dict[str, Any], device: torch.device) -> None:
        """Call the operator, and put the results among the values."""
        arguments = [fill(one, values, device) for one in self.arguments]
        keywords = {name: fill(one, values, device) for name, one in self.keywords.items()}
        if self.block is not None:
            result = self.call(self.block, device, *arguments, **keywords)
        else:
            result = self.call(*arguments, **keywords)
        for name in self.last:
            values.pop(name, None)
        if len(self.results) == 1 and self.block is None:
            result = (result,)
        if self.results:
            for name, value in zip(self.results, result, strict=True):
                _put(values, name, value, self.last)


@dataclass(frozen=True)
class Block:
    """A graph.

    Attributes:
        steps: in the order of their calls.
        inputs: names of the values that it is given.
        outputs: names of the values that it gives.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, values: dict[str, Any], device: torch.device) -> tuple[Any, ...]:
        """Run the steps; `values` has the inputs, and is used up."""
        for step in self.steps:
            step.run(values, device)
        return tuple(values[name] for name in self.outputs)

    def call(self, device: torch.device, *inputs: Any) -> tuple[Any, ...]:
        """Run the steps on these inputs."""
        return self.run(dict(zip(self.inputs, inputs, strict=True)), device)

    def all_steps(self) -> Iterator[Step]:
        """Return the steps, and those of the inner graphs."""
        for step in self.steps:
            yield step
            if step.block is not None:
                yield from step.block.all_steps()


@dataclass
class _Reader:
    """Reads graphs; `left` counts the steps that the file may still have."""

    left: int = field(default=_MAX_STEPS)

    def read(self, graph: Mapping[str, Any], inputs: Sequence[str]) -> Block:
        known: set[str] = set(inputs)
        steps = []
        for node in graph["nodes"]:
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"expected a program of at most {_MAX_STEPS} operators")
            step = self._read_step(node)
            if step is None:
                continue
            for name in step.names:
                if name not in known:
                    raise ValueError(f"the program uses {name!r:.80} before it is made")
            if known & set(step.made) or len(set(step.made)) != len(step.made):
                raise ValueError(f"the program makes a value twice: {step.made[0]!r:.80}")
            known |= set(step.made)
            steps.append(step)
        outputs = tuple(_find_names([read_argument(one) for one in graph["outputs"]]))
        missing = [name for name in outputs if name not in known]
        if missing:
            raise ValueError(f"the program does not make its output {missing[0]!r:.80}")
        return Block(tuple(steps), tuple(inputs), outputs)

    def _read_step(self, node: Mapping[str, Any]) -> Step | None:
        target = node["target"]
        if not isinstance(target, str):
            raise ValueError(f"expected the name of an operator, got {target!r:.80}")
        results = tuple(read_argument(one) for one in node["outputs"])
        if not all(one is None or isinstance(one, Name | list) for one in results):
            raise ValueError(f"expected names of the results of {target:.80}")
        if target in (_GRAD, _AUTOCAST):
            return self._read_wrapped(target, node["inputs"], results)
        call = find_operator(target)
        if call is None:
            return None
        arguments, keywords = [], {}
        for one in node["inputs"]:
            value = read_argument(one["arg"])
            if one.get("kind") == 2:
                keywords[str(one["name"])] = value
            else:
                arguments.append(value)
        return Step(call, tuple(arguments), keywords, results)

    def _read_wrapped(self, target: str, inputs: Sequence[Mapping[str, Any]], results: tuple[Any, ...]) -> Step:
        """Read a graph that runs without gradients, or in autocast."""
        count = 1 if target == _GRAD else 4
        options = [read_argument(one["arg"]) for one in inputs[:count]]
        inner = inputs[count]["arg"]["as_graph"]["graph"]
        names = [next(_find_names([read_argument(one)])) for one in inner["inputs"]]
        arguments = [read_argument(one["arg"]) for one in inputs[count + 1 :]]
        if len(names) != len(arguments) or _find_one(options) is not None:
            raise ValueError(f"expected an input for each argument of {target:.80}")
        call = _with_gradients if target == _GRAD else _with_autocast
        return Step(call, (tuple(options), *arguments), {}, results, self.read(inner, names))


def read_block(graph: Mapping[str, Any], inputs: Sequence[str]) -> Block:
    """Read the JSON of a graph.

    Args:
        graph: of the file.
        inputs: the names of its inputs.

    Raises:
        KeyError, TypeError, ValueError: if it is not a graph, has an unknown operator, or uses a value not made.
    """
    return _Reader().read(graph, inputs)


def fill(argument: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    """Return an argument with values in place of their names."""
    if type(argument) is Name:
        return values[argument]
    if type(argument) is list:
        return [fill(one, values, device) for one in argument]
    return device if argument is DEVICE else argument


def read_argument(described: Mapping[str, Any]) -> Any:
    """Read an argument: a number, a string, None, `DEVICE`, a `Name`, a tuple of numbers, or a list with names in it.

    Raises:
        ValueError: if it is of a kind that we do not read, or not of its kind.
    """
    if not isinstance(described, dict) or len(described) != 1:
        raise ValueError(f"expected one argument, got {described!r:.80}")
    ((kind, value),) = described.items()
    if kind == "as_none":
        return None
    if kind == "as_device":
        return DEVICE
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    if kind in _LISTS:
        if not isinstance(value, list):
            raise ValueError(f"expected a list of {kind}, got {value!r:.80}")
        found = [_LISTS[kind](one) for one in value]
        return found if _find_one(found) is not None else tuple(found)
    raise ValueError(f"unknown argument {kind!r:.40}")


def _put(values: dict[str, Any], name: Any, value: Any, last: Sequence[str]) -> None:
    """Put a result among the values, unless nothing needs it."""
    if isinstance(name, list):
        for one, inner in zip(name, value, strict=True):
            _put(values, one, inner, last)
    elif name is not None and name not in last:
        values[name] = value


def _with_gradients(block: Block, device: torch.device, options: tuple[Any, ...], *inputs: Any) -> tuple[Any, ...]:
    """Run a block with or without gradients, as the network's code did with `torch.no_grad`."""
    with torch.set_grad_enabled(bool(options[0]) and torch.is_grad_enabled()):
        return block.call(device, *inputs)


def _with_autocast(block: Block, device: torch.device, options: tuple[Any, ...], *inputs: Any) -> tuple[Any, ...]:
    """Run a block as the network's code did under `torch.autocast`."""
    _, dtype, enabled, _ = options
    with torch.autocast(device.type, dtype=dtype if isinstance(dtype, torch.dtype) else None, enabled=bool(enabled)):
        return block.call(device, *inputs)


def _find_names(arguments: Sequence[Any]) -> Iterator[Name]:
    """Return the names among arguments, and in the lists among them."""
    for one in arguments:
        if type(one) is Name:
            yield one
        elif type(one) is list:
            yield from _find_names(one)


def _find_one(arguments: Sequence[Any]) -> Name | None:
    return next(_find_names(arguments), None)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"expected a whole number, got {value!r:.80}")
    return value


def _number(value: object) -> float:
    words = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
    if isinstance(value, str) and value in words:
        return words[value]
    if not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {value!r:.80}")
    return float(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r:.80}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {value!r:.80}")
    return value


def _tensor(value: object) -> Name:
    name = value.get("name") if isinstance(value, dict) else None
    return Name(_text(name))


def _coded(codes: Mapping[int, Any]) -> Callable[[object], Any]:
    """Return the reader of a number that stands for a value."""

    def read(value: object) -> Any:
        if type(value) is not int or value not in codes:
            raise ValueError(f"unknown code {value!r:.40}")
        return codes[value]

    return read


def _symbolic(value: object) -> Any:
    """Read a number, or the name of a number that is known when the program runs."""
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"expected a number or a name, got {value!r:.80}")
    ((kind, inner),) = value.items()
    readers = {"as_name": lambda name: Name(_text(name)), "as_int": _whole, "as_float": _number, "as_bool": _truth}
    if kind not in readers:
        raise ValueError(f"unknown argument {kind!r:.40}")
    return readers[kind](inner)


def _optional(value: object) -> Name | None:
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"expected a tensor or none, got {value!r:.80}")
    return None if "as_none" in value else _tensor(value.get("as_tensor"))


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "as_int": _whole, "as_float": _number, "as_bool": _truth, "as_string": _text, "as_tensor": _tensor,
    "as_optional_tensor": _optional, "as_sym_int": _symbolic, "as_sym_float": _symbolic, "as_sym_bool": _symbolic,
    "as_scalar_type": _coded(DTYPES), "as_memory_format": _coded(_FORMATS), "as_layout": _coded({7: torch.strided}),
}  # fmt: skip
_LISTS: dict[str, Callable[[Any], Any]] = {
    "as_ints": _whole, "as_floats": _number, "as_bools": _truth, "as_tensors": _tensor,
    "as_optional_tensors": _optional, "as_sym_ints": _symbolic, "as_sym_floats": _symbolic, "as_sym_bools": _symbolic,
}  # fmt: skip
