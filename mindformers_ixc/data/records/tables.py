"""Tables of questions, as spreadsheets export them, to the samples of conversation files.

The first line names the columns, in any order: `image`, `question`, `answer`. Every further line is one question about
one picture. Cells are separated by commas, semicolons or tabs, whichever the first line has.
"""
from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from mindformers_ixc.data.paths import cut
from mindformers_ixc.data.records.base import Place, Progress, Record, Records, check_source
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_encoding, decode_text

COLUMNS = ("image", "question", "answer")

# Endings of files that are tables; those of spreadsheets' own files, which are not read.
TABLE_ENDINGS, SPREADSHEET_ENDINGS = (".csv", ".tsv"), (".xlsx", ".xls", ".ods", ".numbers")

# The line by which spreadsheets tell each other the separator.
_PREAMBLE = re.compile(r'"?sep=[,;\t]?"?', re.IGNORECASE)

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}

# Bytes that show the encoding; lines whose places are given together.
HEAD, BLOCK = 4, 4096


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file is a table, by the ending of its name.

    Raises:
        DataError: for a spreadsheet's own file, with what to do.
    """
    name = os.fspath(path).lower()
    if name.endswith(SPREADSHEET_ENDINGS):
        raise DataError(f"{path} is a spreadsheet; save it as CSV (UTF-8), with the columns {', '.join(COLUMNS)}.")
    return name.endswith(TABLE_ENDINGS)


class TableRecords(Records):
    """The questions of a table, one for each line below the first.

    A record's row is `{"id": "line N", "image", "conversations"}`. Lines that are empty are passed over.

    Raises:
        DataError: for other columns or another encoding.
        FileNotFoundError: when the file is missing.
    """

    comparable, form = True, "a table of questions"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        with open(check_source(path), "rb") as file:
            self._begin, self._skipped = check_encoding(file.read(HEAD), self.name), 0
            file.seek(self._begin)
            line = decode_text(file.readline(), self.name).rstrip("\r\n")
            if _PREAMBLE.fullmatch(line.strip()):
                self._begin, self._skipped = file.tell(), 1
                line = decode_text(file.readline(), self.name).rstrip("\r\n")
            self.separator = _separator(line, self.name)
        first = next(self._lines(), None)
        if first is None:
            raise DataError(f"{self.name} is empty; its first line must name the columns {', '.join(COLUMNS)}.")
        self.columns = _columns(first[1], self.name)

    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """See `Records.scan`; a line with other cells than the first is one that cannot be read."""
        places, done, first = list[Place](), 0, True
        for place, _ in self._lines():
            if first:
                first = False
                continue
            places.append(place)
            if len(places) == BLOCK:
                progress(sum(place[:2]) - done)
                done = sum(place[:2])
                yield np.array(places, np.int64)
                places = []
        if places:
            yield np.array(places, np.int64)
        elif not done:
            raise DataError(f"{self.name} has no line below its first; write one for each question.")
        progress(os.path.getsize(self.path) - done)

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        text = decode_text(self.read_bytes(place), self.where(index))
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.separator, strict=True))
        except (csv.Error, StopIteration) as error:
            raise DataError(f"{self.name}, line {place.line}: is no line of the table any more.") from error
        if problem := _problem(cells, self.columns, self.separator):
            raise DataError(f"{self.name}, line {place.line}: {problem}")
        image, question, answer = (cells[self.columns.index(column)].strip() for column in COLUMNS)
        return Record({"id": f"line {place.line}", "image": image, "conversations": [
            {"from": "human", "value": question}, {"from": "bot", "value": answer}]})

    def _lines(self) -> Iterator[tuple[Place, list[str]]]:
        """Lines that hold something, each with its place, which begins at its first line in the file."""
        with open(self.path, "rb") as file:
            file.seek(self._begin)
            source = _CountedLines(file, self.name, self._skipped)
            rows = csv.reader(source, delimiter=self.separator, strict=True)
            before, line = source.place, self._skipped
            try:
                for cells in rows:
                    if any(cell.strip() for cell in cells):
                        yield Place(before, source.place - before, line + 1), cells
                    before, line = source.place, self._skipped + rows.line_num
            except csv.Error as error:
                if "new-line" in str(error):
                    raise DataError(f"{self.name}, line {line + 1}: has a carriage return without a line feed, as old "
                                    "Macintosh files end their lines; save it as CSV (UTF-8).") from error
                raise DataError(f"{self.name}, line {line + 1}: a text in double quotes is wrong ({error}); a quote "
                                "inside one is written twice, and one that is not closed takes in all lines that "
                                "follow.") from error


class _CountedLines:
    """Lines of a file as text, and the place behind the last one that was taken."""

    def __init__(self, file: BinaryIO, name: str, skipped: int):
        self.file, self.name, self.place, self.line = file, name, file.tell(), skipped

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        content = self.file.readline()
        if not content:
            raise StopIteration
        self.place += len(content)
        self.line += 1
        if content.isascii():
            return content.decode()
        return decode_text(content, self.name, before=(self.place - len(content), self.line - 1))


def _separator(first: str, path: object) -> str:
    """What stands between the names of the columns."""
    found = [sign for sign in SEPARATORS if sign in first]
    if len(found) != 1:
        signs = ", ".join(f"a {name}" for name in SEPARATORS.values())
        raise DataError(f"{path}: its first line is {cut(first.strip())!r}; it must name the columns "
                        f"{', '.join(COLUMNS)}, with one of these between them: {signs}.")
    return found[0]


def _columns(cells: list[str], path: object) -> list[str]:
    """Names of the columns; empty ones at the end of the line, which spreadsheets leave, are dropped."""
    names = [cell.strip().lower() for cell in cells]
    while names and not names[-1]:
        names.pop()
    missing = [column for column in COLUMNS if names.count(column) != 1]
    surplus = [name for name in names if name not in COLUMNS]
    if missing or surplus:
        odd = f"'{cut(surplus[0])}' is none of them" if surplus else \
            f"'{missing[0]}' is there {names.count(missing[0])} times"
        raise DataError(f"{path}: the columns are {', '.join(COLUMNS)}, each once and no other; {odd}.")
    return names


def _problem(cells: list[str], names: list[str], separator: str) -> str | None:
    """What is wrong with a line, if anything."""
    if len(cells) < len(names):
        return f"has {len(cells)} cells of {len(names)}; the first line names {', '.join(names)}."
    if any(cell.strip() for cell in cells[len(names):]):
        return (f"has {len(cells)} cells, the first line {len(names)}; put a text that has a {SEPARATORS[separator]} "
                "in double quotes.")
    empty = [name for name, cell in zip(names, cells) if not cell.strip()]
    return f"{', '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty." if empty else None
