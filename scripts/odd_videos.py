"""Odd videos from a seed, for `odd_media.py` and its test, made of the reference videos and written by hand."""
from __future__ import annotations

import os
import random
import struct
from pathlib import Path

from odd_pictures import Case, encoded, pixels
from PIL import Image

VIDEOS = Path(__file__).parents[1] / "tests" / "data" / "goldens"

# Atoms of an MP4 file that say where frames lie, when they are shown and what they are.
ATOMS = (b"stts", b"stsz", b"stco", b"stsc", b"stss", b"ctts", b"stsd", b"avc1", b"avcC", b"mvhd", b"tkhd", b"mdhd",
         b"hdlr", b"elst", b"moov", b"trak", b"mdat", b"ftyp", b"minf", b"stbl")

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".flv", ".wmv", ".3gp", ".mpg", ".mpeg", ".ts", ".webm", ".m4v", ".ogv")


def avi(frames: list[bytes], width: int, height: int, codec: bytes = b"MJPG", rate: int = 5) -> bytes:
    """An AVI file of frames, as JPEGs."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    main = struct.pack("<14I", 1000000 // rate, 0, 0, 16, len(frames), 0, 1, 0, width, height, 0, 0, 0, 0)
    head = struct.pack("<4s4sIHHIIIIIIIIHHHH", b"vids", codec, 0, 0, 0, 0, 1, rate, 0, len(frames), 0, 0, 0, 0, 0,
                       width, height)
    form = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, codec, width * height * 3, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", head) + chunk(b"strf", form))
    index, place, data = b"", 4, b""
    for frame in frames:
        index += struct.pack("<4sIII", b"00dc", 16, place, len(frame))
        piece = chunk(b"00dc", frame)
        place, data = place + len(piece), data + piece
    body = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + stream) + chunk(b"LIST", b"movi" + data)
    return chunk(b"RIFF", b"AVI " + body + chunk(b"idx1", index))


def motion_jpeg(rng: random.Random) -> bytes:
    """An AVI file of some JPEGs, all of the first's size or not."""
    picture = Image.fromarray(pixels(rng)).resize((64, 48))
    frames = [encoded(picture.rotate(9 * i), "JPEG") for i in range(rng.randint(1, 12))]
    if rng.random() < 0.3:
        frames[-1] = encoded(picture.resize((32, 64)), "JPEG")
    return avi(frames, 64, 48, rate=rng.choice([1, 5, 25]))


def whole(rng: random.Random) -> bytearray:
    """Some whole video."""
    return bytearray((VIDEOS / f"video_{rng.choice(['land', 'port', 'long'])}.mp4").read_bytes())


def lying(rng: random.Random) -> tuple[str, bytes]:
    """Numbers of an atom that are not the video's."""
    content = whole(rng)
    name = rng.choice([atom for atom in ATOMS if atom in content])
    place = content.index(name)
    for _ in range(rng.randint(1, 3)):
        number = rng.choice([0, 1, 2, 0x7fffffff, 0x80000000, 0xffffffff, 0x10000000, rng.randrange(100000)])
        at = place + rng.choice([-4, 4, 8, 12, 16, 20, 24, 28, 4 * rng.randrange(60)])
        content[at:at + 4] = struct.pack(">I", number)
    return f"lying {name.decode()}", bytes(content)


def renamed(rng: random.Random) -> tuple[str, bytes]:
    """An atom under another name; `vide` as `soun` leaves only sound."""
    content = whole(rng)
    name = rng.choice([b"vide", b"avc1", *[atom for atom in ATOMS if atom in content]])
    other = b"soun" if name == b"vide" else rng.choice([b"hev1", b"mp4v", b"free", b"xxxx", b"vp09"])
    return f"{name.decode()} as {other.decode()}", bytes(content.replace(name, other))


def flipped(rng: random.Random) -> tuple[str, bytes]:
    """Some bytes changed, of the frames or of the tables."""
    content = whole(rng)
    table = content.index(b"moov")
    first, last = (table, len(content)) if rng.random() < 0.5 else (0, len(content))
    for _ in range(rng.choice([1, 3, 30, 300])):
        content[rng.randrange(first, last)] = rng.randrange(256)
    return "flipped", bytes(content)


def cut(rng: random.Random) -> tuple[str, bytes]:
    """A part of a video, or two videos in one file."""
    content = whole(rng)
    place = rng.randrange(len(content))
    return rng.choice([("cut", bytes(content[:place])), ("tail", bytes(content[place:])),
                       ("hole", bytes(content[:place] + bytes(3000) + content[place + 3000:])),
                       ("two in one", bytes(content + whole(rng)))])


def foreign(rng: random.Random) -> tuple[str, bytes]:
    """No video."""
    picture = encoded(Image.fromarray(pixels(rng)), rng.choice(["PNG", "JPEG", "GIF", "WEBP"]))
    return rng.choice([("empty", b""), ("text", b"no video " * 50), ("picture", picture),
                       ("noise", rng.randbytes(5000)),
                       ("HLS", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n"),
                       ("list", b"ffconcat version 1.0\nfile /etc/hostname\n"), ("zeros", bytes(9000)),
                       ("signature", rng.choice([b"FLV\1\5\0\0\0\x09", b"\x1aE\xdf\xa3", b"OggS\0\2", b"\0\0\1\xba",
                                                 b"0&\xb2u\x8ef\xcf\x11", b"G" + bytes(187)]) + rng.randbytes(900))])


def jpegs(rng: random.Random) -> tuple[str, bytes]:
    """Motion JPEG, whole or changed."""
    content = bytearray(motion_jpeg(rng))
    for _ in range(rng.choice([0, 1, 5, 50])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return "motion JPEG", bytes(content)


MAKERS = (lying, lying, lying, renamed, flipped, flipped, cut, cut, foreign, jpegs)


def cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Makes `count` cases below a folder, which is made."""
    folder.mkdir(parents=True)
    rng, made = random.Random(f"videos {seed}"), []
    for number in range(count):
        name, content = rng.choice(MAKERS)(rng)
        path = folder / f"{number}{rng.choice(SUFFIXES)}"
        kind = rng.random()
        if kind < 0.02:
            os.mkfifo(path)
        elif kind < 0.04:
            path.mkdir()
        elif kind < 0.06:
            path.symlink_to("nowhere.mp4")
        else:
            path.write_bytes(content)
        made.append(Case(name, str(path)))
    return made
