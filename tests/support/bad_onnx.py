"""A corpus of bad ONNX files, as a folder from elsewhere may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from support.corpus import Bad
from support.programs import BESIDE

Edit = Callable[[ModelProto], None]


def _conv(model: ModelProto) -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == "Conv")


def _call(kind: str, domain: str = "") -> Edit:
    """Return the edit that calls another operator in place of the first convolution."""

    def edit(model: ModelProto) -> None:
        _conv(model).op_type, _conv(model).domain = kind, domain

    return edit


def _before(*nodes: NodeProto) -> Edit:
    """Return the edit that puts operators before the first convolution, which takes the result `x` of the last."""

    def edit(model: ModelProto) -> None:
        given = _conv(model).input[0]
        _conv(model).input[0] = "x"
        for node in reversed(nodes):
            made = NodeProto()
            made.CopyFrom(node)
            for place, name in enumerate(made.input):
                made.input[place] = given if name == "photos" else name
            model.graph.node.insert(0, made)

    return edit


def _weight(change: Callable[[TensorProto], None]) -> Edit:
    """Return the edit of the weight of the first convolution."""

    def edit(model: ModelProto) -> None:
        name = _conv(model).input[1]
        change(next(one for one in model.graph.initializer if one.name == name))

    return edit


def _external(location: str, **more: object) -> Edit:
    """Return the edit that says that a weight lies elsewhere."""

    def change(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=str(value))

    return _weight(change)


def _dims(*dims: int) -> Edit:
    def change(tensor: TensorProto) -> None:
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return _weight(change)


def _set(name: str, value: object) -> Edit:
    """Return the edit of an attribute of the first convolution."""

    def edit(model: ModelProto) -> None:
        node = _conv(model)
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def _constant(name: str, values: object) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, dtype=np.int64)))


def _cycle(model: ModelProto) -> None:
    _conv(model).input[0] = model.graph.node[-1].output[0]


def _twice(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def _input(kind: int, sizes: list[int | str]) -> Edit:
    def edit(model: ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("photos", kind, sizes))

    return edit


def _output(sizes: list[int | str]) -> Edit:
    def edit(model: ModelProto) -> None:
        name = model.graph.output[0].name
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    return edit


def _second_input(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))


def _loop(model: ModelProto) -> None:
    """Put a loop of 2**60 turns before the first convolution."""
    turn = [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", 9, [])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])], "body", turn, [helper.make_tensor_value_info("d", 9, [])]
    )
    _before(
        _constant("turns", 2**60),
        helper.make_node("Loop", ["turns", ""], ["unused"], body=body),
        helper.make_node("Relu", ["photos"], ["x"]),
    )(model)


def _no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def _new_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 10**6


def _no_nodes(model: ModelProto) -> None:
    del model.graph.node[:]


def _text(tensor: TensorProto) -> None:
    tensor.data_type = TensorProto.STRING


def _unknown(tensor: TensorProto) -> None:
    tensor.data_type = 999


def _sparse(model: ModelProto) -> None:
    model.graph.sparse_initializer.add()


def build_onnx(folder: Path, good: Path) -> dict[str, Bad]:
    """Write bad ONNX files, each with a good JSON file; return what each is."""
    (folder / "secret.bin").write_bytes(bytes(10**4))
    (folder / "link.bin").symlink_to(folder / "secret.bin")
    edits: dict[str, tuple[str, Edit]] = {
        "passwd": ("tensor elsewhere", _external("../../../../../../etc/passwd")),
        "absolute": ("tensor elsewhere", _external("/etc/passwd")),
        "linked": ("tensor elsewhere", _external("link.bin", offset=0, length=864)),
        "backslash": ("tensor elsewhere", _external("..\\secret.bin")),
        "nowhere": ("tensor elsewhere", _external("is-not-there.bin")),
        "unnamed": ("tensor elsewhere", _external("")),
        "dots": ("tensor elsewhere", _external("..")),
        "long-name": ("tensor elsewhere", _external("x" * 5000)),
        "past-end": ("tensor elsewhere", _external("secret.bin", offset=9999)),
        "before": ("tensor elsewhere", _external("secret.bin", offset=-8)),
        "length": ("tensor elsewhere", _external("secret.bin", length=4)),
        "offset-text": ("tensor elsewhere", _external("secret.bin", offset="zero")),
        "itself": ("tensor elsewhere", _external("itself.onnx", offset=10**12)),
        "dims-huge": ("absurd shape", _dims(10**9, 10**9)),
        "dims-negative": ("absurd shape", _dims(-1, 3, 3, 3)),
        "dims-other": ("absurd shape", _dims(8, 3, 3, 2)),
        "dims-none": ("absurd shape", _dims()),
        "text": ("unknown numbers", _weight(_text)),
        "unknown": ("unknown numbers", _weight(_unknown)),
        "sparse": ("unknown numbers", _sparse),
        "cycle": ("no graph", _cycle),
        "twice": ("no graph", _twice),
        "no-nodes": ("no graph", _no_nodes),
        "no-opset": ("no graph", _no_opset),
        "new-opset": ("no graph", _new_opset),
        "custom": ("unknown operator", _call("Conv", "evil")),
        "fused": ("unknown operator", _call("FusedConv", "com.microsoft")),
        "madeup": ("unknown operator", _call("Blur")),
        "image": ("unknown operator", _call("ImageDecoder")),
        "regex": ("unknown operator", _call("RegexFullMatch")),
        "loop": ("unknown operator", _loop),
        "escape": ("unknown operator", _call("\x1b[31mred\n")),
        "stamp": ("unknown operator", _call("__import__('os').system('true')")),
        "zeros": ("bomb", _before(_constant("s", [10**6, 10**6]), helper.make_node("ConstantOfShape", ["s"], ["x"]))),
        "tile": (
            "bomb",
            _before(_constant("s", [1, 1, 10**5, 10**5]), helper.make_node("Tile", ["photos", "s"], ["x"])),
        ),
        "expand": (
            "bomb",
            _before(
                _constant("s", [10**5, 10**5, 1, 1, 1, 1]),
                helper.make_node("Expand", ["photos", "s"], ["y"]),
                helper.make_node("Relu", ["y"], ["x"]),
            ),
        ),
        "pad": (
            "bomb",
            _before(_constant("s", [0, 0, 10**6, 10**6] * 2), helper.make_node("Pad", ["photos", "s"], ["x"])),
        ),
        "kernel": ("bomb", _set("kernel_shape", [10**6, 10**6])),
        "padding": ("bomb", _set("pads", [10**9] * 4)),
        "groups": ("wrong attribute", _set("group", 10**9)),
        "strides": ("wrong attribute", _set("strides", [0, 0])),
        "strides-text": ("wrong attribute", _set("strides", "two")),
        "half": ("wrong input", _input(TensorProto.FLOAT16, ["batch", 3, 16, 16])),
        "two-inputs": ("wrong input", _second_input),
        "flat": ("wrong input", _input(TensorProto.FLOAT, ["batch", 768])),
        "fixed": ("wrong input", _input(TensorProto.FLOAT, [7, 3, 16, 16])),
        "grey": ("wrong input", _input(TensorProto.FLOAT, ["batch", 1, 16, 16])),
        "outputs": ("wrong output", _output(["batch", 9])),
        "output-map": ("wrong output", _output(["batch", 4, 7, 7])),
    }  # fmt: skip
    whole = good.read_bytes()
    files = {
        "empty": b"", "cut": whole[: len(whole) // 2], "zeroed": bytes(len(whole)), "json": b'{"ir_version": 8}',
        "endless": b"\xff" * 1000, "nested": b"\x0a" * 5000, "lying": b"\x3a\xff\xff\xff\xff\x07" + whole,
    }  # fmt: skip
    found = {f"{name}.onnx": Bad("another format") for name in files}
    for name, (kind, edit) in edits.items():
        model = onnx.load(good)
        edit(model)
        files[name], found[f"{name}.onnx"] = model.SerializeToString(), Bad(kind)
    for name, data in files.items():
        (folder / f"{name}.onnx").write_bytes(data)
        (folder / f"{name}.json").write_text(json.dumps(BESIDE))
    return found
