"""Training steps through the kernels for the CPU: the ones that MindSpore's own operations take."""
from __future__ import annotations

import shutil

import mindspore as ms
import numpy as np
import pytest
from mindformers.core import build_optim
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer.optimizer_grouped_parameters import get_optimizer_grouped_parameters
from mindspore import Tensor, nn
from native_batch import SIZES, batch

from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.native import SWITCH
from mindformers_ixc.training.averaging import AveragedOptimizer, averages_of
from mindformers_ixc.training.optimizer import IXC25AdamW, native_optimizer
from mindformers_ixc.training.parts import train_only
from mindformers_ixc.training.wrapper import IXC25TrainOneStepCell

RATE = 1e-2          # of the steps, at its highest

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


def model_of(parts=None) -> IXC25ForCausalLM:
    """The same random model each time, of which no parameter is zero."""
    ms.set_context(mode=ms.GRAPH_MODE)
    model, rng = IXC25ForCausalLM(IXC25Config(**SIZES)), np.random.default_rng(1)
    for parameter in model.get_parameters():
        value = rng.standard_normal(parameter.shape) * 0.3 + ("norm" in parameter.name)
        parameter.set_data(Tensor(value.astype(np.float32)))
    if parts:
        train_only(model, parts)
    return model


def steps(monkeypatch, native: bool, parts=None, ema_decay: float | None = None, **options) -> dict[str, np.ndarray]:
    """Losses and gradient norms of three steps, then weights, moments and averages by name."""
    monkeypatch.setenv(SWITCH, str(int(native)))
    model = model_of(parts)
    rate = CosineWithWarmUpLR(learning_rate=RATE, warmup_steps=2, total_steps=20)
    section = MindFormerConfig(type="AdamW", betas=[0.9, 0.95])
    with native_optimizer(section, model.trainable_params(), ema_decay is not None):
        optimizer = build_optim(section, {"params": get_optimizer_grouped_parameters(model, 0.1, rate),
                                          "learning_rate": rate})
    assert section.type == "AdamW" and isinstance(optimizer, IXC25AdamW) == (native and ema_decay is None)
    if ema_decay is not None:
        optimizer = AveragedOptimizer(optimizer, ema_decay)
    cell = IXC25TrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=1.0, **options)
    cell.set_train(True)
    assert cell.is_native == native
    found, inputs = {}, batch()
    for number in range(3):
        loss, overflow, _, _, norm = cell(*inputs)
        assert not overflow.asnumpy()
        found[f"loss {number}"], found[f"norm {number}"] = loss.asnumpy(), norm.asnumpy()
    for parameter in cell.get_parameters():
        found[parameter.name] = parameter.asnumpy()
    return {**found, **{f"average {name}": value.asnumpy() for name, value in averages_of(cell).items()}}


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """As close as rounding lets three steps of AdamW be, which divides small numbers by small numbers.

    Where a gradient is nothing but rounding, AdamW makes steps of it: that is one weight in a thousand at most, and no
    further away than a step. `test_native_gradients` compares the gradients themselves.
    """
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith("k_proj.bias"):       # attention does not depend on it: its gradient is rounding, AdamW's step
            continue                           # the learning rate in its direction
        assert one[name].shape == other[name].shape
        size = np.abs(other[name]).max() if other[name].size else 0
        if name.startswith(("loss", "norm")):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-4 * size + 1e-12, err_msg=name)
            continue
        apart = np.abs(one[name] - other[name])
        off = apart > 1e-3 * np.abs(other[name]) + 1e-4 * size + 1e-12
        assert off.mean() <= 1e-3 and apart.max(initial=0) <= RATE, name


@pytest.mark.slow
def test_packed_rows_with_dropout_in_parts_with_an_average(monkeypatch):
    options = {"micro_batches": 2, "labels_column": 1, "ema_decay": 0.75}
    start = {parameter.name: parameter.asnumpy().copy() for parameter in model_of().trainable_params()}
    native = steps(monkeypatch, True, **options)
    compare(native, steps(monkeypatch, False, **options))
    assert native["loss 2"] < native["loss 0"]
    assert all((native[name] != value).any() for name, value in start.items())


@pytest.mark.slow
def test_a_part_alone(monkeypatch):
    parts = ["partial_lora"]                  # the head does not train: its losses are another kernel
    start = {parameter.name: parameter.asnumpy().copy() for parameter in model_of().get_parameters()}
    native = steps(monkeypatch, True, parts)
    compare(native, steps(monkeypatch, False, parts))
    trained = {parameter.name for parameter in model_of(parts).trainable_params()}
    assert {name for name, value in start.items() if (native[name] != value).any()} == trained


class Square(nn.Cell):
    """A loss whose gradient is what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(Tensor(np.ones(4, np.float32)), name="weight")

    def construct(self, x):
        return (self.weight * x).sum()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    network = Square()
    optimizer = IXC25AdamW(network.trainable_params(), learning_rate=0.1)
    cell = IXC25TrainOneStepCell(network, optimizer, use_clip_grad=True)
    cell.set_train(True)
    assert cell(Tensor(np.array([1, bad, 2, 3], np.float32)))[1].asnumpy()
    assert (network.weight.asnumpy() == 1).all() and optimizer.global_step.asnumpy() == [0]
    assert not cell(Tensor(np.array([1, 1e37, 2, 3], np.float32)))[1].asnumpy(), "its square alone is not finite"
    assert (network.weight.asnumpy() != 1).any() and optimizer.global_step.asnumpy() == [1]


def test_where_the_kernel_cannot_be_the_optimizer_stays(monkeypatch):
    def chosen(weights, averages=False, **section):
        section = MindFormerConfig(**section)
        with native_optimizer(section, weights, averages):
            return section.type

    weights = Square().trainable_params()
    assert chosen(weights, type="AdamW") == "IXC25AdamW"
    assert chosen(weights, type="Adam") == "Adam"
    assert chosen(weights, True, type="AdamW") == "AdamW"
    assert chosen(weights, type="AdamW", swap=True) == "AdamW"
    half = ms.Parameter(Tensor(np.ones(2, np.float16)), name="half")
    assert chosen([*weights, half], type="AdamW") == "AdamW"
    monkeypatch.setenv(SWITCH, "0")
    assert chosen(weights, type="AdamW") == "AdamW"
