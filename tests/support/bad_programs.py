"""Corpora of bad programs, `.pt2`, and of bad JSON files beside programs, as a folder from elsewhere may have."""

from __future__ import annotations

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.corpus import Bad, Payload
from support.programs import BESIDE, PREPROCESS

Edit = Callable[[dict[str, Any]], Any]
MODEL = "models/model.json"
WEIGHTS, CONSTANTS = (f"data/{name}/model_{name}_config.json" for name in ("weights", "constants"))


def rewrite(
    good: Path,
    edits: dict[str, Edit] | None = None,
    *,
    replace: dict[str, bytes | None] | None = None,
    method: int = zipfile.ZIP_STORED,
) -> bytes:
    """Return a `.pt2` file with JSON members edited, and other members replaced, added, or (None) left out."""
    stream = io.BytesIO()
    left = dict(replace or {})
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(stream, "w", method) as target:
        for member in source.infolist():
            data: bytes | None = source.read(member)
            for name, edit in (edits or {}).items():
                if member.filename.endswith("/" + name):
                    values = json.loads(data or b"")
                    changed = edit(values)
                    data = changed if isinstance(changed, bytes) else json.dumps(values).encode()
            for name in list(left):
                if member.filename.endswith("/" + name):
                    data = left.pop(name)
            if data is not None:
                target.writestr(member.filename, data)
        root = source.namelist()[0].partition("/")[0]
        for name, content in left.items():
            if content is not None:
                target.writestr(f"{root}/{name}", content)
    return stream.getvalue()


def _graph(model: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = model["graph_module"]["graph"]
    return graph


def _node(model: dict[str, Any], target: str) -> dict[str, Any]:
    return next(node for node in _graph(model)["nodes"] if target in node["target"])


def _set_target(target: str, inputs: list[Any] | None = None) -> Edit:
    """Return the edit that calls another operator in place of the first convolution."""

    def edit(model: dict[str, Any]) -> None:
        node = _node(model, "conv2d")
        node["target"] = target
        if inputs is not None:
            node["inputs"] = [{"name": "", "arg": one, "kind": 1} for one in inputs]

    return edit


def _everywhere(values: Any, key: str, text: str) -> None:
    """Set every field of this name to a text."""
    if isinstance(values, dict):
        for name, inner in values.items():
            if name == key:
                values[name] = text
            else:
                _everywhere(inner, key, text)
    elif isinstance(values, list):
        for inner in values:
            _everywhere(inner, key, text)


def _payload(**changed: Any) -> Edit:
    """Return the edit of the first weight's description."""

    def edit(config: dict[str, Any]) -> None:
        first = next(iter(config["config"].values()))
        for name, value in changed.items():
            (first if name in first else first["tensor_meta"])[name] = value

    return edit


def _constant(good: Path, evil: bytes, prefix: str) -> bytes:
    """Return a file with a pickled constant of this kind."""
    described = {"path_name": f"{prefix}0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    spec = {"tensor_constant": {"arg": {"name": "evil"}, "tensor_constant_name": "evil"}}

    def name_it(model: dict[str, Any]) -> None:
        model["graph_module"]["signature"]["input_specs"].insert(0, spec)

    edits: dict[str, Edit] = {CONSTANTS: lambda config: config["config"].update(evil=described), MODEL: name_it}
    return rewrite(good, edits, replace={f"data/constants/{prefix}0": evil})


def _drop_output(model: dict[str, Any]) -> None:
    _graph(model)["nodes"].pop()


def _cycle(model: dict[str, Any]) -> None:
    _graph(model)["nodes"].reverse()


def _twice(model: dict[str, Any]) -> None:
    _graph(model)["nodes"] += copy.deepcopy(_graph(model)["nodes"])


def _huge(model: dict[str, Any]) -> None:
    zeros = {"as_ints": [10**6, 10**6]}
    _set_target("torch.ops.aten.zeros.default", [zeros])(model)


def _fixed(model: dict[str, Any]) -> None:
    _graph(model)["tensor_values"]["photos"]["sizes"][0] = {"as_int": 7}


def _half(model: dict[str, Any]) -> None:
    _graph(model)["tensor_values"]["photos"]["dtype"] = 6


def _deep(_: dict[str, Any]) -> bytes:
    return b'{"graph_module":' * 100_000


def _number(target: str, *inputs: dict[str, Any]) -> Edit:
    """Return the edit that calls another operator in place of the one that gives the size of the batch."""

    def edit(model: dict[str, Any]) -> None:
        node = _node(model, "sym_size")
        node["target"], node["inputs"] = target, [{"name": "", "arg": one, "kind": 1} for one in inputs]

    return edit


def _expanded(config: dict[str, Any]) -> None:
    meta = next(iter(config["config"].values()))["tensor_meta"]
    meta["sizes"], meta["strides"] = [{"as_int": 10**5}] * 4, [{"as_int": 0}] * 4


def _fed(name: str) -> Edit:
    return lambda model: _everywhere(_graph(model)["nodes"], "as_int", name)


def build_programs(folder: Path, good: Path, victim: Path) -> dict[str, Bad]:
    """Write bad `.pt2` files, each with a good JSON file; return what each is. Code in them would create `victim`."""
    evil = pickle.dumps(Payload(victim), protocol=2)
    python = f"__import__('pathlib').Path({str(victim)!r}).touch()"
    whole = good.read_bytes()
    weight = next(iter(json.loads(_member(good, WEIGHTS))["config"]))

    def edited(edit: Edit) -> bytes:
        return rewrite(good, {MODEL: edit})

    strange = {"as_custom_obj": {"name": "x", "class_fqn": "__torch__.torch.classes.evil"}}
    files: dict[str, tuple[str, bytes]] = {
        "pickled-weight.pt2": (
            "code in a pickle",
            rewrite(good, {WEIGHTS: _payload(use_pickle=True)}, replace={"data/weights/weight_0": evil}),
        ),
        "pickled-constant.pt2": ("code in a pickle", _constant(good, evil, "tensor_")),
        "custom-object.pt2": ("code in a pickle", _constant(good, evil, "custom_obj_")),
        "opaque-object.pt2": ("code in a pickle", _constant(good, evil, "opaque_obj_")),
        "old-weights.pt2": (
            "code in a pickle",
            rewrite(good, replace={WEIGHTS: None, "data/weights/model.pt": evil}),
        ),
        "old-constants.pt2": ("code in a pickle", _old_archive(evil)),
        "plain-pickle.pt2": ("code in a pickle", evil),
        "operator.pt2": ("unsafe operator", edited(_set_target("torch.hub.load", [{"as_string": "x/y"}] * 2))),
        "system.pt2": ("unsafe operator", edited(_set_target("_operator.methodcaller", [{"as_string": "touch"}]))),
        "classes.pt2": ("unsafe operator", edited(_set_target("torch.ops.load_library", [{"as_string": "/evil.so"}]))),
        "from-file.pt2": (
            "unsafe operator",
            edited(_set_target("torch.ops.aten.from_file.default", [{"as_string": str(victim)}, {"as_bool": True}])),
        ),
        "memory.pt2": ("unsafe operator", edited(_set_target("torch.ops.aten.as_strided.default"))),
        "custom.pt2": ("unknown operator", edited(_set_target("torch.ops.mylib.blur.default"))),
        "extension.pt2": ("unknown operator", edited(_set_target("#evil:torch.ops.aten.conv2d.default"))),
        "overload.pt2": ("unknown operator", edited(_set_target("torch.ops.aten.conv2d.evil"))),
        "code.pt2": ("unknown operator", edited(_set_target(f"torch.ops.aten.{python}"))),
        "higher-order.pt2": ("unknown operator", edited(_set_target("torch.ops.higher_order.while_loop"))),
        "number.pt2": ("unknown operator", edited(lambda model: _everywhere(_graph(model), "target", 3))),  # type: ignore[arg-type]
        "object.pt2": ("unknown argument", edited(_set_target("torch.ops.aten.relu.default", [strange]))),
        "argument.pt2": ("unknown argument", edited(_fed("three"))),
        "device.pt2": ("unknown argument", edited(_set_target("torch.ops.aten.relu.default", [{}]))),
        "cycle.pt2": ("no program", edited(_cycle)),
        "twice.pt2": ("no program", edited(_twice)),
        "no-output.pt2": ("no program", edited(_drop_output)),
        "list.pt2": ("no program", rewrite(good, replace={MODEL: b"[]"})),
        "not-json.pt2": ("no program", rewrite(good, replace={MODEL: b"{nodes"})),
        "deep.pt2": ("no program", edited(_deep)),
        "empty.pt2": ("no program", b""),
        "model-gone.pt2": ("no program", rewrite(good, replace={MODEL: None})),
        "weights-gone.pt2": ("no program", rewrite(good, replace={WEIGHTS: None})),
        "weight-gone.pt2": ("no program", rewrite(good, replace={"data/weights/weight_0": None})),
        "version.pt2": ("no program", edited(lambda model: model["schema_version"].update(major=99))),
        "bomb.pt2": ("bomb", rewrite(good, replace={"extra/x": bytes(300_000_000)}, method=zipfile.ZIP_DEFLATED)),
        "compressed.pt2": ("bomb", rewrite(good, method=zipfile.ZIP_DEFLATED)),
        "zeros.pt2": ("bomb", edited(_huge)),
        "power.pt2": ("bomb", edited(_number("_operator.pow", {"as_int": 10**9}, {"as_int": 10**9}))),
        "string.pt2": ("bomb", edited(_number("_operator.mul", {"as_string": "a"}, {"as_int": 10**10}))),
        "expanded.pt2": ("bomb", rewrite(good, {WEIGHTS: _expanded})),
        "cut.pt2": ("truncated", whole[: len(whole) // 2]),
        "cut-end.pt2": ("truncated", whole[:-30]),
        "zeroed.pt2": ("truncated", bytes(len(whole))),
        "short.pt2": ("wrong weights", rewrite(good, replace={"data/weights/weight_0": b"1234"})),
        "sizes.pt2": ("wrong weights", rewrite(good, {WEIGHTS: _payload(sizes=[{"as_int": 10**15}] * 2)})),
        "negative.pt2": ("wrong weights", rewrite(good, {WEIGHTS: _payload(sizes=[{"as_int": -1}] * 4)})),
        "offset.pt2": ("wrong weights", rewrite(good, {WEIGHTS: _payload(storage_offset={"as_int": 2**40})})),
        "symbol.pt2": (
            "wrong weights",
            rewrite(good, {WEIGHTS: _payload(storage_offset={"as_expr": {"expr_str": python, "hint": None}})}),
        ),
        "dtype.pt2": ("wrong weights", rewrite(good, {WEIGHTS: _payload(dtype=99)})),
        "outside.pt2": ("wrong weights", rewrite(good, {WEIGHTS: _payload(path_name="../../../../etc/passwd")})),
        "renamed.pt2": (
            "wrong weights",
            rewrite(good, {WEIGHTS: lambda config: config["config"].update(other=config["config"].pop(weight))}),
        ),
        "half.pt2": ("wrong input", edited(_half)),
        "fixed.pt2": ("wrong input", edited(_fixed)),
    }  # fmt: skip
    harmless: dict[str, bytes] = {  # torch's own reader would run this code; it is not read here
        "sample-inputs.pt2": rewrite(good, replace={"data/sample_inputs/model.pt": evil}),
        "symbols.pt2": edited(lambda model: _everywhere(model, "expr_str", python)),
        "guards.pt2": edited(lambda model: model.update(guards_code=[python])),
        "tree.pt2": edited(
            lambda model: _everywhere(model["graph_module"]["module_call_graph"], "in_spec", evil.hex())
        ),
        "compiled.pt2": rewrite(good, replace={"data/aotinductor/model/evil.so": b"\x7fELF"}),
    }
    found = {name: Bad(kind) for name, (kind, _) in files.items()}
    found |= {name: Bad("code that is not read", "odd") for name in harmless}
    for name, data in {**{name: data for name, (_, data) in files.items()}, **harmless}.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".json").write_text(json.dumps(BESIDE))
    return found


def _member(good: Path, name: str) -> bytes:
    with zipfile.ZipFile(good) as archive:
        return archive.read(next(member for member in archive.namelist() if member.endswith("/" + name)))


def _old_archive(evil: bytes) -> bytes:
    """Return an archive as torch 2.6 wrote it, whose tensors are pickles."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("version", "8.5")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{name}.pt", evil)
    return stream.getvalue()


def build_beside(folder: Path, good: Path) -> dict[str, Bad]:
    """Write good programs with bad JSON files beside them; return what each is."""
    labels = BESIDE["labels"]
    changed: dict[str, dict[str, Any]] = {
        "labels-none": {"labels": None},
        "labels-text": {"labels": "cat"},
        "labels-object": {"labels": {"0": "cat"}},
        "labels-numbers": {"labels": [1, 2, 3, 4]},
        "labels-twice": {"labels": ["cat", "cat", "dog", "hen"]},
        "labels-fewer": {"labels": labels[:3], "thresholds": 0.5},
        "labels-more": {"labels": [*labels, "cow"], "thresholds": 0.5},
        "labels-million": {"labels": [str(number) for number in range(10**6)], "thresholds": 0.5},
        "thresholds-above": {"thresholds": 1.5},
        "thresholds-zero": {"thresholds": [0.5, 0, 0.5, 0.5]},
        "thresholds-short": {"thresholds": [0.5]},
        "thresholds-text": {"thresholds": "half"},
        "thresholds-truth": {"thresholds": True},
        "thresholds-nan": {"thresholds": float("nan")},
        "preprocess-none": {"preprocess": None},
        "preprocess-text": {"preprocess": "imagenet"},
        "preprocess-empty": {"preprocess": {}},
        "preprocess-more": {"preprocess": {**PREPROCESS, "blur": 3}},
        "preprocess-size": {"preprocess": {**PREPROCESS, "resize": [224, 224]}},
        "preprocess-side": {"preprocess": {**PREPROCESS, "resize": 16}},
        "preprocess-huge": {"preprocess": {**PREPROCESS, "resize": [10**9, 10**9]}},
        "preprocess-std": {"preprocess": {**PREPROCESS, "std": [0, 0, 0]}},
        "preprocess-deep": {"preprocess": _nested(300)},
        "activation": {"activation": "tanh"},
        "activation-list": {"activation": ["sigmoid"]},
        "unknown-field": {"labelz": labels},
    }
    texts = {
        "text": b"labels: cat", "list": b"[]", "empty": b"", "bytes": b"\xff\xfe\x00", "deep": b'{"a":' * 100_000,
        "number": b"1" * 100_000,
    }  # fmt: skip
    found: dict[str, Bad] = {}
    suffix, data = good.suffix, good.read_bytes()
    for name, change in changed.items():
        values = {key: value for key, value in {**BESIDE, **change}.items() if value is not None}
        texts[name] = json.dumps(values).encode()
    for name, content in texts.items():
        (folder / f"json-{name}{suffix}").write_bytes(data)
        (folder / f"json-{name}.json").write_bytes(content)
        found[f"json-{name}{suffix}"] = Bad("wrong JSON")
    (folder / f"json-gone{suffix}").write_bytes(data)
    (folder / f"json-folder{suffix}").write_bytes(data)
    (folder / "json-folder.json").mkdir()
    return found | {f"json-gone{suffix}": Bad("no JSON"), f"json-folder{suffix}": Bad("no JSON")}


def _nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value
