"""Files on disk that are trusted later: sizes and checksums, so that what was cut, damaged or altered is found."""
from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_json, write_whole

# What has the sizes and checksums of a folder's files; bytes that are read at a time.
SEAL, CHUNK = "seal.json", 1 << 22


def seal(folder: Path, names: Sequence[str], name: str = SEAL) -> None:
    """Notes what files are like now.

    Args:
        folder: of the files.
        names: of the files in it.
        name: of the note.
    """
    write_whole(folder / name, json.dumps({file: _state(folder / file) for file in names}), sync=True)


def check_seal(folder: Path, names: Sequence[str], name: str = SEAL) -> None:
    """Refuses files that are not as they were when they were sealed. They are read once, not mapped into memory.

    Args:
        folder: of the files.
        names: of the files in it.
        name: of the note.

    Raises:
        ValueError: saying which file is another one.
        OSError: when one cannot be read.
    """
    try:
        known = read_json(folder / name)
    except DataError as error:
        raise ValueError(f"{name} is damaged") from error
    for file in names:
        if not isinstance(known, dict) or known.get(file) != _state(folder / file):
            raise ValueError(f"{file} is not as it was written")


def is_sealed(folder: Path, names: Sequence[str], name: str = SEAL) -> bool:
    """Whether files are there, and as they were when they were sealed."""
    try:
        check_seal(folder, names, name)
    except (OSError, ValueError):
        return False
    return True


def _state(path: Path) -> list[int]:
    """Bytes and CRC-32 of a file."""
    check = 0
    with open(path, "rb") as file:
        while content := file.read(CHUNK):
            check = zlib.crc32(content, check)
        return [os.fstat(file.fileno()).st_size, check]
