"""The index of a source on disk: columns that are mapped into memory, so that all processes of a machine share them."""
from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc.data.index.holding import UNFINISHED, Held
from mindformers_ixc.data.index.measuring import Measured
from mindformers_ixc.data.index.seals import seal
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_json, write_whole

# Changes whenever the columns do, or anything that the numbers in them come of: forms, prompts, tokens, tiles
# (tests/data_pipeline/test_index_keys.py has what this version measures).
VERSION = 3

DESCRIPTION = "index.json"

# Columns: type, and numbers a row (0: a plain list).
COLUMNS = {"places": (np.int64, 3), "digests": (np.int64, 0), "picture_starts": (np.int64, 0), "sizes": (np.int32, 3),
           "pair_starts": (np.int64, 0), "needs": (np.int32, 3)}
COLUMN_FILES = tuple(f"{name}.npy" for name in COLUMNS)


@dataclass(frozen=True)
class Description:
    """What an index says of itself.

    Attributes:
        version: of the form.
        source: the file, as it was named.
        samples: their number.
        key: of what the index depends on.
        content: SHA-256 of what was measured; pictures may change while all else stays.
        fingerprint: of the file.
        unusable: samples with a picture that cannot be partitioned: (number, sentence).
        errors: samples that cannot be read, likewise.
        files: pictures of the samples that are files, as in `Measured`; none where there are many.
        path: of the source, whatever the working directory.
        base: see `keys.Keys`.
        asked: likewise.
        captions: as in `Measured`.
        start: of a file that may grow at its end: its bytes, their SHA-256, the lines that end in them.
        how: samples are measured, for people to tell indices of one source apart.
        lacking: as in `Measured`.
    """

    version: int
    source: str
    samples: int
    key: str
    content: str
    fingerprint: list
    unusable: list[list]
    errors: list[list]
    files: list[list]
    path: str = ""
    base: str = ""
    asked: str = ""
    captions: bool = False
    start: list = field(default_factory=list)
    how: str = ""
    lacking: int = 0

    @property
    def left_out(self) -> dict[int, str]:
        """Samples that no run uses, with what is wrong with each."""
        return dict(sorted([*self.unusable, *self.errors]))


class SourceIndex:
    """What is known of the samples of a source.

    Args:
        folder: of the index.

    Attributes:
        places: int64 `(n, 3)`, see `mindformers_ixc.data.records.base.Place`.
        digests: int64 `(n,)`, see `Measured.digests`.
        picture_starts: int64 `(n + 1,)`, where each sample's pictures begin in `sizes`, and the end.
        sizes: int32 `(p, 3)`, see `Measured.sizes`.
        pair_starts: int64 `(n + 1,)`, where each sample's parts begin in `needs`, and the end.
        needs: int32 `(r, 3)`, see `Measured.needs`.
        description: of the index.

    Raises:
        DataError: when it is damaged, or of another version.
    """

    places: np.ndarray
    digests: np.ndarray
    picture_starts: np.ndarray
    sizes: np.ndarray
    pair_starts: np.ndarray
    needs: np.ndarray

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._held = Held(folder)
            fields = read_json(folder / DESCRIPTION)
            self.description = Description(**fields)
            for name in COLUMNS:
                setattr(self, name, mapped(folder / f"{name}.npy", *COLUMNS[name]))
            self._check()
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            raise DataError(f"The index {folder} is damaged ({error}); remove the folder, and it is built anew.") \
                from error

    def _check(self) -> None:
        if self.description.version != VERSION:
            raise ValueError(f"it is of version {self.description.version}, and {VERSION} is expected")
        count = self.description.samples
        ends = (len(self.places), len(self.digests), len(self.picture_starts) - 1, len(self.pair_starts) - 1)
        rows = (int(self.picture_starts[-1]), len(self.sizes), int(self.pair_starts[-1]), len(self.needs))
        if ends != (count,) * 4 or rows[0] != rows[1] or rows[2] != rows[3]:
            raise ValueError("its columns do not belong together")

    def __len__(self) -> int:
        """Number of samples."""
        return self.description.samples


def read_description(folder: Path) -> Description:
    """What an index says of itself.

    Raises:
        DataError: when it is damaged, or of another version.
        OSError: when it is not there.
    """
    try:
        description = Description(**read_json(folder / DESCRIPTION))
        if description.version == VERSION:
            return description
    except TypeError as error:
        raise DataError(f"The index {folder} is damaged ({error}); remove the folder, and it is built anew.") from error
    raise DataError(f"The index {folder} is of version {description.version}, and {VERSION} is expected.")


def descriptions(place: Path) -> Iterator[tuple[Path, Description]]:
    """Folder and description of the indices of a source that can be used."""
    for folder in sorted(place.iterdir()):
        if folder.suffix != UNFINISHED and not folder.name.startswith("."):
            with contextlib.suppress(DataError, OSError):
                yield folder, read_description(folder)


def mapped(path: Path, dtype: Any, width: int) -> np.ndarray:
    """A column of an index, mapped into memory.

    Args:
        path: of the column.
        dtype: it must have.
        width: numbers a row; 0 for a plain list.

    Raises:
        ValueError: when it is something else.
        OSError: when it cannot be read.
    """
    # a file without rows cannot be mapped
    column = np.load(path, mmap_mode="r" if path.stat().st_size > _HEADER else None)
    if column.dtype != dtype or column.shape[1:] != ((width,) if width else ()):
        raise ValueError(f"{path.name} has the type {column.dtype} {column.shape}")
    return column


# Bytes of the smallest header of a .npy file.
_HEADER = 128


def write_index(folder: Path, description: Description, places: Iterable[np.ndarray],
                parts: Iterable[Measured]) -> None:
    """Writes an index; its description, without which it is none, comes last.

    Args:
        folder: to be filled.
        description: of the index.
        places: of all samples, in order.
        parts: of all samples, in order.
    """
    writers = {name: ColumnWriter(folder / f"{name}.npy", *COLUMNS[name]) for name in COLUMNS}
    for block in places:
        writers["places"].add(block)
    pictures = pairs = 0
    for starts in ("picture_starts", "pair_starts"):
        writers[starts].add(np.zeros(1, np.int64))
    for part in parts:
        for starts, counts, before in (("picture_starts", part.pictures, pictures),
                                       ("pair_starts", part.pairs, pairs)):
            writers[starts].add(np.cumsum(counts, dtype=np.int64) + before)
        pictures, pairs = pictures + len(part.sizes), pairs + len(part.needs)
        for name, rows in (("digests", part.digests), ("sizes", part.sizes), ("needs", part.needs)):
            writers[name].add(rows)
    for writer in writers.values():
        writer.close()
    seal(folder, COLUMN_FILES)
    write_whole(folder / DESCRIPTION, json.dumps(asdict(description)), sync=True)


class ColumnWriter:
    """A column that grows on disk; its header, which says how long it is, is written last.

    Args:
        path: of the column, a `.npy` file.
        dtype: of its numbers.
        width: numbers a row; 0 for a plain list.
    """

    def __init__(self, path: Path, dtype: Any, width: int):
        self.path, self.dtype, self.width, self.rows = path, np.dtype(dtype), width, 0
        self._file = open(path, "wb")     # noqa: SIM115 - closed by `close`
        self._file.write(b"\0" * _HEADER)

    def add(self, rows: np.ndarray) -> None:
        """Appends rows."""
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.rows += len(rows)

    def close(self) -> None:
        """Ends the column; all of it is on the disk then."""
        shape = (self.rows, self.width) if self.width else (self.rows,)
        header = repr({"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape})
        content = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + \
            header.encode().ljust(_HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


# Of what was measured, what is no array.
_TEXTS = ("unusable", "errors", "files")


def save_part(path: Path, part: Measured) -> None:
    """Writes what was measured of some samples; the file is whole or not there."""
    texts = {name: np.frombuffer(json.dumps(getattr(part, name)).encode(), np.uint8) for name in _TEXTS}
    content = io.BytesIO()         # an archive that is written to a full disk says something else
    np.savez(content, **{**part._asdict(), **texts})
    write_whole(path, content.getvalue())


def load_part(path: Path) -> Measured:
    """What `save_part` wrote.

    Raises:
        ValueError: when the file is damaged.
    """
    with np.load(path, allow_pickle=False) as held:
        fields: dict[str, Any] = {name: [tuple(entry) for entry in json.loads(held[name].tobytes())]
                                  if name in _TEXTS else held[name] for name in Measured._fields}
        return Measured(**{**fields, "captions": bool(fields["captions"]), "lacking": int(fields["lacking"])})


def blocks(column: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """A column, some rows at a time."""
    for start in range(0, len(column), rows):
        yield column[start:start + rows]
