"""MindRecord files, MindSpore's own: read without MindSpore, through the index file that stands beside each shard.

A shard begins with the length of a JSON header (8 bytes, little-endian) and that header. Its pages hold, for every
record, the fields that are no bytes as MessagePack, and those that are, each with its length in front (big-endian) if
there are several; in front of either stands its whole length (little-endian). The index is an SQLite table of pages and
places. This was read off files that MindSpore 2.9 writes, version 3.0 of the form.
"""
from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc.data.batch import REFERENCE_COLUMN
from mindformers_ixc.data.forms import MEDIA_KEYS
from mindformers_ixc.data.records.base import (
    Fingerprint,
    Place,
    Progress,
    Record,
    Records,
    check_source,
    fingerprint,
)
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.files import parse_json
from mindformers_ixc.processing.stored import StoredFile

# Records whose places are given together.
BLOCK = 4096

# A place is the span of a record's plain fields in its shard; `line` has the shard's number above so many bits, and
# below them where the record's bytes begin.
SHARD_BITS = 48

# Fields whose texts may be lists in JSON, since the form has no lists of texts.
LISTS = ("conversations", "messages", "history", REFERENCE_COLUMN, *MEDIA_KEYS)

_LENGTH, _INNER_LENGTH = struct.Struct("<Q"), struct.Struct(">Q")

_COLUMNS = ("PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END", "PAGE_ID_BLOB", "PAGE_OFFSET_BLOB")


def is_mindrecord(path: str | os.PathLike) -> bool:
    """Whether a file is a shard of MindRecord: its index stands beside it, or would."""
    name = os.fspath(path)
    return name.rstrip("0123456789").lower().endswith(".mindrecord") or os.path.exists(f"{name}.db")


class MindRecords(Records):
    """Records of a MindRecord data set: of all its shards, whichever of them is named, as MindSpore reads them.

    Raises:
        FileNotFoundError: when a shard or its index is missing.
        DataError: when one is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        header = _header(check_source(path), self.name)
        self.shards = [_Shard(self.path.with_name(Path(name).name), self) for name in header["shard_addresses"]]

    def fingerprint(self) -> Fingerprint:
        """See `Records.fingerprint`; of all shards."""
        own = [fingerprint(file) for shard in self.shards for file in (shard.path, shard.database)]
        return Fingerprint(sum(one.size for one in own), max(one.time for one in own),
                           "".join(one.ends for one in own))

    def expect(self, size: int, time: int, compared: bool = True) -> None:
        """See `Records.expect`.

        Raises:
            DataError: when a shard has changed already.
        """
        states = [[os.stat(file) for file in (shard.path, shard.database)] for shard in self.shards]
        every = [state for pair in states for state in pair]
        if (sum(state.st_size for state in every), max(state.st_mtime_ns for state in every)) != (size, time):
            raise DataError(f"{self.name} was changed while it was being read; start again when it is complete.")
        for shard, (state, _) in zip(self.shards, states):
            shard.expect(state.st_size, state.st_mtime_ns, compared)

    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """See `Records.scan`."""
        size, done = os.path.getsize(self.path), 0
        for number, shard in enumerate(self.shards):
            for places in shard.blocks():
                places[:, 2] += number << SHARD_BITS
                yield places
            end = size * (number + 1) // len(self.shards)
            progress(end - done)
            done = end

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        number = place.line >> SHARD_BITS
        if not 0 <= number < len(self.shards):
            raise DataError(f"{self.where(index)}: there is no shard {number}.")
        shard = self.shards[number]
        start = place.line & (1 << SHARD_BITS) - 1
        row = shard.plain(place, self.where(index))
        files: dict[str, StoredFile] = {}
        for name, span in shard.spans(start, self.where(index)).items():
            if name in MEDIA_KEYS:
                files[name] = StoredFile(f"{self.where(index)}: {name}", partial(shard.held, span, self.where(index)))
                row[name] = name
            elif name == REFERENCE_COLUMN and shard.types.get(name, "").startswith("float"):
                row[name] = np.frombuffer(shard.read_bytes(span), shard.types[name]).tolist()
            else:
                row[name] = f"{span.length} bytes"       # unknown, and refused by name unless it is ignored
        for name in LISTS:
            if isinstance(row.get(name), str) and row[name].lstrip().startswith("["):
                row[name] = parse_json(row[name], f"{self.where(index)}, field {name}")
        return Record(row, files)


class _Shard(Records):
    """A file of a data set."""

    def __init__(self, path: Path, whole: MindRecords):
        super().__init__(path)
        header = _header(check_source(path), self.name)
        if header.get("compression_size"):
            raise DataError(f"{self.name} is compressed, which is not read; write it without compression.")
        self.first_page, self.page = header["header_size"], header["page_size"]
        self.bytes_fields = list(header["schema"][0]["blob_fields"])
        self.types = {name: field["type"] for name, field in header["schema"][0]["schema"].items()}
        self.database = check_source(f"{path}.db")

    def blocks(self) -> Iterator[np.ndarray]:
        """Places of its records, `line` without the shard."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as index:
                found = index.execute(f"SELECT {', '.join(_COLUMNS)} FROM INDEXES ORDER BY ROW_ID, INC_0")
                while rows := found.fetchmany(BLOCK):
                    pages = np.array(rows, np.int64)
                    plain = self.first_page + pages[:, 0] * self.page + pages[:, 1]
                    held = self.first_page + pages[:, 3] * self.page + pages[:, 4]
                    yield np.stack([plain, pages[:, 2] - pages[:, 1], held], 1)
        except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:      # the latter of what is no number
            raise DataError(f"{self.database}, the index of {self.name}, cannot be read ({error}); both files belong "
                            "together.") from error

    def plain(self, place: Place, where: str) -> dict[str, Any]:
        """Fields of a record that are no bytes."""
        try:
            import msgpack  # noqa: PLC0415 - optional
        except ImportError as error:
            raise DataError(f"{self.name}: MindRecord files need the package msgpack; pip install msgpack.") from error
        content = self.read_bytes(place)
        try:
            if _LENGTH.unpack_from(content)[0] != place.length - _LENGTH.size:
                raise ValueError("its length and its index's differ")
            row = msgpack.unpackb(content[_LENGTH.size:])
        except (ValueError, struct.error) as error:
            raise DataError(f"{where}: is damaged in {self.name} ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: is damaged in {self.name} (no fields).")
        return row

    def spans(self, start: int, where: str) -> dict[str, Place]:
        """Where the fields of a record that are bytes lie."""
        if not self.bytes_fields:
            return {}
        length, = _LENGTH.unpack(self.read_bytes(Place(start, _LENGTH.size)))
        start += _LENGTH.size
        end = start + length
        if len(self.bytes_fields) == 1:
            return {self.bytes_fields[0]: Place(start, length)}
        spans = {}
        for name in self.bytes_fields:
            inner, = _INNER_LENGTH.unpack(self.read_bytes(Place(start, _INNER_LENGTH.size)))
            spans[name] = Place(start + _INNER_LENGTH.size, inner)
            start += _INNER_LENGTH.size + inner
        if start != end:
            raise DataError(f"{where}: is damaged in {self.name} (the lengths of its fields differ from the whole).")
        return spans

    def held(self, span: Place, where: str) -> bytes:
        """The bytes of a field.

        Raises:
            ImageError: when they cannot be read.
        """
        try:
            return self.read_bytes(span)
        except (DataError, OSError) as error:
            raise ImageError(f"{where}: {error}") from error

    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """See `Records.scan`."""
        return self.blocks()

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        return Record(self.plain(place, self.where(index)))


def _header(path: Path, name: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            length, = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(min(length, 1 << 24)))
        sizes, shards = (header["header_size"], header["page_size"]), header["shard_addresses"]
        fields = header["schema"][0]["blob_fields"]
        if not (all(type(size) is int and size >= 0 for size in sizes) and _are_texts(shards) and shards and
                _are_texts(fields)):
            raise ValueError("it says something else than sizes, shards and fields")
    except (struct.error, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{name} is no MindRecord file, or damaged: its header cannot be read ({error}).") from error
    return header


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
