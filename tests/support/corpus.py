"""Corpora of bad image files and bad checkpoints, as a folder from elsewhere may have them."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save

FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}


def good(form: str, size: tuple[int, int] = (36, 30)) -> bytes:
    """Return a small valid file."""
    pixels = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, *, crc: int | None = None, length: int | None = None) -> bytes:
    """Return a PNG chunk; a checksum or length that is given may be wrong."""
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", checksum)


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, data: bytes = b"", interlace: int = 0) -> bytes:
    """Return a PNG with the header that is given, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    body = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def thread(width: int, height: int) -> bytes:
    """Return a sound PNG of a black line."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def build(folder: Path) -> dict[str, str]:
    """Write the corpus; return the kind of each file. All names end as photos do."""
    files: dict[str, tuple[str, bytes]] = {}
    rng = random.Random(0)
    for extension, form in FORMATS.items():
        data = good(form)
        for share in (0.1, 0.5, 0.9):
            files[f"cut-{share}.{extension}"] = ("truncated", data[: int(len(data) * share)])
        files[f"zeros.{extension}"] = ("zeroed", data[:20] + bytes(len(data) - 20))
        for number in range(4):
            damaged = bytearray(data)
            for _ in range(1 + 6 * number):
                damaged[rng.randrange(2, min(len(damaged), 400))] ^= 1 << rng.randrange(8)
            files[f"flip-{number}.{extension}"] = ("bits flipped", bytes(damaged))
        files[f"twice.{extension}"] = ("two files in one", data + data)
        files[f"wrong.{'jpg' if extension == 'png' else 'png'}.{extension}"] = ("wrong name", good("PNG"))
        files[f"head-alone.{extension}"] = ("header alone", data[:12])
    files |= {
        "empty.png": ("empty", b""),
        "text.jpg": ("text", b"not a photo\n" * 50),
        "html.png": ("text", b"<html><script>alert(1)</script></html>"),
        "random.webp": ("noise", rng.randbytes(5000)),
        "huge.png": ("absurd size", png(2**31 - 1, 2**31 - 1)),
        "wide.png": ("absurd size", png(200_000, 200_000)),
        "long.png": ("absurd size", png(1, 2**31 - 1)),
        "thin.png": ("absurd shape", thread(50_000, 1)),
        "tall.png": ("absurd shape", thread(1, 50_000)),
        "none.png": ("no pixels", png(0, 10)),
        "bits.png": ("impossible depth", png(8, 8, bits=3, data=bytes(200))),
        "colour.png": ("impossible colours", png(8, 8, colour=5, data=bytes(200))),
        "palette.png": ("palette missing", png(8, 8, colour=3, data=bytes(72))),
        "interlace.png": ("impossible interlace", png(8, 8, data=bytes(200), interlace=9)),
        "short.png": ("too little data", png(64, 64, data=bytes(10))),
        "much.png": ("too much data", png(4, 4, data=bytes(5_000_000))),
        "bomb.png": ("bomb", png(12_000, 12_000, data=bytes(12_000 * 36_001))),
        "crc.png": ("wrong checksum", good("PNG").replace(b"IEND", b"IENE")),
        "length.png": ("lying length", good("PNG")[:33] + chunk(b"IDAT", b"x", length=2**31 - 1)),
        "text-bomb.png": ("bomb", png(1, 1)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
        "profile.png": ("bad profile", good("PNG")[:33] + chunk(b"iCCP", b"x\0\0" + bytes(50)) + good("PNG")[33:]),
        "exif.jpg": ("bad EXIF", b"\xff\xd8\xff\xe1\x00\x20Exif\0\0" + rng.randbytes(24) + good("JPEG")[2:]),
        "size.gif": ("lying size", good("GIF")[:6] + b"\xff\xff\xff\xff" + good("GIF")[10:]),
        "size.webp": ("lying size", good("WEBP")[:4] + b"\xff\xff\xff\x7f" + good("WEBP")[8:]),
        "size.bmp": ("lying size", good("BMP")[:18] + b"\xff\xff\xff\x7f\xff\xff\xff\x7f" + good("BMP")[26:]),
        "size.ppm": ("lying size", b"P6 99999999 99999999 255\n"),
        "negative.ppm": ("lying size", b"P6 -5 -5 255\n" + bytes(75)),
        "loop.tif": ("endless chain", b"II*\0\x08\0\0\0\0\0\x08\0\0\0" * 4),
        "offset.tif": ("lying offset", b"II*\0\xff\xff\xff\x7f"),
    }  # fmt: skip
    for name, (_, data) in files.items():
        (folder / name).write_bytes(data)
    kinds = {name: kind for name, (kind, _) in files.items()}
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "nowhere.png").symlink_to(folder / "is-not-there.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / ("n" * 251 + ".png")).write_bytes(good("PNG"))
    (folder / "new\nline\x1b[31m.png").write_bytes(good("PNG"))
    (folder / os.fsdecode(b"\xff\xfe.png")).write_bytes(good("PNG"))
    (folder / "CASE.png").write_bytes(good("PNG"))
    (folder / "case.png").write_bytes(good("PNG"))
    odd = ("pipe.png", "folder.png", "nowhere.png", "self.png", "n" * 251 + ".png", "new\nline\x1b[31m.png", "CASE.png")
    return kinds | dict.fromkeys(odd, "odd entry")


@dataclass(frozen=True)
class Bad:
    """A bad checkpoint.

    Attributes:
        kind: what is wrong with it.
        fate: `refused`; `odd`: it does what it says, and that is harmless; `not finite`: so are its logits; `either`.
        plain: whether it is given with --arch and --labels, as plain weights are.
    """

    kind: str
    fate: str = "refused"
    plain: bool = False


class Payload:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


class Call:
    """A pickle that calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.function, self.arguments


def tensors_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a safetensors file of a header, JSON or raw bytes; a header length that is given may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _torch_file(value: object, *, archive: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=archive)
    return stream.getvalue()


def _archive(path: Path, change: Callable[[str, bytes], bytes], *, method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a copy of an archive of torch.save with changed members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(stream, "w", method) as target:
        for member in source.namelist():
            target.writestr(member, change(member, source.read(member)))
    return stream.getvalue()


def build_checkpoints(folder: Path, good: Path, victim: Path) -> dict[str, Bad]:
    """Write bad checkpoints, made from a good checkpoint of ours; return the damage of each file.

    Checkpoints with code would create the file `victim` if the code were executed.
    """
    whole = good.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8:start]), whole[start:]
    files: dict[str, tuple[Bad, bytes]] = {}
    for name, (kind, content) in _bad_bytes(whole, start).items():
        files[name] = Bad(kind, "either" if kind == "bits flipped" else "refused"), content
    for name, (kind, change) in _bad_headers().items():
        files[name] = Bad(kind), tensors_file({**header, **change}, data)
    for name, (bad, fields) in _bad_metadata(len(json.loads(header["__metadata__"]["labels"]))).items():
        metadata = {key: value for key, value in {**header["__metadata__"], **fields}.items() if value is not None}
        files[name] = bad, tensors_file({**header, "__metadata__": metadata}, data)
    state = load(whole)
    for name, (bad, tensors) in _bad_tensors(state).items():
        kept = {key: tensor for key, tensor in {**state, **tensors}.items() if tensor is not None}
        files[name] = bad, save(kept, header["__metadata__"])
    for name, (bad, content) in _bad_pickles(folder, state, victim).items():
        files[name] = bad, content
    for name, (_, content) in files.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.safetensors")
    os.mkfifo(folder / "pipe.pt")
    (folder / "folder.safetensors").mkdir()
    (folder / "nowhere.safetensors").symlink_to(folder / "is-not-there.safetensors")
    (folder / "self.safetensors").symlink_to(folder / "self.safetensors")
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    with (folder / "sparse.pt").open("wb") as stream:
        stream.truncate(2**38)
    with (folder / "sparse.safetensors").open("wb") as stream:
        stream.write(tensors_file({"fc.bias": {"dtype": "U8", "shape": [2**38], "data_offsets": [0, 2**38]}}))
        stream.truncate(stream.tell() + 2**38)
    odd = ("pipe.safetensors", "folder.safetensors", "nowhere.safetensors", "self.safetensors", "zero.safetensors")
    return (
        {name: bad for name, (bad, _) in files.items()}
        | dict.fromkeys(odd, Bad("odd entry"))
        | {"pipe.pt": Bad("odd entry", plain=True), "sparse.pt": Bad("sparse", plain=True)}
        | {"sparse.safetensors": Bad("sparse", plain=True)}
    )


def _bad_bytes(whole: bytes, start: int) -> dict[str, tuple[str, bytes]]:
    rng = random.Random(1)
    files = {
        f"cut-{share}.safetensors": ("truncated", whole[: int(len(whole) * share)]) for share in (0.002, 0.5, 0.99)
    }
    for number, (first, last) in enumerate([(0, 8), (8, start), (8, start), (8, start), (start, len(whole))]):
        damaged = bytearray(whole)
        for _ in range(1 + 3 * number):
            damaged[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
        files[f"flip-{number}.safetensors"] = ("bits flipped", bytes(damaged))
    for name, length in {"none": 0, "short": start - 9, "long": len(whole), "absurd": 2**64 - 1}.items():
        files[f"length-{name}.safetensors"] = ("lying header length", struct.pack("<Q", length) + whole[8:])
    return files | {
        "zeroed.safetensors": ("zeroed", bytes(len(whole))),
        "zero-header.safetensors": ("zeroed", whole[:8] + bytes(start - 8) + whole[start:]),
        "empty.safetensors": ("empty", b""),
        "text.safetensors": ("another format", b"not a checkpoint\n" * 50),
        "photo.safetensors": ("another format", good("PNG")),
        "archive.safetensors": ("another format", _torch_file({"a": torch.zeros(3)})),
        "new\nline\x1b[31m.safetensors": ("odd name", b"x"),
        "json.safetensors": ("header no JSON", tensors_file(whole[8:start].replace(b":", b"="), whole[start:])),
        "binary.safetensors": ("header no JSON", tensors_file(rng.randbytes(900))),
        "list.safetensors": ("header no object", tensors_file([1, 2])),
        "deep.safetensors": ("nested too deeply", tensors_file(b'{"a":' * 200_000)),
        "many.safetensors": ("absurd header", tensors_file(b"[" + b"{}," * 3_000_000 + b"{}]")),
        "number.safetensors": ("absurd header", tensors_file(b'{"a":' + b"9" * 2_000_000 + b"}")),
    }  # fmt: skip


def _bad_headers() -> dict[str, tuple[str, dict[str, object]]]:
    def bias(shape: object = (4,), offsets: object = (0, 16), kind: object = "F32") -> dict[str, object]:
        return {"fc.bias": {"dtype": kind, "shape": shape, "data_offsets": offsets}}

    return {
        "overlap.safetensors": ("overlapping offsets", bias(offsets=(8, 24))),
        "outside.safetensors": ("offsets out of range", bias(offsets=(2**40, 2**40 + 16))),
        "wrapped.safetensors": ("offsets out of range", bias(offsets=(2**64 - 16, 2**64))),
        "negative.safetensors": ("offsets out of range", bias(offsets=(-16, 0))),
        "backwards.safetensors": ("offsets out of range", bias(offsets=(16, 0))),
        "fraction.safetensors": ("offsets out of range", bias(offsets=(0.5, 16.5))),
        "no-offsets.safetensors": ("fields missing", {"fc.bias": {"dtype": "F32", "shape": [4]}}),
        "shape-negative.safetensors": ("absurd shape", bias((-4,))),
        "shape-huge.safetensors": ("absurd shape", bias((2**62, 2**62))),
        "shape-text.safetensors": ("absurd shape", bias("four")),
        "shape-deep.safetensors": ("absurd shape", bias((1,) * 100_000)),
        "dtype.safetensors": ("unknown dtype", bias(kind="X9")),
        "dtype-wide.safetensors": ("dtype does not fit", bias(kind="F64")),
        "dtype-number.safetensors": ("unknown dtype", bias(kind=32)),
        "tensor-null.safetensors": ("fields missing", {"fc.bias": None}),
    }  # fmt: skip


def _bad_metadata(count: int) -> dict[str, tuple[Bad, dict[str, str | None]]]:
    """Return metadata to replace good metadata; a field that is None is missing."""
    names = [f"label {number}" for number in range(count)]
    million: dict[str, str | None] = {
        "labels": json.dumps([f"{n}" for n in range(10**6)]),
        "thresholds": json.dumps([0.5] * 10**6),
    }
    preprocess = {"resize": [40, 40], "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    wrong: dict[str, dict[str, str | None]] = {
        "gone": {"format": None},
        "format": {"format": "mlperturb.checkpoint/999"},
        "no-labels": {"labels": None},
        "labels-json": {"labels": "[cat"},
        "labels-object": {"labels": '{"a": 0, "b": 1, "c": 2, "d": 3}'},
        "labels-numbers": {"labels": json.dumps(list(range(count)))},
        "labels-twice": {"labels": json.dumps([*names[:-1], names[0]])},
        "labels-more": {"labels": json.dumps([*names, "more"]), "thresholds": json.dumps([0.5] * (count + 1))},
        "labels-million": million,
        "labels-million-alone": {"labels": million["labels"]},
        "labels-deep": {"labels": "[" * 100_000},
        "thresholds-nan": {"thresholds": json.dumps([float("nan")] * count)},
        "thresholds-huge": {"thresholds": json.dumps([10**400] * count)},
        "thresholds-text": {"thresholds": json.dumps(["half"] * count)},
        "digits": {"metrics": "9" * 100_000},
        "provenance-deep": {"provenance": '{"a":' * 100_000},
        "provenance-list": {"provenance": "[]"},
        "arch-none": {"architecture": ""},
        "arch-escape": {"architecture": "\x1b[31mresnet\n"},
        "arch-path": {"architecture": "../../etc/passwd"},
        "arch-other": {"architecture": "vit_h_14"},
        "arch-video": {"architecture": "raft_large"},
        "arch-hub": {"architecture": "timm/hf-hub:timm/resnet18.a1_in1k"},
        "arch-timm": {"architecture": "timm/vit_giant_patch14_224"},
        "no-preprocess": {"preprocess": "{}"},
    }  # fmt: skip
    wrong |= {f"depth-{n}": {"metrics": '{"a":' * n + "1" + "}" * n} for n in (300, 980)}
    sizes: dict[str, dict[str, object]] = {
        "zero": {"resize": 0},
        "negative": {"resize": [-40, -40]},
        "huge": {"resize": [10**6, 10**6]},
        "side": {"resize": 10**9},
        "long": {"resize": 10**30},
        "crop": {"resize": 2**31, "crop": [40, 40]},
        "crop-large": {"crop": [41, 41]},
        "fraction": {"resize": 40.5},
        "three": {"resize": [40, 40, 40]},
        "text": {"resize": "40"},
        "kind": {"interpolation": ["bilinear"]},
        "mean": {"mean": [float("nan")] * 3},
        "std": {"std": [0, 0, 0]},
        "std-huge": {"std": [10**400] * 3},
    }  # fmt: skip
    strange: dict[str, dict[str, str | None]] = {
        "escapes": {"labels": json.dumps(["\x1b[31mred\x1b[0m", "new\nline\r", "\u202eright to left", "\x07\x00"])},
        "markup": {"labels": json.dumps(["[red]x[/red]", "<script>alert(1)</script>", "{{ 7 * 7 }}", "[/nothing]"])},
        "unpaired": {"labels": '["\\ud800", "\\udfff", "", " "]'},
        "long-name": {"labels": json.dumps(["x" * 1_000_000, *names[1:]])},
        "not-finite": {"metrics": '{"map": NaN, "loss": Infinity, "deep": {"map": -Infinity, "huge": 1e999}}'},
        "keys": {"provenance": json.dumps({"\x1b[2J": "[bold]\x1b]0;title\x07", "": {"a\n": 1e308, "b": True}})},
        "crop-one": {"preprocess": json.dumps({**preprocess, "crop": [1, 1]})},
    }  # fmt: skip
    found = {f"metadata-{name}.safetensors": (Bad("wrong metadata"), dict(change)) for name, change in wrong.items()}
    for name, change in sizes.items():
        text = json.dumps({**preprocess, **change})
        found[f"preprocess-{name}.safetensors"] = Bad("absurd preprocessing"), {"preprocess": text}
    for name, odd in strange.items():
        found[f"strange-{name}.safetensors"] = Bad("strange metadata", "odd"), dict(odd)
    for name, extreme in {"mean": {"mean": [1e300] * 3}, "std": {"std": [1e-300] * 3}}.items():
        text = json.dumps({**preprocess, **extreme})
        found[f"float32-{name}.safetensors"] = Bad("absurd preprocessing", "not finite"), {"preprocess": text}
    return found


def _bad_tensors(state: dict[str, torch.Tensor]) -> dict[str, tuple[Bad, dict[str, torch.Tensor | None]]]:
    head = state["fc.weight"]
    all_of = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return {
        "missing.safetensors": (Bad("tensor missing"), {"fc.bias": None}),
        "none.safetensors": (Bad("tensor missing"), dict.fromkeys(state)),
        "extra.safetensors": (Bad("extra tensor"), {"\x1b[31m": torch.zeros(2)}),
        "extra-many.safetensors": (Bad("extra tensor"), {f"extra.{n}": torch.zeros(0) for n in range(5000)}),
        "transposed.safetensors": (Bad("wrong shape"), {"fc.weight": head.T.contiguous()}),
        "scalar.safetensors": (Bad("wrong shape"), {"fc.weight": torch.zeros(())}),
        "hollow.safetensors": (Bad("wrong shape"), {"fc.weight": torch.zeros(0, 1024)}),
        "complex.safetensors": (Bad("wrong dtype"), {"fc.weight": head.to(torch.complex64)}),
        "truth.safetensors": (Bad("wrong dtype", "odd"), {"fc.weight": head > 0}),
        "eight-bits.safetensors": (Bad("wrong dtype", "odd"), {"fc.weight": head.to(torch.float8_e5m2)}),
        "double.safetensors": (Bad("wrong dtype", "odd"), {name: t.double() for name, t in all_of.items()}),
        "unsigned.safetensors": (Bad("wrong dtype", "odd"), {"fc.bias": torch.ones(4, dtype=torch.uint64)}),
        "overflow.safetensors": (Bad("weights not finite", "not finite"), {"fc.weight": head.double() * 1e300}),
        "nan.safetensors": (Bad("weights not finite", "not finite"), {"fc.bias": torch.full((4,), torch.nan)}),
        "infinite.safetensors": (Bad("weights not finite", "not finite"), {"fc.bias": torch.full((4,), torch.inf)}),
        "one-nan.safetensors": (
            Bad("weights not finite", "not finite"),
            {"fc.bias": torch.tensor([0.0, 1.0, torch.nan, 0.0])},
        ),
        "zeros.safetensors": (Bad("zeroed", "odd"), {name: torch.zeros_like(t) for name, t in state.items()}),
        "variance.safetensors": (
            Bad("weights not finite", "not finite"),
            {name: -torch.ones_like(t) for name, t in state.items() if name.endswith("running_var")},
        ),
    }  # fmt: skip


def _bad_pickles(folder: Path, state: dict[str, torch.Tensor], victim: Path) -> dict[str, tuple[Bad, bytes]]:
    evil = {**state, "evil": Payload(victim)}
    head, scratch = state["fc.weight"], folder.with_name("scratch.pt")
    torch.save(state, scratch)
    archive = scratch.read_bytes()
    looped: dict[str, object] = {}
    looped["state_dict"] = looped
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both formats are deprecated
        quantised = torch.quantize_per_tensor(head, 0.1, 0, torch.qint8)
        stream = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    tape = io.BytesIO()
    with tarfile.open(fileobj=tape, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Payload(victim), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

    def swap(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
        return _archive(scratch, lambda member, old: content if member.endswith(name) else old, method=method)

    files: dict[str, tuple[str, bytes]] = {
        "evil-zip.pt": ("code in a pickle", _torch_file(evil)),
        "evil-legacy.pt": ("code in a pickle", _torch_file(evil, archive=False)),
        "evil-nested.pth": ("code in a pickle", _torch_file({"state_dict": state, "epoch": Payload(victim)})),
        "evil-plain.pt": ("code in a pickle", pickle.dumps(evil)),
        "evil-first.bin": ("code in a pickle", pickle.dumps(Payload(victim), protocol=0)),
        "evil-tar.pt": ("code in a pickle", tape.getvalue()),
        "evil-swap.pt": ("code in a pickle", swap("data.pkl", pickle.dumps(evil["evil"], 2))),
        "module.pt": ("a pickled module", _torch_file(torch.nn.Linear(2, 2))),
        "script.pt": ("TorchScript", stream.getvalue()),
        "cut.pt": ("truncated", archive[: len(archive) // 2]),
        "cut-end.pt": ("truncated", archive[:-30]),
        "zeroed.pt": ("zeroed", bytes(len(archive))),
        "empty.pt": ("empty", b""),
        "text.pt": ("another format", b"weights\n" * 20),
        "photo.pt": ("another format", good("PNG")),
        "end-alone.pt": ("another format", b"PK\x05\x06" + bytes(18)),
        "hollow.pt": ("members missing", _archive(scratch, lambda *_: b"")),
        "short.pt": ("members missing", _archive(scratch, lambda name, old: old[: 9 if "/data/" in name else None])),
        "bomb.pt": ("bomb", swap("data/0", bytes(700_000_000), zipfile.ZIP_DEFLATED)),
        "bomb-pickle.pt": ("bomb", swap("data.pkl", bytes(700_000_000), zipfile.ZIP_DEFLATED)),
        "array.pt": ("bomb", _torch_file({**state, "fc.bias": Call(bytearray, 700_000_000)})),
        "array-legacy.pt": ("bomb", _torch_file({"fc.bias": Call(bytearray, 700_000_000)}, archive=False)),
        "looped.pt": ("no state dict", _torch_file(looped)),
        "numbers.pt": ("no state dict", _torch_file({**state, "epoch": 3})),
        "keys.pt": ("no state dict", _torch_file({7: head, None: head, ("a", "b"): head})),
        "nothing.pt": ("no state dict", _torch_file(OrderedDict())),
        "abstract.pt": ("no plain tensor", _torch_file({**state, "fc.weight": head.to("meta")})),
        "sparse-tensor.pt": ("no plain tensor", _torch_file({**state, "fc.weight": head.to_sparse()})),
        "quantised.pt": ("no plain tensor", _torch_file({**state, "fc.weight": quantised})),
        "complex.pt": ("no plain tensor", _torch_file({**state, "fc.weight": head.to(torch.complex64)})),
        "bits.pt": ("no plain tensor", _torch_file({**state, "fc.weight": head.half().view(torch.bits16)})),
        "packed.pt": ("no plain tensor", _torch_file({**state, "fc.bias": packed})),
        "other.pt": ("tensor missing", _torch_file({"weight": torch.zeros(2)})),
        "giant.pt": ("wrong shape", _torch_file({**state, "fc.weight": torch.zeros(1).expand(10**9, 10**9)})),
    }  # fmt: skip
    found = {name: (Bad(kind, plain=True), content) for name, (kind, content) in files.items()}
    expanded = {**state, "fc.weight": torch.zeros(1).expand(head.shape)}
    found["expanded.pt"] = Bad("one number for all", "odd", plain=True), _torch_file(expanded)
    scratch.unlink()
    return found
