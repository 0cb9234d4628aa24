"""Work on columns of millions of numbers, a block at a time, so that it takes little memory beside them."""
from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterator

import numpy as np

# Entries that are worked on together.
BLOCK = 1 << 18


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that together are `count` entries, each of `size` at most."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def places_where(column: np.ndarray, value: object) -> np.ndarray:
    """Places at which a column has a value, int32, ascending."""
    found = [np.flatnonzero(column[part] == value).astype(np.int32) + np.int32(part.start)
             for part in blocks(len(column))]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


def count_values(column: np.ndarray, at: np.ndarray | None = None, least: int = 0) -> np.ndarray:
    """How often a column has each number from 0 on, int64.

    Args:
        column: whole numbers from 0 on.
        at: places of the column that count, a place as often as it is named; by default all, once.
        least: numbers that the result has at least.
    """
    counts = np.zeros(least, np.int64)
    for part in blocks(len(column if at is None else at)):
        more = np.bincount(column[part if at is None else at[part]], minlength=len(counts))
        more[:len(counts)] += counts
        counts = more
    return counts


def highest(column: np.ndarray) -> int:
    """The highest number of a column that has one."""
    most = []
    for part in blocks(len(column)):
        most.append(int(column[part].max()))
        unmap(column)
    return max(most)


def sorted_by(places: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Places in the order of what columns have there; those that have the same stay as they are.

    Args:
        places: of the columns, int32 `(n,)`.
        *columns: whole numbers from 0 on; the first one counts most.
    """
    count = len(places)
    if not count:
        return places
    limits = [highest(column) + 1 for column in columns]
    if math.prod(limits) * count >= 1 << 63:
        return places[np.lexsort([column[places] for column in reversed(columns)])]
    # one number for all columns and the place in the order: sorting such numbers needs no memory beside them
    keys = np.empty(count, np.int64)
    for part in blocks(count):
        key = np.zeros(part.stop - part.start, np.int64)
        for column, limit in zip(columns, limits):
            key = key * limit + column[places[part]]
        keys[part] = key * count + np.arange(part.start, part.stop)
    keys.sort()
    result = keys.view(np.int32)          # written over what was read
    for part in blocks(count):
        result[part] = places[keys[part] % count]
    del result
    keys.resize(-(-count // 2), refcheck=False)
    return keys.view(np.int32)[:count]


def unmap(*columns: np.ndarray) -> None:
    """Lets go of what was looked at of columns that are mapped into memory; the machine's page cache keeps it."""
    for column in columns:
        held = getattr(column, "_mmap", None)
        if held is not None and hasattr(held, "madvise"):
            held.madvise(mmap.MADV_DONTNEED)


def give_back() -> None:
    """Gives memory that is free again back to the machine; the C library keeps some of it, for the next large array."""
    with contextlib.suppress(OSError, AttributeError, TypeError):      # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
