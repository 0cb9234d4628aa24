"""Packed sequences and dropout from seeds: what they must equal."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.data.packing import join_samples
from mindformers_ixc.demo import demo_path
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.dropout import SeededDropout
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

SMALL = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 4, "plora_alpha": 4,
         "task_lora_ranks": {}, "max_tiles": 4, "vision_config": {
             "image_size": 56, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}}
SEQ_LENGTH = 160


def small_model(**fields) -> IXC25ForCausalLM:
    ms.set_context(mode=0)
    ms.set_seed(0)
    return IXC25ForCausalLM(IXC25Config(**{**SMALL, "seq_length": SEQ_LENGTH, **fields}))


def encoded():
    processor = IXC25Processor(IXC25ImageProcessor(56), InternLM2Tokenizer(str(demo_path("tokenizer.model"))))
    rng = np.random.default_rng(0)
    samples = []
    for i, question in enumerate(("what is shown?", "and what would be a good title for it?", "which colour?")):
        picture = rng.integers(0, 255, (50, 60 + i, 3), np.uint8)
        samples.append(processor.encode_conversation([("user", question), ("assistant", f"answer {i}")], [picture],
                                                     hd_num=1))
    return processor, samples


@pytest.mark.slow
def test_a_packed_batch_has_the_loss_and_gradients_of_its_samples():
    _, samples = encoded()
    model = small_model(plora_dropout=0.0)
    model.set_train(True)
    for name, cell in model.cells_and_names():
        if name.endswith("Plora_B"):
            cell.weight.set_data(ms.numpy.rand(cell.weight.shape) * 0.1)
    columns = (*BATCH_COLUMNS, *PACKING_COLUMNS)

    def loss_and_gradients(rows, tiles):
        batch = [Tensor(np.stack([row[name] for row in rows])) for name in columns]
        model.set_grad()
        grad = ms.ops.GradOperation(get_by_list=True)
        weights = ms.ParameterTuple([p for p in model.trainable_params() if p.name in
                                     ("model.layers.0.attention.wqkv.weight", "vision_proj.0.weight")])
        return model(*batch).asnumpy(), [g.asnumpy() for g in grad(model, weights)(*batch)]

    model.max_tiles = 6
    apart = loss_and_gradients([join_samples([sample], SEQ_LENGTH, 6, 2, max_segments=5) for sample in samples], 6)
    packed = loss_and_gradients([join_samples(samples, SEQ_LENGTH, 6, 2, max_segments=5)], 6)
    assert packed[0] == pytest.approx(apart[0], rel=1e-5)
    for one, other in zip(packed[1], apart[1]):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


class Drop(nn.Cell):
    def __init__(self, rate, salt=0):
        super().__init__()
        self.dropout = SeededDropout(rate, 512, salt)
        self.set_train(True)

    def construct(self, x, noise):
        return self.dropout(x, noise)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_noise_from_seeds_has_the_rate_and_is_uncorrelated(rate):
    ms.set_context(mode=0)
    seeds = Tensor(np.random.default_rng(0).integers(0, 2 ** 31 - 1, (1000, 1)).astype(np.int32))
    x = Tensor(np.ones((1000, 512), np.float32))
    kept = Drop(rate)(x, seeds).asnumpy()
    np.testing.assert_allclose(np.unique(kept), [0, 1 / (1 - rate)], rtol=1e-6)
    dropped = kept == 0
    noise = 4 * np.sqrt(rate * (1 - rate))       # four standard deviations of one draw
    assert abs(dropped.mean() - rate) < noise / np.sqrt(dropped.size)
    assert abs(dropped.mean(0) - rate).max() < 1.3 * noise / np.sqrt(1000)
    assert abs(dropped.mean(1) - rate).max() < 1.3 * noise / np.sqrt(512)
    others = [dropped[1:] & dropped[:-1], dropped[:, 1:] & dropped[:, :-1],
              dropped & (Drop(rate, 1)(x, seeds).asnumpy() == 0)]
    for both in others:
        assert abs(both.mean() - rate ** 2) < 3 * noise / np.sqrt(both.size)
    np.testing.assert_array_equal(kept, Drop(rate)(x, seeds).asnumpy())
