"""Tensors that are somewhere else: in files, or in parts over several files. Rows of them are read when asked for."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.dtypes import STORAGE, convert_dtype, item_size
from mindformers_ixc.errors import CheckpointError

# Bytes of a tensor that are in memory at once.
PIECE = 64 * 2**20

# Axes and numbers of a tensor that NumPy can still describe, whatever its format.
MAX_AXES, MAX_NUMBERS = 32, 2**59


@dataclass(frozen=True)
class Stretch:
    """Consecutive bytes of a file.

    Attributes:
        path: file.
        offset: of the first byte.
        nbytes: how many.
    """

    path: Path
    offset: int
    nbytes: int


class LazyTensor:
    """A tensor whose rows are read on demand.

    Attributes:
        dtype: format, a key of `dtypes.STORAGE`.
        shape: of the tensor.
        group: name of the tensors that are computed together with it; empty where there are none.
    """

    dtype: str
    shape: tuple[int, ...]
    group: str = ""

    @property
    def stored_dtype(self) -> str:
        """Format it is written in unless another is asked for; of a computed tensor, that of what it comes from."""
        return self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * item_size(self.dtype)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end` along the first axis, in the storage type; valid until the next call."""
        raise NotImplementedError

    def pieces(self, limit: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
        """First row and content of consecutive pieces of about `limit` bytes; a scalar is one piece."""
        if not self.shape:
            yield 0, self.rows(0, 1)
            return
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        step = max(1, limit // row) if row else max(1, self.shape[0])
        for begin in range(0, self.shape[0], step):
            yield begin, self.rows(begin, min(begin + step, self.shape[0]))

    def whole(self) -> np.ndarray:
        """The tensor in memory of its own."""
        value = np.empty(self.shape, STORAGE[self.dtype])
        for begin, piece in self.pieces():
            if self.shape:
                value[begin:begin + len(piece)] = piece
            else:
                value[()] = piece
        return value


class MappedTensor(LazyTensor):
    """A tensor in files, in one or more stretches of bytes, mapped piece by piece.

    What is mapped counts as the process's memory once it is read, so no mapping outlives its piece.

    Args:
        dtype: its format.
        shape: its shape.
        stretches: where its bytes lie, in order.

    Raises:
        CheckpointError: when the stretches do not make up the shape.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stretches: list[Stretch]):
        self.dtype, self.shape, self.stretches = dtype, shape, stretches
        if len(shape) > MAX_AXES or math.prod(max(1, length) for length in shape) >= MAX_NUMBERS:
            raise CheckpointError(f"{stretches[0].path} has a tensor of shape {shape[:MAX_AXES]}, which no weight has; "
                                  "the file is damaged.")
        found = sum(stretch.nbytes for stretch in stretches)
        if found != self.nbytes:
            raise CheckpointError(f"{stretches[0].path} gives a tensor of shape {shape} in {dtype} {found} bytes, it "
                                  f"needs {self.nbytes}; the file is damaged.")

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        row = math.prod(self.shape[1:]) * item_size(self.dtype)
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        found, start, low, high = [], 0, begin * row, end * row
        for stretch in self.stretches:
            first, last = max(low, start), min(high, start + stretch.nbytes)
            if first < last:
                found.append(np.memmap(stretch.path, np.uint8, mode="r", offset=stretch.offset + first - start,
                                       shape=(last - first,)))
            start += stretch.nbytes
        if not found:
            return np.empty(shape, STORAGE[self.dtype])
        return (found[0] if len(found) == 1 else np.concatenate(found)).view(STORAGE[self.dtype]).reshape(shape)


class JoinedTensor(LazyTensor):
    """A tensor cut over several files.

    Args:
        shape: of the whole tensor.
        parts: for each part the slices of the whole it covers, and the tensor that holds it; they cover everything.
        copies: tensors that should be equal, for each part.
    """

    def __init__(self, shape: tuple[int, ...], parts: list[tuple[tuple[slice, ...], LazyTensor]],
                 copies: list[list[LazyTensor]]):
        self.shape, self.parts, self.dtype, self.copies = shape, parts, parts[0][1].dtype, copies

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        if not self.shape:
            return self.parts[0][1].rows(0, 1)
        value = np.empty((end - begin, *self.shape[1:]), STORAGE[self.dtype])
        for where, part in self.parts:
            low, high = max(begin, where[0].start), min(end, where[0].stop)
            if low < high:
                target = (slice(low - begin, high - begin), *where[1:])
                value[target] = part.rows(low - where[0].start, high - where[0].start)
        return value

    def pieces(self, limit: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
        """See `LazyTensor`; parts that have whole rows come one after the other, without a copy."""
        if not self.shape or any(part.shape[1:] != self.shape[1:] for _, part in self.parts):
            yield from super().pieces(limit)
            return
        for where, part in sorted(self.parts, key=lambda entry: entry[0][0].start):
            for begin, piece in part.pieces(limit):
                yield where[0].start + begin, piece

    def copies_agree(self) -> bool:
        """Whether every copy of every part has the same bytes."""
        return all(np.array_equal(one.view(np.uint8), other.view(np.uint8))
                   for first, *others in self.copies for copy in others
                   for (_, one), (_, other) in zip(map(_as_bytes, first.pieces()), map(_as_bytes, copy.pieces())))


def _as_bytes(piece: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
    return piece[0], np.ascontiguousarray(piece[1]).reshape(-1)


class PartOfTensor(LazyTensor):
    """A part of another tensor.

    Args:
        tensor: the whole; at least one axis.
        slices: one a axis, with start and stop.
    """

    def __init__(self, tensor: LazyTensor, slices: tuple[slice, ...]):
        self.tensor, self.slices, self.dtype = tensor, slices, tensor.dtype
        self.shape = tuple(part.stop - part.start for part in slices)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        first = self.slices[0].start
        return self.tensor.rows(first + begin, first + end)[(slice(None), *self.slices[1:])]


class ConvertedTensor(LazyTensor):
    """A tensor whose rows are rounded to another format as they are read.

    Args:
        tensor: of numbers with a point.
        dtype: the format.
    """

    def __init__(self, tensor: LazyTensor, dtype: str):
        self.tensor, self.dtype, self.shape = tensor, dtype, tensor.shape

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        return convert_dtype(self.tensor.rows(begin, end), self.tensor.dtype, self.dtype)


class ArrayTensor(LazyTensor):
    """A tensor that is in memory.

    Args:
        array: its content, in the storage type.
        dtype: its format.
    """

    def __init__(self, array: np.ndarray, dtype: str):
        self.array, self.dtype, self.shape = array, dtype, array.shape

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        return self.array[begin:end] if self.shape else self.array
