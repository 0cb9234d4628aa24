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

from mindformers_ixc.data.paths import cut
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_text
from mindformers_ixc.resources import resolve_path

COLUMNS = ("image", "question", "answer")

# Endings of files that are tables; those of spreadsheets' own files, which are not read.
TABLE_ENDINGS, SPREADSHEET_ENDINGS = (".csv", ".tsv"), (".xlsx", ".xls", ".ods", ".numbers")

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}

_PREAMBLE = re.compile(r'"?sep=[,;\t]?"?', re.IGNORECASE)

# Lines with errors that a message lists; the rest are counted.
LISTED_LINES = 10


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file is a table, by the ending of its name.

    Raises:
        DataError: for a spreadsheet's own file, with what to do.
    """
    name = os.fspath(path).lower()
    if name.endswith(SPREADSHEET_ENDINGS):
        raise DataError(f"{path} is a spreadsheet; save it as CSV (UTF-8), with the columns {', '.join(COLUMNS)}.")
    return name.endswith(TABLE_ENDINGS)


def read_table(path: str | os.PathLike) -> list[dict]:
    """The samples of a table: `{"id": "line N", "image", "conversations"}`, one for each line below the first.

    Args:
        path: the file; `pkg:` paths work. Lines that are empty are passed over.

    Raises:
        DataError: for other columns, for lines with empty, missing or surplus cells (all of them by number), for a file
            without questions or of another encoding.
        FileNotFoundError: when the file is missing.
    """
    if not resolve_path(path).is_file():
        raise FileNotFoundError(f"The data file {path} does not exist.")
    text, skipped = _without_preamble(read_text(path))
    separator = _separator(text.partition("\n")[0], path)
    lines = ((number + skipped, cells) for number, cells in _lines(text, separator, path))
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} is empty; its first line must name the columns {', '.join(COLUMNS)}.")
    names = _columns(first[1], path)
    samples, errors = [], []
    for number, cells in lines:
        problem = _problem(cells, names, separator)
        if problem:
            errors.append(f"{path}, line {number}: {problem}")
            continue
        image, question, answer = (cells[names.index(column)].strip() for column in COLUMNS)
        samples.append({"id": f"line {number}", "image": image, "conversations": [
            {"from": "human", "value": question}, {"from": "bot", "value": answer}]})
    if errors:
        more = f"\n... and {len(errors) - LISTED_LINES} more lines" if len(errors) > LISTED_LINES else ""
        raise DataError("\n".join(errors[:LISTED_LINES]) + more)
    if not samples:
        raise DataError(f"{path} has no line below its first; write one for each question.")
    return samples


def _without_preamble(text: str) -> tuple[str, int]:
    """A table without the line `sep=;` by which spreadsheets tell each other the separator; how many lines that was."""
    first, _, rest = text.partition("\n")
    return (rest, 1) if _PREAMBLE.fullmatch(first.strip()) else (text, 0)


def _separator(first: str, path: object) -> str:
    """What stands between the names of the columns."""
    found = [sign for sign in SEPARATORS if sign in first]
    if len(found) != 1:
        signs = ", ".join(f"a {name}" for name in SEPARATORS.values())
        raise DataError(f"{path}: its first line is {cut(first.strip())!r}; it must name the columns "
                        f"{', '.join(COLUMNS)}, with one of these between them: {signs}.")
    return found[0]


def _lines(text: str, separator: str, path: object) -> Iterator[tuple[int, list[str]]]:
    """Lines that hold something, each with the number of its first line in the file."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    before = 0
    try:
        for cells in rows:
            if any(cell.strip() for cell in cells):
                yield before + 1, cells
            before = rows.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {before + 1}: a text in double quotes is wrong ({error}); a quote inside one is "
                        "written twice.") from error


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
