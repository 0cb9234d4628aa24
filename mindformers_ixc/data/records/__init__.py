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
    name = os.fspath(path).lower()
    kind: type[Records] = JsonRecords
    if is_table(path):
        kind = TableRecords
    elif name.endswith(".parquet"):
        kind = ParquetRecords
    elif name.endswith(".tar"):
        kind = TarRecords
    elif is_mindrecord(path):
        kind = MindRecords
    elif name.endswith(tuple(ENDINGS)):
        kind = CompressedRecords
    records = kind(path)
    records.item = item
    return records
