"""The kernels that extend a cache by several positions, called without MindSpore, against those that take one."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
from raw_kernels import BAD_PLACE, CASES, DONE, Case, call

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

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
