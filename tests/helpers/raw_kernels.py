"""Kernels called as MindSpore calls them, without MindSpore."""
from __future__ import annotations

import ctypes

import numpy as np

from mindformers_ixc import native

# what a kernel returns
DONE, BAD_PLACE, BAD_SHAPE = 0, 2, 3

# batch, key/value heads, query heads of each, width of a head, positions of the cache, rows, first positions, real rows
CASES = [(1, 4, 2, 64, 768, 5, [500], [5]), (2, 2, 3, 8, 40, 4, [3, 17], [4, 2]),
         (2, 2, 2, 16, 64, 32, [30, 0], [20, 32]), (1, 2, 1, 8, 12, 3, [9], [3]), (2, 1, 2, 8, 12, 3, [0, 12], [1, 0])]



def functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.library()))


def use_threads(count: int) -> None:
    """Sets what OMP_NUM_THREADS would, for the calling thread."""
    ctypes.CDLL("libgomp.so.1").omp_set_num_threads(count)


def call(name: str, *arrays: np.ndarray) -> int:
    """What a kernel returns, called as MindSpore calls it; whole numbers of 16 bits are bfloat16."""
    pointers, count = ctypes.POINTER(ctypes.c_int64), len(arrays)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    assert all(array.flags.c_contiguous for array in arrays)
    dtypes = [b"bfloat16" if array.dtype == np.uint16 else str(array.dtype).encode() for array in arrays]
    return getattr(functions(), name)(
        count, (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
        (ctypes.c_int * count)(*[array.ndim for array in arrays]),
        (pointers * count)(*[ctypes.cast(shape, pointers) for shape in shapes]), (ctypes.c_char_p * count)(*dtypes),
        None, None)


def to_half(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16, ties to even, as whole numbers."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def of_half(halves: np.ndarray) -> np.ndarray:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def angles(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    turned = positions.ravel()[:, None] * 1e4 ** (-np.arange(0, size, 2) / size)
    turned = np.concatenate((turned, turned), -1)
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


class Case:
    """A cache, and products of more positions than it holds."""

    def __init__(self, batch, heads, groups, size, positions, rows, at, real):
        rng = np.random.default_rng(7)
        self.batch, self.heads, self.groups, self.size, self.rows = batch, heads, groups, size, rows
        self.keys, self.values = rng.standard_normal((2, batch * heads, positions, size)).astype(np.float32)
        self.qkv = rng.standard_normal((batch * rows, heads * (groups + 2) * size)).astype(np.float32)
        self.at, self.real = np.array(at), np.array(real)
        self.places = np.stack((at, real), -1).astype(np.int32)
        self.cos, self.sin = angles(self.at[:, None] + np.arange(rows), size)
        # as decoding takes them: queries scaled, the sine's first half negative, values left as they are
        factors = np.array([size ** -0.5] * groups + [1, 1], np.float32)[:, None]
        negative = np.concatenate((-self.sin[:, :size // 2], self.sin[:, size // 2:]), -1)
        self.packed = [table[:, None] * factors for table in (self.cos, negative)]
        self.packed[0][:, -1], self.packed[1][:, -1] = 1, 0
        self.width = heads * groups * size

    def one_by_one(self):
        """Output `(B, R, H*d)`, keys and values by `decode_attention`, a row and a position at a time."""
        keys, values = self.keys.copy(), self.values.copy()
        found = np.zeros((self.batch, self.rows, self.width), np.float32)
        for row in range(self.batch):
            own = slice(row * self.heads, row * self.heads + self.heads)
            for place in range(self.real[row]):
                number = row * self.rows + place
                where = np.stack((np.arange(self.heads), np.full(self.heads, self.at[row] + place)), -1)
                y = np.zeros((1, self.width), np.float32)
                tables = [table[None, None, number] for table in self.packed]
                assert call("decode_attention", self.qkv[number:number + 1], *tables, where.astype(np.int32),
                            keys[own], values[own], y) == DONE
                found[row, place] = y
        return found, keys, values
