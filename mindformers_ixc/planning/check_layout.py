"""Whether MindSpore's compiler cuts parameters as the table of cuts says: `mindformers convert --check_layout`.

The model's graph is compiled for a cluster that is not there, and what the compiler arrives at is compared, device by
device, with the slices that conversion and parallel loading go by.
"""
from __future__ import annotations

from pathlib import Path

from mindformers_ixc.checkpoint.layouts import Layout, Strategy
from mindformers_ixc.checkpoint.strategy_file import read_strategy
from mindformers_ixc.checkpoint.writing import expected_layouts
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.cpu_cluster.simulated import run_rank
from mindformers_ixc.errors import LayoutError
from mindformers_ixc.files import whole_file
from mindformers_ixc.parallel.cuts import check_degree, check_stages
from mindformers_ixc.parameters import parameter_table


def check_layout(config: ModelConfig, tensor_parallel: int, pipeline_stages: int, mode: str, folder: Path) -> Strategy:
    """Compiles the graph of every pipeline stage and compares its layout with the table of cuts.

    Args:
        config: sizes of the model.
        tensor_parallel: devices of a stage.
        pipeline_stages: stages.
        mode: task LoRAs in the graph, a key of `fields.ALL_MODES`.
        folder: for what the compiler writes.

    Returns:
        The compiled layout.

    Raises:
        ConfigError: for degrees that do not divide the model.
        BuildError: when the simulation cannot be built here (it needs g++).
        LayoutError: when a graph does not compile, or a parameter is cut otherwise.
    """
    compile_layouts(config, tensor_parallel, pipeline_stages, mode, folder)
    strategy = read_strategy(folder)
    compare_layouts(strategy, expected_layouts(config, tensor_parallel, pipeline_stages, mode), config)
    return strategy


def compile_layouts(config: ModelConfig, tensor_parallel: int, pipeline_stages: int, mode: str,
                    folder: Path) -> list[Path]:
    """Strategy file of each pipeline stage, as MindSpore's compiler writes it for the forward graph.

    Args:
        config: sizes of the model.
        tensor_parallel: devices of a stage.
        pipeline_stages: stages.
        mode: task LoRAs in the graph, a key of `fields.ALL_MODES`.
        folder: where the files go (`stage_rank_N.ckpt`); existing ones are kept.

    Raises:
        ConfigError: for degrees that do not divide the model.
        BuildError: when the simulation cannot be built here.
        LayoutError: when the graph does not compile.
    """
    check_degree(config, tensor_parallel)
    check_stages(config, pipeline_stages)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for stage in range(pipeline_stages):
        target = folder / f"stage_rank_{stage}.ckpt"
        files.append(target)
        if target.exists():
            continue
        with whole_file(target) as partial:
            job = {"config": config.to_public_dict(), "tensor_parallel": tensor_parallel, "stage": stage,
                   "pipeline_stages": pipeline_stages, "mode": mode, "target": str(partial)}
            run_rank("mindformers_ixc.planning.forward_graph", job, folder,
                     f"The graph of stage {stage} did not compile for tensor parallel {tensor_parallel} and "
                     f"{pipeline_stages} stages")
    return files


def compare_layouts(strategy: Strategy, expected: dict[str, tuple[Layout, int]], config: ModelConfig) -> None:
    """Refuses a compiled layout that is not the expected one, device by device.

    Parameters outside the graph, which the compiler does not name, are whole on every device.

    Raises:
        LayoutError: naming the parameter.
    """
    table = parameter_table(config)
    for name, (layout, stage) in expected.items():
        if name not in strategy.layouts:
            if layout.counts() == (1,) * len(table[name].shape):
                continue
            raise LayoutError(f"{name} is in no compiled graph, but the table of cuts says {layout} on stage {stage}.")
        compiled, shape = strategy.layouts[name], table[name].shape
        if strategy.stages[name] != [stage] or compiled.devices != layout.devices or any(
                compiled.slices(shape, device) != layout.slices(shape, device) for device in range(layout.devices)):
            raise LayoutError(f"{name} was compiled as {compiled} on stage {strategy.stages[name]}, the table of cuts "
                              f"says {layout} on stage {stage}.")
