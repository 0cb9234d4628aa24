"""The kernels for training on the CPU: values against formulae in float64, gradients against their derivatives."""
from __future__ import annotations

import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.ops import composite as C

from mindformers_ixc.models.dropout import FEATURE_MIX_FIRST, FEATURE_MIX_SECOND, FEATURE_SHIFT, SeededDropout
from mindformers_ixc.models.loss import IGNORE_INDEX
from mindformers_ixc.native import training

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

MODES = [pytest.param(ms.GRAPH_MODE, id="graph"), pytest.param(ms.PYNATIVE_MODE, id="pynative")]

RNG = np.random.default_rng(0)
EPS = np.array([1e-5], np.float32)


@pytest.fixture(autouse=True, params=MODES)
def mode(request):
    """Every test runs as a graph and operator by operator."""
    assert training.available()
    ms.set_context(mode=request.param)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


class First(nn.Cell):
    """The first output of an operation."""

    def __init__(self, operation, several: bool):
        super().__init__()
        self.operation, self.several = operation, several

    def construct(self, *inputs):
        return self.operation(*inputs)[0] if self.several else self.operation(*inputs)


class Gradients(nn.Cell):
    """Gradients of all inputs of a cell."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.grad = cell, C.GradOperation(get_all=True, sens_param=True)

    def construct(self, sens, *inputs):
        return self.grad(self.cell)(*inputs, sens)


def check(operation, formula, inputs: list[np.ndarray], several: bool = False, trained: int | None = None) -> None:
    """Compares an operation with a formula, and its gradients with the formula's slopes in random directions.

    Args:
        operation: to test.
        formula: takes float64 arrays where inputs are float32, and gives the first output.
        inputs: of the operation.
        several: whether it has several outputs.
        trained: how many of the inputs have gradients; by default all.
    """
    cell = First(operation, several)
    tensors = tuple(map(Tensor, inputs))
    wide = [value.astype(np.float64) if value.dtype == np.float32 else value for value in inputs]
    expected = formula(*wide)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(cell(*tensors).asnumpy(), expected, atol=2e-6 * scale, rtol=2e-5)
    sens = values(*expected.shape)
    found = Gradients(cell)(Tensor(sens), *tensors)
    for number in range(len(inputs) if trained is None else trained):
        gradient = found[number].asnumpy().astype(np.float64)
        assert gradient.shape == inputs[number].shape and np.isfinite(gradient).all()
        for _ in range(3):
            direction, moved = RNG.standard_normal(inputs[number].shape), list(wide)
            ends = []
            for step in (1e-6, -1e-6):
                moved[number] = wide[number] + step * direction
                ends.append((formula(*moved) * sens).sum())
            slope = (ends[0] - ends[1]) / 2e-6
            size = np.linalg.norm(gradient)        # of the slope of a direction of length 1 in each of its numbers
            assert (gradient * direction).sum() == pytest.approx(slope, abs=1e-5 * size), number


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


@pytest.mark.parametrize(("rows", "width", "out"), [(5, 3, 4), (100, 70, 33), (300, 40, 130)])
def test_linear(rows, width, out):
    # the last is large enough to be shared among threads
    x, weight, bias = values(rows, width), values(out, width), values(out)
    check(training.linear(False), lambda x, weight: x @ weight.T, [x, weight])
    check(training.linear(True), lambda x, weight, bias: x @ weight.T + bias, [x, weight, bias])


def factors(rows: int) -> np.ndarray:
    """Runs of image positions of many lengths, at both ends too."""
    mask = (np.sin(np.arange(rows) ** 1.5) > -0.5).astype(np.float32)
    mask[0] = mask[-1] = 1
    mask[rows // 3:rows // 2] = 0
    return 1.5 * mask[:, None]


@pytest.mark.parametrize("rows", [7, 600])
def test_partial_lora(rows):
    inputs = [values(rows, 40), values(50, 40), values(4, 40), values(50, 4), factors(rows)]

    def formula(x, weight, first, second, factor):
        return x @ weight.T + factor * (x @ first.T) @ second.T

    check(training.partial_lora(False), formula, inputs, True, 4)
    without = [*inputs[:4], np.zeros((rows, 1), np.float32)]
    check(training.partial_lora(False), formula, without, True, 4)


def test_partial_lora_with_dropout_draws_the_noise_of_the_composed_cell():
    rows, width, rate = 700, 40, 0.3
    noise = RNG.integers(-2 ** 31, 2 ** 31, (rows, 1)).astype(np.int32)
    dropout = SeededDropout(rate, width, salt=3)
    dropout.set_train(True)
    kept = dropout(Tensor(np.ones((rows, width), np.float32)), Tensor(noise)).asnumpy().astype(np.float64)
    assert (kept == 0).mean() == pytest.approx(rate, abs=0.02)
    assert dropout.numbers[1].asnumpy()[0] == FEATURE_MIX_FIRST
    assert dropout.numbers[1].asnumpy()[1] == FEATURE_MIX_SECOND
    assert FEATURE_SHIFT == 15, "the kernel has it as a constant"

    def formula(x, weight, first, second, factor, *_):
        return x @ weight.T + factor * ((kept * x) @ first.T) @ second.T

    inputs = [values(rows, width), values(50, width), values(4, width), values(50, 4), factors(rows), noise]
    check(training.partial_lora(True), formula, [*inputs, *[number.asnumpy() for number in dropout.numbers]], True, 4)


@pytest.mark.parametrize("shape", [(3, 5), (700, 64)])
def test_norms(shape):
    x, weight, bias = 3 * values(*shape), 1 + values(shape[1]), values(shape[1])

    def rms(x, weight, eps):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * weight

    def layer(x, weight, bias, eps):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5) * weight + bias

    check(training.rms_norm(), rms, [x, weight, EPS], True, 2)
    check(training.layer_norm(), layer, [x, weight, bias, EPS], True, 3)


@pytest.mark.parametrize("shape", [(3, 5), (300, 200)])
def test_gates(shape):
    gate, x = 4 * values(*shape), values(*shape)
    gate[0, 0], gate[0, 1] = 200, -200           # where exp() alone would overflow
    check(training.swiglu(), lambda gate, x: gate * sigmoid(gate) * x, [gate, x])
    check(training.quick_gelu(), lambda x: x * sigmoid(1.702 * x), [gate])


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("length", [5, 130])
def test_attention_of_a_tile(length):
    tiles, heads, size = 3, 2, 8

    def formula(*inputs):
        q, k, v = (value.reshape(tiles, length, heads, size).transpose(0, 2, 1, 3) for value in inputs)
        y = softmax(q @ k.swapaxes(-1, -2) * size ** -0.5) @ v
        return y.transpose(0, 2, 1, 3).reshape(tiles * length, heads * size)

    inputs = [values(tiles * length, heads * size) for _ in range(3)]
    check(training.tile_attention(heads, length), formula, inputs, True)


@pytest.mark.parametrize(("length", "ends"), [(6, [[6]]), (150, [[150]]), (150, [[40, 41, 149, 150], [1, 2, 3, 150]])])
def test_causal_attention(length, ends):
    batch, heads, groups, size = 2, 2, 3, 8
    samples = batch if len(ends) > 1 else 1       # packed rows have angles of their own
    angles = RNG.uniform(0, 6, (samples, length, 1, 1, size))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    ends = np.array(ends, np.int32)
    numbers = np.stack([np.searchsorted(row, np.arange(length), "right") for row in ends])
    seen = (numbers[:, :, None] == numbers[:, None]) & np.tri(length, dtype=bool)              # (B or 1, L, L)

    def formula(qkv, cos, sin, _):
        qkv = qkv.reshape(batch, length, heads, groups + 2, size)
        qk, v = qkv[..., :-1, :], qkv[..., -1, :].transpose(0, 2, 1, 3)[:, :, None]
        qk = qk * cos + np.concatenate((-qk[..., size // 2:], qk[..., :size // 2]), -1) * sin
        q = qk[..., :groups, :].transpose(0, 2, 3, 1, 4)                                       # (B, KV, G, L, d)
        k = qk[..., groups, :].transpose(0, 2, 1, 3)[:, :, None]
        scores = np.where(seen[:, None, None], q @ k.swapaxes(-1, -2) * size ** -0.5, -np.inf)
        return (softmax(scores) @ v).transpose(0, 3, 1, 2, 4).reshape(batch * length, -1)

    qkv = values(batch * length, heads * (groups + 2) * size)
    check(training.causal_attention(heads, groups), formula, [qkv, cos, sin, ends], True, 1)


def test_attention_of_models_whose_inputs_have_the_same_shapes():
    """MindSpore infers shapes once for equal operations with equal inputs: another model's must be another one."""
    q, k, v = (values(3 * 5, 16) for _ in range(3))
    for heads in (2, 4, 2):
        y, lse = training.tile_attention(heads, 5)(Tensor(q), Tensor(k), Tensor(v))
        assert lse.shape == (3, heads, 5)
        parts = [value.reshape(3, 5, heads, -1).transpose(0, 2, 1, 3) for value in (q, k, v)]
        expected = softmax(parts[0] @ parts[1].swapaxes(-1, -2) * (16 / heads) ** -0.5) @ parts[2]
        np.testing.assert_allclose(y.asnumpy(), expected.transpose(0, 2, 1, 3).reshape(15, 16), atol=1e-5)
    qkv, angles = Tensor(values(6, 96)), Tensor(np.ones((1, 6, 1, 1, 8), np.float32))
    ends = Tensor(np.array([[6]], np.int32))
    for heads, groups in ((2, 4), (3, 2), (2, 4)):
        y, lse = training.causal_attention(heads, groups)(qkv, angles, angles, ends)
        assert y.shape == (6, heads * groups * 8) and lse.shape == (1, heads, groups, 6)


@pytest.mark.parametrize("rows", [4, 700])
@pytest.mark.parametrize("trains", [True, False])
def test_losses_of_the_head(rows, trains):
    words = 300
    labels = RNG.integers(0, words, rows).astype(np.int32)
    labels[::3] = IGNORE_INDEX

    def formula(x, weight, labels):
        logits = x @ weight.T
        highest = logits.max(-1)
        lse = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
        picked = logits[np.arange(rows), np.where(labels < 0, 0, labels)]
        return np.where(labels == IGNORE_INDEX, 0.0, lse - picked)

    inputs = [values(rows, 20), values(words, 20), labels]
    check(training.head_losses(trains), formula, inputs, True, 2 if trains else 1)
    nothing = [*inputs[:2], np.full(rows, IGNORE_INDEX, np.int32)]
    cell = First(training.head_losses(trains), True)
    assert not cell(*map(Tensor, nothing)).asnumpy().any()
    found = Gradients(cell)(Tensor(values(rows)), *map(Tensor, nothing))
    assert not found[0].asnumpy().any() and not found[1].asnumpy().any()


def test_a_label_that_is_no_word_is_an_error():
    inputs = values(2, 4), values(7, 4), np.array([3, 7], np.int32)
    with pytest.raises(RuntimeError):
        First(training.head_losses(True), True)(*map(Tensor, inputs)).asnumpy()


class Norm(nn.Cell):
    """The norm of gradients as a graph."""

    def __init__(self):
        super().__init__()
        self.kernel = training.gradient_norm()

    def construct(self, *gradients):
        return self.kernel(*gradients)


def test_the_norm_of_gradients_and_whether_all_are_finite():
    gradients, cell = [values(3, 5), values(), values(300, 900)], Norm()
    norm, finite = (value.asnumpy() for value in cell(*map(Tensor, gradients)))
    expected = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in gradients))
    assert norm == pytest.approx([expected], rel=1e-6) and finite == [1]
    gradients[2][-1, -1] = 3e38                     # finite, though its square is not in float32
    norm, finite = (value.asnumpy() for value in cell(*map(Tensor, gradients)))
    assert norm == pytest.approx([3e38], rel=1e-6) and finite == [1]
    for bad in (np.inf, -np.inf, np.nan):
        gradients[2][-1, -1] = bad
        assert cell(*map(Tensor, gradients))[1].asnumpy() == [0]


class Update(nn.Cell):
    """One parameter's AdamW as a graph."""

    def __init__(self):
        super().__init__()
        self.kernel = training.adamw()

    def construct(self, *inputs):
        return self.kernel(*inputs)


@pytest.mark.parametrize("shape", [(3,), (400, 700)])
def test_adamw(shape):
    cell, (b1, b2, eps) = Update(), (0.9, 0.95, 1e-8)
    found = [values(*shape), values(*shape), values(*shape) ** 2]
    weight, mean, square = (value.astype(np.float64) for value in found)
    for step in (1, 2, 100):
        gradient, rate, decay, factor = values(*shape), 1e-2, 0.1, 0.5
        numbers = (np.array([factor], np.float32), np.array(rate, np.float32), np.array(decay, np.float32),
                   np.array([step], np.int32), np.array([b1, b2, eps], np.float32))
        found = [value.asnumpy() for value in cell(*map(Tensor, (*found, gradient, *numbers)))]
        scaled = gradient.astype(np.float64) * factor
        mean, square = mean * b1 + scaled * (1 - b1), square * b2 + scaled ** 2 * (1 - b2)
        root = np.sqrt(square / (1 - b2 ** step)) + eps
        weight = weight * (1 - rate * decay) - rate * (mean / (1 - b1 ** step)) / root
        for one, expected in zip(found, (weight, mean, square)):
            np.testing.assert_allclose(one, expected, rtol=2e-5, atol=2e-6)
