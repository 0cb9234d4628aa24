"""The loss on held-out conversations is the model's mean loss, whatever form training returns it in."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.preference import IXC25ForPreference
from mindformers_ixc.training.evaluation import MeanLoss

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 2, "plora_alpha": 2, "seq_length": 12,
         "max_tiles": 1, "task_lora_ranks": {"sft": 2, "dpo": 2}, "adapter_mode": "write",
         "vision_config": {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 16}}


def model_of(cls=IXC25Model, **fields):
    ms.set_seed(5)
    model = cls(IXC25Config(**SIZES, **fields))
    model.set_train(False)
    return model


@pytest.fixture(scope="module")
def batch() -> list[Tensor]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 64, (3, 12)).astype(np.int32)
    labels = np.where(rng.random((3, 12)) < 0.5, ids, -100).astype(np.int32)
    mask = np.zeros_like(ids)
    mask[:, 2] = 1
    return [Tensor(ids), Tensor(labels), Tensor(rng.normal(size=(3, 1, 3, 28, 28)).astype(np.float32)), Tensor(mask),
            Tensor(mask)]


@pytest.fixture(scope="module")
def expected(batch) -> bytes:
    return model_of()(*batch).asnumpy().tobytes()


@pytest.mark.parametrize(("cls", "fields"), [
    (IXC25Model, {}), (IXC25Model, {"calculate_per_token_loss": True}),
    (IXC25Model, {"loss_form": "sources", "num_sources": 2}), (IXC25ForPreference, {})])
def test_it_is_bit_equal_to_the_loss_of_a_plain_step(batch, expected, cls, fields):
    model = model_of(cls, **fields)
    names = [parameter.name for parameter in model.get_parameters()]
    loss = MeanLoss(model)
    assert loss(*batch).asnumpy().tobytes() == expected
    assert [parameter.name for parameter in model.get_parameters()] == names
