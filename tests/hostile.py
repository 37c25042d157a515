"""A corpus of bad image files: what a folder from elsewhere may hold."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "ppm": "PPM"}


def good(form: str, size: tuple[int, int] = (36, 30)) -> bytes:
    """Return a small valid file."""
    pixels = np.random.default_rng(5).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, *, crc: int | None = None, length: int | None = None) -> bytes:
    """Return a PNG chunk, its checksum or length a lie if given."""
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", checksum)


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, data: bytes = b"", interlace: int = 0) -> bytes:
    """Return a PNG whose header says what is given, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    body = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


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
