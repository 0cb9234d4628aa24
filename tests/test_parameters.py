"""The table of parameters against the cells, and the published counts."""
from __future__ import annotations

import math

import pytest
from mindspore import nn

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.config import read_config
from mindformers_ixc.parameters import PARTS, base_name, layer_of, parameter_table, part_of


def test_the_table_is_what_the_cells_have(goldens):
    config = read_config(goldens / "t1", IXC25Config)
    model = IXC25ForCausalLM(config)
    found = {parameter.name: tuple(parameter.shape) for parameter in model.get_parameters()}
    assert {entry.name: entry.shape for entry in parameter_table(config).values()} == found


def test_the_table_is_what_the_7b_cells_have():
    config = IXC25Config()
    with nn.no_init_parameters():
        model = IXC25ForCausalLM(config)
    found = {parameter.name: tuple(parameter.shape) for parameter in model.get_parameters()}
    assert {entry.name: entry.shape for entry in parameter_table(config).values()} == found


@pytest.mark.parametrize(("parts", "billions"), [
    # the published sizes: the LLM, Partial LoRA, ViT, projector; everything; everything but the task LoRAs
    (["language"], "7.738"), (["partial_lora"], "0.604"), (["vision"], "0.305"), (["projector"], "0.0336"),
    (list(PARTS), "11.096"), ([part for part in PARTS if not part.startswith("task_lora")], "8.680")])
def test_counts_of_the_7b_model(parts, billions):
    table = parameter_table(IXC25Config()).values()
    count = sum(math.prod(entry.shape) for entry in table if entry.part in parts)
    assert f"{count / 1e9:.{len(billions.split(chr(46))[1])}f}" == billions


def test_every_parameter_has_a_part_and_strangers_have_none():
    # "lora" is MindFormers' own adapter, which a configuration does not know of; only a reward model has its head
    parts = {entry.part for entry in parameter_table(IXC25Config()).values()}
    assert parts == set(PARTS) - {"lora", "reward_head"}
    rewards = parameter_table(IXC25Config(reward_pooling="last"))
    assert rewards["v_head.weight"].part == "reward_head" and "output.weight" not in rewards
    assert part_of("transformer.h.0.attn.weight") is None


def test_optimizer_states_lead_to_their_parameter():
    assert base_name("adam_m.model.layers.7.attention.wo.weight") == "model.layers.7.attention.wo.weight"
    assert base_name("model.norm.weight") == "model.norm.weight"
    assert layer_of("adam_v.model.layers.7.attention.wo.weight") == 7
    assert layer_of("vit.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight") is None
