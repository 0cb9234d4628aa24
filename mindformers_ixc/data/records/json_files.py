"""JSON lists and JSON lines: records are spans of bytes, found without keeping anything of what they hold.

Files are looked at through windows of some megabytes, as if they were Latin-1 text: of UTF-8, that leaves every
character that means something to JSON where it is, one character to a byte, so places of the text are places of the
file. Whether a record is UTF-8, and what it says, is found when it is read.
"""
from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from mindformers_ixc.data.records.base import Place, Progress, Record, Records, check_source
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_encoding, decode_text, is_json_lines, parse_json

# Bytes that are looked at together, and of a file's beginning that say whether it is a list or lines.
WINDOW, HEAD = 1 << 23, 1 << 20

_SPACE = re.compile(r"[ \t\r\n]*")
_NEWLINE = ord("\n")

# Bytes of a line above which it is taken to hold something, unseen; what does not is refused when it is read.
_BLANK = 1000


class JsonRecords(Records):
    """Records of a JSON list, or of JSON lines; which of them, the beginning says (`files.is_json_lines`).

    Args:
        path: the file; `pkg:` paths work.
        name: what messages call it; by default the path.

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is of another encoding.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        super().__init__(path)
        check_source(path)
        self.name = name or self.name
        with open(self.path, "rb") as file:
            head = file.read(HEAD)
        self._begin = check_encoding(head, self.name)
        self.lines = is_json_lines(head[self._begin:].decode("utf-8", errors="replace"), self.name)

    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """See `Records.scan`."""
        if not os.path.getsize(self.path) - self._begin:
            raise DataError(f"{self.name} is empty, found no {self.item}s; it must hold a JSON list or JSON lines, "
                            f"with at least one {self.item}.")
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield from self._lines(content, progress) if self.lines else self._list(content, progress)

    def read(self, index: int, place: Place) -> Record:
        """See `Records.read`."""
        name = f"{self.name}, line {place.line}" if place.line else self.where(index)
        content = self.read_bytes(place)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:          # where in the file is only counted when it matters
            text = decode_text(content, self.name, before=(place.start, self._lines_before(place)))
        return Record(parse_json(text, name))

    def _lines_before(self, place: Place) -> int:
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return line_of(content, place.start) - 1

    def _lines(self, content: mmap.mmap, progress: Progress) -> Iterator[np.ndarray]:
        done = 0
        for block in _line_blocks(content, self._begin):
            end = int(block[-1, :2].sum())
            progress(end - done)
            done = end
            yield block
        progress(len(content) - done)

    def _list(self, content: mmap.mmap, progress: Progress) -> Iterator[np.ndarray]:
        """Places of the entries of a list."""
        first = re.compile(rb"[ \t\r\n]*").match(content, self._begin).end()      # type: ignore[union-attr]
        if content[first:first + 1] != b"[":
            found = "something else"
            if len(content) <= HEAD:
                found = type(parse_json(content[self._begin:], self.name)).__name__
            raise DataError(f"{self.name} must hold a JSON list with at least one {self.item}, found {found}; of "
                            "JSON lines each is an object.")
        end = yield from _told(list_blocks(self.name, content, first + 1), progress)
        _check_rest(self.name, content, end)
        progress(len(content) - end)


def _told(blocks: Generator[np.ndarray, None, int], progress: Progress) -> Generator[np.ndarray, None, int]:
    """The blocks, each told when it has come."""
    done = 0
    while True:
        try:
            block = next(blocks)
        except StopIteration as end:
            progress(end.value - done)
            return end.value
        last = int(block[-1, :2].sum())
        progress(last - done)
        done = last
        yield block


def list_blocks(name: str, content: mmap.mmap, at: int) -> Generator[np.ndarray, None, int]:
    """Places of the entries of a list, window after window.

    Args:
        name: of the file, for messages.
        content: of it.
        at: the byte behind the list's opening bracket.

    Yields:
        int64 `(n, 3)`, see `Place`.

    Returns:
        The byte behind the closing bracket.

    Raises:
        DataError: where the list is damaged, or cut short.
    """
    size, entries = WINDOW, 0
    while True:
        text = content[at:at + size].decode("latin-1")
        final = at + len(text) == len(content)
        spans, done, problem = _spans(text, entries == 0)
        if spans:
            yield np.array([(at + start, length, 0) for start, length in spans], np.int64)
        entries += len(spans)
        if problem is None:
            return at + done
        if final or not problem.more:
            raise _error(name, content, at, problem, entries)
        size = WINDOW if done else size * 4
        release(content, at, at + done)
        at += done


def release(content: mmap.mmap, start: int, end: int) -> None:
    """Gives back the memory of a part of a file that was looked at, up to the page that its end is in.

    The system keeps it in its cache as before; but it no longer counts as this process's.
    """
    first, last = (place // mmap.PAGESIZE * mmap.PAGESIZE for place in (start, end))
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        content.madvise(mmap.MADV_DONTNEED, first, last - first)


class _Problem(NamedTuple):
    """Why a window's text ends before the list does.

    Attributes:
        message: what JSON's parser says.
        start: where the entry begins that it says it of.
        place: of the fault.
        more: whether more text might mend it.
        cut_short: whether the text ends where more of it must come.
        between: whether it stands between entries.
    """

    message: str
    start: int
    place: int
    more: bool
    cut_short: bool
    between: bool


def _spans(text: str, first: bool) -> tuple[list[tuple[int, int]], int, _Problem | None]:
    """Entries of a list in a text that begins where an entry may.

    Args:
        text: a part of the list.
        first: whether none was before it, so that the list may end at once.

    Returns:
        (start, length) of the entries, the place behind the last sign that is understood, and why the text ends before
        the list does, if so.
    """
    spans, done = list[tuple[int, int]](), 0
    while True:
        start = _SPACE.match(text, done).end()                               # type: ignore[union-attr]
        if first and text[start:start + 1] == "]":
            return spans, start + 1, None
        try:
            _, end = _SCAN(text, start)
        except RecursionError:
            return spans, done, _Problem("lists or objects are nested too deeply", start, start, False, False, False)
        except StopIteration as error:
            return spans, done, _Problem("a value is missing", start, error.value, _near_end(text, error.value),
                                         error.value >= len(text), False)
        except ValueError as error:       # also of numbers of thousands of digits, which Python does not take
            place, message = getattr(error, "pos", start), getattr(error, "msg", str(error))
            open_text = message.startswith("Unterminated")
            return spans, done, _Problem(message, start, place, open_text or _near_end(text, place),
                                         open_text or place >= len(text), False)
        sign = _SPACE.match(text, end).end()                                 # type: ignore[union-attr]
        if text[sign:sign + 1] not in (",", "]"):
            return spans, done, _Problem("a comma or the closing bracket is missing", start, sign, sign >= len(text),
                                         sign >= len(text), True)
        spans.append((start, end - start))
        done, first = sign + 1, False
        if text[sign] == "]":
            return spans, done, None


# JSON's own scanner: the value that begins at a place, and where it ends.
_SCAN = json.JSONDecoder().scan_once       # type: ignore[attr-defined]


def _near_end(text: str, place: int) -> bool:
    """Whether a fault may be that the text ends: escapes, numbers and words such as `false` are shorter than this."""
    return place >= len(text) - 16


def _error(name: str, content: mmap.mmap, at: int, problem: _Problem, entries: int) -> DataError:
    line = line_of(content, at + problem.place)
    if problem.cut_short and problem.between:
        return DataError(f"{name} is not valid JSON: it ends in line {line}, after its sample {entries}, without the "
                         "list's closing bracket; it is cut short, or still being written.")
    if problem.cut_short:
        last = line_of(content, len(content))
        return DataError(f"{name} is not valid JSON: it ends in line {last}, within its sample {entries}, which "
                         f"begins in line {line_of(content, at + problem.start)}; it is cut short, or "
                         "still being written.")
    return DataError(f"{name}, line {line}: is not valid JSON ({problem.message}), in sample {entries} (counted from "
                     "0).")


def _check_rest(name: str, content: mmap.mmap, at: int) -> None:
    """Refuses what follows the list's closing bracket."""
    for start in range(at, len(content), WINDOW):
        rest = content[start:start + WINDOW]
        if rest.strip(b" \t\r\n"):
            place = start + len(rest) - len(rest.lstrip(b" \t\r\n"))
            raise DataError(f"{name}, line {line_of(content, place)}: something follows the closing bracket of the "
                            "list; a file is one list.")


def line_of(content: mmap.mmap, place: int) -> int:
    """Number of the line, counted from 1, that a byte is in."""
    return 1 + sum(content[start:min(start + WINDOW, place)].count(b"\n") for start in range(0, place, WINDOW))


def _line_blocks(content: mmap.mmap, at: int) -> Iterator[np.ndarray]:
    """Places of the lines that hold something."""
    size, before = WINDOW, 0
    while at < len(content):
        window = content[at:at + size]
        ends = np.flatnonzero(np.frombuffer(window, np.uint8) == _NEWLINE)
        if at + len(window) == len(content) and (not len(ends) or ends[-1] < len(window) - 1):
            ends = np.append(ends, len(window))
        if not len(ends):
            size *= 4
            continue
        starts = np.concatenate([[0], ends[:-1] + 1])
        held = [place for place, (start, end) in enumerate(zip(starts.tolist(), ends.tolist()))
                if end - start > _BLANK or window[start:end].strip()]
        if held:
            yield np.stack([starts[held] + at, (ends - starts)[held], np.array(held) + before + 1], 1)
        release(content, at, at + int(ends[-1]))
        at, size, before = at + int(ends[-1]) + 1, WINDOW, before + len(ends)
