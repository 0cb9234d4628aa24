"""Compiles a training graph for a device that may not be there and prints its primitives as JSON.

`ascend_primitives.py DEVICE FIELDS`, started with MS_SIMULATION_LEVEL=0; FIELDS are those of `IXC25Config`, as JSON.
"""
from __future__ import annotations

import json
import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.train.mind_ir_pb2 import ModelProto

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.device import assume_device


class Gradients(nn.Cell):
    """Gradients of the loss, so that the fused operators' own gradients are compiled too."""

    def __init__(self, model):
        super().__init__()
        self.model, self.weights = model, ms.ParameterTuple(model.trainable_params())
        self.grad = ms.ops.GradOperation(get_by_list=True)

    def construct(self, *inputs):
        return self.grad(self.model, self.weights)(*inputs)


def main(device: str, fields: dict) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    with assume_device(device), nn.no_init_parameters():
        model = IXC25ForCausalLM(IXC25Config(**fields))
    step = Gradients(model)
    step.set_train()
    side = fields["vision_config"]["image_size"]
    ids = Tensor(np.zeros((1, fields["seq_length"]), np.int32))
    batch = [ids, ids, Tensor(np.zeros((1, fields["max_tiles"], 3, side, side), np.float32)), ids, ids]
    batch += [ids, Tensor(np.zeros((1, fields["max_segments"]), np.int32))] if fields.get("packing") else []
    _cell_graph_executor.compile(step, *batch, phase="train", do_convert=False)
    graph, executor = ModelProto(), _cell_graph_executor._graph_executor
    graph.ParseFromString(executor.get_func_graph_proto(step.current_phase, "mind_ir", True))
    print(json.dumps(sorted({primitive.op_type for primitive in graph.primitives})))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
