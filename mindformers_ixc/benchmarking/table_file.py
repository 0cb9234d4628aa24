"""VLMEvalKit's tables: tab-separated text, a question a line, pictures in base64.

Cells are read as pandas reads them, since prompts and scores depend on it: what stands for nothing is missing, and a
column that holds nothing but numbers holds numbers.
"""
from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Union

from mindformers_ixc.benchmarking.catalogue import COLUMNS, Benchmark
from mindformers_ixc.benchmarking.matching import listed
from mindformers_ixc.data.paths import check_root, cut, find_file, search_folders
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.files import check_encoding, decode_text
from mindformers_ixc.processing.pictures import image_size
from mindformers_ixc.processing.stored import StoredFile

# What a cell holds; `None` where it is missing.
Cell = Union[str, int, float, bool, None]

# Letters of a cell of `image` up to which it names another row instead of holding a picture.
LONGEST_REFERENCE = 64

# Hexadecimal digits by which the pictures of a row are told from others in its place.
MARK = 12

# Columns that are read again when they are needed, and not kept.
HEAVY = ("image",)

# What pandas takes for a missing cell.
_MISSING = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
                      "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))

_WHOLE = re.compile(r"\s*[+-]?\d{1,18}\s*")
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_SPACE = re.compile(r"\s+")

# Rows whose pictures are named in one message.
_NAMED = 3


@dataclass
class Row:
    """A line of the table.

    Attributes:
        cells: by column, without `HEAVY`.
        place: first byte of the line with this row's pictures, and how many it has.
        count: pictures.
        mark: the beginning of the SHA-256 of the cell with its pictures; empty where they are files.
    """

    cells: dict[str, Cell]
    place: tuple[int, int]
    count: int
    mark: str = ""

    @property
    def index(self) -> str:
        """What the table calls it."""
        return str(self.cells["index"])


class BenchmarkTable:
    """The rows of a data set, checked; pictures are read when they are asked for.

    Rows without a picture are left out where the table has a column of pictures, as VLMEvalKit does.

    Args:
        path: of the table.
        benchmark: the data set.
        image_folder: where the paths of a table without pictures start; by default beside it, then here.
        image_root: refuse pictures outside this folder.

    Attributes:
        columns: in the order of the file.
        rows: that are asked about.
        left_out: rows without a picture.

    Raises:
        DataError: for a file that is no such table, by column and row.
        FileNotFoundError: when it is missing.
    """

    def __init__(self, path: str | os.PathLike, benchmark: Benchmark, image_folder: str | None = None,
                 image_root: str | None = None):
        self.path, self.benchmark = Path(path), benchmark
        self._folders, self._root = search_folders(self.path, image_folder), check_root(image_root)
        with _any_length(), open(self.path, "rb") as file:
            lines = _lines(file, str(path))
            self.columns = _header(next(lines, None), str(path))
            _check_columns(self.columns, benchmark, str(path))
            self._image = self.columns.index("image") if "image" in self.columns else None
            rows, images, faults = self._read(lines)
        if not rows:
            raise DataError(f"{path} has no row below its first; each is a question.")
        self._type_columns(rows)
        self._by_index = {row.index: number for number, row in enumerate(rows)}
        if len(self._by_index) < len(rows):
            twice = next(row.index for number, row in enumerate(rows) if self._by_index[row.index] != number)
            raise DataError(f"{path}: two rows have the index {cut(twice)}; every row needs its own.")
        if self._image is not None:
            self._resolve(rows, images, faults)
            self.rows = [row for row in rows if row.count]
        else:
            self.rows = rows
            self._check_paths()
        self.left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise DataError(f"{path}: no row has a picture.")

    def _read(self, lines: Iterator[tuple[tuple[int, int], list[str]]]) -> \
            tuple[list[Row], list[str], dict[int, str]]:
        """Rows, what each has for a picture (cut to what a reference can be), and what is wrong with pictures."""
        rows: list[Row] = []
        images: list[str] = []
        faults: dict[int, str] = {}
        for place, cells in lines:
            number = len(rows)
            if len(cells) != len(self.columns):
                raise DataError(f"{self.path}, row {number + 1}: has {len(cells)} cells of {len(self.columns)}; a text "
                                "with a tab or a line break stands in double quotes.")
            image = "" if self._image is None else cells[self._image].strip()
            several = [] if image in _MISSING else listed(image)
            if len(image) > LONGEST_REFERENCE and (fault := _fault(several)):
                faults[number] = fault
            images.append(image[:LONGEST_REFERENCE + 1] if several else "")
            rows.append(Row({name: cell for name, cell in zip(self.columns, cells) if name not in HEAVY}, place,
                            len(several), hashlib.sha256(image.encode()).hexdigest()[:MARK] if several else ""))
        return rows, images, faults

    def _type_columns(self, rows: Sequence[Row]) -> None:
        """Missing cells become `None`, columns of numbers numbers."""
        for name in self.columns:
            if name not in HEAVY:
                for row, value in zip(rows, typed([str(row.cells[name]) for row in rows])):
                    row.cells[name] = value
        for number, row in enumerate(rows, 1):
            for name in COLUMNS:
                if row.cells[name] is None:
                    raise DataError(f"{self.path}, row {number}: '{name}' is empty.")

    def _resolve(self, rows: Sequence[Row], images: Sequence[str], faults: dict[int, str]) -> None:
        """Follows the cells that name another row's picture."""
        for number, image in enumerate(images):
            if not 0 < len(image) <= LONGEST_REFERENCE:
                continue
            other = self._by_index.get(image)
            if other is None or len(images[other]) <= LONGEST_REFERENCE:
                faults[number] = (f"'image' is {cut(image)!r}, which is neither a picture in base64 nor the index of a "
                                  "row with one")
                continue
            of = rows[other]
            rows[number].place, rows[number].count, rows[number].mark = of.place, of.count, of.mark
        if faults:
            named = "; ".join(f"row {rows[number].index}: {fault}" for number, fault in
                              sorted(faults.items())[:_NAMED])
            more = f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            raise DataError(f"{self.path}: {named}{more}.")

    def _check_paths(self) -> None:
        """Looks for the files of a table without pictures."""
        for row in self.rows:
            if row.cells["image_path"] is None:
                raise DataError(f"{self.path}, row {row.index}: 'image_path' is empty.")
            paths = self._paths(row)
            row.count = len(paths)
            for path in paths:
                try:
                    image_size(path)
                except ImageError as error:
                    raise DataError(f"{self.path}, row {row.index}: {error}") from error

    def _paths(self, row: Row) -> list[Path]:
        names = listed(str(row.cells["image_path"]))
        try:
            return [find_file(name, self._folders, self._root) for name in names]
        except (DataError, FileNotFoundError) as error:
            raise DataError(f"{self.path}, row {row.index}: {error}") from error

    def pictures(self, row: Row) -> list[StoredFile | Path]:
        """The pictures of a row, whose bytes are read when they are opened."""
        if self._image is None:
            return list(self._paths(row))
        name = f"{self.path.name}, row {row.index}: picture"
        return [StoredFile(f"{name} {number + 1}", partial(self._bytes, row, number), row.mark)
                for number in range(row.count)]

    def _bytes(self, row: Row, number: int) -> bytes:
        return decoded(listed(self._cell(row))[number])

    def _cell(self, row: Row) -> str:
        """What the column of pictures has for a row."""
        begin, length = row.place
        with _any_length(), open(self.path, "rb") as file:
            file.seek(begin)
            cells = next(csv.reader(io.StringIO(decode_text(file.read(length), str(self.path)), newline=""),
                                    delimiter="\t"), [])
        if len(cells) != len(self.columns):
            raise DataError(f"{self.path} has changed since it was opened.")
        assert self._image is not None
        return cells[self._image].strip()


def typed(cells: Sequence[str]) -> list[Cell]:
    """A column as pandas types it: whole numbers, numbers where some are missing or none is whole, truth values, text.

    Args:
        cells: its texts.
    """
    present = [cell for cell in cells if cell not in _MISSING]
    convert: Callable[[str], Cell] = str
    if present and all(_WHOLE.fullmatch(cell) for cell in present):
        # missing cells are numbers too, for pandas, which only fractions can be
        convert = int if len(present) == len(cells) else float
    elif present and all(_NUMBER.fullmatch(cell) for cell in present):
        convert = float
    elif len(present) == len(cells) and all(cell in ("True", "False", "TRUE", "FALSE", "true", "false")
                                            for cell in present) and present:
        convert = _truth
    return [None if cell in _MISSING else convert(cell) for cell in cells]


def _truth(cell: str) -> bool:
    return cell.lower() == "true"


def decoded(text: str) -> bytes:
    """The bytes of a picture in base64.

    Raises:
        ImageError: when it is none.
    """
    content = _SPACE.sub("", text)
    if content.startswith("data:"):
        content = content.partition(",")[2]
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the picture is no base64 ({error}).") from error


def _fault(pictures: Sequence[str]) -> str:
    """What is wrong with the pictures of a cell, if anything; of a picture its header is looked at."""
    try:
        for one in pictures:
            image_size(StoredFile("the picture", partial(bytes, decoded(one))))
    except ImageError as error:
        return str(error).rstrip(".")
    return ""


def _header(line: tuple[tuple[int, int], list[str]] | None, path: str) -> list[str]:
    if line is None:
        raise DataError(f"{path} is empty; its first line names the columns.")
    names = line[1]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has two columns of the name '{cut(twice[0])}'.")
    return names


def _check_columns(names: Sequence[str], benchmark: Benchmark, path: str) -> None:
    missing = [name for name in (*COLUMNS, *benchmark.columns) if name not in names]
    if "image" not in names and "image_path" not in names:
        missing.append("image")
    if missing:
        found = ", ".join(cut(name) for name in names[:20])
        needed = ", ".join((*COLUMNS, "image", *benchmark.columns))
        raise DataError(f"{path} has no column {' and no column '.join(map(repr, missing))}; {benchmark.name} needs "
                        f"{needed}, separated by tabs, and the first line names {found}.")


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """Lines that are not empty, each with its place."""
    begin = check_encoding(file.read(4), path)
    file.seek(begin)
    source = _Counted(file, path)
    before = begin
    try:
        for cells in csv.reader(source, delimiter="\t"):
            if cells:
                yield (before, source.place - before), cells
            before = source.place
    except csv.Error as error:
        raise DataError(f"{path}: no table of tab-separated text ({error}).") from error


class _Counted:
    """Lines of a file as text, and the place behind the last one that was taken."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path, self.place = file, path, file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        content = self.file.readline()
        if not content:
            raise StopIteration
        self.place += len(content)
        return content.decode() if content.isascii() else decode_text(content, self.path)


@contextmanager
def _any_length() -> Iterator[None]:
    """For a block that reads cells of any length: Python's reader has one limit for all tables."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
