"""The fused CPU kernels: each against its formula in numpy, and the engine with and without them."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from mindformers_ixc import native
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.caches import decode_tables
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.models.rotary import rotary_tables
from mindformers_ixc.native import kernels
from mindformers_ixc.processing.encoded import EncodedSample

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


class Call(nn.Cell):
    """One kernel as a graph."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def construct(self, *inputs):
        return self.kernel(*inputs)


def run(name: str, *inputs, **options):
    found = Call(kernels.kernel(name, **options))(*[Tensor(value) for value in inputs])
    return [item.asnumpy() for item in found] if isinstance(found, tuple) else found.asnumpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_they_are_built_when_they_are_needed():
    assert native.library() is not None
    assert kernels.available()


@pytest.mark.parametrize("width", [1, 7, 64, 130])
def test_norms(width):
    x, weight, bias = values(5, width).astype(np.float64), values(width), values(width)
    eps = np.array([1e-5], np.float32)
    single = x.astype(np.float32)
    expected = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(run("rms_norm", single, weight, eps), expected, rtol=2e-5, atol=1e-6)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(run("layer_norm", single, weight, bias, eps), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 5, 3), (2, 64, 9), (3, 200, 17), (8, 512, 300), (1, 130, 2001)])
def test_linear(rows, width, out):
    # the last two are large enough to be shared among threads
    x, weight = values(rows, width), values(out, width)
    found = run("linear", x, weight, shape=lambda x, w: (x[0], w[0]))
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-5 * width ** 0.5)


def test_activations():
    x, y, bias = 5 * values(6, 37), values(6, 37), values(37)
    x[0, 0], x[0, 1] = 200, -200           # where exp() alone would overflow
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(run("swiglu", x, y), wide * sigmoid(wide) * y, rtol=1e-5, atol=1e-6)
        shifted = wide + bias
        np.testing.assert_allclose(run("bias_quick_gelu", x, bias), shifted * sigmoid(1.702 * shifted), rtol=1e-5,
                                   atol=1e-6)
    np.testing.assert_allclose(run("bias_residual", x, bias, y), x + bias + y, rtol=1e-6, atol=1e-6)


def test_bias_heads():
    x, bias = values(2 * 3, 4 * 8), values(4 * 8)
    found = run("bias_heads", x, bias, np.array([0.5], np.float32), shape=lambda *_: (2, 4, 3, 8))
    expected = ((x + bias) * 0.5).reshape(2, 3, 4, 8).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("heads", "queries", "keys"), [(1, 1, 1), (6, 5, 5), (4, 3, 8), (7, 150, 300)])
def test_causal_softmax(heads, queries, keys):
    # the last is large enough to be shared among threads
    scores = 4 * values(heads, queries, keys)
    hidden = np.arange(keys) > np.arange(keys - queries, keys)[:, None]
    expected = np.exp(np.where(hidden, -np.inf, scores.astype(np.float64)))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(run("causal_softmax", scores), expected, rtol=2e-5, atol=1e-7)


class TestCache:
    """Two rows, two key/value heads of three query heads, head size 8."""

    batch, heads, groups, size, positions = 2, 2, 3, 8, 9

    def tables(self, config_positions: int):
        from mindformers_ixc.models.configuration import IXC25Config

        config = IXC25Config(vocab_size=8, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
                             intermediate_size=8, num_hidden_layers=1, task_lora_ranks={})
        return rotary_tables(config, config_positions)

    @staticmethod
    def rotated(x, cos, sin):
        half = x.shape[-1] // 2
        return x * cos + np.concatenate((-x[..., half:], x[..., :half]), -1) * sin

    def test_prefill_splits_rotates_and_fills(self):
        length = 5
        qkv = values(self.batch * length, self.heads * (self.groups + 2) * self.size)
        cos, sin = (np.stack([table] * 2)[:, :, None, None] for table in self.tables(length))
        real = (np.arange(length) < np.array([[5], [3]])).astype(np.int32)[:, None, :, None]
        keys, values_ = (Parameter(Tensor(values(4, self.positions, self.size)), name=name) for name in "kv")
        heads = (self.batch, self.heads, length, self.size)
        split = kernels.kernel("prefill_heads", lambda *_: ((2, 2, 3, length, 8), heads, heads), outputs=3)

        class Fill(nn.Cell):
            def __init__(self):
                super().__init__()
                self.keys, self.values, self.split = keys, values_, split

            def construct(self, qkv, cos, sin, real, scale):
                return self.split(qkv, cos, sin, real, scale, self.keys, self.values)

        found = Fill()(*[Tensor(x) for x in (qkv, cos, sin, real, np.array([0.25], np.float32))])
        parts = qkv.reshape(self.batch, length, self.heads, self.groups + 2, self.size)
        turned = self.rotated(parts, cos, sin)
        np.testing.assert_allclose(found[0].asnumpy(), 0.25 * turned[..., :3, :].transpose(0, 2, 3, 1, 4), atol=1e-6)
        key, value = turned[..., 3, :].transpose(0, 2, 1, 3), parts[..., 4, :].transpose(0, 2, 1, 3)
        np.testing.assert_allclose(found[1].asnumpy(), key, atol=1e-6)
        np.testing.assert_allclose(found[2].asnumpy(), value)
        for cache, part in ((keys, key), (values_, value)):
            cache = cache.asnumpy().reshape(2, 2, self.positions, self.size)
            np.testing.assert_allclose(cache[0, :, :5], part[0], atol=1e-6)
            np.testing.assert_allclose(cache[1, :, :3], part[1, :, :3], atol=1e-6)
            assert not cache[0, :, 5:].any()
            assert not cache[1, :, 3:].any()

    def test_decode_appends_and_attends(self):
        qkv = values(self.batch, self.heads * (self.groups + 2) * self.size)
        at = np.array([4, 6])
        cos, sin = self.tables(self.positions)
        packed = [table[:, None] for table in decode_tables(cos[at], sin[at], self.groups, self.size ** -0.5)]
        where = np.array([[0, 4], [1, 4], [2, 6], [3, 6]], np.int32)
        before = [values(4, self.positions, self.size) for _ in "kv"]
        keys, values_ = (Parameter(Tensor(array), name=name) for array, name in zip(before, "kv"))
        attention = kernels.kernel("decode_attention", lambda *_: (self.batch, self.heads * self.groups * self.size))

        class Decode(nn.Cell):
            def __init__(self):
                super().__init__()
                self.keys, self.values, self.attention = keys, values_, attention

            def construct(self, *inputs):
                return self.attention(*inputs, self.keys, self.values)

        found = Decode()(*[Tensor(x) for x in (qkv, *packed, where)]).asnumpy().reshape(4, self.groups, self.size)
        parts = qkv.reshape(self.batch, self.heads, self.groups + 2, self.size)
        turned = self.rotated(parts, cos[at][:, None, None], sin[at][:, None, None]).reshape(4, 5, self.size)
        for entry, (row, place) in enumerate(zip((0, 0, 1, 1), (4, 4, 6, 6))):
            cache_k, cache_v = before[0][entry].copy(), before[1][entry].copy()
            cache_k[place], cache_v[place] = turned[entry, 3], parts[row].reshape(2, 5, 8)[entry % 2, 4]
            np.testing.assert_allclose(keys.asnumpy()[entry], cache_k, atol=1e-6)
            np.testing.assert_allclose(values_.asnumpy()[entry], cache_v, atol=1e-6)
            scores = turned[entry, :3] @ cache_k[:place + 1].T * self.size ** -0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected = weights / weights.sum(-1, keepdims=True) @ cache_v[:place + 1]
            np.testing.assert_allclose(found[entry], expected, atol=2e-6)

    def test_a_place_outside_the_cache_is_an_error(self):
        attention = kernels.kernel("decode_attention", lambda *_: (1, 8))
        cache = values(1, 4, 8)
        inputs = (values(1, 24), values(1, 1, 3, 8), values(1, 1, 3, 8), np.array([[0, 4]], np.int32), cache, cache)
        with pytest.raises(RuntimeError):
            Call(attention)(*[Tensor(x) for x in inputs]).asnumpy()


@pytest.mark.slow
def test_the_engine_gives_the_same_with_and_without(goldens, monkeypatch):
    rng = np.random.default_rng(5)
    ids = rng.integers(3, 400, 20).astype(np.int32)
    sample = EncodedSample(ids, ids, np.zeros_like(ids), [], np.zeros((0, 3, 56, 56), np.float32), 2)
    logits, tokens = [], []
    for switch in ("1", "0"):
        monkeypatch.setenv(native.SWITCH, switch)
        assistant = Assistant(load_model(goldens / "t1", seq_length=64, max_tiles=6), None)
        decoder = assistant.engine.decoder([sample], 4)
        assert type(decoder.slot.caches[0]).__name__ == {"1": "NativeCache", "0": "ContiguousCache"}[switch]
        logits.append([decoder.prefill(), decoder.step(np.array([5])), decoder.step(np.array([6]))])
        options = GenerationOptions(max_new_tokens=8, num_beams=3, stop_token_ids=(2,))
        tokens.append(assistant.generate([sample, sample], options))
    np.testing.assert_allclose(np.array(logits[0]), np.array(logits[1]), atol=2e-5)
    assert tokens[0] == tokens[1]
