"""The kernels that extend a cache by several positions, called without MindSpore, against those that take one."""
from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest

from mindformers_ixc import native

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

DONE, BAD_PLACE = 0, 2

# batch, key/value heads, query heads of each, width of a head, positions of the cache, rows, first positions, real rows
CASES = [(1, 4, 2, 64, 768, 5, [500], [5]), (2, 2, 3, 8, 40, 4, [3, 17], [4, 2]),
         (2, 2, 2, 16, 64, 32, [30, 0], [20, 32]), (1, 2, 1, 8, 12, 3, [9], [3]), (2, 1, 2, 8, 12, 3, [0, 12], [1, 0])]


def call(name: str, *arrays: np.ndarray) -> int:
    """What a kernel returns, called as MindSpore calls it."""
    pointers = ctypes.POINTER(ctypes.c_int64)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    assert all(array.flags.c_contiguous for array in arrays)
    return getattr(ctypes.CDLL(str(native.library())), name)(
        len(arrays), (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays]),
        (ctypes.c_int * len(arrays))(*[array.ndim for array in arrays]),
        (pointers * len(arrays))(*[ctypes.cast(shape, pointers) for shape in shapes]), None, None, None)


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_several_positions_have_the_bits_of_one_after_the_other(case):
    case = Case(*case)
    expected, keys, values = case.one_by_one()
    tables = [table.reshape(case.batch, case.rows, case.groups + 2, case.size) for table in case.packed]
    found = np.full((case.batch * case.rows, case.width), 7, np.float32)
    assert call("extend_attention", case.qkv, *tables, case.places, case.keys, case.values, found) == DONE
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)       # what is not real is zero
    np.testing.assert_array_equal(case.keys, keys)
    np.testing.assert_array_equal(case.values, values)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_positions_give_the_same_by_products(case):
    case = Case(*case)
    expected, keys, values = case.one_by_one()
    shape = (case.batch, case.heads, case.groups, case.rows, case.size)
    queries, scale = np.zeros(shape, np.float32), np.array([case.size ** -0.5], np.float32)
    tables = [table.reshape(case.batch, case.rows, 1, 1, case.size) for table in (case.cos, case.sin)]
    assert call("extend_heads", case.qkv, *tables, case.places, scale, case.keys, case.values, queries) == DONE
    np.testing.assert_allclose(case.keys, keys, atol=1e-6)
    np.testing.assert_array_equal(case.values, values)
    held = [half.reshape(case.batch, case.heads, -1, case.size) for half in (case.keys, case.values)]
    scores = np.ascontiguousarray(np.einsum("bkgrd,bksd->bkgrs", queries, held[0]))
    weights = np.full_like(scores, np.nan)
    assert call("extend_softmax", scores, case.places, weights) == DONE
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    found = np.einsum("bkgrs,bksd->brkgd", weights, held[1]).reshape(expected.shape)
    for row, count in enumerate(case.real):
        np.testing.assert_allclose(found[row, :count], expected[row, :count], atol=2e-6)


def test_the_first_positions_of_a_cache():
    cache = np.random.default_rng(3).standard_normal((6, 40, 8)).astype(np.float32)
    for seen in (1, 17, 40):
        found = np.full((6, seen, 8), np.nan, np.float32)
        assert call("first_positions", cache, np.zeros(1, np.float32), found) == DONE
        np.testing.assert_array_equal(found, cache[:, :seen])
    assert call("first_positions", cache, np.zeros(1, np.float32), np.zeros((6, 41, 8), np.float32)) == BAD_PLACE


@pytest.mark.parametrize("places", [[40, 1], [37, 4], [-1, 2], [0, 5], [0, -1]], ids=str)
def test_a_place_outside_the_cache_is_an_error_and_nothing_is_written(places):
    case = Case(1, 2, 3, 8, 40, 4, [3], [4])
    before, wrong = case.keys.copy(), np.array([places], np.int32)
    tables = [table.reshape(1, 4, 5, 8) for table in case.packed]
    assert call("extend_attention", case.qkv, *tables, wrong, case.keys, case.values,
                np.zeros((4, case.width), np.float32)) == BAD_PLACE
    tables = [table.reshape(1, 4, 1, 1, 8) for table in (case.cos, case.sin)]
    assert call("extend_heads", case.qkv, *tables, wrong, np.ones(1, np.float32), case.keys, case.values,
                np.zeros((1, 2, 3, 4, 8), np.float32)) == BAD_PLACE
    np.testing.assert_array_equal(case.keys, before)
