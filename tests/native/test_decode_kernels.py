"""Whole decoder layers as one kernel, caches in bfloat16 and the team of threads, called without MindSpore."""
from __future__ import annotations

import multiprocessing
import shutil
import threading

import numpy as np
import pytest
from raw_kernels import BAD_PLACE, BAD_SHAPE, DONE, call, of_half, to_half, use_threads

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

EPS = 1e-5

# key/value heads, query heads of each, width of a head, inner width; the second is shared out among threads, the last
# has widths that no vector fits
SIZES = [(2, 2, 8, 40), (4, 2, 64, 1792), (1, 3, 6, 35)]


class Layer:
    """A layer with its cache, R tokens a row and what they give by the formula."""

    def __init__(self, heads, groups, size, inner, batch=2, rows=1, positions=100, half=False):
        rng = np.random.default_rng(3)
        self.heads, self.groups, self.size, self.batch, self.rows, self.half = heads, groups, size, batch, rows, half
        self.width = heads * groups * size
        own = heads * (groups + 2) * size

        def weight(*shape):
            return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

        self.x = weight(batch * rows, self.width) * 8
        self.norms = [1 + weight(self.width) for _ in range(2)]
        self.wqkv, self.wo = weight(own, self.width), weight(self.width, self.width)
        self.w1, self.w3, self.w2 = weight(inner, self.width), weight(inner, self.width), weight(self.width, inner)
        held = weight(2, batch * heads, positions, size) * 3
        self.keys, self.values = to_half(held) if half else held
        self.at = np.array([positions // 2 + 13, 5])[:batch]
        angles = (self.at[:, None] + np.arange(rows))[..., None] * 100.0 ** (-np.arange(size // 2) / size)
        cos, sin = (np.concatenate((turn(angles), turn(angles)), -1) for turn in (np.cos, np.sin))
        self.cos, self.sin = cos, sin                                                       # (B, R, d)
        factors = np.array([size ** -0.5] * groups + [1, 1])[:, None]
        negative = np.concatenate((-sin[..., :size // 2], sin[..., size // 2:]), -1)
        self.tables = [(table[:, :, None] * factors).astype(np.float32) for table in (cos, negative)]
        self.tables[0][:, :, -1], self.tables[1][:, :, -1] = 1, 0

    def run(self, name: str, places: np.ndarray, rows: slice = slice(None)) -> tuple[int, np.ndarray]:
        x = np.ascontiguousarray(self.x.reshape(self.batch, self.rows, -1)[:, rows]).reshape(-1, self.width)
        out = np.full_like(x, np.nan)
        tables = [np.ascontiguousarray(table[:, rows]) for table in self.tables]
        code = call(name, x, *self.norms, np.array([EPS], np.float32), self.wqkv, *tables, places.astype(np.int32),
                    self.keys, self.values, self.wo, self.w1, self.w3, self.w2, out)
        return code, out

    def where(self, row: int = 0) -> np.ndarray:
        """Entries and positions of each row's token number `row`."""
        entries = self.batch * self.heads
        return np.stack((np.arange(entries), np.repeat(self.at + row, self.heads)), -1)

    def formula(self) -> np.ndarray:
        """Output in float64; the keys and values of the new tokens are as the cache holds them."""
        def norm(x, weight):
            return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + EPS) * weight

        def turned(x):
            cos, sin = self.cos[:, :, None, None], self.sin[:, :, None, None]
            halves = np.concatenate((-x[..., self.size // 2:], x[..., :self.size // 2]), -1)
            return x * cos + halves * sin

        b, r, kv, g, d = self.batch, self.rows, self.heads, self.groups, self.size
        x = self.x.astype(np.float64)
        qkv = (norm(x, self.norms[0]) @ self.wqkv.T.astype(np.float64)).reshape(b, r, kv, g + 2, d)
        query, key = turned(qkv[..., :g, :]) * d ** -0.5, turned(qkv[..., g:g + 1, :])[..., 0, :]
        new = [key, qkv[..., g + 1, :]]
        held = [(of_half(half) if self.half else half).reshape(b, kv, -1, d).astype(np.float64)
                for half in (self.keys, self.values)]
        if self.half:
            new = [of_half(to_half(one)).astype(np.float64) for one in new]
        y = np.zeros((b, r, kv, g, d))
        for row in range(b):
            for token in range(r):
                end = self.at[row] + token + 1
                for half, one in zip(held, new):
                    half[row, :, end - 1] = one[row, token]
                scores = np.einsum("kgd,ksd->kgs", query[row, token], held[0][row, :, :end])
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                y[row, token] = np.einsum("kgs,ksd->kgd", weights, held[1][row, :, :end])
        x = x + y.reshape(b * r, -1) @ self.wo.T
        y = norm(x, self.norms[1])
        gate = y @ self.w1.T
        return x + (gate / (1 + np.exp(-gate)) * (y @ self.w3.T)) @ self.w2.T


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_layer_is_its_formula(sizes, half):
    layer = Layer(*sizes, half=half)
    expected, before = layer.formula(), layer.keys.copy()
    code, found = layer.run("decode_layer", layer.where())
    assert code == DONE
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 if not half else 2e-2)
    changed = (layer.keys != before).any(-1)
    assert {tuple(place) for place in np.argwhere(changed)} == {tuple(place) for place in layer.where()}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_several_tokens_have_the_bits_of_one_after_the_other(sizes, half):
    together, alone = Layer(*sizes, rows=4, half=half), Layer(*sizes, rows=4, half=half)
    code, found = together.run("extend_layer", np.stack((together.at, [4, 4]), -1))
    assert code == DONE
    found = found.reshape(2, 4, -1)
    for token in range(4):
        code, one = alone.run("decode_layer", alone.where(token), slice(token, token + 1))
        assert code == DONE
        np.testing.assert_array_equal(found[:, token], one)
    np.testing.assert_array_equal(together.keys, alone.keys)
    np.testing.assert_array_equal(together.values, alone.values)


def test_threads_change_no_bit():
    layer = Layer(*SIZES[1], batch=2, rows=1, positions=600)
    found = []
    try:
        for threads in (1, 2, 5, 1, 3):
            use_threads(threads)
            found += [layer.run("decode_layer", layer.where())[1] for _ in range(20)]
    finally:
        use_threads(1)
    assert all(np.array_equal(one, found[0]) for one in found)


def test_kernels_that_run_at_the_same_time_are_right():
    layer = Layer(*SIZES[1])
    expected, found, errors = layer.run("decode_layer", layer.where())[1], [], []

    def run():
        try:
            use_threads(3)
            found.extend(layer.run("decode_layer", layer.where())[1] for _ in range(20))
        except Exception as error:      # shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 80
    assert all(np.array_equal(one, expected) for one in found)


def _in_a_fork(layer, expected, queue):
    queue.put(np.array_equal(layer.run("decode_layer", layer.where())[1], expected))


def test_a_forked_process_has_threads_of_its_own():
    layer = Layer(*SIZES[1])
    use_threads(2)
    try:
        expected = layer.run("decode_layer", layer.where())[1]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_in_a_fork, args=(layer, expected, queue))
        process.start()
        assert queue.get(timeout=300)
        process.join(timeout=300)
        assert process.exitcode == 0
    finally:
        use_threads(1)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_a_place_outside_the_cache_is_an_error_and_nothing_is_written(wrong):
    layer = Layer(*SIZES[0])
    before, places = layer.keys.copy(), layer.where()
    places[-1 - layer.heads + 1:, 1] = wrong
    assert layer.run("decode_layer", places)[0] == BAD_PLACE
    assert layer.run("extend_layer", np.array([[5, 1], [wrong, 1]]))[0] == BAD_PLACE
    np.testing.assert_array_equal(layer.keys, before)


@pytest.mark.parametrize(("entry", "half"), [(0, 0), (1, 1)], ids=["another entry", "another position"])
def test_places_that_are_not_those_of_all_heads_are_an_error_and_nothing_is_written(entry, half):
    layer = Layer(*SIZES[0])
    before, places = layer.keys.copy(), layer.where()
    places[entry, half] += 1
    assert layer.run("decode_layer", places)[0] == BAD_PLACE
    np.testing.assert_array_equal(layer.keys, before)


def test_weights_that_do_not_belong_together_are_an_error():
    layer = Layer(*SIZES[0])
    layer.w2 = layer.w2[:, :-1].copy()
    assert layer.run("decode_layer", layer.where())[0] == BAD_SHAPE


def test_a_prompt_attends_to_what_a_cache_of_16_bits_holds():
    batch, heads, groups, length, size, positions = 2, 2, 3, 5, 8, 9
    rng = np.random.default_rng(5)
    qkv = rng.standard_normal((batch * length, heads * (groups + 2) * size)).astype(np.float32)
    tables = rng.standard_normal((2, batch, length, 1, 1, size)).astype(np.float32)
    real = np.ones((batch, 1, length, 1), np.int32)
    real[1, :, 3:] = 0
    held = np.full((2, batch * heads, positions, size), 7, np.uint16)
    queries = np.zeros((batch, heads, groups, length, size), np.float32)
    full, rounded = np.zeros((2, 2, batch, heads, length, size), np.float32)
    scale = np.array([0.5], np.float32)
    wide = np.zeros(held.shape, np.float32)
    assert call("prefill_heads", qkv, *tables, real, scale, *wide, queries, *full) == DONE
    assert call("prefill_heads", qkv, *tables, real, scale, *held, queries, *rounded) == DONE
    np.testing.assert_array_equal(rounded, of_half(to_half(full)))
    np.testing.assert_array_equal(held, to_half(wide))
    assert not held[:, heads:, 3:].any() and not held[:, :, length:].any()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_entries_of_a_cache_take_over_one_another(dtype):
    keys, values = np.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5).astype(dtype)
    source, expected = np.array([2, 1, 0, 2], np.int32), (keys[[2, 1, 0, 2]], values[[2, 1, 0, 2]])
    assert call("reorder_cache", keys, values, source, np.ones(1, np.float32)) == DONE
    np.testing.assert_array_equal((keys, values), expected)
    assert call("reorder_cache", keys, values, source + 2, np.ones(1, np.float32)) == BAD_PLACE
    np.testing.assert_array_equal((keys, values), expected)
