"""Records of data sources, each read by itself: what a source may be, and where its records lie."""
from __future__ import annotations

import os

from mindformers_ixc.data.records.base import Record, Records
from mindformers_ixc.data.records.compressed import ENDINGS, CompressedRecords
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.data.records.mindrecord import MindRecords, is_mindrecord
from mindformers_ixc.data.records.parquet import ParquetRecords
from mindformers_ixc.data.records.tables import TableRecords, is_table
from mindformers_ixc.data.records.tar import TarRecords
from mindformers_ixc.reading import reading

__all__ = ["Record", "Records", "open_records"]


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
        records = _kind_of(path)(path)
    records.item = item
    return records


def _kind_of(path: str | os.PathLike) -> type[Records]:
    name = os.fspath(path).lower()
    if is_table(path):
        return TableRecords
    if name.endswith(".parquet"):
        return ParquetRecords
    if name.endswith(".tar"):
        return TarRecords
    if is_mindrecord(path):
        return MindRecords
    return CompressedRecords if name.endswith(tuple(ENDINGS)) else JsonRecords
