"""What `convert` cuts by the table of cuts is what MindSpore's compiler arrives at, in every layout, field by field."""
from __future__ import annotations

import dataclasses

import pytest
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
from random_model import make

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.layouts import Layout
from mindformers_ixc.checkpoint.strategy_file import STRATEGY_FILE, read_strategy
from mindformers_ixc.checkpoint.writing import expected_layouts
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import LayoutError
from mindformers_ixc.parameters import parameter_table
from mindformers_ixc.planning.check_layout import check_layout, compare_layouts, compile_layouts


def message(path) -> tuple[int, dict[str, str], dict[str, str]]:
    """A strategy file by MindSpore's own classes: stage counter, operators and layouts as text, by name."""
    found = ParallelStrategyMap()
    found.ParseFromString(path.read_bytes())
    return (found.current_stage,
            {item.node_name: str(item.parallel_strategys) for item in found.parallel_strategy_item},
            {item.param_name: str(item.parallel_layouts) for item in found.parallel_layout_item})


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "stages", "mode"), [(1, 2, "all"), (4, 1, "base"), (2, 2, "web"), (4, 2, "write")])
def test_strategies_are_those_the_compiler_writes(tmp_path, tensor, stages, mode):
    model = make(tmp_path / "model")
    config = read_config(model)
    convert(model, tmp_path / "cut", tensor_parallel=tensor, pipeline_stages=stages, mode=mode)
    check_layout(config, tensor, stages, mode, tmp_path / "layout")
    compiled = compile_layouts(config, tensor, stages, mode, tmp_path / "layout")     # kept from the line before
    for stage, file in enumerate(compiled):
        counter, operators, layouts = message(file)
        for rank in range(stage * tensor, (stage + 1) * tensor):
            written = message(tmp_path / "cut" / "strategy" / STRATEGY_FILE.format(rank))
            assert written[:2] == (counter, operators)
            assert {name: written[2][name] for name in layouts} == layouts
            outside = set(written[2]) - set(layouts)        # whole: MindSpore's functions drop what has no layout
            assert all("dim: 0" not in written[2][name] for name in outside)
    assert set(read_strategy(tmp_path / "cut" / "strategy").layouts) == set(parameter_table(config))


def test_another_cut_is_refused_by_name(tmp_path):
    config = read_config(make(tmp_path / "model"))
    convert(tmp_path / "model", tmp_path / "cut", tensor_parallel=2, pipeline_stages=2)
    strategy, expected = read_strategy(tmp_path / "cut" / "strategy"), expected_layouts(config, 2, 2)
    compare_layouts(strategy, expected, config)
    name = "model.layers.3.attention.wo.weight"
    wrong = {**strategy.layouts, name: Layout((2,), (0, -1))}
    with pytest.raises(LayoutError, match=f"{name} was compiled as .* on stage 1"):
        compare_layouts(dataclasses.replace(strategy, layouts=wrong), expected, config)
    with pytest.raises(LayoutError, match=f"{name} was compiled as .* on stage .0."):
        compare_layouts(dataclasses.replace(strategy, stages={**strategy.stages, name: [0]}), expected, config)
    without = {key: layout for key, layout in strategy.layouts.items() if key != name}
    with pytest.raises(LayoutError, match=f"{name} is in no compiled graph"):
        compare_layouts(dataclasses.replace(strategy, layouts=without), expected, config)
