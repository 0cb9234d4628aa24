"""Tar shards in WebDataset's form: files of one sample follow one another and have one name, up to its first dot."""
from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mindformers_ixc.data.records.base import Place, Progress, Record, Records, check_source
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import decode_text, parse_json
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.processing.video import SUFFIXES as VIDEO_ENDINGS

# Endings of a sample's files: what it says, as JSON or as a caption; its pictures. Others are refused, or ignored by
# name (`ignore_keys`).
ROW, CAPTIONS = "json", ("txt", "caption")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "pbm", "pnm")

# Samples whose places are given together.
BLOCK = 1024


class TarRecords(Records):
    """Samples of a tar shard; a place is the span of bytes that a sample's files and their headers take.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is no tar file, or a compressed one.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        with open(check_source(path), "rb") as file:
            head = file.read(6)
        kind = next((name for mark, name in _COMPRESSED if head.startswith(mark)), None)
        if kind:
            raise DataError(f"{self.name} is compressed with {kind}, so that no sample could be read by itself; "
                            "unpack it to a plain .tar (its pictures are compressed already).")

    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """See `Records.scan`."""
        size, places, done = os.path.getsize(self.path), list[tuple[int, int, int]](), 0
        start, key = 0, None
        end = 0
        for name, first, last in self._members(size):
            if name is not None and _key(name) != key:
                if key is not None:
                    places.append((start, end - start, 0))
                start, key = first, _key(name)
            end = last
            if len(places) == BLOCK:
                progress(end - done)
                done = end
                yield np.array(places, np.int64)
                places = []
        if key is not None:
            places.append((start, end - start, 0))
        if places:
            yield np.array(places, np.int64)
        progress(size - done)

    def _members(self, size: int) -> Iterator[tuple[str | None, int, int]]:
        """Name of each file, `None` of what is none, with where its header begins and its content ends."""
        end, name = 0, "its first file"
        try:
            with tarfile.open(self.path, "r:", errorlevel=2) as archive:
                for member in archive:
                    archive.members = []      # type: ignore[attr-defined]    # it would keep them all
                    name, last = member.name, member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield (name if member.isfile() else None), end, last
                    end = last
            if size - end < BLOCK_BYTES:
                raise tarfile.ReadError("no end mark; if nothing is missing, append 1024 zero bytes")
        except tarfile.TarError as error:
            raise DataError(f"{self.name} is no tar file, or cut short: at byte {end} of {size}, at or behind {name} "
                            f"({error}); fetch it again.") from error

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        row: dict[str, Any] = {}
        files: dict[str, StoredFile] = {}
        content = self.read_bytes(place)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
        for member in members:
            ending = member.name.rpartition(".")[2].lower()
            name, where = PurePosixPath(member.name).name, f"{self.name}, {member.name}"
            held = content[member.offset_data:member.offset_data + member.size]
            if ending == ROW:
                row = {**row, **self._row(held, where)}
            elif ending in CAPTIONS:
                row["caption"] = decode_text(held, where).strip()
            elif ending in PICTURES or f".{ending}" in VIDEO_ENDINGS:
                files[name] = StoredFile(where, partial(bytes, held))
            else:
                row[ending] = decode_text(held, where) if ending in ("cls", "id") else f"{member.size} bytes"
        row.setdefault("id", _key(members[0].name))
        return Record(self._named(row, files), files)

    def _row(self, content: bytes, where: str) -> dict:
        row = parse_json(content, where)
        if not isinstance(row, dict):
            raise DataError(f"{where}: must hold a JSON object, found {type(row).__name__}.")
        return row

    def _named(self, row: dict, files: dict[str, StoredFile]) -> dict:
        """The row with its pictures named; by the shard's order where it does not name them itself."""
        if files and not any(row.get(key) for key in ("image", "images", "video", "videos")):
            for key, wanted in (("images", False), ("videos", True)):
                names = [name for name in files if name.lower().endswith(VIDEO_ENDINGS) == wanted]
                if names:
                    row[key] = names
        return row


# Of a tar file; every header and every content takes whole ones.
BLOCK_BYTES = 512

_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"))


def _key(name: str) -> str:
    """What the files of a sample have in common."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))
