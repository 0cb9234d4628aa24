"""Products and attention of many positions, called without MindSpore, against their formulae."""
from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from raw_kernels import BAD_PLACE, CASES, DONE, Case, call, functions, of_half, to_half, use_threads

_LIBRARIES = sorted((Path(importlib.util.find_spec("mindspore").origin).parent / "lib").glob("libdnnl.so*"))

# without a compiler there are no kernels, and without oneDNN these are not used
pytestmark = [pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"),
              pytest.mark.skipif(not _LIBRARIES, reason="MindSpore brings no oneDNN")]

RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True, scope="module")
def product():
    functions().use_product(ctypes.cast(ctypes.CDLL(str(_LIBRARIES[0])).dnnl_sgemm, ctypes.c_void_p))


@pytest.fixture(autouse=True, params=[1, 3], ids="{} threads".format)
def threads(request):
    use_threads(request.param)
    yield
    use_threads(1)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("rows", "width", "out"), [(9, 5, 3), (70, 64, 300), (600, 40, 17), (300, 96, 700)])
def test_products(rows, width, out):
    x, weight, y = values(rows, width), values(out, width), np.full((rows, out), np.nan, np.float32)
    assert call("linear_many", x, weight, y) == DONE
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image", [[(0, 0)], [(0, 300)], [(3, 4), (60, 130), (255, 300)]], ids=str)
def test_pairs_act_where_the_factor_is_not_zero(image):
    x, weight, first, second = values(300, 48), values(330, 48), values(7, 48), values(330, 7)
    factor = np.zeros((300, 1), np.float32)
    for begin, end in image:
        factor[begin:end] = 1.5
    y = np.full((300, 330), np.nan, np.float32)
    assert call("linear_many_pair", x, weight, first, second, factor, y) == DONE
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide @ weight.T + (factor * (wide @ first.T)) @ second.T, rtol=1e-4, atol=2e-4)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(("batch", "heads", "groups", "length", "seen", "size"),
                         [(2, 2, 3, 5, 5, 8), (1, 2, 2, 300, 300, 16), (1, 1, 2, 130, 700, 8)])
def test_attention_of_a_prompt(batch, heads, groups, length, seen, size):
    query, keys, held = values(batch, heads, groups, length, size), *values(2, batch, heads, seen, size)
    y = np.full((batch * length, heads * groups * size), np.nan, np.float32)
    assert call("prompt_attention", query, keys, held, y) == DONE
    scores = np.einsum("bkgld,bksd->bkgls", query.astype(np.float64), keys)
    scores[..., np.arange(seen) > np.arange(seen - length, seen)[:, None]] = -np.inf
    expected = np.einsum("bkgls,bksd->blkgd", softmax(scores), held)
    np.testing.assert_allclose(y, expected.reshape(y.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tiles", "heads", "length", "size"), [(3, 2, 5, 8), (2, 3, 257, 16)])
def test_attention_of_tiles(tiles, heads, length, size):
    query, keys, held = values(3, tiles, heads, length, size)
    y = np.full((tiles * length, heads * size), np.nan, np.float32)
    assert call("whole_attention", query, keys, held, y) == DONE
    weights = softmax(np.einsum("nhld,nhsd->nhls", query.astype(np.float64), keys))
    expected = np.einsum("nhls,nhsd->nlhd", weights, held)
    np.testing.assert_allclose(y, expected.reshape(y.shape), rtol=1e-4, atol=1e-5)


def test_more_queries_than_keys_are_an_error():
    query, keys = values(1, 1, 1, 4, 8), values(1, 1, 3, 8)
    assert call("prompt_attention", query, keys, keys, np.zeros((4, 8), np.float32)) == BAD_PLACE


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_more_positions_are_those_one_after_the_other(case, half):
    case = Case(*case)
    if half:
        case.keys, case.values = (of_half(to_half(one)) for one in (case.keys, case.values))
    expected, keys, values = case.one_by_one()
    scale, y = np.array([case.size ** -0.5], np.float32), np.full((case.batch * case.rows, case.width), 7, np.float32)
    tables = [table.reshape(case.batch, case.rows, 1, 1, case.size) for table in (case.cos, case.sin)]
    held = [to_half(one) if half else one for one in (case.keys, case.values)]
    assert call("extend_many", case.qkv, *tables, case.places, scale, *held, y) == DONE
    np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=3e-2 if half else 2e-6)
    for found, wanted in zip(held, (keys, values)):
        np.testing.assert_allclose(of_half(found) if half else found, wanted, atol=2e-2 if half else 1e-6)


@pytest.mark.parametrize("places", [[40, 1], [37, 4], [-1, 2], [0, 5], [0, -1]], ids=str)
def test_a_place_outside_the_cache_is_an_error_and_nothing_is_written(places):
    case = Case(1, 2, 3, 8, 40, 4, [3], [4])
    before = case.keys.copy()
    tables = [table.reshape(1, 4, 1, 1, 8) for table in (case.cos, case.sin)]
    assert call("extend_many", case.qkv, *tables, np.array([places], np.int32), np.ones(1, np.float32), case.keys,
                case.values, np.zeros((4, case.width), np.float32)) == BAD_PLACE
    np.testing.assert_array_equal(case.keys, before)


def test_threads_that_end_leave_no_memory_behind():
    query, keys = values(1, 1, 1, 128, 8), values(1, 1, 8000, 8)
    expected, found = np.zeros((2, 128, 8), np.float32)
    assert call("prompt_attention", query, keys, keys, expected) == DONE

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(2):          # what the first threads of a process cost is no leak
        for _ in range(40):     # of 4 MB each
            thread = threading.Thread(target=call, args=("prompt_attention", query, keys, keys, found))
            thread.start()
            thread.join()
        sizes.append(resident())
    np.testing.assert_array_equal(found, expected)
    assert sizes[1] - sizes[0] < 80 << 20
