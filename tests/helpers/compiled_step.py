"""Compiles a whole train step for rank 0 of data parallel 2 x tensor parallel 2 and prints its communication as JSON.

`compiled_step.py CONFIG_DIRECTORY FOLDER`, started with the variables of `preload_environment(simulated=True)`.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.core.optim import AdamW
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell

from mindformers_ixc.config import read_config
from mindformers_ixc.cpu_cluster.groups import simulate
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.training.wrapper import IXC25TrainOneStepCell


def main(directory: str, folder: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, max_call_depth=10000, save_graphs=2, save_graphs_path=folder)
    ms.set_device("CPU")
    simulate(0, 4)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=4, global_rank=0, full_batch=True)
    # 16 positions a device: two chunks and a shorter one
    config = read_config(directory, IXC25Config, seq_length=16, max_tiles=2, adapter_mode="web", loss_chunk=6,
                         parallel_config={"data_parallel": 2, "model_parallel": 2, "vocab_emb_dp": False})
    with nn.no_init_parameters():
        model = IXC25ForCausalLM(config)
        network = _VirtualDatasetCell(model)
        rate = CosineWithWarmUpLR(learning_rate=1e-4, warmup_steps=1, total_steps=10)
        step = IXC25TrainOneStepCell(network, AdamW(model.trainable_params(), learning_rate=rate), use_clip_grad=True)
    step.set_train()
    ids, side = Tensor(np.zeros((2, 16), np.int32)), config.vision_config.image_size
    pixels = Tensor(np.zeros((2, 2, 3, side, side), np.uint8))
    views, slots = Tensor(np.zeros((2, 1, 3, side, side), np.float32)), Tensor(np.zeros((2, 2), np.int32))
    trained = [parameter.name for parameter in model.trainable_params()]
    _cell_graph_executor.compile(step, ids, ids, pixels, views, slots, ids, ids, phase="train", do_convert=False)
    text = next(Path(folder).rglob("*_validate_*.ir")).read_text(encoding="utf-8")
    # the compiler names what it adds: sums of products in the forward pass, and changes of layout between operators
    forward = len(re.findall(r"= AllReduce\(%\d+\) \{instance name: forward_op", text))
    changes = re.findall(r"= (?:AllGather|AlltoAll|ReduceScatter)\(.*\n.*\n\s+# Fullname with scope: \((.*)\)", text)
    print(json.dumps({"trained": trained, "mirrors": sorted(set(re.findall(r'mirror_user_id: "([^"]*)"', text))),
                      "forward_sums": forward, "layout_changes": changes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
