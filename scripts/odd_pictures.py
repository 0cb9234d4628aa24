"""Odd pictures from a seed, for `odd_media.py` and its test; where a picture is whole, its right pixels too."""
from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 274


class Case(NamedTuple):
    """One thing to load.

    Attributes:
        name: what is odd about it.
        source: what the loader is given.
        expected: uint8 `(height, width, 3)` it must give, on white; `None` where refusing is as good.
        exif: the option of that name.
    """

    name: str
    source: object
    expected: np.ndarray | None = None
    exif: str = "ignore"


def pixels(rng: random.Random, channels: int = 3) -> np.ndarray:
    """A smooth picture of random size, so that lossy formats keep it, uint8."""
    height, width = rng.randint(4, 90), rng.randint(4, 90)
    y, x = np.mgrid[:height, :width]
    planes = [(y * rng.randint(0, 2) + x * rng.randint(0, 2) + rng.randint(0, 255)) % 256 for _ in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def on_white(picture: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composites in floating point."""
    share = alpha[..., None] / 255
    return np.rint(picture * share + 255 * (1 - share)).astype(np.uint8)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    """A picture's file."""
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


def deep_png(levels: np.ndarray, bits: int, colour: int, key: bytes = b"") -> bytes:
    """A PNG of a bit depth that Pillow does not write; `levels` are its samples `(height, width[, channels])`."""
    height, width = levels.shape[:2]
    rows = levels.reshape(height, -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        unpacked = (rows[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8).reshape(height, -1)
        lines = [np.packbits(row).tobytes() for row in unpacked]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *([(b"tRNS", key)] if key else []),
             (b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


# Whole pictures

def plain(rng: random.Random) -> tuple[str, bytes, np.ndarray]:
    """A picture in some lossless format."""
    picture = pixels(rng)
    kind, options = rng.choice([("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True}),
                                ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_deflate"})])
    return f"plain {kind}", encoded(Image.fromarray(picture), kind, **options), picture


def grey(rng: random.Random) -> tuple[str, bytes, np.ndarray]:
    """Greyscale of 1 to 16 bits."""
    bits = rng.choice([1, 2, 4, 16])
    height, width = rng.randint(4, 60), rng.randint(4, 60)
    levels = np.random.default_rng(rng.randint(0, 9999)).integers(0, 1 << bits, (height, width))
    shown = levels >> 8 if bits == 16 else levels * 255 // ((1 << bits) - 1)
    key = b""
    if rng.random() < 0.5:
        clear = int(levels[0, 0])
        key = struct.pack(">H", clear)
        shown = np.where(levels == clear, 255, shown)
    name = f"grey of {bits} bits{' with a key' if key else ''}"
    return name, deep_png(levels, bits, 0, key), np.repeat(shown[..., None], 3, 2).astype(np.uint8)


def transparent(rng: random.Random) -> tuple[str, bytes, np.ndarray]:
    """An alpha channel in some format."""
    picture = pixels(rng, 4)
    kind = rng.choice(["PNG", "WEBP", "TIFF", "GIF", "LA"])
    if kind == "LA":
        image = Image.fromarray(picture).convert("LA")
        parts = np.asarray(image)
        return "transparent LA", encoded(image, "PNG"), on_white(np.repeat(parts[..., :1], 3, 2), parts[..., 1])
    if kind == "GIF":
        image = Image.fromarray(np.where(picture[..., 0] < 128, 0, 1).astype(np.uint8), "P")
        image.putpalette([10, 20, 30, 200, 0, 0] + [0] * 762)
        shown = np.where(np.asarray(image)[..., None] == 0, 255, np.array([200, 0, 0]))
        return "transparent GIF", encoded(image, "GIF", transparency=0), shown.astype(np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    expected = on_white(picture[..., :3], picture[..., 3])
    return f"transparent {kind}", encoded(Image.fromarray(picture), kind, **options), expected


def turned(rng: random.Random) -> tuple[str, bytes, np.ndarray]:
    """An orientation that is to be followed; see `cases`."""
    picture, orientation = pixels(rng), rng.randint(1, 8)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a)}
    kind = rng.choice(["PNG", "WEBP", "TIFF"])
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(picture), kind, exif=exif, **options)
    return f"turned {orientation} {kind}", content, turns[orientation](picture)


def several(rng: random.Random) -> tuple[str, bytes, np.ndarray]:
    """Frames or pages, of which the first counts."""
    picture = pixels(rng)
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    kind, options = rng.choice([("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
    return f"several {kind}", encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options), picture


WHOLE = (plain, grey, transparent, turned, several)


# Damaged pictures

def base(rng: random.Random) -> tuple[str, bytes]:
    """Some whole file, of a lossy format too, or one whose range of pixels is not known."""
    picture = Image.fromarray(pixels(rng))
    kind, mode, options = rng.choice([
        ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("JPEG", "L", {}),
        ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "RGBA", {}), ("PNG", "1", {}), ("GIF", "P", {}),
        ("BMP", "RGB", {}), ("BMP", "P", {}), ("BMP", "1", {}), ("TIFF", "RGB", {}), ("TIFF", "F", {}),
        ("TIFF", "I", {}), ("TIFF", "CMYK", {}), ("TIFF", "LAB", {}), ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "1", {"compression": "group4"}),
        ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("PPM", "RGB", {}), ("PPM", "L", {}),
        *([("AVIF", "RGB", {"speed": 10})] if "AVIF" in Image.SAVE else [])])
    name = f"{kind} {mode}{' ' + str(options) if options else ''}"
    return name, encoded(picture.convert(mode), kind, **options)


def cut(rng: random.Random) -> tuple[str, bytes]:
    """A file's beginning."""
    name, content = base(rng)
    return f"cut {name}", content[:rng.randrange(len(content))]


def flipped(rng: random.Random) -> tuple[str, bytes]:
    """Some bytes changed, most often in the header."""
    name, content = base(rng)
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 30)):
        place = rng.randrange(min(len(damaged), 120) if rng.random() < 0.6 else len(damaged))
        damaged[place] = rng.choice([damaged[place] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
    return f"flipped {name}", bytes(damaged)


def lying(rng: random.Random) -> tuple[str, bytes]:
    """A header whose numbers are not the picture's."""
    numbers = [0, 1, 2, 65535, 1 << 16, 9000, 20000, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
               rng.randrange(4000)]
    kind, number = rng.choice(["PNG", "BMP", "GIF", "TIFF", "PPM", "JPEG", "chunk"]), rng.choice(numbers)
    if kind == "PPM":
        head = f"P{rng.randint(1, 7)} {number} {rng.choice(numbers)} {rng.choice(numbers)}\n".encode()
        return "lying PPM", head + bytes(rng.randrange(2000))
    content = bytearray(encoded(Image.fromarray(pixels(rng)), "PNG" if kind == "chunk" else kind))
    if kind == "PNG":
        size = struct.pack(">II", number % (1 << 32), rng.choice(numbers) % (1 << 32))
        kinds = bytes([rng.choice([1, 2, 4, 8, 16, 3]), rng.choice([0, 2, 3, 4, 6, 5]), 0, 0, rng.randint(0, 2)])
        content[8:33] = png_chunk(b"IHDR", size + kinds)
    elif kind == "chunk":
        name = rng.choice([b"tRNS", b"PLTE", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"gAMA", b"pHYs"])
        text = rng.choice([b"", rng.randbytes(rng.randrange(300)), b"k\0\0" + zlib.compress(bytes(1 << 22))])
        content[33:33] = png_chunk(name, text)
    elif kind == "TIFF":
        place = 8 + 2 + 12 * rng.randrange(12)
        content[place:place + 12] = struct.pack("<HHII", rng.choice([256, 257, 258, 259, 262, 273, 277, 278, 279, 339]),
                                                rng.randint(1, 12), rng.choice(numbers) % 9, number % (1 << 32))
    elif kind == "JPEG":
        frame = content.index(b"\xff\xc0")
        content[frame + 5:frame + 9] = struct.pack(">HH", number & 65535, rng.choice(numbers) & 65535)
    else:
        place = 18 if kind == "BMP" else 6
        content[place:place + 4] = struct.pack("<I", number % (1 << 32))
    return f"lying {kind}", bytes(content)


def large(rng: random.Random) -> tuple[str, bytes]:
    """Sides that are far apart or many."""
    width, height = rng.choice([(5000, 3), (3, 5000), (1, 1), (1, 30000), (30000, 1), (60000, 2), (2, 2), (700, 1),
                                (20000, 20000), (14000, 14000), (9000, 9000)])
    kind = "PNG" if width * height > 10 ** 6 else rng.choice(["PNG", "BMP", "TIFF"])
    return f"sides {width} x {height} {kind}", encoded(Image.new("1", (width, height)), kind)


def foreign(rng: random.Random) -> tuple[str, bytes]:
    """No picture, or of a format that is not read."""
    picture = Image.fromarray(pixels(rng))
    kinds = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"8BPS\0\1" + bytes(300),
             b"%PDF-1.4\n", b"<html></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"", b"\0" * 99,
             b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"II*\0\x08\0\0\0", b"P6", b"BM",
             b"version https://git-lfs.github.com/spec/v1\n", b"\0\0\0\x1cftypheic\0\0\0\0", b"\xd7\xcd\xc6\x9a" * 9,
             b"SIMPLE  =                    T", rng.randbytes(500),
             *(encoded(picture, other) for other in ("TGA", "ICO", "EPS", "PCX", "SGI"))]
    content = rng.choice(kinds)
    return f"foreign {content[:8]!r}", content


def bad_exif(rng: random.Random) -> tuple[str, bytes]:
    """EXIF that is none."""
    picture = Image.fromarray(pixels(rng))
    exif = b"Exif\0\0" + rng.choice([b"", b"MM\0*", b"II*\0\xff\xff\xff\xff", rng.randbytes(rng.randrange(60)),
                                     b"MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\0\0\0\1" + rng.randbytes(9)])
    return "bad EXIF", encoded(picture, rng.choice(["JPEG", "PNG", "WEBP"]), exif=exif)


DAMAGED = (cut, cut, flipped, flipped, lying, lying, large, foreign, bad_exif)


# No files

def no_file(rng: random.Random, folder: Path, number: int) -> Case:
    """Something else than a picture's file."""
    path = folder / f"{number}.png"
    picture = Image.fromarray(pixels(rng))
    kind = rng.choice(["folder", "fifo", "broken link", "loop", "missing", "long", "data", "device", "zero byte",
                       "surrogate", "bytes", "array", "floats", "number", "none", "mode", "empty picture", "half"])
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    values: dict[str, object] = {
        "long": "/9j/4AAQSkZJRg" * 4000, "data": "data:image/png;base64," + "iVBORw0KGgo" * 5000, "device": "/dev/zero",
        "zero byte": "a\0b.png", "surrogate": "a\udcff.png", "bytes": rng.randbytes(200), "floats": np.zeros((4, 4, 3)),
        "array": np.zeros(rng.choice([(0, 5, 3), (5, 0), (4, 4, 2), (3,), (1, 1, 1, 1), (4, 4, 4)]), np.uint8),
        "number": 7, "none": None, "empty picture": Image.new("RGB", (0, rng.randint(0, 4))),
        "mode": picture.convert(rng.choice(["F", "I", "CMYK", "YCbCr", "LAB", "HSV", "1", "LA"])),
        "half": encoded(picture, "PNG")[:60]}
    return Case(kind, values.get(kind, str(path)))


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Makes `count` cases below a folder, which is made."""
    folder.mkdir(parents=True)
    rng, made = random.Random(f"pictures {seed}"), []
    for number in range(count):
        kind = rng.random()
        if kind < 0.07:
            made.append(no_file(rng, folder, number))
            continue
        expected = None
        if kind < 0.35:
            maker = rng.choice(WHOLE)
            name, content, expected = maker(rng)
        else:
            maker = rng.choice(DAMAGED)
            name, content = maker(rng)
        suffix = rng.choice([".png", ".jpg", ".jpeg", ".tif", ".gif", ".webp", ".bmp", ".PNG", "", ".txt"])
        path = folder / f"{number}{suffix}"
        path.write_bytes(content)
        if rng.random() < 0.05:
            link = folder / f"link {number}{suffix}"
            link.symlink_to(path)
            path = link
        exif = "apply" if maker in (turned, bad_exif) else rng.choice(["ignore", "apply"])
        made.append(Case(name, str(path) if rng.random() < 0.9 else content, expected, exif))
    return made
