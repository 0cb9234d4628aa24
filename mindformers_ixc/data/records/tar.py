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

from mindformers_ixc.data.forms import METADATA
from mindformers_ixc.data.paths import cut, shown
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

    form = "files of samples (0.jpg, 0.json)"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        with open(check_source(path), "rb") as file:
            head = file.read(6)
        kind = next((name for mark, name in COMPRESSED.items() if head.startswith(mark)), None)
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
            with tarfile.open(self.path, "r:", errorlevel=2, **_NAMES) as archive:
                for member in archive:
                    archive.members = []      # type: ignore[attr-defined]    # it would keep them all
                    name = member.name
                    self._check(member)
                    last = member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield (name if _is_read(member) else None), end, last
                    end = last
            self._check_end(end, size, name)
        except tarfile.TarError as error:
            raise DataError(f"{self.name} is no tar file, or cut short: at byte {end} of {size}, at or behind {name} "
                            f"({error}); fetch it again.") from error

    def _check(self, member: tarfile.TarInfo) -> None:
        """Refuses what stands in a shard without its content; passed over, it would be missed by nobody.

        Raises:
            DataError: naming it.
        """
        if member.issparse():
            raise DataError(f"{self.name}: {member.name} is stored as a sparse file, whose bytes do not follow one "
                            "another; pack the shard again without --sparse.")
        if member.islnk() or member.issym():
            raise DataError(f"{self.name}: {member.name} is a link to {cut(member.linkname)}, and has no content; pack "
                            "the shard again with --dereference --hard-dereference.")
        if not (member.isfile() or member.isdir()):
            raise DataError(f"{self.name}: {member.name} is neither a file nor a folder; pack the shard without it.")

    def _check_end(self, end: int, size: int, name: str) -> None:
        """Refuses a shard that goes on behind what looks like its end: a damaged header looks like that too.

        Raises:
            DataError: when something follows.
            TarError: when the end mark is missing.
        """
        if size - end < BLOCK_BYTES:
            raise tarfile.ReadError("no end mark; if nothing is missing, append 1024 zero bytes")
        with open(self.path, "rb") as file:
            file.seek(end)
            if file.read(BLOCK_BYTES).strip(b"\0"):
                raise DataError(f"{self.name} is damaged: at byte {end} of {size}, behind {name}, stands no header of "
                                "a file; fetch it again.")
            while content := file.read(WINDOW):
                if rest := content.lstrip(b"\0"):
                    raise DataError(f"{self.name} has an end mark behind {name}, at byte {end}, and goes on at byte "
                                    f"{file.tell() - len(rest)} of {size}; it is damaged, or several shards were "
                                    "joined byte by byte: fetch it again, or name each shard by itself.")

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        content = self.read_bytes(place)
        try:
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:", **_NAMES) as archive:
                members = [member for member in archive.getmembers() if _is_read(member)]
        except tarfile.TarError as error:
            raise DataError(f"{self.where(index)}: at byte {place.start} begins no file of a shard ({error}).") \
                from error
        if not members:
            raise DataError(f"{self.where(index)}: has no files.")
        row: dict[str, Any] = {}
        files: dict[str, StoredFile] = {}
        for member in members:
            held = content[member.offset_data:member.offset_data + member.size]
            self._add(member.name, held, row, files)
        key = _key(members[0].name)
        if files and not set(row).difference(METADATA):
            names = ", ".join(PurePosixPath(member.name).name for member in members[:3])
            raise DataError(f"{self.where(index)} (id {shown(key)}): has files ({names}), and nothing is said about "
                            f"them: a .{ROW}, .{' or .'.join(CAPTIONS)} file of the same name must stand directly "
                            "before or behind them.")
        row.setdefault("id", key)
        return Record(self._named(row, files), files)

    def _add(self, member: str, held: bytes, row: dict[str, Any], files: dict[str, StoredFile]) -> None:
        """Adds what a file of a sample holds to the sample's row and files.

        Raises:
            DataError: when it cannot be read, or the sample has the same twice.
        """
        ending = member.rpartition(".")[2].lower()
        name, where = PurePosixPath(member).name, f"{self.name}, {member}"
        if ending in PICTURES or f".{ending}" in VIDEO_ENDINGS:
            if name in files:
                raise DataError(f"{where}: the sample has two files of this name; leave one of them.")
            files[name] = StoredFile(where, partial(bytes, held))
            return
        if ending == ROW:
            more = self._row(held, where)
        elif ending in CAPTIONS:
            more = {"caption": decode_text(held, where).strip()}
            if not more["caption"]:
                raise DataError(f"{where}: is empty; write what the picture shows, or leave the sample out.")
        else:
            more = {ending: decode_text(held, where) if ending in ("cls", "id") else f"{len(held)} bytes"}
        twice = next((key for key in more if key in row and _stripped(row[key]) != _stripped(more[key])), None)
        if twice is not None:
            raise DataError(f"{where}: another file of the sample has its field {cut(str(twice))} too, with another "
                            "value; leave one of them.")
        row.update(more)

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


# Of a tar file; every header and every content takes whole ones. Bytes that are looked at together.
BLOCK_BYTES, WINDOW = 512, 1 << 20

# Names in any encoding: what is no UTF-8 is shown byte by byte.
_NAMES: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}

# Beginnings of compressed files.
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


def _stripped(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def _is_read(member: tarfile.TarInfo) -> bool:
    """Whether a file belongs to a sample: folders do not, nor what macOS packs beside every file."""
    return member.isfile() and not PurePosixPath(member.name).name.startswith("._")


def _key(name: str) -> str:
    """What the files of a sample have in common."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))
