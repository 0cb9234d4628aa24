"""JSON files compressed with gzip or zstd: unpacked once, into the user's cache."""
from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mindformers_ixc import terminal
from mindformers_ixc.data.records.base import check_source, fingerprint
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import whole_file
from mindformers_ixc.resources import resolve_path, user_cache_folder


def _zstd(path: Path) -> Any:
    import pyarrow  # noqa: PLC0415 - slow to import, and seldom needed

    return pyarrow.input_stream(str(path), compression="zstd")


# Endings of compressed files, and what opens them as a stream of bytes.
ENDINGS: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".zst": _zstd, ".zstd": _zstd}  # type: ignore

# Bytes that are unpacked at a time.
CHUNK = 1 << 22


class CompressedRecords(JsonRecords):
    """Records of a compressed JSON file.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it cannot be unpacked.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(unpacked(path), str(path))
        self.home = resolve_path(path)


def unpacked(path: str | os.PathLike) -> Path:
    """The unpacked form of a file in the user's cache; made, if it is not there yet.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is damaged or cut short.
        OSError: when the cache cannot be written.
    """
    file = check_source(path)
    ending = next(ending for ending in ENDINGS if file.name.lower().endswith(ending))
    key = hashlib.sha256(repr(fingerprint(file)).encode()).hexdigest()[:32]
    target = user_cache_folder("unpacked", f"{key}-{file.name[:-len(ending)]}")
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with terminal.current.doing(f"unpacking {file.name}"), whole_file(target) as part:
        try:
            with ENDINGS[ending](file) as source, open(part, "wb") as out:
                shutil.copyfileobj(source, out, CHUNK)
        except (EOFError, gzip.BadGzipFile, ValueError) as error:
            raise DataError(f"{path} cannot be unpacked; it is damaged or cut short ({error}).") from error
        except OSError as error:
            if error.errno:
                raise
            raise DataError(f"{path} cannot be unpacked; it is damaged or cut short ({error}).") from error
    return target
