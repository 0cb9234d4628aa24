"""Compiles the model's graph for a cluster that is not there, and keeps the layouts MindSpore's compiler arrives at.

The compiler needs a process of its own: it must be started with a preloaded library, and what it sets stays set. Run as
a program, this module is that process; it reads its job from standard input.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mindformers_ixc.config import MODE_ADAPTERS, IXC25Config
from mindformers_ixc.parallel.cpu import preload_environment
from mindformers_ixc.parallel.cuts import check_degree, check_stages

# Task LoRAs in the graph, by mode: those of training and inference, and `all`, which cuts every pair.
MODES = {"all": ("sft", "dpo", "web"), **MODE_ADAPTERS}

# Positions and tiles of the compiled sample. Layouts of parameters do not depend on them; 32 positions compile fast.
POSITIONS, TILES = 32, 2


class LayoutError(RuntimeError):
    """The compiler failed; this is a defect of the model's strategies, not of the input."""


def compile_layouts(config: IXC25Config, tensor_parallel: int, pipeline_stages: int, mode: str,
                    folder: Path) -> list[Path]:
    """Strategy file of each pipeline stage, as MindSpore's compiler writes it for the forward graph.

    Args:
        config: sizes of the model.
        tensor_parallel: devices of a stage.
        pipeline_stages: stages.
        mode: task LoRAs in the graph, a key of `MODES`.
        folder: where the files go (`stage_N.ckpt`); existing ones are kept.

    Raises:
        ConfigError: for degrees that do not divide the model.
        BuildError: when the simulation cannot be built here.
        LayoutError: when the graph does not compile.
    """
    check_degree(config, tensor_parallel)
    check_stages(config, pipeline_stages)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **preload_environment(simulated=True), "GLOG_v": "3",
                   "LOG_MF_PATH": str(folder / "log")}
    files = []
    for stage in range(pipeline_stages):
        target = folder / f"stage_{stage}.ckpt"
        files.append(target)
        if target.exists():
            continue
        # a name of its own: the compiler of a killed run may still be at work here
        partial = target.with_suffix(f".{os.getpid()}.ckpt")
        job = {"config": config.to_public_dict(), "tensor_parallel": tensor_parallel, "stage": stage,
               "pipeline_stages": pipeline_stages, "mode": mode, "target": str(partial)}
        result = subprocess.run([sys.executable, "-m", __name__], input=json.dumps(job), env=environment,
                                capture_output=True, text=True, check=False)
        if result.returncode:
            lines = (result.stderr + result.stdout).strip().splitlines()[-15:]
            raise LayoutError(f"The graph of stage {stage} did not compile for tensor parallel {tensor_parallel} and "
                              f"{pipeline_stages} stages:\n" + "\n".join(lines))
        partial.replace(target)
    return files


def _compile(job: dict) -> None:
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn
    from mindspore.common.api import _cell_graph_executor

    from mindformers_ixc.models.ixc25 import IXC25ForCausalLM
    from mindformers_ixc.parallel.cpu import simulate

    stages, tensor_parallel = job["pipeline_stages"], job["tensor_parallel"]
    ranks, rank = stages * tensor_parallel, job["stage"] * tensor_parallel
    ms.set_context(mode=ms.GRAPH_MODE, max_call_depth=100000)
    ms.set_device("CPU")
    simulate(rank, ranks)
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel", device_num=ranks, global_rank=rank, full_batch=True,
        pipeline_stages=stages, strategy_ckpt_config={"save_file": job["target"], "only_trainable_params": False})
    fields = {key: value for key, value in job["config"].items() if key not in ("model_type", "architectures")}
    parallel = {"data_parallel": 1, "model_parallel": tensor_parallel, "pipeline_stage": stages,
                "micro_batch_num": stages, "vocab_emb_dp": False}
    config = IXC25Config(**fields, seq_length=POSITIONS, max_tiles=TILES, parallel_config=parallel)
    with nn.no_init_parameters():
        model = IXC25ForCausalLM(config)
    model.adapters = tuple(task for task in MODES[job["mode"]] if task in config.task_lora_ranks)
    model.set_train(False)
    ids = Tensor(np.zeros((stages, POSITIONS), np.int32))
    side = config.vision_config.image_size
    pixels = Tensor(np.zeros((stages, TILES, 3, side, side), np.float32))
    _cell_graph_executor.compile(model, ids, None, pixels, ids, ids, phase="layout", do_convert=False)


if __name__ == "__main__":
    _compile(json.load(sys.stdin))
