"""Compiles the training graph of packed rows for Ascend as a rank of a cluster that is not there; prints JSON.

`packed_layout.py DATA TENSOR FIELDS FOLDER`, started with the variables of `preload_environment(simulated=True)`;
FIELDS are those of `IXC25Config`, two rows a replica. The last line has `attention`, for each fused attention of the
decoder its name and the shapes of query and key, `lengths`, dtype and number of the lengths that the kernels take, and
`layout_changes`, the scopes of what the compiler sends to change a tensor's layout.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import ascend_primitives as primitives  # first: it sets what MindSpore reads while it is imported
import ascend_rules
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
from mindspore.train.mind_ir_pb2 import ModelProto

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.cpu_cluster.groups import simulate
from mindformers_ixc.device import assume_device


def main(data: int, tensor: int, fields: dict, folder: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, max_call_depth=10000, save_graphs=2, save_graphs_path=folder)
    ms.set_device("CPU")
    simulate(0, data * tensor)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=data * tensor, global_rank=0,
                                 full_batch=True)
    sequence = fields.pop("use_seq_parallel", False)
    config = IXC25Config(**fields, parallel_config={"data_parallel": data, "model_parallel": tensor,
                                                    "vocab_emb_dp": False, "use_seq_parallel": sequence})
    with assume_device("Ascend"), nn.no_init_parameters():
        model = IXC25ForCausalLM(config)
        given = {name: Tensor(np.repeat(value.asnumpy(), 2 * data, 0))
                 for name, value in primitives.columns(config, False).items()}
        step = primitives.Gradients(_VirtualDatasetCell(primitives.Loss(model, given)))
    step.set_train()
    _cell_graph_executor.compile(step, *given.values(), phase="train", do_convert=False)
    graph = ModelProto()
    executor = _cell_graph_executor._graph_executor
    graph.ParseFromString(executor.get_func_graph_proto(step.current_phase, "mind_ir", True))
    attention = [[one.name, one.query.shape, one.key.shape]
                 for one in ascend_rules.operators(graph, ("FlashAttentionScore", "FlashAttentionScoreGrad"))
                 if one.layout == "TND"]
    text = next(Path(folder).rglob("*_validate_*.ir")).read_text(encoding="utf-8")
    changes = re.findall(r"= (?:AllGather|AlltoAll|ReduceScatter)\(.*\n.*\n\s+# Fullname with scope: \((.*)\)", text)
    # the compiler hands the tensor of lengths to the kernel as a tuple of numbers
    lengths = re.findall(r"= TensorToTuple\(.*\n\s+: \(<Tensor\[(\w+)\], \((\d+)\)>\)", text)
    print(json.dumps({"attention": attention, "lengths": lengths, "layout_changes": changes}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
