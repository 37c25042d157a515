"""Corpora of bad folders, of timm and of transformers models, made from good folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.corpus import Payload

Values = dict[str, Any]
Damage = Callable[[Path], object]

HUGE, LARGE, NAN = 10**9, 10**6, float("nan")
DEEP = '{"a":' * 200_000


def fields(name: str = "config.json", **changed: object) -> Damage:
    """Return the damage that changes fields of a JSON file; a field that is None is dropped."""

    def damage(folder: Path) -> None:
        values: Values = {**json.loads((folder / name).read_text()), **changed}
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return damage


def inner(field: str, **changed: object) -> Damage:
    """Return the damage that changes fields of an object in config.json."""

    def damage(folder: Path) -> None:
        values: Values = json.loads((folder / "config.json").read_text())
        values[field] = {**values.get(field, {}), **changed}
        (folder / "config.json").write_text(json.dumps(values))

    return damage


def text(name: str, content: str | bytes) -> Damage:
    """Return the damage that replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _made_a_folder(folder: Path) -> None:
    """Put a folder in place of config.json."""
    lost("config.json")(folder)
    (folder / "config.json").mkdir()


def lost(name: str) -> Damage:
    """Return the damage that removes a file."""
    return lambda folder: (folder / name).unlink()


def link(name: str, target: str) -> Damage:
    """Return the damage that makes a file a link."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Return the damage that changes the weights."""

    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")

    return damage


def pickled(victim: Path, *, whole: bool) -> Damage:
    """Return the damage that makes the weights a pickle that would create a file."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        evil = Payload(victim)
        if whole:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
        else:
            torch.save({"head.weight": torch.zeros(2), "evil": evil}, folder / "pytorch_model.bin")

    return damage


def pipe(name: str) -> Damage:
    """Return the damage that makes a file a pipe, which never ends."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def sparse(name: str) -> Damage:
    """Return the damage that makes a file of 200 MB, which are nowhere on the disk."""

    def damage(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(200_000_000)

    return damage


def _both(victim: Path) -> dict[str, Damage]:
    return {
        "config-gone": lost("config.json"),
        "config-empty": text("config.json", ""),
        "config-cut": text("config.json", '{"architecture": "test_vit", '),
        "config-binary": text("config.json", bytes(range(256))),
        "config-list": text("config.json", "[1, 2]"),
        "config-null": text("config.json", "null"),
        "config-deep": text("config.json", DEEP),
        "config-nested": fields(extra=json.loads('{"a":' * 60 + "1" + "}" * 60)),
        "config-large": sparse("config.json"),
        "config-pipe": pipe("config.json"),
        "config-loop": link("config.json", "config.json"),
        "config-device": link("config.json", "/dev/zero"),
        "config-folder": _made_a_folder,
        "code": fields(auto_map={"AutoModelForImageClassification": "code.Net", "AutoConfig": "code.Config"}),
        "code-inside": fields(extra={"auto_map": {"AutoConfig": "code.Config"}}),
        "number-huge": fields(hidden_size=10**30),
        "number-nan": fields(layer_norm_eps=NAN),
        "weights-gone": lost("model.safetensors"),
        "weights-empty": text("model.safetensors", b""),
        "weights-header": text("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        "weights-text": text("model.safetensors", "not weights" * 20),
        "weights-device": link("model.safetensors", "/dev/zero"),
        "weights-nowhere": link("model.safetensors", "../../nowhere.safetensors"),
        "weights-pipe": pipe("model.safetensors"),
        "weights-none": tensors(lambda state: state.clear()),
        "weights-missing": tensors(lambda state: state.pop(sorted(state)[0])),
        "weights-shape": tensors(lambda state: state.update({name: torch.zeros(3, 3) for name in state})),
        "weights-complex": tensors(lambda state: state.update({n: t.to(torch.complex64) for n, t in state.items()})),
        "pickle": pickled(victim, whole=True),
        "pickle-inside": pickled(victim, whole=False),
    }


def _timm() -> dict[str, Damage]:
    return {
        "architecture-number": fields(architecture=7),
        "architecture-unknown": fields(architecture="no_such_net"),
        "architecture-path": fields(architecture="../../../etc/passwd"),
        "architecture-hub": fields(architecture="hf-hub:some/net"),
        "architecture-escape": fields(architecture="\x1b[31mnet\n"),
        "architecture-other": fields(architecture="test_resnet"),
        "architecture-giant": fields(architecture="vit_giant_patch14_224"),
        "outputs-text": fields(num_classes="four", label_names=["a", "b"]),
        "outputs-more": fields(num_classes=5),
        "outputs-huge": fields(num_classes=HUGE),
        "labels-number": fields(label_names=7),
        "labels-numbers": fields(label_names=[1, 2, 3, 4]),
        "labels-twice": fields(label_names=["a", "a", "b", "c"]),
        "labels-empty": fields(label_names=["", "a", "b", "c"]),
        "labels-few": fields(label_names=["a"], num_classes=None),
        "labels-keys": fields(label_names={"1": "a", "2": "b", "3": "c", "4": "d"}),
        "table-binary": text("selected_tags.csv", b"\xff\xfe\x00\x01"),
        "table-columns": text("selected_tags.csv", "a,b\n1,2\n"),
        "table-large": sparse("selected_tags.csv"),
        "table-threshold": text("selected_tags.csv", "name,best_threshold\na,x\nb,.5\nc,.5\nd,.5\n"),
        "table-one": text("selected_tags.csv", "name,best_threshold\na,1\nb,.5\nc,.5\nd,.5\n"),
        "options-list": fields(model_args=[1]),
        "options-depth": fields(model_args={"depth": LARGE}),
        "options-depth-huge": fields(model_args={"depth": HUGE}),
        "options-width": fields(model_args={"embed_dim": LARGE}),
        "options-heads": fields(model_args={"num_heads": 0}),
        "options-text": fields(model_args={"depth": "deep"}),
        "options-unknown": fields(model_args={"no_such_option": 1}),
        "options-file": fields(model_args={"checkpoint_path": "/etc/passwd", "depth": "x"}),
        "preprocess-list": fields(pretrained_cfg=[1]),
        "preprocess-text": fields(pretrained_cfg="large"),
        "size-two": inner("pretrained_cfg", input_size=[3, 160]),
        "size-zero": inner("pretrained_cfg", input_size=[3, 0, 0]),
        "size-negative": inner("pretrained_cfg", input_size=[3, -160, -160]),
        "size-huge": inner("pretrained_cfg", input_size=[3, HUGE, HUGE]),
        "size-large": inner("pretrained_cfg", input_size=[3, LARGE, LARGE]),
        "size-nan": inner("pretrained_cfg", input_size=[3, NAN, NAN]),
        "size-text": inner("pretrained_cfg", input_size="3x160x160"),
        "channels": inner("pretrained_cfg", input_size=[1, 160, 160], mean=[0.5]),
        "share-small": inner("pretrained_cfg", crop_pct=1e-9),
        "share-text": inner("pretrained_cfg", crop_pct="all"),
        "mean-nan": inner("pretrained_cfg", mean=[NAN] * 3),
        "mean-two": inner("pretrained_cfg", mean=[0.5, 0.5]),
        "std-zero": inner("pretrained_cfg", std=[0, 0, 0]),
        "filter": inner("pretrained_cfg", interpolation="nearest"),
        "filter-number": inner("pretrained_cfg", interpolation=3),
    }


def _transformers() -> dict[str, Damage]:
    processor = "preprocessor_config.json"

    def size(height: object, width: object) -> Damage:
        return fields(processor, size={"height": height, "width": width})

    return {
        "type-number": fields(model_type=7),
        "type-unknown": fields(model_type="no_such_net"),
        "type-text": fields(model_type="bert"),
        "type-path": fields(model_type="../../code"),
        "type-escape": fields(model_type="\x1b[31mvit\n"),
        "type-other": fields(model_type="resnet"),
        "labels-none": fields(id2label=None),
        "labels-number": fields(id2label=7),
        "labels-numbers": fields(id2label={"0": 1, "1": 2, "2": 3, "3": 4}),
        "labels-few": fields(id2label={"0": "a"}),
        "labels-many": fields(id2label={str(n): f"label {n}" for n in range(100_000)}),
        "labels-keys": fields(id2label={"one": "a", "two": "b", "three": "c", "four": "d"}),
        "labels-holes": fields(id2label={"0": "a", "1": "b", "7": "c", "9": "d"}),
        "labels-empty": fields(id2label={"0": "", "1": "b", "2": "c", "3": "d"}),
        "quantised": fields(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "weights-elsewhere": fields(transformers_weights="../../../etc/passwd"),
        "depth-large": fields(num_hidden_layers=LARGE),
        "depth-huge": fields(num_hidden_layers=HUGE),
        "depth-text": fields(num_hidden_layers="many"),
        "depth-negative": fields(num_hidden_layers=-1),
        "width-large": fields(hidden_size=LARGE, num_attention_heads=1),
        "heads-zero": fields(num_attention_heads=0),
        "heads-many": fields(num_attention_heads=7),
        "image-large": fields(image_size=LARGE),
        "image-zero": fields(image_size=0),
        "image-other": fields(image_size=96),
        "patch-zero": fields(patch_size=0),
        "patch-text": fields(patch_size="16"),
        "channels": fields(num_channels=9),
        "activation": fields(hidden_act="no_such_activation"),
        "activation-list": fields(hidden_act=["gelu"]),
        "processor-gone": lost(processor),
        "processor-empty": text(processor, ""),
        "processor-list": text(processor, "[]"),
        "processor-deep": text(processor, DEEP),
        "processor-large": sparse(processor),
        "processor-pipe": pipe(processor),
        "processor-device": link(processor, "/dev/zero"),
        "processor-code": fields(processor, auto_map={"AutoImageProcessor": "code.P"}),
        "processor-unknown": fields(processor, image_processor_type="NoSuch"),
        "processor-number": fields(processor, image_processor_type=7),
        "processor-video": fields(processor, image_processor_type="DonutImageProcessor"),
        "processor-nested": text("processor_config.json", '{"image_processor": {"auto_map": {"A": "code.P"}}}'),
        "size-nan": size(NAN, NAN),
        "size-huge": size(HUGE, HUGE),
        "size-large": size(LARGE, LARGE),
        "size-zero": size(0, 0),
        "size-negative": size(-48, -48),
        "size-text": size("48", "48"),
        "size-half": size(48.5, 48.5),
        "size-list": fields(processor, size=[48]),
        "size-keys": fields(processor, size={"depth": 4}),
        "size-short": fields(processor, size={"shortest_edge": 48}),
        "crop-large": fields(processor, do_center_crop=True, crop_size={"height": 90, "width": 90}),
        "crop-text": fields(processor, do_center_crop=True, crop_size="all"),
        "mean-text": fields(processor, image_mean="grey"),
        "mean-two": fields(processor, image_mean=[0.5, 0.5]),
        "mean-nan": fields(processor, image_mean=[NAN] * 3),
        "std-zero": fields(processor, image_std=[0, 0, 0]),
        "rescale-zero": fields(processor, rescale_factor=0),
        "rescale-text": fields(processor, rescale_factor="255"),
        "filter-lanczos": fields(processor, resample=1),
        "filter-nine": fields(processor, resample=9),
        "filter-text": fields(processor, resample="bicubic"),
        "no-resize": fields(processor, do_resize=False),
    }


def build(parent: Path, timm_folder: Path, transformers_folder: Path, victim: Path) -> list[Path]:
    """Write a folder for each damage; return them. Code in a pickle would create the file `victim`."""
    both, made = _both(victim), []
    for kind, good, own in (("timm", timm_folder, _timm()), ("transformers", transformers_folder, _transformers())):
        for name, damage in {**both, **own}.items():
            folder = parent / kind / name
            shutil.copytree(good, folder)
            damage(folder)
            made.append(folder)
    return made
