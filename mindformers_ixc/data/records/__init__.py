"""Records of data sources, each read by itself: what a source may be, and where its records lie."""
from __future__ import annotations

import os
import re

from mindformers_ixc.data.records.base import Record, Records, check_source
from mindformers_ixc.data.records.compressed import ENDINGS, CompressedRecords
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.data.records.mindrecord import MindRecords, is_mindrecord
from mindformers_ixc.data.records.parquet import ParquetRecords
from mindformers_ixc.data.records.signatures import refuse_foreign
from mindformers_ixc.data.records.tables import TableRecords, is_table
from mindformers_ixc.data.records.tar import COMPRESSED, TarRecords
from mindformers_ixc.errors import DataError
from mindformers_ixc.reading import reading

__all__ = ["Record", "Records", "open_records"]

# Names of tar shards, compressed ones too, which are refused with what to do.
_TAR = re.compile(r".*\.(tar(\.(gz|bz2|xz|zst|zstd|lz4))?|tgz|tbz2?|txz|tzst)")

# What Parquet files begin with.
_PARQUET = (b"PAR1", b"PARE")


def open_records(path: str | os.PathLike, item: str = "sample") -> Records:
    """The records of a source, whose kind its name says; what has no known ending is JSON.

    Args:
        path: the source; `pkg:` paths work.
        item: what a record is called in messages.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is not what its name says.
    """
    with reading(path):
        kind, own = _kind_of(path)
        refuse_foreign(check_source(path), str(path), own)
        records = kind(path)
    records.item = item
    return records


def _kind_of(path: str | os.PathLike) -> tuple[type[Records], tuple[bytes, ...]]:
    """The kind of a source, by its name, and what its first bytes may be though they are another kind's signature."""
    name = os.path.basename(os.fspath(path)).lower()
    if is_table(path):
        return TableRecords, ()
    if name.endswith(".parquet"):
        return ParquetRecords, _PARQUET
    if _TAR.fullmatch(name):
        return TarRecords, (*COMPRESSED, b"\0")
    if is_mindrecord(path):
        return MindRecords, (b"",)             # it begins with a length, which may be any bytes
    if name.endswith(tuple(ENDINGS)):
        _check_inner(path, name)
        return CompressedRecords, tuple(COMPRESSED)
    return JsonRecords, ()


def _check_inner(path: str | os.PathLike, name: str) -> None:
    """Refuses what is compressed and, by its name, no JSON."""
    inner = os.path.splitext(os.path.splitext(name)[0])[1]
    if inner in (".csv", ".tsv", ".parquet", ".mindrecord", ".txt"):
        raise DataError(f"{path} is a compressed {inner} file, and only JSON is read compressed; unpack it.")
