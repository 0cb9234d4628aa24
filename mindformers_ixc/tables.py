"""Tables, sentences and bars as lines of text that suit where they go: a terminal of some columns, or a file."""
from __future__ import annotations

import contextlib
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

# Narrower than that nothing is made to fit.
NARROWEST = 20

# Signs that colour a text.
PAINT = re.compile(r"\033\[[0-9;]*m")

# Blanks between two columns of a table that is made narrower: so many, or else so many.
GAPS = (2, 1)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: above it; also before the value where a row is written as words.
        width: where there is room, with the blanks before a number.
        left: it holds words and stands at the left; numbers stand at the right.
        gap: blanks before it, where there is room.
    """

    name: str
    width: int = 0
    left: bool = False
    gap: int = 0

    def cell(self, text: str, width: int) -> str:
        """A text in so many columns."""
        room = " " * max(0, width - width_of(text))
        return text + room if self.left else room + text


def columns_of(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream goes to; `None` if it goes elsewhere, where lines are as long as they are.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return max(NARROWEST, os.get_terminal_size(stream.fileno()).columns) if stream.isatty() else None
    return None


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], room: int | None = None,
          heading: int = 1) -> Iterator[str]:
    """A table as lines.

    Args:
        columns: of the table.
        rows: its cells.
        room: columns of the terminal, `None` for any number. What does not fit is moved together, names of columns in
            several lines; what does not fit then either has no columns: each row is a line that names it, and its
            values below.
        heading: leading cells that name a row.
    """
    rows = [list(row) for row in rows]
    for gaps, widths, heads in _ways(columns, rows):
        made = ["".join(gap + column.cell(text, width) for gap, column, text, width in
                        zip(gaps, columns, line, widths)).rstrip() for line in [*heads, *rows]]
        if room is None or max(map(width_of, made)) <= room:
            yield from made
            return
    for row in rows:
        yield from _as_words(columns, row, room, heading)


def _ways(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[tuple]:
    """Gaps, widths and lines of names of a table, the widest first."""
    cells = [max((width_of(row[number]) for row in rows), default=0) for number in range(len(columns))]
    names = [column.name for column in columns]
    whole = [max(width, width_of(name)) for width, name in zip(cells, names)]
    wide = [max(column.width, own) for column, own in zip(columns, whole)]
    yield [" " * column.gap for column in columns], wide, [names]
    narrow = [max([width, *map(width_of, name.split())]) for width, name in zip(cells, names)]
    parts = [textwrap.wrap(name, width) if name else [""] for name, width in zip(names, narrow)]
    height = max(map(len, parts))
    stacked = list(zip(*([""] * (height - len(part)) + part for part in parts)))      # they end in one line
    for gap in GAPS:
        gaps = ["", *[" " * gap] * (len(columns) - 1)]
        yield gaps, whole, [names]
        yield gaps, narrow, stacked


def _as_words(columns: Sequence[Column], row: Sequence[str], room: int | None, heading: int) -> Iterator[str]:
    """A row as what names it, and its values below."""
    named = [f"{column.name.strip()} {text}".strip() for column, text in zip(columns, row)]
    first = [text if column.left else name for column, text, name in zip(columns, row, named)]
    yield from listed(first[:heading], room, "  ")
    yield from listed([name for name, text in zip(named[heading:], row[heading:]) if text], room, "  ", "  ")


def listed(items: Iterable[str], room: int | None, others: str = "", first: str = "") -> list[str]:
    """Items with commas between them, in lines that end between two of them if they can; see `wrapped`."""
    whole = ", ".join(item.replace(" ", "\0") for item in items)
    return [line.replace("\0", " ") for line in wrapped(whole, room, others, first)]


def wrapped(text: str, room: int | None, others: str = "", first: str = "") -> list[str]:
    """A line broken between words, as far as it must be.

    Args:
        text: without line ends.
        room: columns at most, `None` for any number.
        others: stands before every line but the first.
        first: stands before the first.
    """
    return [first + text] if room is None else broken(first + text, room, others)


def width_of(text: str) -> int:
    """Columns that a text takes: colours none, wide signs, as of Chinese, two."""
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF")
               for sign in PAINT.sub("", text))


def broken(text: str, columns: int, others: str = "") -> list[str]:
    """A line as lines that fit so many columns, broken between words; a word that is longer stays whole.

    Args:
        text: without line ends.
        columns: at most.
        others: stands before every line but the first.
    """
    columns = max(columns, NARROWEST)
    if width_of(text) <= columns:
        return [text]
    lines, start = [""], re.match(" *", text)
    assert start is not None
    for word in re.findall(" *[^ ]+", text[start.end():]):
        if lines[-1].strip() and width_of(lines[-1] + word) > columns - (len(lines) == 1) * start.end():
            lines.append(others + word.lstrip(" "))
        else:
            lines[-1] += word
    return [start[0] + lines[0], *lines[1:]]


def clip(text: str, columns: int) -> str:
    """As much of a one-line text as fits so many columns."""
    text = text.replace("\n", " ")
    if width_of(text) <= columns:
        return text
    kept, left = [], columns
    for sign in text:
        left -= width_of(sign)
        if left < 0:
            break
        kept.append(sign)
    return "".join(kept)


def bar(share: float, columns: int, unicode: bool) -> str:
    """A bar of some columns, filled to a share from 0 to 1."""
    full, empty = ("█", "░") if unicode else ("#", "-")
    filled = round(min(1.0, max(0.0, share)) * columns)
    return full * filled + empty * (columns - filled)
