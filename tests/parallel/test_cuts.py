"""The table of tensor-parallel cuts: shapes that divide, degrees that are refused, stages."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc import ConfigError, IXC25Config
from mindformers_ixc.parallel.cuts import COLUMNS, ROWS, allowed_degrees, check_degree, check_stages, cut_axis
from mindformers_ixc.parallel.stages import layer_stages, stages_of_layers, work_of_sample
from mindformers_ixc.parameters import parameter_table

LAYER = "model.layers.3"


@pytest.mark.parametrize(("name", "axis"), [
    (f"{LAYER}.attention.wqkv.weight", ROWS), (f"{LAYER}.attention.wo.weight", COLUMNS),
    (f"{LAYER}.feed_forward.w1.weight", ROWS), (f"{LAYER}.feed_forward.w2.weight", COLUMNS),
    # a pair is cut with its linear, its rank stays whole
    (f"{LAYER}.attention.wqkv.Plora_A.weight", None), (f"{LAYER}.attention.wqkv.Plora_B.weight", ROWS),
    (f"{LAYER}.attention.wo.Plora_A.weight", COLUMNS), (f"{LAYER}.attention.wo.Plora_B.weight", None),
    (f"{LAYER}.feed_forward.w2.lora_web_A.weight", COLUMNS), (f"{LAYER}.feed_forward.w3.lora_dpo_B.weight", ROWS),
    (f"{LAYER}.attention_norm.weight", None), ("model.tok_embeddings.weight", ROWS), ("output.weight", ROWS),
    ("vit.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias", ROWS),
    ("vit.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight", COLUMNS),
    ("vit.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias", None),
    ("vit.vision_tower.vision_model.embeddings.position_embedding.weight", None),
    ("vision_proj.0.bias", ROWS), ("vision_proj.2.weight", COLUMNS), ("plora_sub_GN", None)])
def test_where_a_parameter_is_cut(name, axis):
    assert cut_axis(name) == axis


def test_every_cut_of_the_7b_model_divides():
    config = IXC25Config()
    assert allowed_degrees(config) == [1, 2, 4, 8]
    for entry in parameter_table(config).values():
        axis = cut_axis(entry.name)
        assert axis is None or entry.shape[axis] % 8 == 0


def test_a_shard_of_the_consolidated_qkv_holds_whole_groups():
    config = IXC25Config()
    group = (config.query_groups + 2) * config.head_size
    rows = parameter_table(config)["model.layers.0.attention.wqkv.weight"].shape[0]
    for degree in allowed_degrees(config):
        assert rows // degree % group == 0


@pytest.mark.parametrize("degree", [3, 16, 0])
def test_other_degrees_are_refused_with_those_that_work(degree):
    with pytest.raises(ConfigError, match=r"8 key/value groups, 16 vision heads.*are 1, 2, 4, 8"):
        check_degree(IXC25Config(), degree)


@pytest.mark.parametrize("stages", [0, 33])
def test_more_stages_than_layers_are_refused(stages):
    with pytest.raises(ConfigError, match="choose 1 to 32"):
        check_stages(IXC25Config(), stages)


@given(st.integers(16, 80), st.integers(1, 16))
def test_stages_are_in_order_and_balanced(layers, stages):
    found = layer_stages(layers, stages)
    counts = [found.count(stage) for stage in range(stages)]
    assert found == sorted(found) and len(found) == layers
    assert max(counts) - min(counts) <= 1


def test_an_offset_moves_layers():
    assert layer_stages(8, 2, [-1, 1]) == [0, 0, 0, 1, 1, 1, 1, 1]


def test_offsets_that_leave_layers_or_stages_out_are_refused():
    with pytest.raises(ConfigError, match="sum to 0"):
        layer_stages(8, 2, [1, 1])
    with pytest.raises(ConfigError, match="one number for each"):
        layer_stages(8, 2, [1, -1, 0])
    with pytest.raises(ConfigError, match="each needs one at least"):
        layer_stages(4, 2, [-2, 2])


@given(st.integers(2, 8), st.integers(8, 40))
def test_auto_gives_no_stage_more_work_than_one_layer_above_another(stages, layers):
    config = IXC25Config(num_hidden_layers=layers, offset="auto")
    found = stages_of_layers(config, stages)
    assert found == sorted(found) and len(found) == layers and set(found) == set(range(stages))
    vision, layer, head = work_of_sample(config)
    work = [found.count(stage) * layer for stage in range(stages)]
    work[0] += vision
    work[-1] += head
    for stage in range(stages):          # taking a layer from the busiest to any other does not help
        if found.count(stage) > 1:
            assert work[stage] - layer <= min(work) + 1e-6 * layer


def test_a_replicated_tower_allows_degrees_that_do_not_divide_its_heads():
    sizes = {"vision_config": {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 96}}
    assert 4 not in allowed_degrees(IXC25Config(**sizes))
    assert 4 in allowed_degrees(IXC25Config(**sizes, vision_parallel="replicated"))
