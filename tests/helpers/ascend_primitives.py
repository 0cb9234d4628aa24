"""Compiles training graphs for a device that may not be there and prints what is in them as JSON.

`ascend_primitives.py DEVICE TENSOR FIELDS...`: TENSOR is the number of tensor-parallel devices; the FIELDS of each
graph, as JSON, are those of `IXC25Config` and `noise`: whether dropout is seeded. The last line is a list of objects:
`primitives`, their names; `checked`, how many operators there are that rules of scripts/ascend_rules.py are about, by
name; `broken`, the rules they break; `gather_batch_axes`, those of its gathers; `largest`, numbers of the largest
tensor.
"""
from __future__ import annotations

import inspect
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["MS_SIMULATION_LEVEL"] = "0"
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import ascend_rules
import mindspore as ms
import numpy as np
from compile_ascend import join_cluster
from mindspore import Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.train.mind_ir_pb2 import ModelProto

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.device import assume_device


class Loss(nn.Cell):
    """Loss of some of the network's arguments; the parallel compiler takes no None for an input."""

    def __init__(self, model, given):
        super().__init__()
        self.model, names = model, list(given)
        self.places = tuple(names.index(name) if name in given else -1
                            for name in inspect.signature(model.construct).parameters)

    def construct(self, *inputs):
        arguments = ()
        for place in self.places:
            arguments += (inputs[place] if place >= 0 else None,)
        return self.model(*arguments)


class Gradients(nn.Cell):
    """Gradients of the loss, so that the fused operators' own gradients are compiled too."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.weights = loss, ms.ParameterTuple(loss.trainable_params())
        self.grad = ms.ops.GradOperation(get_by_list=True)

    def construct(self, *inputs):
        return self.grad(self.loss, self.weights)(*inputs)


def gather_batch_axes(graph: ModelProto) -> list[int]:
    """`batch_dims`, the fourth input, of every Gather."""
    nodes = [node for part in (graph.graph, *graph.functions) for node in part.node]
    constants = {node.output[0]: node.attribute[0] for node in nodes if node.op_type == "Constant"}
    names = {primitive.name: primitive.op_type for primitive in graph.primitives}
    gathers = [node for node in nodes if names.get(node.op_type.removeprefix("REF::"), node.op_type) == "Gather"]
    return [constants[node.input[3]].i for node in gathers]


def columns(config: IXC25Config, noise: bool) -> dict[str, Tensor]:
    """A batch of one row, by the names of the network's arguments."""
    side, ids = config.vision_config.image_size, Tensor(np.zeros((1, config.seq_length), np.int32))
    found = dict.fromkeys(("input_ids", "labels", "vision_index", "image_mask"), ids)
    found["pixel_values"] = Tensor(np.zeros((1, config.max_tiles, 3, side, side), np.uint8))
    found["global_views"] = Tensor(np.zeros((1, config.max_images, 3, side, side), np.float32))
    found["view_index"] = Tensor(np.zeros((1, config.max_tiles), np.int32))
    if config.packing:
        ends = Tensor(np.zeros((1, config.max_segments), np.int32))
        found |= {"position_ids": ids, "segment_ends": ends}
    return {**found, "noise_seed": Tensor(np.zeros(1, np.int32))} if noise else found


def compiled(device: str, fields: dict) -> dict:
    """What the training graph of a configuration holds."""
    noise = fields.pop("noise", False)
    config = IXC25Config(**fields)
    with assume_device(device), nn.no_init_parameters():
        model = IXC25ForCausalLM(config)
    given = columns(config, noise)
    step = Gradients(Loss(model, given))
    step.set_train()
    _cell_graph_executor.compile(step, *given.values(), phase="train", do_convert=False)
    graph, executor = ModelProto(), _cell_graph_executor._graph_executor
    graph.ParseFromString(executor.get_func_graph_proto(step.current_phase, "mind_ir", True))
    checked = ascend_rules.operators(graph)
    return {"primitives": sorted({primitive.op_type for primitive in graph.primitives}),
            "checked": Counter(operator.name for operator in checked), "broken": ascend_rules.broken(checked),
            "gather_batch_axes": gather_batch_axes(graph),
            "largest": max(math.prod(shape) for shape in ascend_rules.tensors(graph))}


def main(device: str, tensor: int, given: list[dict]) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    layout = join_cluster(tensor, 1, 0)
    print(json.dumps([compiled(device, {**fields, **layout}) for fields in given]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [json.loads(fields) for fields in sys.argv[3:]])
