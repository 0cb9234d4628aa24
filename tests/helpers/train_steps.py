"""A few train steps on fixed data, alone or as one rank of a tensor-parallel run; the losses go to a file.

`train_steps.py CHECKPOINT INPUTS.npz LOSSES.npy`: alone CHECKPOINT is a model directory, under msrun what
`convert --tp` made of it. The step is MindFormers' (gradient clipping, AdamW, a schedule), dropout is off.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.core.optim import AdamW
from mindspore import Tensor
from mindspore.communication import get_group_size, get_rank, init

from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.config import read_config
from mindformers_ixc.cpu_cluster.groups import install
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.training.wrapper import IXC25TrainOneStepCell

STEPS = 5        # at this learning rate rounding grows tenfold a step: a sixth would be 4e-5 apart


def start() -> tuple[int, int]:
    """Rank and number of ranks, with the parallel mode set where there are several."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    if "MS_WORKER_NUM" not in os.environ:
        return 0, 1
    init()
    install()
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", full_batch=True, device_num=get_group_size(),
                                 global_rank=get_rank())
    return get_rank(), get_group_size()


def main(checkpoint: Path, inputs: Path, result: Path) -> None:
    rank, ranks = start()
    arrays = np.load(inputs)
    config = read_config(checkpoint, IXC25Config, seq_length=arrays["input_ids"].shape[1],
                         max_tiles=arrays["pixel_values"].shape[1],
                         adapter_mode="write", plora_dropout=0.0,
                         parallel_config={"data_parallel": 1, "model_parallel": ranks, "vocab_emb_dp": False})
    model = IXC25ForCausalLM(config)
    rate = CosineWithWarmUpLR(learning_rate=1e-2, warmup_steps=2, total_steps=20)
    optimizer = AdamW(model.trainable_params(), learning_rate=rate, weight_decay=0.1)
    step = IXC25TrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=1.0)
    step.set_train()
    batch = [Tensor(arrays[name]) for name in BATCH_COLUMNS]
    if ranks == 1:
        load_weights(model, checkpoint)
    else:
        step.compile(*batch)        # from here on the parameters have the rank's shapes
        file, = (checkpoint / "checkpoint" / f"rank_{rank}").iterdir()
        assert ms.load_param_into_net(model, ms.load_checkpoint(str(file), format="safetensors")) == ([], [])
    losses = [float(np.ravel(step(*batch)[0].asnumpy())[0]) for _ in range(STEPS)]
    if rank == 0:
        np.save(result, losses)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
