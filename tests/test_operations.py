"""Operations against the numbers of the 7B model, counted by hand."""
from __future__ import annotations

import pytest

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.operations import Costs, goodput, tower_operations, training_costs

LAYER = 4096 * (6144 + 4096 + 3 * 14336)           # numbers in the five linears of a decoder layer
HEAD = 92544 * 4096


def test_costs_of_the_7b_model():
    config = ModelConfig(task_lora_ranks={}, plora_rank=0)
    layer = 2 * 1601 * 12 * 1024 ** 2 + 4 * 1601 ** 2 * 1024
    assert tower_operations(config) == 24 * layer + 2 * 1600 * 588 * 1024
    costs = training_costs(config)
    assert costs.position == 3 * 2 * (32 * LAYER + HEAD)
    assert costs.tile == 3 * (tower_operations(config) + 2 * 400 * (4096 * 4096 + 4096 * 4096))
    assert costs.pair == 3 * 4 * 4096 * 32


def test_what_is_frozen_is_counted_forward_only():
    config = ModelConfig(task_lora_ranks={})
    pairs = 2 * 256 * (4096 + 6144 + 2 * 4096 + 3 * (4096 + 14336))
    costs = training_costs(config, ["vision", "projector", "partial_lora"])
    assert costs.position == 2 * (32 * LAYER + HEAD) + 3 * 32 * pairs
    assert costs.tile == training_costs(config).tile


def test_goodput():
    costs = Costs(tile=10.0, position=1.0, pair=0.5)
    assert goodput(costs, 100, 4, 2, 100, 4) == pytest.approx(140 / 280)
    assert goodput(costs, 200, 8, 2, 100, 4) == 1.0
    assert goodput(costs, 0, 0, 0, 100, 4) == 1.0
    assert costs.of(3, 1, [2, 3]) == 3 + 10 + 0.5 * 13
