"""One rank of a tensor-parallel forward pass, started by msrun: `rank_logits.py CHECKPOINT INPUTS.npz RESULT.npy`.

Loads the slice that `convert --tp` wrote for this rank, as MindSpore's own functions do, and saves the logits.
"""
from __future__ import annotations

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.communication import get_group_size, get_rank, init

from mindformers_ixc.config import read_config
from mindformers_ixc.cpu_cluster.groups import install
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config


def main(checkpoint: Path, inputs: Path, result: Path) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    init()
    install()
    rank, size = get_rank(), get_group_size()
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", full_batch=True, device_num=size, global_rank=rank)
    arrays = np.load(inputs)
    config = read_config(checkpoint, IXC25Config, seq_length=arrays["input_ids"].shape[1],
                         max_tiles=arrays["pixel_values"].shape[1],
                         adapter_mode="write", parallel_config={"data_parallel": 1, "model_parallel": size,
                                                                "vocab_emb_dp": False})
    model = IXC25ForCausalLM(config)
    model.set_train(False)
    batch = [Tensor(arrays["input_ids"]), None,
             *(Tensor(arrays[name]) for name in BATCH_COLUMNS[2:])]
    model.compile(*batch)       # from here on the parameters have the rank's shapes
    file, = (checkpoint / "checkpoint" / f"rank_{rank}").iterdir()
    missing, surplus = ms.load_param_into_net(model, ms.load_checkpoint(str(file), format="safetensors"))
    assert not missing and not surplus, (missing, surplus)
    logits = model(*batch).asnumpy()
    if rank == 0:
        np.save(result, logits)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
