"""Compiles the forward graph of one rank of a cluster that is not there; run as a program, a job on standard input.

MindSpore's compiler writes the layout of every parameter it arrives at to the job's `target`, a strategy file.
"""
from __future__ import annotations

import json
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor

from mindformers_ixc.cpu_cluster.groups import simulate
from mindformers_ixc.fields import ALL_MODES
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model, LogitsGraph

# Positions and tiles of the compiled sample. Layouts of parameters do not depend on them; 32 positions compile fast.
POSITIONS, TILES = 32, 2


def compile_forward(job: dict) -> None:
    """Compiles the graph of a job: `config` (public fields), `tensor_parallel`, `pipeline_stages`, `stage`, `mode` (a
    key of `fields.ALL_MODES`) and `target`."""
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
        model = IXC25Model(config)
    model.adapters = tuple(task for task in ALL_MODES[job["mode"]] if task in config.task_lora_ranks)
    model.set_train(False)
    ids = Tensor(np.zeros((stages, POSITIONS), np.int32))
    side = config.vision_config.image_size
    pixels = Tensor(np.zeros((stages, TILES, 3, side, side), np.float32))
    _cell_graph_executor.compile(LogitsGraph(model), ids, pixels, None, None, ids, ids, phase="layout",
                                 do_convert=False)


if __name__ == "__main__":
    compile_forward(json.load(sys.stdin))
