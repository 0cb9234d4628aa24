"""Compiles the train step of one rank of a cluster that is not there; run as a program, a job on standard input.

The step is the one the YAML asks for (model, what trains, recompute, wrapper, micro batches), with MindFormers' AdamW
and the leaf cells of the YAML's device. No weight is allocated and nothing runs. The answer goes to the job's `target`
as JSON, see `compile_step`.
"""
from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import mindspore as ms
import mindspore.common.dtype as mstype
from mindformers.core.lr import CosineWithWarmUpLR
from mindformers.core.parallel_config import build_parallel_config
from mindformers.tools.register import MindFormerConfig
from mindformers.wrapper.wrapper import GradAccumulationCellWithTwoOutput, PipelineCellWithTwoOutput
from mindspore import Parameter, Tensor, nn
from mindspore.common.api import _cell_graph_executor
from mindspore.common.initializer import Zero
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
from mindspore.train.mind_ir_pb2 import AttributeProto, ModelProto, NodeProto, PrimitiveProto, TensorProto

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.cpu_cluster.groups import simulate
from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS, column_shapes
from mindformers_ixc.device import assume_device
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.placement import mark_backward_end
from mindformers_ixc.models.preference import IXC25ForPreference
from mindformers_ixc.models.reward import IXC25RewardModel
from mindformers_ixc.parameters import parameter_table, part_of
from mindformers_ixc.planning.few_layers import can_shorten, shorten
from mindformers_ixc.training.parts import stop_dropout, train_only
from mindformers_ixc.training.wrapper import IXC25PipelineWithLossScaleCell, IXC25TrainOneStepCell
from mindformers_ixc.training_options import PREFERENCE_NETWORK, REWARD_NETWORK

# Communication operators of a compiled graph.
OPERATORS = ("AllReduce", "AllGather", "ReduceScatter", "AlltoAll", "AllToAll", "Broadcast", "Send", "Receive")

# Part of the scope of what is summed over replicas in each micro batch (`gradient_accumulation_shard`).
ACCUMULATED = "Grad__VirtualAssignAdd"

# Operators at most between a parameter and where its slices are gathered: a cast, a load.
CASTS = 4


# Networks that learn from pairs, by the YAML's `arch.type`.
NETWORKS: dict[str, type[IXC25Model]] = {PREFERENCE_NETWORK: IXC25ForPreference, REWARD_NETWORK: IXC25RewardModel}


def compile_step(job: dict) -> dict:
    """Compiles the step of a rank and describes it.

    Args:
        job: `fields` of the YAML, `devices`, `rank`, and `micro_batches`, which must be as many as pipeline stages at
            least; more than one without a pipeline are accumulated. With `every_layer` all layers are compiled,
            otherwise three of a kind, from which the plan is completed (`few_layers`).

    Returns:
        `parameters`: of the rank's graph, optimizer states and accumulated gradients under names of their own, each
        with `shape`, `local` (the rank's slice), `trained`, `optimizer_shards`, `dtype`, `device_matrix`, `tensor_map`.
        `outside`: parameters of the model that the graph does not have. `operators`: communication, each with
        `operator`, `bytes` (of its input; of Receive its output), `group` (ranks), `group_size`, `purpose` (`forward`,
        `backward`, `layout_change`, `gradient`, `optimizer`, `pipeline`, `norm`), `per_step` (false: once a micro
        batch), `scope`. `groups`: ranks by name. `seconds`, `peak_bytes`: of the compilation.
    """
    fields, devices, rank, micro_batches = job["fields"], job["devices"], job["rank"], job["micro_batches"]
    began = time.perf_counter()
    config, shortened = _config(fields, micro_batches), None
    if not job.get("every_layer") and can_shorten(fields):
        stage = rank * config.parallel_config.pipeline_stage // devices
        fields, shortened = shorten(fields, config, stage)
    ms.set_context(mode=ms.GRAPH_MODE, max_call_depth=100000)
    ms.set_device("CPU")
    groups = simulate(rank, devices)
    ms.set_auto_parallel_context(**_context(fields, devices, rank))
    target = (fields.get("context") or {}).get("device_target", "Ascend")
    with assume_device(target) if target == "Ascend" else nullcontext():
        model, step, inputs = _build(fields, micro_batches)
    trained = {parameter.name for parameter in model.trainable_params()}
    _cell_graph_executor.compile(step, *inputs, phase="plan", do_convert=False)
    layouts = step.parameter_layout_dict
    parameters = [_describe(parameter, layouts[parameter.name], parameter.name in trained, groups, devices)
                  for parameter in step.get_parameters() if parameter.name in layouts]
    operators = list(_communication(_graph(step), rank, micro_batches))
    if shortened is not None:
        parameters, operators = shortened.parameters(parameters), shortened.operators(operators)
    operators = [row for row in operators for _ in range(row.pop("times"))]
    inside = {row["name"] for row in parameters}
    return {"parameters": parameters, "outside": [name for name in parameter_table(config) if name not in inside],
            "operators": operators, "groups": groups, "seconds": time.perf_counter() - began,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _context(fields: dict, devices: int, rank: int) -> dict:
    parallel = fields.get("parallel") or {}
    context = {"parallel_mode": "semi_auto_parallel", "device_num": devices, "global_rank": rank, "full_batch": True,
               "pipeline_stages": fields["parallel_config"].get("pipeline_stage") or 1,
               "enable_parallel_optimizer": bool(parallel.get("enable_parallel_optimizer"))}
    if parallel.get("parallel_optimizer_config"):
        context["parallel_optimizer_config"] = parallel["parallel_optimizer_config"]
    return context


def _build(fields: dict, micro_batches: int) -> tuple[
        IXC25Model, IXC25TrainOneStepCell | IXC25PipelineWithLossScaleCell, list[Tensor]]:
    """Model, step cell and inputs without memory."""
    with nn.no_init_parameters():
        model = NETWORKS.get(fields["model"]["arch"]["type"], IXC25Model)(_config(fields, micro_batches))
        if fields.get("train_parts") is not None:
            train_only(model, fields["train_parts"])
        if not any("Plora" in parameter.name for parameter in model.trainable_params()):
            stop_dropout(model)
        mark_backward_end(model)
        rate = CosineWithWarmUpLR(learning_rate=1e-4, warmup_steps=10, total_steps=100)
        # MindFormers' AdamW holds the same two moments, but is a dozen operators a parameter, most of the whole graph
        optimizer = nn.AdamWeightDecay(model.trainable_params(), learning_rate=rate, weight_decay=0.1)
        network = _micro_batched(model, micro_batches)
        step: IXC25TrainOneStepCell | IXC25PipelineWithLossScaleCell
        if micro_batches > 1:
            step = IXC25PipelineWithLossScaleCell(network, optimizer, micro_batch_num=micro_batches,
                                                  calculate_per_token_loss=True, use_clip_grad=True,
                                                  max_grad_norm=1.0)
        else:
            step = IXC25TrainOneStepCell(network, optimizer, use_clip_grad=True, max_grad_norm=1.0)
    step.set_train()
    return model, step, _inputs(fields, model.config, micro_batches)


def _has_pairs(fields: dict) -> bool:
    return fields["model"]["arch"]["type"] in NETWORKS


def _config(fields: dict, micro_batches: int) -> IXC25Config:
    """Configuration of the model in the YAML's layout."""
    section = {key: value for key, value in fields["model"]["model_config"].items() if key != "type"}
    built = MindFormerConfig(use_legacy=True, recompute_config=fields.get("recompute_config"),
                             parallel_config={**fields["parallel_config"], "micro_batch_num": micro_batches})
    build_parallel_config(built)
    return IXC25Config(**section, parallel_config=built.parallel_config, calculate_per_token_loss=micro_batches > 1)


def _micro_batched(model: IXC25Model, micro_batches: int) -> nn.Cell:
    """The network that MindFormers' trainer makes of a model."""
    network = model
    if model.config.parallel_config.pipeline_stage > 1:
        network = PipelineCellWithTwoOutput(network, micro_batches)
    elif micro_batches > 1:
        network = GradAccumulationCellWithTwoOutput(network, micro_batches)
    return _VirtualDatasetCell(network)


def _inputs(fields: dict, config: IXC25Config, micro_batches: int) -> list[Tensor]:
    """A global batch as the data set gives it, without memory."""
    size = fields["runner_config"]["batch_size"] * config.parallel_config.data_parallel * micro_batches
    columns = [*BATCH_COLUMNS, *(PACKING_COLUMNS if config.packing else ())]
    shapes = column_shapes(config, columns, 2 if _has_pairs(fields) else 1)
    return [Tensor(shape=(size, *shape), dtype=getattr(mstype, dtype), init=Zero())
            for dtype, shape in shapes.values()]


def _describe(parameter: Parameter, layout: Sequence, trained: bool, groups: dict, devices: int) -> dict:
    """A parameter's whole and local shape; optimizer sharding cuts its first axis once more."""
    local, group = list(layout[2]), layout[5] if len(layout) > 5 else ""
    shards = len(groups.get(group, range(devices))) if group else 1     # the world's group was not created
    if shards > 1:
        local[0] //= shards
    # a compiled parameter has its slice's shape; the layout keeps the whole one
    return {"name": parameter.name, "shape": list(layout[6]), "local": local, "trained": trained,
            "optimizer_shards": shards, "dtype": str(parameter.dtype), "device_matrix": list(layout[0]),
            "tensor_map": [list(entry) if isinstance(entry, (tuple, list)) else entry for entry in layout[1]]}


def _graph(step: nn.Cell) -> ModelProto:
    """The compiled graph in MindSpore's exchange format, without the parameters' values."""
    model, executor = ModelProto(), _cell_graph_executor._graph_executor
    model.ParseFromString(executor.get_func_graph_proto(step.current_phase, "mind_ir", True))
    return model


def _communication(model: ModelProto, rank: int, micro_batches: int) -> Iterator[dict]:
    """Communication operators of a compiled graph, each with how many `times` it runs."""
    primitives = {primitive.name: primitive for primitive in model.primitives}
    calls, scopes = _calls(model), _forward_scopes(model)
    for graph in (model.graph, *model.functions):
        made = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            primitive = primitives.get(node.op_type.rpartition("::")[2])
            if primitive is not None and primitive.op_type in OPERATORS:
                row = _describe_operator(primitive, node, made, rank, micro_batches)
                if row["purpose"] == "backward" and (key := _forward_id(node)) in scopes:
                    row["scope"] = scopes[key]
                yield {**row, "times": calls[graph.name]}


def _forward_id(node: NodeProto) -> bytes | None:
    """What a communication operator of the forward pass and those of its gradient have in common."""
    return next((entry.s for entry in node.primal_attr if entry.name == "forward_comm_node_unique_id"), None)


def _forward_scopes(model: ModelProto) -> dict[bytes | None, str]:
    """Scopes of gradients by that: their own is that of the first operator of the kind, whatever cell it is in."""
    return {key: f"Gradients/{node.domain}" for graph in (model.graph, *model.functions) for node in graph.node
            if not node.domain.startswith("Gradients") and (key := _forward_id(node)) is not None}


def _calls(model: ModelProto) -> Counter:
    """How often each graph of a model runs: micro batches may share one."""
    names = {graph.name for graph in model.functions}
    callers: dict[str, Counter] = {}
    for graph in (model.graph, *model.functions):
        words = (word.removeprefix("REF::") for node in graph.node for word in (node.op_type, *node.input))
        callers[graph.name] = Counter(word for word in words if word in names and word != graph.name)
    counts = Counter({model.graph.name: 1})
    pending = [model.graph.name]
    while pending:
        name = pending.pop()
        for callee, times in callers[name].items():
            counts[callee] += times * counts[name]
            pending.append(callee)
    return counts


def _describe_operator(primitive: PrimitiveProto, node: NodeProto, made: dict[str, NodeProto], rank: int,
                       micro_batches: int) -> dict:
    kind = primitive.op_type
    attributes = {entry.name: entry for entry in [*primitive.attribute, *node.attribute]}
    group = [value.ints[0] for value in attributes["group_rank_ids"].values] if "group_rank_ids" in attributes else []
    for end in ("dest_rank", "src_rank"):
        if kind in ("Send", "Receive") and end in attributes:
            group = sorted((rank, group[attributes[end].i]))
    purpose = _purpose(kind, primitive.instance_name, node.domain)
    size = _output_bytes(attributes["shape"])
    if kind == "AllGather":
        size //= len(group)
    elif kind == "ReduceScatter":
        size *= len(group)
    return {"operator": kind, "bytes": size, "group": group, "group_size": len(group), "purpose": purpose,
            "per_step": micro_batches == 1 or (purpose in ("gradient", "optimizer", "norm")
                                               and ACCUMULATED not in node.domain),
            "scope": (purpose in ("gradient", "optimizer") and _parameter_of(node, made)) or node.domain}


def _parameter_of(node: NodeProto, made: dict[str, NodeProto]) -> str | None:
    """The parameter whose slices or gradient an operator brings together; scopes of shared graphs name no cell."""
    for entry in node.primal_attr:
        if entry.name == "mirror_user_id":
            return entry.s.decode() if isinstance(entry.s, bytes) else entry.s
    source = node.input[0]
    for _ in range(CASTS):
        name = next((word for word in source.split(":") if part_of(word)), None)
        if name or source not in made or not made[source].input:
            return name
        source = made[source].input[0]
    return None


def _purpose(kind: str, instance: str, scope: str) -> str:
    if ACCUMULATED in scope:
        return "gradient"
    if kind in ("Send", "Receive"):
        return "pipeline"
    if "parallel_optimizer" in instance:
        return "gradient" if instance.startswith("grad_") else "optimizer"
    if "mirror" in instance:
        return "gradient"
    if "GLOBALNORM" in instance or scope.count("/") <= 1:
        return "norm"
    if scope.startswith("Gradients"):
        return "backward"
    return "forward" if kind == "AllReduce" or "forward_op" in instance else "layout_change"


def _output_bytes(attribute: AttributeProto) -> int:
    """Size of the tensor that a node's `shape` attribute describes."""
    tensor = attribute.tensors[0]
    return math.prod(tensor.dims) * dtype_bytes(TensorProto.DataType.Name(tensor.data_type))


if __name__ == "__main__":
    given = json.load(sys.stdin)
    Path(given["target"]).write_text(json.dumps(compile_step(given)), encoding="utf-8")
