"""JSON files compressed with gzip or zstd: unpacked once, into the user's cache, by one process of many."""
from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from mindformers_ixc import terminal
from mindformers_ixc.data.index.holding import NOTE, Held, is_there, made, put_in_place, remove, sweep, unfinished
from mindformers_ixc.data.paths import cut
from mindformers_ixc.data.records.base import check_source, fingerprint
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import write_whole
from mindformers_ixc.reading import read_on
from mindformers_ixc.resources import resolve_path, usable_cache_folder


def _zstd(path: Path) -> Any:
    import pyarrow  # noqa: PLC0415 - slow to import, and seldom needed

    return pyarrow.input_stream(str(path), compression="zstd")


# Endings of compressed files, and what opens them as a stream of bytes.
ENDINGS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".zst": _zstd, ".zstd": _zstd}  # type: ignore

# Bytes that are unpacked at a time; the name that they are given, with the ending that says what they are.
CHUNK, CONTENT = 1 << 22, "content"


class CompressedRecords(JsonRecords):
    """Records of a compressed JSON file.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it cannot be unpacked.
        OSError: when the cache cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self._held = unpacked(path)
        super().__init__(_content(self._held.folder), str(path))
        self.home = resolve_path(path)

    def expect(self, size: int, time: int, compared: bool = True) -> None:
        """Nothing: the folder of the unpacked file says which one it is of, and no other file is put there."""


def copies_folder() -> Path:
    """Where unpacked files lie."""
    return usable_cache_folder("unpacked")


def _content(folder: Path) -> Path:
    """The file in the folder of a copy."""
    return next(folder.glob(f"{CONTENT}*"))


def unpacked(path: str | os.PathLike) -> Held:
    """The folder with the unpacked form of a file, in the user's cache; made, if it is not there yet.

    Copies of the file as it was before are removed then, if nobody uses them.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is damaged or cut short.
        OSError: when the cache cannot be written.
    """
    file = check_source(path)
    state = fingerprint(file)
    place = copies_folder() / f"{cut(file.name)}-{_key(str(file.resolve()))}"
    folder = place / _key(repr(state))

    def there() -> Held | None:
        with contextlib.suppress(FileNotFoundError):
            return Held(folder) if is_there(folder) else None
        return None

    def make(alone: bool) -> Held:
        part = unfinished(folder, alone)
        shutil.rmtree(part, ignore_errors=True)          # of a process that was killed
        part.mkdir()
        try:
            write_whole(part / NOTE, json.dumps({"path": os.path.abspath(file), "fingerprint": list(state)}))
            _unpack(path, file, part)
            held = put_in_place(part, folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        for other in place.iterdir():
            if other != folder and _KEY.fullmatch(other.name):
                remove(other)
        sweep(place)
        return held

    return made(there, make, folder.with_suffix(".lock"), f"waiting for {file.name}, which {{who}} unpacks")


def _unpack(path: str | os.PathLike, file: Path, folder: Path) -> None:
    ending = next(ending for ending in ENDINGS if file.name.lower().endswith(ending))
    target = folder / f"{CONTENT}{Path(file.name[:-len(ending)]).suffix}"
    with terminal.current.doing(f"unpacking {file.name}"):
        try:
            with ENDINGS[ending](file) as source, open(target, "wb") as out:
                for piece in read_on(file, iter(partial(source.read, CHUNK), b"")):
                    out.write(piece)
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            raise DataError(f"{path} cannot be unpacked; it is damaged or cut short ({error}).") from error
        except OSError as error:
            if error.errno:
                raise OSError(f"{path} cannot be unpacked into {folder.parent} ({error.strerror}); free space there, "
                              "name another cache by XDG_CACHE_HOME, or unpack it by hand.") from error
            raise DataError(f"{path} cannot be unpacked; it is damaged or cut short ({error}).") from error


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


_KEY = re.compile("[0-9a-f]{24}")
