"""What every kind of source gives: the places of its records, found once, and a record read by its place."""
from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ixc.data.paths import missing_file
from mindformers_ixc.data.records.latest import OPEN_FILES
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.reading import read_on, reading
from mindformers_ixc.resources import resolve_path

logger = logging.getLogger(__name__)

# Bytes of a file's beginning, and of its end, that tell it from a changed one.
HASHED = 1 << 16

# Told how many bytes of a file were looked at, as they are.
Progress = Callable[[int], object]


class Place(NamedTuple):
    """Where a record lies; what the two numbers mean is the business of its kind of source.

    Attributes:
        start: byte in a file, or row of a table.
        length: bytes, or part of a table.
        line: of the file, counted from 1, where the kind of source has lines.
    """

    start: int
    length: int
    line: int = 0


class Record(NamedTuple):
    """A record.

    Attributes:
        row: as `mindformers_ixc.data.forms.read_form` takes it.
        files: pictures and videos that come with it, by the names that the row has for them.
    """

    row: Any
    files: Mapping[str, StoredFile] = {}


class Fingerprint(NamedTuple):
    """What tells a file from a changed one, without reading it whole.

    Attributes:
        size: bytes.
        time: of the last change, ns since the epoch.
        ends: SHA-256 of the first and the last `HASHED` bytes, hexadecimal.
    """

    size: int
    time: int
    ends: str


def fingerprint(path: str | os.PathLike) -> Fingerprint:
    """The fingerprint of a file.

    Raises:
        OSError: when it cannot be read.
    """
    with reading(path), open(path, "rb") as file:
        state = os.fstat(file.fileno())
        digest = hashlib.sha256(file.read(HASHED))
        file.seek(max(0, state.st_size - HASHED))
        digest.update(file.read(HASHED))
    return Fingerprint(state.st_size, state.st_mtime_ns, digest.hexdigest())


class Records(ABC):
    """The records of a source.

    An object may be copied to other processes; each opens the file when it reads first.

    Args:
        path: the source; `pkg:` paths work.

    Attributes:
        changed: whether a changed file is read on.
        item: what a record is called in messages.
        form: what a file of the kind is called there.
        home: the file that was named, from whose folder names of pictures start; not always the one that is read.
    """

    # Whether a changed file may be read on, since all that a record says is compared with what was indexed.
    comparable = False
    item, form = "sample", "a JSON list"

    def __init__(self, path: str | os.PathLike):
        self.name, self.path = str(path), resolve_path(path)
        self.home = self.path
        self._state: tuple[int, int] | None = None
        self._expected, self.changed = False, False

    def fingerprint(self) -> Fingerprint:
        """What tells the source from a changed one."""
        return fingerprint(self.home)

    def expect(self, size: int, time: int, compared: bool = True) -> None:
        """Says what the file was like when it was indexed, or when that began (see `Fingerprint`).

        Args:
            size: of it.
            time: of its last change.
            compared: whether each record is compared with the index, so that a changed file may be read on if its
                records are `comparable`; else it is refused.
        """
        self._state, self._expected = (size, time), compared

    @abstractmethod
    def scan(self, progress: Progress = lambda count: None) -> Iterator[np.ndarray]:
        """Places of all records, in the order of the file.

        Args:
            progress: told of the bytes that were looked at.

        Yields:
            int64 `(n, 3)`: places of some records, with the fields of `Place`.

        Raises:
            DataError: for a damaged file, with the line or place where the damage is.
        """

    @abstractmethod
    def read(self, index: int, place: Place) -> Record:
        """The record at a place.

        Args:
            index: its number, for messages.
            place: where it lies.

        Raises:
            DataError: when it cannot be read, or the file has changed since it was opened.
        """

    def read_bytes(self, place: Place) -> bytes:
        """Bytes of the file.

        Raises:
            DataError: when the file has changed since it was read first.
            OSError: when it cannot be read.
        """
        file = OPEN_FILES.get((self.path, *self.state), partial(open, self.path, "rb", buffering=0))
        state = os.fstat(file.fileno())
        self._check_unchanged(state)
        # a damaged length may ask for more than there is memory
        whole = 0 <= place.start <= place.start + place.length <= state.st_size
        content = os.pread(file.fileno(), place.length, place.start) if whole else b""
        if not whole or len(content) != place.length:
            raise DataError(f"{self.name} has {state.st_size} bytes, and its record at byte {place.start} would have "
                            f"{place.length}; it is damaged, cut short, or being written.")
        return content

    @property
    def state(self) -> tuple[int, int]:
        """Bytes of the file that is read, and the time of its last change in ns."""
        if self._state is None:
            self._check_unchanged(os.stat(self.path))
        return self._state or (0, 0)

    def _check_unchanged(self, state: os.stat_result) -> None:
        """Refuses a file that is not the one that was read first, or that is expected.

        Raises:
            DataError: when it has changed.
        """
        now = state.st_size, state.st_mtime_ns
        self._state = self._state or now
        if now != self._state and self._expected and self.comparable:
            if not self.changed:
                logger.warning(f"{self.name} was changed since it was indexed; samples that say something else than "
                               "they did are left out.")
            self.changed = True
        elif now != self._state:
            raise DataError(f"{self.name} was changed while it was being read; start again when it is complete.")

    def __iter__(self) -> Iterator[tuple[int, Place]]:
        """Number and place of every record.

        Raises:
            DataError: when there is none; see `scan`.
        """
        index = 0
        for places in read_on(self.name, self.scan()):
            for place in map(Place._make, places.tolist()):
                yield index, place
                index += 1
        if not index:
            raise self._empty()

    def places(self, progress: Progress = lambda count: None) -> np.ndarray:
        """Places of all records, int64 `(n, 3)`; arguments and errors as of `scan`, and none is an error too."""
        blocks = list(self.scan(progress))
        if not blocks:
            raise self._empty()
        return np.concatenate(blocks)

    def _empty(self) -> DataError:
        return DataError(f"{self.name} must hold {self.form} with at least one {self.item}, found no {self.item}s.")

    def where(self, index: int) -> str:
        """Names a record in messages."""
        return f"{self.name}, sample {index}"


def check_source(path: str | os.PathLike) -> Path:
    """The file of a source.

    Raises:
        FileNotFoundError: when it is missing.
        DataError: when it is no regular file: a record is read by its place, and not as it comes.
    """
    file = resolve_path(path)
    with reading(path):
        if file.is_file():
            return file
        raise missing_file(f"The data file {path}", file)
