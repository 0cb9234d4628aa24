"""How long a training step would take: products, messages and the pipeline's bubble, by closed formulae.

Everything rests on `Assumptions`; nothing here has been measured. A plan is for comparing layouts with each other.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.workload import LocalParameter, OptimizerSharding, Workload, local_parameters


@dataclass(frozen=True)
class Assumptions:
    """What is taken to be true of the machines. Defaults: one Ascend 910B server, as its makers describe it.

    Attributes:
        tflops: dense bfloat16 peak of a device, 10^12 operations a second.
        utilisation: share of it that products reach, everything between them included.
        server_bandwidth: between devices of a server, 10^9 bytes a second that one device can send (HCCS).
        network_bandwidth: between servers, 10^9 bytes a second that one device can send (200 Gb/s RoCE at 80 %).
        devices_per_server: neighbouring ranks that share a server.
        latency: seconds that a message takes whatever its size.
    """

    tflops: float = 320.0
    utilisation: float = 0.4
    server_bandwidth: float = 150.0
    network_bandwidth: float = 20.0
    devices_per_server: int = 8
    latency: float = 20e-6

    @property
    def operations(self) -> float:
        """Operations a second of a device."""
        return self.tflops * 1e12 * self.utilisation

    def bandwidth(self, group: Iterable[int]) -> float:
        """Bytes a second in a group of ranks."""
        servers = {rank // self.devices_per_server for rank in group}
        return 1e9 * (self.server_bandwidth if len(servers) == 1 else self.network_bandwidth)


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind.

    Attributes:
        purpose: `forward`, `backward`, `layout_change`, `gradient`, `optimizer`, `pipeline` or `norm`.
        operator: MindSpore's name.
        bytes: the operator's input, or Receive's output, of all messages of a step together.
        count: messages of a step.
        group: ranks.
        per_step: sent once a step, not with every micro batch.
    """

    purpose: str
    operator: str
    bytes: float
    count: float
    group: tuple[int, ...]
    per_step: bool = False

    def seconds(self, assumptions: Assumptions) -> float:
        """Time of a step's messages, by the formulae of ring algorithms."""
        n = len(self.group)
        if n < 2 or not self.count:
            return 0.0
        share = {"AllReduce": 2 * (n - 1) / n, "AllGather": n - 1, "ReduceScatter": (n - 1) / n,
                 "AlltoAll": (n - 1) / n, "AllToAll": (n - 1) / n}.get(self.operator, 1.0)
        # MindSpore sends gradients in few large messages
        messages = 1 if self.per_step else self.count
        return share * self.bytes / assumptions.bandwidth(self.group) + messages * assumptions.latency


@dataclass(frozen=True)
class StageWork:
    """Operations of one micro batch on one device of a stage.

    Attributes:
        forward: the forward pass.
        backward: the backward pass.
        again: what recomputation adds.
        reference: forward pass of the reference of preference pairs.
    """

    forward: float
    backward: float
    again: float
    reference: float

    @property
    def total(self) -> float:
        """Forward and backward passes, recomputation and reference together."""
        return self.forward + self.backward + self.again + self.reference


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: products on the slowest stage.
        communication: messages of the slowest stage, none of them hidden behind products.
        bubble: what the pipeline takes to fill and to drain.
        ideal: products of the model alone, spread evenly, nothing computed twice.
    """

    compute: float
    communication: float
    bubble: float
    ideal: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.communication + self.bubble

    @property
    def efficiency(self) -> float:
        """Share of the step that the ideal would take."""
        return self.ideal / self.total


def stage_work(workload: Workload, stage: int, parameters: list[LocalParameter]) -> StageWork:
    """Operations of a micro batch on one device of a stage, whose parameters are given.

    A product of N positions with a weight of P numbers is 2 N P operations forward, as many again for the gradient of
    its input and as many for that of a weight that trains.
    """
    positions = _positions(workload)
    forward = backward = again = narrow = 0.0
    for parameter in parameters:
        if len(parameter.shape) < 2:
            continue
        work = 2.0 * positions(parameter) * parameter.used_size
        forward += work
        backward += work * (_feeds_gradient(workload, parameter.part) + parameter.trained)
        if _is_recomputed(workload, parameter):
            again += work
        if workload.reference and parameter.part == f"task_lora.{workload.preference_task}":
            narrow += work
    attention, attention_back, attention_again = _attention_work(workload, stage)
    reference = forward + attention - narrow if workload.reference else 0.0
    if workload.reference and stage == 0:      # images are encoded once
        reference -= _vision_work(workload, parameters)
    return StageWork(forward + attention, backward + attention_back, again + attention_again, reference)


def _positions(workload: Workload) -> Callable[[LocalParameter], int]:
    """Function that gives the rows of the product a parameter is used in."""
    config, vision = workload.config, workload.config.vision_config
    tiles, patches = workload.samples * config.max_tiles, vision.patches_per_side ** 2
    tower = workload.tile_positions

    def positions(parameter: LocalParameter) -> int:
        if parameter.part == "vision":
            if parameter.name.endswith("patch_embedding.weight"):
                return tiles * patches
            return 0 if "position_embedding" in parameter.name else tiles * tower
        if parameter.part == "projector":
            return workload.samples * config.vision_rows
        if parameter.part == "separators" or parameter.name == "model.tok_embeddings.weight":
            return 0
        return workload.positions

    return positions


def _feeds_gradient(workload: Workload, part: str) -> bool:
    """Whether the backward pass goes through a part to what lies before it."""
    if part == "vision":
        return workload.trains("vision")
    if part == "projector":
        return workload.trains("vision") or workload.trains("separators")
    return True


def _is_recomputed(workload: Workload, parameter: LocalParameter) -> bool:
    if parameter.layer is not None:
        return parameter.layer < workload.recomputed
    if parameter.name == "output.weight":       # the loss makes the logits of a chunk a second time
        return True
    return (parameter.part == "vision" and ".encoder." in parameter.name and workload.trains("vision")
            and workload.recomputed == workload.config.num_hidden_layers)


def _attention_work(workload: Workload, stage: int) -> tuple[float, float, float]:
    """Scores and weighted sums: forward, backward, again."""
    config = workload.config
    # the fused kernel leaves out the masked half and what packed samples have with each other, and computes the scores
    # again in its backward pass
    squares = 0.5 * workload.squares if workload.flash else float(config.seq_length ** 2)
    layer = 4.0 * workload.sequences * squares * config.num_attention_heads * config.head_size
    layer /= workload.layout.model_parallel
    back = 2.5 if workload.flash else 2.0
    layers = [number for number, place in enumerate(workload.layer_stages) if place == stage]
    forward, backward = len(layers) * layer, len(layers) * layer * back
    limit = workload.recomputed if workload.flash else workload.selected
    again = layer * sum(number < limit for number in layers)
    if stage == 0:
        tower = _vision_attention(workload)
        forward += tower
        if workload.trains("vision"):
            backward += tower * back
            again += tower if workload.recomputed == config.num_hidden_layers else 0.0
    return forward, backward, again


def _vision_attention(workload: Workload) -> float:
    vision = workload.config.vision_config
    positions = workload.tile_positions
    layer = 4.0 * workload.samples * workload.config.max_tiles * positions ** 2 * vision.hidden_size
    return vision.num_hidden_layers * layer / workload.vision_degree


def _vision_work(workload: Workload, parameters: Iterable[LocalParameter]) -> float:
    positions = _positions(workload)
    products = sum(2.0 * positions(parameter) * parameter.used_size for parameter in parameters
                   if parameter.part in ("vision", "projector") and len(parameter.shape) > 1)
    return products + _vision_attention(workload)


def stage_traffic(workload: Workload, stage: int, parameters: list[LocalParameter]) -> list[Traffic]:
    """Messages of a step that the first rank of a stage, whose parameters are given, takes part in.

    They are those of the graphs MindSpore's compiler makes: the gradient of a sum over devices is again such a sum.
    """
    return [*_tensor_traffic(workload, stage), *_loss_traffic(workload, stage), *_pipeline_traffic(workload, stage),
            *_gradient_traffic(workload, stage, parameters), *_norm_traffic(workload, stage)]


def _tensor_traffic(workload: Workload, stage: int) -> list[Traffic]:
    """Sums where a linear is cut by columns, and with sequence parallel the gathers before one cut by rows."""
    layout, sums = workload.layout, _Sums(workload)
    if layout.model_parallel == 1:
        return []
    sums.add_layers([number for number, place in enumerate(workload.layer_stages) if place == stage])
    if stage == 0:
        sums.add_vision()
    if stage == layout.pipeline_stage - 1:
        sums.add_losses()
        if workload.sequence_parallel:
            sums.gather(1)                                                    # for the head
    base = workload.first_rank(stage)
    return sums.traffic(tuple(range(base, base + layout.model_parallel)))


class _Sums:
    """Adds up the messages between tensor-parallel devices of one micro batch.

    Args:
        workload: the step.
    """

    def __init__(self, workload: Workload):
        self.workload = workload
        self.sizes: dict[tuple[str, str], list[float]] = {}
        self.compute = dtype_bytes(workload.config.compute_dtype)
        self.wide = workload.positions * workload.config.hidden_size * self.compute

    def add(self, purpose: str, operator: str, size: float, count: int) -> None:
        """Adds `count` messages of `size` bytes together."""
        entry = self.sizes.setdefault((purpose, operator), [0.0, 0.0])
        entry[0] += size
        entry[1] += count

    def sum(self, size: float, count: int, backward: bool = True) -> None:
        """Adds sums of whole tensors; `backward` if their gradients travel too."""
        self.add("forward", "AllReduce", size, count)
        if backward:
            self.add("backward", "AllReduce", size, count)

    def sum_positions(self, size: float, count: int, backward: bool = True) -> None:
        """Adds sums after which, with sequence parallel, every device keeps its share of the positions."""
        if not self.workload.sequence_parallel:
            self.sum(size, count, backward)
            return
        self.add("forward", "ReduceScatter", size, count)
        if backward:
            self.add("backward", "AllGather", size / self.workload.layout.model_parallel, count)

    def gather(self, count: int, backward: bool = True) -> None:
        """Adds gathers of the positions that sequence parallel cut."""
        self.add("layout_change", "AllGather", count * self.wide / self.workload.layout.model_parallel, count)
        if backward:
            self.add("backward", "ReduceScatter", count * self.wide, count)

    def add_layers(self, layers: list[int]) -> None:
        """Adds decoder layers: wo and w2, and A of their low-rank pairs."""
        workload, config = self.workload, self.workload.config
        ranks = {task: config.task_lora_ranks[task] for task in workload.adapters}
        if config.plora_rank:
            ranks["partial"] = config.plora_rank
        narrow = {name: workload.positions * rank * self.compute for name, rank in ranks.items()}
        again = sum(number < workload.recomputed for number in layers)
        if not config.parallel_config.recompute.mp_comm_recompute:
            again = 0
        count, all_narrow = len(layers), sum(narrow.values())
        if count:
            self.sum_positions(count * 2 * (self.wide + all_narrow), count * 2 * (1 + len(narrow)))
        if again:        # what w2 gives is not needed again
            self.sum_positions(again * (self.wide + 2 * all_narrow), again * (1 + 2 * len(narrow)), backward=False)
        if workload.reference:
            without = all_narrow - narrow.get(workload.preference_task, 0.0)
            self.sum_positions(count * 2 * (self.wide + without), count * 2 * len(narrow), backward=False)
        if workload.sequence_parallel and count:
            self.gather(2 * count)
            if again:
                self.gather(2 * again, backward=False)

    def add_vision(self) -> None:
        """Adds the vision side and the embedding."""
        workload, config, vision = self.workload, self.workload.config, self.workload.config.vision_config
        positions = workload.tile_positions
        tower = workload.samples * config.max_tiles * positions * vision.hidden_size * self.compute
        layers = vision.num_hidden_layers
        if workload.vision_degree > 1:
            self.sum(layers * 2 * tower, layers * 2, backward=workload.trains("vision"))
            if workload.trains("vision") and workload.recomputed == config.num_hidden_layers \
                    and config.parallel_config.recompute.mp_comm_recompute:
                self.sum(layers * tower, layers, backward=False)
        feeds = any(workload.trains(part) for part in ("vision", "projector", "separators"))
        self.sum(workload.samples * config.vision_rows * config.hidden_size * self.compute, 1, backward=feeds)
        if workload.cuts_vocabulary:
            table = workload.positions * config.hidden_size * dtype_bytes(config.param_init_type)
            self.sum(table, 1, backward=workload.trains("language"))

    def add_losses(self) -> None:
        """Adds the cross entropy of each chunk of positions: maximum, sum and picked logit, the first two twice."""
        positions = self.workload.positions
        chunks, forward = -(-positions // self.workload.config.loss_chunk), 8 if self.workload.reference else 5
        self.add("forward", "AllReduce", forward * positions * 4, forward * chunks)
        self.add("backward", "AllReduce", 2 * positions * 4, 2 * chunks)

    def traffic(self, group: tuple[int, ...]) -> list[Traffic]:
        """The messages of a step."""
        micro = self.workload.micro_batches
        return [Traffic(purpose, operator, micro * size, micro * count, group)
                for (purpose, operator), (size, count) in self.sizes.items()]


def _loss_traffic(workload: Workload, stage: int) -> list[Traffic]:
    """Sum and number of the losses of all replicas, and the gradient of the sum; 4 bytes each."""
    layout, micro = workload.layout, workload.micro_batches
    if layout.data_parallel == 1 or stage < layout.pipeline_stage - 1:
        return []
    base = workload.first_rank(stage)
    group = tuple(range(base, base + layout.data_parallel * layout.model_parallel, layout.model_parallel))
    return [Traffic("forward", "AllReduce", 2 * micro * 4, 2 * micro, group),
            Traffic("backward", "AllReduce", micro * 4, micro, group)]


def _pipeline_traffic(workload: Workload, stage: int) -> list[Traffic]:
    config, layout, rank = workload.config, workload.layout, workload.first_rank(stage)
    ranks = layout.data_parallel * layout.model_parallel
    size: float = workload.positions * config.hidden_size * dtype_bytes(config.compute_dtype)
    size = workload.micro_batches * size / (layout.model_parallel if workload.sequence_parallel else 1)
    found = []
    for there, operators in ((rank + ranks, ("Send", "Receive")), (rank - ranks, ("Receive", "Send"))):
        if 0 <= there < layout.devices:
            group = tuple(sorted((rank, there)))
            for operator, times in zip(operators, (2 if workload.reference else 1, 1)):    # forward and gradient
                found.append(Traffic("pipeline", operator, times * size, times * workload.micro_batches, group))
    return found


def _gradient_traffic(workload: Workload, stage: int, parameters: list[LocalParameter]) -> list[Traffic]:
    """Sums of gradients over the devices that hold a copy, and what optimizer sharding scatters and gathers."""
    layout, base = workload.layout, workload.first_rank(stage)
    tensor, ranks = layout.model_parallel, layout.data_parallel * layout.model_parallel
    sizes: dict[tuple[str, str, tuple[int, ...]], list[float]] = {}

    def add(purpose: str, operator: str, size: float, group: tuple[int, ...]) -> None:
        if len(group) > 1:
            entry = sizes.setdefault((purpose, operator, group), [0.0, 0.0])
            entry[0] += size
            entry[1] += 1

    for parameter in parameters:
        holders = range(base, base + ranks, tensor if parameter.replicas < ranks else 1)
        shards, item = parameter.optimizer_shards, parameter.item_bytes
        if parameter.trained:
            add("gradient", "ReduceScatter", parameter.used_size * item, tuple(holders[:shards]))
            add("gradient", "AllReduce", parameter.size * item, tuple(holders[::shards]))
        times = 2 if workload.gathers_again else 1
        add("optimizer", "AllGather", times * parameter.size * workload.gathered_bytes(parameter),
            tuple(holders[:shards]))
    # gradients that are spread as they are added up are scattered with every micro batch
    each = workload.micro_batches if workload.accumulates and workload.sharding.shards_gradients else 1
    found = []
    for (purpose, operator, group), (size, count) in sizes.items():
        times = each if operator == "ReduceScatter" else 1
        found.append(Traffic(purpose, operator, times * size, times * count, group, per_step=times == 1))
    return found


def _norm_traffic(workload: Workload, stage: int) -> list[Traffic]:
    base, ranks = workload.first_rank(stage), workload.layout.data_parallel * workload.layout.model_parallel
    return [Traffic("norm", "AllReduce", 8, 2, tuple(range(base, base + ranks)), True)] if ranks > 1 else []


def step_time(workload: Workload, assumptions: Assumptions, parameters: list[list[LocalParameter]],
              traffic: list[list[Traffic]] | None = None) -> StepTime:
    """Seconds of a step.

    Args:
        workload: the step.
        assumptions: of the machines.
        parameters: of each stage.
        traffic: messages of each stage, if they are known better than by formula.
    """
    stages, micro = workload.layout.pipeline_stage, workload.micro_batches
    traffic = traffic or [stage_traffic(workload, stage, parameters[stage]) for stage in range(stages)]
    compute = [stage_work(workload, stage, parameters[stage]).total / assumptions.operations
               for stage in range(stages)]
    messages = [sum(one.seconds(assumptions) for one in of_stage if not one.per_step) / micro
                for of_stage in traffic]
    once = max(sum(one.seconds(assumptions) for one in of_stage if one.per_step) for of_stage in traffic)
    each = [sum(pair) for pair in zip(compute, messages)]
    slowest = max(range(stages), key=each.__getitem__)
    return StepTime(micro * compute[slowest], micro * messages[slowest] + once, sum(each) - each[slowest],
                    ideal_seconds(workload, assumptions))


def ideal_seconds(workload: Workload, assumptions: Assumptions) -> float:
    """Seconds the products of a step would take, spread evenly over the devices, nothing computed twice."""
    alone = replace(workload, layout=Degrees(), samples=1, sharding=OptimizerSharding())
    return workload.global_batch * _sample_work(alone) / workload.layout.devices / assumptions.operations


@lru_cache(maxsize=8)
def _sample_work(workload: Workload) -> float:
    work = stage_work(workload, 0, local_parameters(workload)[0])
    return work.forward + work.backward + work.reference
