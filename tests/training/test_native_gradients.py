"""Gradients of the kernels for the CPU, whatever trains and however: the ones of MindSpore's own operations."""
from __future__ import annotations

import shutil

import numpy as np
import pytest
from mindformers.core import build_optim
from mindformers.modules.transformer import TransformerOpParallelConfig, TransformerRecomputeConfig
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor
from native_batch import SIZES, batch

from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.native import SWITCH
from mindformers_ixc.parameters import part_of
from mindformers_ixc.training.averaging import AveragedOptimizer
from mindformers_ixc.training.optimizer import native_optimizer
from mindformers_ixc.training.pet import inject
from mindformers_ixc.training.wrapper import IXC25TrainOneStepCell

# without a compiler there are no kernels, as docs/install.md says
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

HEAD = "output.weight"

# What can train by itself: the parts, an ordinary LoRA, and the head without the rest of the language model.
PARTS = ("language", "partial_lora", "projector", "separators", "vision", "task_lora.web", "lora", "head")

# Ways to compute a step: dropout, recomputation, parts of a batch, a moving average.
WAYS = {
    "dropout": {},
    "plain": {"dropout": 0.0},
    "select_recompute": {"recompute": {"select_recompute": True}},
    "all": {"recompute": {"recompute": True}, "micro_batches": 2, "average": True},
}


def model_of(dropout: float, recompute: dict, trained: tuple[str, ...]) -> IXC25ForCausalLM:
    """The same random model each time, of which no parameter is zero and some parts train."""
    sizes = {**SIZES, "num_hidden_layers": 1, "plora_dropout": dropout}
    if recompute:
        sizes["parallel_config"] = TransformerOpParallelConfig(recompute=TransformerRecomputeConfig(**recompute))
    model, rng = IXC25ForCausalLM(IXC25Config(**sizes)), np.random.default_rng(1)
    inject(model, lambda cell: cell.add_lora(4, 8, 0.0))
    for parameter in model.get_parameters():
        value = rng.standard_normal(parameter.shape) * 0.3 + ("norm" in parameter.name)
        parameter.set_data(Tensor(value.astype(np.float32)))
        trains = part_of(parameter.name) in trained or (parameter.name == HEAD and "head" in trained)
        parameter.requires_grad = parameter.requires_grad and trains
    model.chunked_losses.weight_trains = model.output.weight.requires_grad
    return model


def inputs() -> list[Tensor]:
    """The batch, with loss on pictures too: all that a layer adds there would have no gradient otherwise."""
    columns, rng = batch(), np.random.default_rng(2)
    labels, mask = columns[1].asnumpy().copy(), columns[6].asnumpy() == 1
    labels[mask] = rng.integers(0, SIZES["vocab_size"], mask.sum())
    columns[1] = Tensor(labels)
    return columns


def gradients(native: bool, trained: tuple[str, ...], dropout: float = 0.3, recompute: dict | None = None,
              micro_batches: int = 1, average: bool = False) -> dict[str, np.ndarray]:
    """The loss and the gradients by name: what AdamW's first moments are after a step from nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, str(int(native)))
        model = model_of(dropout, recompute or {}, trained)
        section = MindFormerConfig(type="AdamW", betas=[0.5, 0.95])
        with native_optimizer(section, model.trainable_params(), average):
            optimizer = build_optim(section, {"params": model.trainable_params(), "learning_rate": 1e-3})
        whole = AveragedOptimizer(optimizer, 0.75) if average else optimizer
        cell = IXC25TrainOneStepCell(model, whole, micro_batches, 1 if micro_batches > 1 else None,
                                     use_clip_grad=True, max_grad_norm=1e9)
        cell.set_train(True)
        assert cell.is_native == native
        loss = cell(*inputs())[0].asnumpy()
    moments = {parameter.name: 2 * moment.asnumpy() for parameter, moment in zip(optimizer.parameters,
                                                                                 optimizer.exp_avg)}
    return {"loss": loss, **moments}


def compare(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every gradient is right to 1e-4 of its largest number, as against the reference outputs: both sides are sums in
    float32 whose order depends on the threads that are free, and the terms of biases and embeddings cancel out."""
    for name, value in found.items():
        # attention does not depend on the bias of its keys: that gradient is rounding, of numbers of the queries' size
        size = np.abs(expected[name.replace("k_proj.bias", "q_proj.bias")]).max()
        assert size > 0 and np.isfinite(value).all(), name
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-4 * size, err_msg=name)


def check(way: dict, choices: list[tuple[str, ...]]) -> None:
    """Compares, for each choice of what trains, with one step of MindSpore's operations in which everything does."""
    expected = gradients(False, PARTS, **way)
    for trained in choices:
        found = gradients(True, trained, **way)
        names = {name for name in expected if name == "loss" or part_of(name) in trained
                 or (name == HEAD and "head" in trained)}
        assert found.keys() == names and len(names) > 1, trained
        compare(found, expected)


def test_the_vision_tower_alone():
    check({}, [("vision",)])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dropout", "all"])
def test_each_part_alone(way):
    check(WAYS[way], [(part,) for part in PARTS])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "select_recompute"])
def test_all_parts(way):
    check(WAYS[way], [PARTS])
