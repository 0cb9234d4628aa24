"""The loss on held-out conversations is the model's mean loss, whatever form training returns it in."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.preference import IXC25ForPreference
from mindformers_ixc.training.evaluation import HeldOut, MeanLoss, evaluation_options

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


def test_batches_weigh_as_their_labelled_positions_and_rest_is_blank():
    fields = read_yaml(Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml")
    data = MindFormerConfig(**fields).train_dataset
    options = evaluation_options({"dataset_dir": "pkg:mindformers_ixc/demo/train.json", "max_samples": 5})
    held_out, batches = HeldOut(data, options), []

    def mean_loss(*columns):
        batches.append([column.asnumpy() for column in columns])
        return Tensor(np.float32(len(batches)))

    found = held_out.loss(mean_loss)
    counts = [(labels != -100).sum() for _, labels, *_ in batches]
    assert [len(labels) for _, labels, *_ in batches] == [4, 4]            # one shape, one graph
    assert (batches[1][1][1:] == -100).all() and counts[1] > 0
    assert found == pytest.approx((counts[0] + 2 * counts[1]) / sum(counts))
    own, others = list(held_out.rows(False)), list(held_out.rows(True))
    assert len(own) == len(others) == 5
    assert any((a["pixel_values"] != b["pixel_values"]).any() for a, b in zip(own, others))
