"""A file of known tensors, written at any place in any order."""
from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.ckpt_file import SLICE, slice_prefix
from mindformers_ixc.checkpoint.dtypes import item_size
from mindformers_ixc.checkpoint.safetensors_file import make_header


class TensorFile:
    """A safetensors or .ckpt file of known tensors, written at any place in any order.

    Args:
        path: of the file.
        tensors: name, format and shape of each.
        metadata: further texts for the header of a safetensors file.
    """

    def __init__(self, path: Path, tensors: list[tuple[str, str, tuple[int, ...]]],
                 metadata: dict[str, str] | None = None):
        self.path = path
        self.prefixes: list[tuple[int, bytes]] = []
        # first row, row behind the last and offset of each stretch of a tensor
        self.stretches: dict[str, list[tuple[int, int, int]]] = {}
        self.descriptor = -1
        if path.suffix == ".ckpt":
            self.size = self._lay_out_ckpt(tensors)
        else:
            header, offsets = make_header(tensors, metadata)
            self.prefixes.append((0, header))
            self.size = len(header)
            for name, dtype, shape in tensors:
                rows, row_bytes = _rows(dtype, shape)
                self.stretches[name] = [(0, rows, offsets[name])]
                self.size += rows * row_bytes

    def _lay_out_ckpt(self, tensors: list[tuple[str, str, tuple[int, ...]]]) -> int:
        offset = 0
        for name, dtype, shape in tensors:
            rows, row_bytes = _rows(dtype, shape)
            step, self.stretches[name] = max(1, SLICE // max(1, row_bytes)), []
            for begin in range(0, max(1, rows), step):
                end = min(begin + step, rows)
                prefix = slice_prefix(name, dtype, shape, (end - begin) * row_bytes)
                self.prefixes.append((offset, prefix))
                self.stretches[name].append((begin, end, offset + len(prefix)))
                offset += len(prefix) + (end - begin) * row_bytes
        return offset

    def open(self) -> None:
        """Creates the file at its full size, or opens the one that an interrupted run left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self.descriptor).st_size != self.size:
            os.truncate(self.path, self.size)
        for offset, prefix in self.prefixes:
            _write(self.descriptor, prefix, offset)

    def write(self, name: str, begin: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor from row `begin` on; a scalar is one row."""
        data = np.ascontiguousarray(rows)
        count = len(data) if data.ndim else 1
        row_bytes = data.nbytes // count if count else 0
        view = data.reshape(-1).view(np.uint8).data
        for low, high, offset in self.stretches[name]:
            first, last = max(low, begin), min(high, begin + count)
            if first < last:
                _write(self.descriptor, view[(first - begin) * row_bytes:(last - begin) * row_bytes],
                       offset + (first - low) * row_bytes)

    def sync(self) -> None:
        """Waits until everything is on the disk, then gives its memory in the system's cache back for what comes."""
        os.fdatasync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Gives the file descriptor back; closing twice does no harm."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _rows(dtype: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows of a tensor and bytes of one; a scalar is one row."""
    return (shape[0] if shape else 1), math.prod(shape[1:]) * item_size(dtype)


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
