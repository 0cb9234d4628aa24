"""Published JSON files of any size: one object of lists, or one of many members, gone through without being held."""
from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Generator, Iterator
from typing import Any, NoReturn

import numpy as np

from mindformers_ixc.data.records.base import check_source
from mindformers_ixc.data.records.json_files import line_of, list_blocks
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_encoding, parse_json

# Bytes that are looked at for a key or a value; more where they do not do.
WINDOW = 1 << 14

# Bytes of members behind which their memory is given back.
RELEASED = 1 << 23

_SPACE = re.compile(rb"[ \t\r\n]*")
_SCAN = json.JSONDecoder().scan_once       # type: ignore[attr-defined]


class Published:
    """The object of a JSON file, as converters read it: `file["annotations"]` goes through that list, entry by entry.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: when it is missing.
        DataError: when it is of another encoding, or holds no object.
    """

    def __init__(self, path: str | os.PathLike):
        self.name, self.path = str(path), check_source(path)
        with open(self.path, "rb") as file:
            self._begin = check_encoding(file.read(4), self.name)
            if not os.path.getsize(self.path):
                raise DataError(f"{self.name} is empty; it must hold a JSON object.")
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._first = self._skip(self._begin)
        if self._content[self._first:self._first + 1] != b"{":
            raise TypeError("it holds no object")

    def __getitem__(self, key: str) -> Any:
        """The value of a key; of a list an iterator over its entries.

        Raises:
            KeyError: when there is none.
            DataError: where the file is damaged, or cut short.
        """
        for name, start in self._members():
            if name == key:
                if self._content[start:start + 1] == b"[":
                    return self._entries(start)
                return self._value(start, name)[0]
        raise KeyError(key)

    def check(self) -> None:
        """Goes through the whole file once; a key is found, and its list gone through, whatever comes after it.

        Raises:
            DataError: where the file is damaged, or cut short.
        """
        for _ in self._members():
            pass

    def items(self) -> Iterator[tuple[str, Any]]:
        """All members, as of a mapping.

        Raises:
            DataError: where the file is damaged, or cut short.
        """
        for name, start in self._members():
            yield name, self._value(start, name)[0]

    def _entries(self, start: int) -> Iterator[Any]:
        for block in self._blocks(start):
            for place, length, _ in block.tolist():
                yield parse_json(self._content[place:place + length], f"{self.name}, at byte {place}")

    def _blocks(self, start: int) -> Generator[np.ndarray, None, int]:
        """Places of the entries of a list, as `list_blocks` gives them; what was looked at is given back."""
        blocks = list_blocks(self.name, self._content, start + 1)
        while True:
            try:
                block = next(blocks)
            except StopIteration as end:
                return end.value
            yield block
            looked_at = int(block[-1, :2].sum())
            release(self._content, start, looked_at)
            start = looked_at

    def _members(self) -> Iterator[tuple[str, int]]:
        """Key of each member, and where its value begins."""
        at = before = self._skip(self._first + 1)
        if self._content[at:at + 1] == b"}":
            return
        while True:
            key, end = self._value(at, "a key")
            end = self._skip(end)
            if not isinstance(key, str) or self._content[end:end + 1] != b":":
                self._refuse(end, "a key and a colon are missing")
            start = self._skip(end + 1)
            yield key, start
            end = self._skip(self._end_of(start, key))
            sign = self._content[end:end + 1]
            if sign == b"}":
                if self._skip(end + 1) < len(self._content):
                    self._refuse(self._skip(end + 1), "something follows the closing brace")
                return
            if sign != b",":
                self._refuse(end, "a comma or the closing brace is missing")
            at = self._skip(end + 1)
            if at - before > RELEASED:
                release(self._content, before, at)
                before = at

    def _end_of(self, start: int, name: str) -> int:
        """Where a value ends."""
        if self._content[start:start + 1] != b"[":
            return self._scanned(start, name)
        blocks = self._blocks(start)
        while True:
            try:
                next(blocks)
            except StopIteration as end:
                return end.value

    def _value(self, start: int, name: str) -> tuple[Any, int]:
        """A value, and where it ends."""
        end = self._scanned(start, name)
        return parse_json(self._content[start:end], self.name), end

    def _scanned(self, start: int, name: str) -> int:
        """Where a value ends."""
        size = WINDOW
        while True:
            # of UTF-8 looked at as Latin-1, a place is a byte (see `json_files`)
            text = self._content[start:start + size].decode("latin-1")
            final = start + len(text) == len(self._content)
            try:
                _, length = _SCAN(text, 0)
            except (StopIteration, ValueError, RecursionError) as error:
                if final or isinstance(error, RecursionError):
                    self._refuse(start, f"the value of {name!r:.60} is cut short or damaged")
            else:
                if final or length < len(text):           # a number may go on behind the window
                    return start + length
            size *= 4

    def _skip(self, at: int) -> int:
        return _SPACE.match(self._content, at).end()       # type: ignore[union-attr]

    def _refuse(self, at: int, what: str) -> NoReturn:
        raise DataError(f"{self.name}, line {line_of(self._content, at)}: is not valid JSON ({what}).")


def release(content: mmap.mmap, start: int, end: int) -> None:
    """Gives back the memory of a part of a file that was looked at, up to the page that its end is in.

    The system keeps it in its cache as before; but it no longer counts as this process's.
    """
    first, last = (place // mmap.PAGESIZE * mmap.PAGESIZE for place in (start, end))
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        content.madvise(mmap.MADV_DONTNEED, first, last - first)
