"""Records of data sources, each read by itself: what a source may be, and where its records lie."""
from __future__ import annotations

import os

from mindformers_ixc.data.records.base import Record, Records
from mindformers_ixc.data.records.compressed import ENDINGS, CompressedRecords
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.data.records.parquet import ParquetRecords
from mindformers_ixc.data.records.tables import TableRecords, is_table
from mindformers_ixc.data.records.tar import TarRecords

__all__ = ["Record", "Records", "open_records"]


def open_records(path: str | os.PathLike) -> Records:
    """The records of a source, whose kind its name says; what has no known ending is JSON.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is not what its name says.
    """
    name = os.fspath(path).lower()
    if is_table(path):
        return TableRecords(path)
    if name.endswith(".parquet"):
        return ParquetRecords(path)
    if name.endswith(".tar"):
        return TarRecords(path)
    return CompressedRecords(path) if name.endswith(tuple(ENDINGS)) else JsonRecords(path)
