"""Parquet tables, as data sets are published: a row is a sample, with its pictures' bytes or paths."""
from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mindformers_ixc.data.forms import MEDIA_KEYS
from mindformers_ixc.data.paths import cut
from mindformers_ixc.data.records.base import Place, Progress, Record, Records, check_source
from mindformers_ixc.data.records.latest import GROUP_BYTES, GROUPS, OPEN_FILES
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import parse_json
from mindformers_ixc.processing.stored import StoredFile

# Bytes of a column that are read at a time, if its pages are no larger; bytes of rows that a stream gives together.
BUFFER, BATCH_BYTES = 1 << 20, 1 << 24


class ParquetRecords(Records):
    """Rows of a Parquet file; a place is (row in its group, number of the group).

    Pictures are columns `image` or `images` as Hugging Face's: bytes, or `{"bytes", "path"}`, or a list of either; or
    texts, which are paths. Columns of lists may be JSON texts.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is no Parquet file, or cut short.
    """

    form = "a table"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        check_source(path)
        self._damaged: dict[int, str] = {}
        file = self._parquet()
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{self.name} has {names.count(twice[0])} columns named {cut(twice[0])!r}; rename or drop "
                            "all but one.")
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        self.rows, self.sizes = [group.num_rows for group in groups], [group.total_byte_size for group in groups]

    def _parquet(self) -> Any:
        """The open file; of a thread, since its reader is not said to be for several."""
        return OPEN_FILES.get((self.path, threading.get_ident(), *self.state), self._open)

    def _open(self, buffer: int = 0) -> Any:
        import pyarrow.parquet  # noqa: PLC0415 - slow to import, and seldom needed

        try:
            # not mapped into memory, see `mindformers_ixc.reading`; of a file that is shortened, or written over, pages
            # would end the process or change, too
            return pyarrow.parquet.ParquetFile(self.path, memory_map=False, buffer_size=buffer,
                                               page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{self.name} is no Parquet file, or cut short: its description, which stands at its "
                            f"end, cannot be read ({_first_line(error)}).") from error

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
        import pyarrow  # noqa: PLC0415 - slow to import, and seldom needed

        if not (0 <= place.length < len(self.rows) and 0 <= place.start < self.rows[place.length]):
            raise DataError(f"{self.where(index)}: the table has no row {place.start} in a group {place.length}.")
        try:
            row = self._row(place.start, place.length).to_pylist()[0]
        except (pyarrow.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.where(index)}: row {place.start} of row group {place.length} (both counted from 0) "
                            f"cannot be read ({_first_line(error)}); texts must be UTF-8.") from error
        files: dict[str, StoredFile] = {}
        for key, value in row.items():
            if key in MEDIA_KEYS and value is not None:
                several = value if isinstance(value, list) else [value]
                names = [self._file_name(one, f"{key}{number}", index, files) for number, one in enumerate(several)]
                row[key] = names if isinstance(value, list) else names[0]
            elif isinstance(value, str) and key in _LISTS and value.lstrip().startswith("["):
                row[key] = parse_json(value, f"{self.where(index)}, field {key}")
        return Record(row, files)

    def _row(self, row: int, group: int) -> Any:
        """A row as a table."""
        import pyarrow  # noqa: PLC0415 - slow to import, and seldom needed

        if group in self._damaged:         # every row of it would try again
            raise DataError(self._damaged[group])
        self._check_unchanged(os.stat(self.path))
        try:
            if self.sizes[group] > GROUP_BYTES:
                return _streamed(self, group).row(row)
            table = GROUPS.get((self.path, group, *self.state), lambda: self._group(group), lambda table: table.nbytes)
        except (pyarrow.ArrowException, OSError) as error:
            first = sum(self.rows[:group])
            self._damaged[group] = (f"{self.name}: its row group {group} (counted from 0), samples {first} to "
                                    f"{first + self.rows[group] - 1}, is damaged ({_first_line(error)}); fetch the "
                                    "file again.")
            raise DataError(self._damaged[group]) from error
        return table.slice(row, 1)

    def _group(self, number: int) -> Any:
        return self._parquet().read_row_group(number, use_threads=False)

    def stream(self, group: int) -> Iterator[Any]:
        """The rows of a group from its start on, some at a time."""
        rows = max(1, self.rows[group] * BATCH_BYTES // max(1, self.sizes[group]))
        return self._open(BUFFER).iter_batches(batch_size=rows, row_groups=[group], use_threads=False)

    def _file_name(self, value: object, field: str, index: int, files: dict[str, StoredFile]) -> object:
        """The name of a picture, whose bytes are put aside if the row has them."""
        given = value.get("path") if isinstance(value, dict) else None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            if isinstance(value, dict) and given is None and set(value) <= {"bytes", "path"}:
                return None                 # no picture, as a row of such a column says it
            return value if given is None else given
        name = PurePosixPath(given).name if given else field
        if name in files:
            name = f"{field}_{name}"
        files[name] = StoredFile(f"{self.where(index)}: {name}", lambda: content)
        return name


class _Stream:
    """Rows of a group that is too large to be kept: read on from the last one, or from the start for an earlier one.

    Args:
        records: of the file.
        group: number of the group.
    """

    def __init__(self, records: ParquetRecords, group: int):
        self.records, self.group, self.key = records, group, _stream_key(records, group)
        self._begin()

    def _begin(self) -> None:
        self.start = self.end = 0        # of the batch
        self.batch: Any = None
        self.batches = self.records.stream(self.group)

    def row(self, number: int) -> Any:
        """A row as a table.

        Raises:
            OSError: when there are fewer.
        """
        if number < self.start:
            self._begin()
        while number >= self.end:
            self.batch = None             # its memory is the next one's
            self.batch = next(self.batches, None)
            if self.batch is None:
                raise OSError(f"it has {self.end} rows and not {self.records.rows[self.group]}")
            self.start, self.end = self.end, self.end + self.batch.num_rows
        return self.batch.slice(number - self.start, 1)


# Of each thread the stream that it reads from.
_streams = threading.local()


def _stream_key(records: ParquetRecords, group: int) -> tuple:
    return records.path, group, records.state, os.getpid()


def _streamed(records: ParquetRecords, group: int) -> _Stream:
    stream: _Stream | None = getattr(_streams, "last", None)
    if stream is None or stream.key != _stream_key(records, group):
        _streams.last = stream = None     # its memory is the next one's
        _streams.last = stream = _Stream(records, group)
    return stream


# Columns that hold lists, which some tables have as JSON texts.
_LISTS = ("conversations", "messages", "history", "reference_logps")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
