"""Plans against MindSpore's compiler: what the formulae say is what it makes, so that a search can be trusted."""
from __future__ import annotations

from collections import Counter

import pytest
from planned import recipe, workload

from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.cost import Assumptions, stage_traffic
from mindformers_ixc.planning.memory import stage_memory
from mindformers_ixc.planning.plan import make_plan
from mindformers_ixc.planning.workload import local_parameters

# Few layers compile fast; every kind of parameter is still there.
SMALL = {"model__model_config__num_hidden_layers": 2, "model__model_config__vision_config__num_hidden_layers": 1,
         "model__model_config__task_lora_ranks": {}, "parallel__full_batch": True,
         "parallel__enable_parallel_optimizer": True, "parallel__parallel_mode": 1}


def planned(layout: Degrees, **overrides):
    """Plan and workload of a small model in a layout."""
    fields = recipe("sft_tiny", **{**SMALL, **overrides})
    placed = workload(fields, layout)
    return make_plan(fields, placed, 2 ** 30, Assumptions()), placed


def sent(traffic) -> Counter:
    """Bytes of a step by purpose, operator and size of the group."""
    found = Counter()
    for one in traffic:
        found[one.purpose, one.operator, len(one.group)] += one.bytes
    return found


def compare(plan, placed, exact: tuple[str, ...]) -> None:
    """Compares slices, state and the messages of some purposes."""
    assert not plan.problems and not plan.notes
    for stage, own in zip(plan.stages, local_parameters(placed)):
        slices = {parameter.name: (parameter.shape, parameter.local, parameter.optimizer_shards, parameter.replicas,
                                   parameter.trained) for parameter in own}
        assert slices == {parameter.name: (parameter.shape, parameter.local, parameter.optimizer_shards,
                                           parameter.replicas, parameter.trained) for parameter in stage.parameters}
        memory = stage_memory(placed, stage.stage, own)
        assert (stage.memory.parameters, stage.memory.gradients, stage.memory.optimizer) \
            == (memory.parameters, memory.gradients, memory.optimizer)
        compiled, formula = sent(stage.traffic), sent(stage_traffic(placed, stage.stage, own))
        for key in compiled.keys() | formula.keys():
            # the loss of each position is gathered over replicas, which its gradient scatters: a few bytes
            if key[0] in exact and key[:2] != ("backward", "ReduceScatter"):
                assert compiled[key] == formula[key], key


@pytest.mark.slow
def test_data_tensor_and_pipeline_parallel_with_optimizer_sharding():
    plan, placed = planned(Degrees(2, 2, 2, 4))
    compare(plan, placed, ("forward", "backward", "gradient", "optimizer", "pipeline"))
    assert not [warning for stage in plan.stages for warning in stage.warnings]
    assert all(stage.seconds > 0 and stage.peak_bytes > 0 for stage in plan.stages)


@pytest.mark.slow
def test_the_step_of_ascend_with_sharding_over_tensor_parallel_copies_and_sequence_parallel():
    # micro batches share a graph here, and weights are gathered outside of it, before their cast
    plan, placed = planned(
        Degrees(1, 2, 1, 4), parallel_config__use_seq_parallel=True, context__device_target="Ascend",
        model__model_config__compute_dtype="bfloat16", model__model_config__use_flash_attention=True,
        recompute_config={"recompute": True}, parallel__parallel_optimizer_config={"parallel_optimizer_threshold": 0})
    compare(plan, placed, ("forward", "backward", "gradient", "optimizer"))
    assert not [warning for stage in plan.stages for warning in stage.warnings]


@pytest.mark.slow
def test_a_plan_from_three_layers_of_a_kind_is_that_of_all():
    # both stages have more than three layers, and so has the tower
    layers = {"model__model_config__num_hidden_layers": 8, "model__model_config__vision_config__num_hidden_layers": 4}
    fields = recipe("sft_tiny", **{
        **SMALL, **layers,
        "context__device_target": "Ascend", "model__model_config__compute_dtype": "bfloat16",
        "model__model_config__use_flash_attention": True, "parallel_config__use_seq_parallel": True,
        "recompute_config": {"recompute": True}})
    placed = workload(fields, Degrees(2, 2, 2, 2))
    short, whole = (make_plan(fields, placed, 2 ** 30, Assumptions(), every_layer=every) for every in (False, True))
    for ours, theirs in zip(short.stages, whole.stages):
        assert sorted(map(repr, ours.parameters)) == sorted(map(repr, theirs.parameters))
        assert sent(ours.traffic) == sent(theirs.traffic)
        assert ours.memory == theirs.memory
