"""Parquet tables, as data sets are published: a row is a sample, with its pictures' bytes or paths."""
from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from mindformers_ixc.data.forms import MEDIA_KEYS
from mindformers_ixc.data.records.base import Place, Progress, Record, Records, check_source
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import parse_json
from mindformers_ixc.processing.stored import StoredFile

if TYPE_CHECKING:
    import pyarrow

# Row groups that a process keeps: rows are read by whole groups, and shuffled samples lie in any of them.
KEPT_GROUPS = 8


class ParquetRecords(Records):
    """Rows of a Parquet file; a place is (row in its group, number of the group).

    Pictures are columns `image` or `images` as Hugging Face's: bytes, or `{"bytes", "path"}`, or a list of either; or
    texts, which are paths. Columns of lists may be JSON texts.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is no Parquet file, or cut short.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        check_source(path)
        self._groups: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._open: Any = None
        self.rows = [self._parquet.metadata.row_group(group).num_rows
                     for group in range(self._parquet.metadata.num_row_groups)]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open": None, "_groups": OrderedDict()}

    @property
    def _parquet(self) -> Any:
        if self._open is None:
            import pyarrow.parquet  # noqa: PLC0415 - slow to import, and seldom needed

            try:
                self._open = pyarrow.parquet.ParquetFile(self.path, memory_map=True)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{self.name} is no Parquet file, or cut short: its description, which stands at its "
                                f"end, cannot be read ({_first_line(error)}).") from error
        return self._open

    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """See `Records.scan`."""
        size, done = os.path.getsize(self.path), 0
        for group, rows in enumerate(self.rows):
            end = size * (group + 1) // len(self.rows)
            progress(end - done)
            done = end
            yield np.stack([np.arange(rows), np.full(rows, group), np.zeros(rows, int)], 1).astype(np.int64)

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        row = self._group(place.length).slice(place.start, 1).to_pylist()[0]
        files: dict[str, StoredFile] = {}
        for key, value in row.items():
            if key in MEDIA_KEYS and value is not None:
                several = value if isinstance(value, list) else [value]
                names = [self._file_name(one, f"{key}{number}", index, files) for number, one in enumerate(several)]
                row[key] = names if isinstance(value, list) else names[0]
            elif isinstance(value, str) and key in _LISTS and value.lstrip().startswith("["):
                row[key] = parse_json(value, f"{self.where(index)}, field {key}")
        return Record(row, files)

    def _group(self, number: int) -> Any:
        if number in self._groups:
            self._groups.move_to_end(number)
        else:
            import pyarrow  # noqa: PLC0415 - slow to import, and seldom needed

            self._check_unchanged(os.stat(self.path))
            try:
                self._groups[number] = self._parquet.read_row_group(number, use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{self.name}: its row group {number} (counted from 0) is damaged "
                                f"({_first_line(error)}); fetch the file again.") from error
            if len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        return self._groups[number]

    def _file_name(self, value: object, field: str, index: int, files: dict[str, StoredFile]) -> object:
        """The name of a picture, whose bytes are put aside if the row has them."""
        given = value.get("path") if isinstance(value, dict) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            return value if given is None else given
        name = PurePosixPath(given).name if given else field
        if name in files:
            name = f"{field}_{name}"
        files[name] = StoredFile(f"{self.where(index)}: {name}", lambda: content)
        return name


# Columns that hold lists, which some tables have as JSON texts.
_LISTS = ("conversations", "messages", "history", "reference_logps")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
