"""Make an ONNX file safe and plain: what is left of it is numbers, and operators that compute numbers from numbers.

Every name in it is replaced by a number, so that no name of the file becomes part of a path or of Python code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from mlperturb.errors import CheckpointError
from mlperturb.model.shaped import Form

OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Cast CastLike
    Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace Div Dropout Einsum
    Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity
    InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization
    LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow
    RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round ScatterElements ScatterND Selu Shape
    Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan
    Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905  # easier to read
)
ADVICE = "a program of torch.export (.pt2) may serve in its place, see docs/checkpoints.md"
_DOMAINS = ("", "ai.onnx")
_PASSING = ("Identity", "Dropout")  # give their first input on, once a network is trained
_MAX_NODES = 100_000
_ATTRIBUTES = (
    AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING,
    AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS,
)  # fmt: skip
_KINDS: dict[int, int] = {  # of tensors that are read: bytes of a number
    TensorProto.FLOAT: 4, TensorProto.DOUBLE: 8, TensorProto.INT64: 8, TensorProto.INT32: 4, TensorProto.INT8: 1,
    TensorProto.UINT8: 1, TensorProto.BOOL: 1, TensorProto.INT16: 2, TensorProto.UINT16: 2, TensorProto.FLOAT16: 2,
}  # fmt: skip


@dataclass
class Plain:
    """A model with names of our own.

    Attributes:
        model: its input is `input`, its output `output`.
        form: of the input, and the activation that was left out.
    """

    model: ModelProto
    form: Form


@dataclass
class _Names:
    """Gives every name of the file a name of our own; a value that is passed on keeps its name."""

    known: dict[str, str] = field(default_factory=dict)

    def make(self, name: str) -> str:
        if name in self.known:
            raise ValueError(f"the value {name!r:.80} is made twice")
        self.known[name] = f"v{len(self.known)}"
        return self.known[name]

    def find(self, name: str) -> str:
        if name == "":  # an input that is left out
            return ""
        if name not in self.known:
            raise ValueError(f"the value {name!r:.80} is used before it is made")
        return self.known[name]


def read_plain(path: Path, outputs: int) -> Plain:
    """Read an ONNX file, and leave of it what leads from the photos to the logits.

    Args:
        path: of the file; tensors may lie in another file of the same folder.
        outputs: L, the number of labels.

    Raises:
        CheckpointError: if the file is damaged, has operators that mlperturb does not know or tensors in other folders,
            or is not a program from one batch of photos to L logits.
    """
    try:
        model = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's errors differ between its implementations
        raise CheckpointError(f"{path} is not an ONNX file") from error
    try:
        return _make_plain(model, path, outputs)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: {reason:.300}; {ADVICE}") from error


def _make_plain(model: ModelProto, path: Path, outputs: int) -> Plain:
    graph = model.graph
    opset = [one for one in model.opset_import if one.domain in _DOMAINS]
    if len(opset) != 1 or not graph.node:
        raise ValueError("expected an ONNX model with operators of the ONNX standard")
    if len(graph.node) > _MAX_NODES or graph.sparse_initializer:
        raise ValueError(f"expected at most {_MAX_NODES} operators, and no sparse tensors")
    names = _Names()
    tensors = {}
    for tensor in graph.initializer:
        tensors[names.make(tensor.name)] = _read_tensor(tensor, path.parent)
    photos = [one for one in graph.input if one.name not in names.known]
    if len(photos) != 1:
        raise ValueError(f"expected a batch of photos as the only input, got {len(photos)} inputs")
    names.known[photos[0].name] = "input"
    nodes = list(_rename(graph.node, names, tensors))
    form = Form(_input_sizes(photos[0]))
    result = names.find(_find_output(graph, outputs))
    result, activation = _logits(nodes, result)
    nodes = _needed(nodes, result)
    return Plain(_build(nodes, tensors, result, form, opset[0].version), form.with_activation(activation))


def _rename(found: Iterable[NodeProto], names: _Names, tensors: dict[str, Any]) -> Iterable[NodeProto]:
    """Return the operators with names of our own, without those that pass their input on; constants become tensors."""
    for number, node in enumerate(found):
        if node.domain not in _DOMAINS or node.op_type not in OPERATORS:
            named = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise ValueError(f"unknown operator {named!r:.80}")
        inputs = [names.find(name) for name in node.input]
        if node.op_type in _PASSING and not any(node.output[1:]):
            names.known[node.output[0]] = inputs[0]
            continue
        value = [one for one in node.attribute if one.name == "value" and one.type == AttributeProto.TENSOR]
        if node.op_type == "Constant" and value:
            tensors[names.make(node.output[0])] = _read_tensor(value[0].t, None)
            continue
        made = [names.make(name) if name else "" for name in node.output]
        kept = NodeProto(op_type=node.op_type, name=f"n{number}", input=inputs, output=made)
        kept.attribute.extend(_check_attribute(one) for one in node.attribute)
        yield kept


def _check_attribute(attribute: AttributeProto) -> AttributeProto:
    """Return an attribute; a tensor in it is read and written anew.

    Raises:
        ValueError: if it has a graph or another object in it.
    """
    if attribute.type == AttributeProto.TENSOR and not attribute.ref_attr_name:
        result = AttributeProto(name=attribute.name, type=AttributeProto.TENSOR)
        result.t.CopyFrom(numpy_helper.from_array(_read_tensor(attribute.t, None)))
        return result
    if attribute.type not in _ATTRIBUTES or attribute.ref_attr_name or attribute.HasField("g") or attribute.graphs:
        raise ValueError(f"expected numbers or strings as the attribute {attribute.name!r:.40}")
    return attribute


def _read_tensor(tensor: TensorProto, folder: Path | None) -> Any:
    """Return the array of a tensor of the file, or of another file in its folder.

    Raises:
        ValueError: if it is of a kind that is not read, lies elsewhere, or has another number of bytes than its shape.
    """
    width = _KINDS.get(tensor.data_type)
    if width is None:
        kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in TensorProto.DataType.values() else "?"
        raise ValueError(f"expected a tensor of plain numbers, got {kind}")
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"expected sizes of at least 0, got {list(tensor.dims)!r:.80}")
    size = math.prod(tensor.dims) * width
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        copy = TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=_read_external(tensor, folder, size))
        return numpy_helper.to_array(copy)
    given = tensor.ByteSize()
    if size > 8 * given:  # repeated fields may pack a number in fewer bytes than it has
        raise ValueError(f"expected a tensor of {size} bytes, got {given}")
    return numpy_helper.to_array(tensor)


def _read_external(tensor: TensorProto, folder: Path | None, size: int) -> bytes:
    """Return the bytes of a tensor that lie in another file of the folder."""
    entries = {one.key: one.value for one in tensor.external_data}
    name = entries.get("location", "")
    if folder is None or not name or name in (".", "..") or set(name) & set("/\\\0:") or len(name.encode()) > 255:
        raise ValueError(f"expected tensors in the file or in a file beside it, got {name!r:.80}")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"expected a file {name!r:.80} beside it")
    offset, length = int(entries.get("offset") or 0), int(entries.get("length") or size)
    if length != size or offset < 0 or offset + length > path.stat().st_size:
        raise ValueError(
            f"expected {size} bytes of a tensor at {offset} of {name!r:.80}, which has {path.stat().st_size}"
        )
    with path.open("rb") as stream:
        stream.seek(offset)
        data: bytes = stream.read(length)
    return data


def _sizes(value: Any) -> tuple[int | None, ...]:
    """Return the sizes of an input or an output; None for one that is free."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims)


def _input_sizes(photos: Any) -> tuple[int | None, ...]:
    kind = photos.type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        raise ValueError("expected an input of float32 numbers: convert the model to float32")
    return _sizes(photos)


def _find_output(graph: GraphProto, outputs: int) -> str:
    """Return the name of the only output of L columns."""
    shapes = {one.name: _sizes(one) for one in graph.output}
    if len(shapes) == 1 and len(next(iter(shapes.values()))) in (0, 2):
        (name,) = shapes
        if not shapes[name] or shapes[name][1] in (outputs, None):
            return str(name)
    fitting = [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] == outputs]
    if len(fitting) != 1:
        shown = " and ".join("x".join(str(size or "N") for size in shape) for shape in list(shapes.values())[:5])
        raise ValueError(f"expected one output of {outputs} logits, one for each label, got {shown or 'none':.100}")
    return str(fitting[0])


def _logits(nodes: list[NodeProto], result: str) -> tuple[str, str | None]:
    """Return the name of the logits, and the activation that the model applies to them, if any."""
    for node in nodes:
        if result in node.output:
            axis = next((one.i for one in node.attribute if one.name == "axis"), -1)
            if node.op_type == "Sigmoid" or (node.op_type == "Softmax" and axis in (1, -1)):
                return node.input[0], node.op_type.lower()
    return result, None


def _needed(nodes: list[NodeProto], result: str) -> list[NodeProto]:
    """Return the operators on which the result depends."""
    wanted, kept = {result}, []
    for node in reversed(nodes):
        if wanted & {name for name in node.output if name}:
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _build(nodes: list[NodeProto], tensors: Mapping[str, Any], result: str, form: Form, opset: int) -> ModelProto:
    used = {name for node in nodes for name in node.input}
    sizes = [f"s{place}" if size is None else size for place, size in enumerate(form.sizes)]
    graph = onnx.helper.make_graph(
        nodes,
        "program",
        [onnx.helper.make_tensor_value_info("input", TensorProto.FLOAT, sizes)],
        [onnx.helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items() if name in used],
    )
    model: ModelProto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, 10)
    return model
