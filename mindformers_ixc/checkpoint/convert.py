"""Converts checkpoints: public to MindSpore and back, cut for any tensor and pipeline parallel layout and joined again.

    convert("internlm-xcomposer2d5-7b", "ixc25_ms")                       # one MindSpore checkpoint
    convert("internlm-xcomposer2d5-7b", "ixc25_tp8", tensor_parallel=8)   # rank_N folders and strategy files
    convert("output/checkpoint", "trained", to="hf")                      # ranks of a run to the public layout
"""
from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from mindformers_ixc.checkpoint.family import say_unused
from mindformers_ixc.checkpoint.model_config import config_of, run_record
from mindformers_ixc.checkpoint.quantised import widened
from mindformers_ixc.checkpoint.sources import AVERAGE_PREFIX, OpenedCheckpoint, is_state, open_source
from mindformers_ixc.checkpoint.start import check_tensor, mismatch
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.checkpoint.unused import of_ranks
from mindformers_ixc.checkpoint.writing import SHARD_BYTES, Options, write_checkpoint
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parallel.cuts import check_degree, check_stages
from mindformers_ixc.parameters import BUFFERS, UNUSED, base_name, parameter_table, part_of

logger = logging.getLogger(__name__)


def convert(source: str | Path, target: str | Path, *, to: str | None = None, format: str = "safetensors",
            tensor_parallel: int = 1, pipeline_stages: int = 1, dtype: str | None = None, mode: str = "all",
            drop: Iterable[str] = (), config: str | Path | None = None, strategy: str | Path | None = None,
            shard_bytes: int = SHARD_BYTES, overwrite: bool = False) -> Path:
    """Converts a checkpoint to another container, format or layout. An interrupted run goes on where it stopped.

    Args:
        source: public directory (safetensors or .bin, sharded or not), one file, a MindSpore checkpoint or the ranks of
            a run. A quantised one is widened: the target has full weights.
        target: directory to be made, or one file (`.safetensors`, `.ckpt`).
        to: `ms` or `hf`; by default the other one of what the source is.
        format: container of `ms`: `safetensors` or `ckpt`.
        tensor_parallel: devices of a pipeline stage.
        pipeline_stages: pipeline stages.
        dtype: `float32`, `bfloat16` or `float16`; by default each tensor keeps its own.
        mode: task LoRAs in the graph the layout is for, a key of `fields.ALL_MODES`.
        drop: task LoRAs to leave out (`fields.TASK_LORAS`).
        config: `config.json` or its directory, if the source has none beside it.
        strategy: strategy file or folder of the source's ranks, if it is not in the usual place.
        shard_bytes: size of a file at most, in bytes.
        overwrite: replace a target that exists.

    Returns:
        The target.

    Raises:
        CheckpointError: for everything that is wrong with source or target, before anything is written where possible.
        ConfigError: for degrees that do not divide the model.
    """
    opened = widened(open_source(source, strategy))
    if to is None:
        to = "ms" if opened.kind == "public" else "hf"
        if tensor_parallel * pipeline_stages > 1 or format == "ckpt" or Path(target).suffix == ".ckpt":
            to = "ms"
    if Path(target).suffix == ".ckpt":
        format = "ckpt"
    options = Options(to, format, tensor_parallel, pipeline_stages, dtype, mode, tuple(sorted(drop)), shard_bytes)
    options.check()
    model = drop_task_loras(config_of(opened, config), options.drop)
    check_degree(model, tensor_parallel)
    check_stages(model, pipeline_stages)
    tensors = select_tensors(opened, model, options)
    write_checkpoint(tensors, model, opened, Path(target), options, overwrite)
    return Path(target)


def drop_task_loras(config: ModelConfig, drop: Iterable[str]) -> ModelConfig:
    """The configuration without some task LoRAs.

    Raises:
        CheckpointError: for one it does not have.
    """
    unknown = sorted(set(drop) - set(config.task_lora_ranks))
    if unknown:
        raise CheckpointError(f"The task LoRAs to drop, {unknown}, are not in this model; it has "
                              f"{sorted(config.task_lora_ranks)}.")
    config.task_lora_ranks = {task: rank for task, rank in config.task_lora_ranks.items() if task not in drop}
    return config


def select_tensors(source: OpenedCheckpoint, config: ModelConfig, options: Options) -> dict[str, LazyTensor]:
    """The source's tensors that go into the target, checked against the configuration.

    Raises:
        CheckpointError: for missing or surplus parameters, another shape or a format no weight has.
    """
    table, is_run, left_out = parameter_table(config), source.is_training_state, 0
    dropped = {f"task_lora.{task}" for task in options.drop}
    chosen, surplus = {}, []
    for name, tensor in source.tensors.items():
        entry = table.get(base_name(name))
        if entry is not None:
            check_tensor(source, name, tensor, entry.shape)
            if name == entry.name or options.to == "ms":
                chosen[name] = tensor
            else:
                left_out += 1
        elif part_of(base_name(name)) in dropped or BUFFERS.match(name):
            continue
        elif name in UNUSED:
            chosen[name] = tensor
        elif part_of(base_name(name)) is None and (is_state(name) or len(tensor.shape) <= 1):
            if options.to == "ms" and not name.startswith(AVERAGE_PREFIX):
                chosen[name] = tensor
            else:
                left_out += 1
        else:
            surplus.append(name)
    missing = [name for name in table if name not in source.tensors]
    if missing and source.kind == "ranks":
        found = of_ranks(source, run_record(source)[1], missing)
        for name, tensor in found.items():
            check_tensor(source, name, tensor, table[name].shape)
        chosen.update(found)
        missing = [name for name in missing if name not in found]
    if missing or surplus:
        raise CheckpointError(mismatch(source.path, missing, surplus))
    say_unused(source)
    if is_run and left_out:
        logger.info(f"{source.path}: {left_out} tensors are no parameters (optimizer states, averages, counters) and "
                    "are left out.")
    return chosen
