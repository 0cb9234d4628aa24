"""The loss a chunk of positions at a time, against its formula: losses, gradients, forms and what the graph keeps."""
from __future__ import annotations

import os
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from mindspore.ops import operations as P

from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.loss import IGNORE_INDEX, BatchLoss, HeadLosses
from mindformers_ixc.models.report import SourceSums
from mindformers_ixc.native import SWITCH

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 7, 8, 13
POSITIONS = ROWS * LENGTH


@pytest.fixture(autouse=True, params=["1", "0"], ids=["native", "composed"])
def native(request, monkeypatch) -> str:
    """Every test runs with the kernels for the CPU and with MindSpore's operations."""
    monkeypatch.setenv(SWITCH, request.param)
    return request.param


def config_of(chunk: int = 4, **fields) -> IXC25Config:
    return IXC25Config(**{"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 2,
                          "num_key_value_heads": 1, "num_hidden_layers": 1, "loss_chunk": chunk, **fields})


class Weighted(nn.Cell):
    """Every position's loss times a weight of its own, summed: gradients then tell positions apart."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.weight = Parameter(Tensor(arrays()["weight"]), name="weight")
        self.losses = HeadLosses(config)
        self.sum = P.ReduceSum()

    def construct(self, x, labels, factors):
        losses = self.losses(x, self.weight, labels)
        return self.sum(losses * factors), losses


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    labels[0, :3] = labels[1, 5:] = IGNORE_INDEX
    return {"weight": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
            "x": rng.standard_normal((POSITIONS, WIDTH)).astype(np.float32), "labels": labels,
            "factors": rng.standard_normal((ROWS, LENGTH)).astype(np.float32),
            "source": rng.integers(0, 3, (ROWS, LENGTH)).astype(np.int32)}


def formula(x, weight, labels, factors):
    """Losses `(B, L)` and the gradients for x and weight of their weighted sum, in float64."""
    logits = x.astype(np.float64) @ weight.T.astype(np.float64)
    labelled = labels.reshape(-1) != IGNORE_INDEX
    targets = np.where(labelled, labels.reshape(-1), 0)
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    losses = np.where(labelled, -logs[np.arange(len(logs)), targets], 0.0)
    inner = np.exp(logs)
    inner[np.arange(len(logs)), targets] -= 1
    inner *= (labelled * factors.reshape(-1))[:, None]
    return losses.reshape(labels.shape), inner @ weight, inner.T @ x


def measured(config: IXC25Config, x, weight, labels, factors):
    net = Weighted(config)
    net.weight.set_data(Tensor(weight))
    graph = ms.value_and_grad(net, 0, ms.ParameterTuple([net.weight]), has_aux=True)
    (_, losses), (of_x, (of_weight,)) = graph(Tensor(x), Tensor(labels), Tensor(factors))
    return losses.asnumpy(), of_x.asnumpy(), of_weight.asnumpy()


# 14 positions: one chunk, even chunks, an uneven last one, a last one of a single position, single positions
@pytest.mark.parametrize("chunk", [1024, 14, 7, 4, 13, 1])
def test_losses_and_gradients_are_those_of_the_formula(chunk):
    given = arrays()
    inputs = [given[name] for name in ("x", "weight", "labels", "factors")]
    found = measured(config_of(chunk), *inputs)
    for ours, right in zip(found, formula(*inputs)):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
    assert (found[0][given["labels"] == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("labelled", [(), ((1, 6),)])
def test_nothing_or_one_position_is_labelled(labelled):
    given = arrays()
    labels = np.full((ROWS, LENGTH), IGNORE_INDEX, np.int32)
    for place in labelled:
        labels[place] = VOCABULARY - 1
    inputs = [given["x"], given["weight"], labels, given["factors"]]
    found = measured(config_of(5), *inputs)
    for ours, right in zip(found, formula(*inputs)):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
    if not labelled:
        assert not any(value.any() for value in found)


def test_logits_that_would_overflow_do_not():
    given = arrays()
    inputs = [given["x"] * 1e3, given["weight"], given["labels"], given["factors"]]
    losses, of_x, _ = measured(config_of(5), *inputs)
    np.testing.assert_allclose(losses, formula(*inputs)[0], rtol=1e-4, atol=1e-3)
    assert np.isfinite(of_x).all()


class Forms(nn.Cell):
    def __init__(self, config: IXC25Config):
        super().__init__()
        self.loss, self.source_sums = BatchLoss(config), SourceSums(config)

    def construct(self, losses, labels, source):
        return self.loss(losses, labels), self.source_sums(losses, labels, source)


@pytest.mark.parametrize("nothing", [False, True])
@pytest.mark.parametrize("form", ["mean", "sums"])
def test_forms_of_the_loss(form, nothing):
    given = arrays()
    labels = np.full_like(given["labels"], IGNORE_INDEX) if nothing else given["labels"]
    losses = np.where(labels == IGNORE_INDEX, 0, np.abs(given["factors"])).astype(np.float32)
    cell = Forms(config_of(loss_form=form, num_sources=3))
    loss, report = cell(*map(Tensor, (losses, labels, given["source"])))
    count = (labels != IGNORE_INDEX).sum()
    if form == "sums":
        np.testing.assert_allclose([value.asnumpy() for value in loss], [losses.sum(), count], rtol=1e-6)
    else:
        np.testing.assert_allclose(loss.asnumpy(), losses.sum() / max(count, 1), rtol=1e-6)
    right = [[values[given["source"] == number].sum() for number in range(3)]
             for values in (losses, labels != IGNORE_INDEX)]
    np.testing.assert_allclose(report.asnumpy(), right, rtol=1e-6)


def test_sources_outside_the_report_count_nowhere():
    labels, losses = np.zeros((1, 4), np.int32), np.ones((1, 4), np.float32)
    source = np.array([[0, -1, 5, 1]], np.int32)
    _, report = Forms(config_of(num_sources=2))(*map(Tensor, (losses, labels, source)))
    np.testing.assert_array_equal(report.asnumpy(), [[1, 1], [1, 1]])


class Step(nn.Cell):
    """Loss and gradients in one graph."""

    def __init__(self, config: IXC25Config, weight: np.ndarray):
        super().__init__()
        self.net = Weighted(config)
        self.net.weight = Parameter(Tensor(weight), name="weight")
        self.grad = ms.value_and_grad(self.net, 0, ms.ParameterTuple([self.net.weight]), has_aux=True)

    def construct(self, x, labels, factors):
        return self.grad(x, labels, factors)


def peak_of(work) -> int:
    """Bytes by which the process grows at most while something is done."""
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")      # the peak begins anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_only_one_chunk_of_logits_is_in_memory(native):
    positions, vocabulary, chunk = 2000, 48_000, 125
    copy = positions * vocabulary * 4                                             # 384 MB
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (vocabulary, positions))
    labels = rng.integers(0, vocabulary, (1, positions)).astype(np.int32)
    inputs = [Tensor(value) for value in (x, labels, np.ones(labels.shape, np.float32))]

    def train(size: int) -> None:
        graph = Step(config_of(size, vocab_size=vocabulary), weight)
        assert np.isfinite(graph(*inputs)[0][0].asnumpy())

    # a chunk is a sixteenth of a copy of the logits; four of them, and what compiling takes
    assert peak_of(lambda: train(chunk)) < copy / 2
    if native == "0":       # MindSpore's pool is warm now, and yet whole logits need three copies
        assert peak_of(lambda: train(positions)) > 2 * copy
