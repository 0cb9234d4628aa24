"""What one training step is on a cluster: sizes, what trains, and the slice of every parameter on every stage.

All of it follows from the YAML file; nothing is compiled. `step.compile_step` asks MindSpore's compiler the same.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.config import ModelConfig, ParallelOptions, recomputed_layers
from mindformers_ixc.data.batch import BATCH_COLUMNS, REFERENCE_COLUMN
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.parallel.checks import ABSENT_DEGREES, check_global_batch, check_possible
from mindformers_ixc.parallel.degrees import DEGREES, Degrees, degrees_of
from mindformers_ixc.parallel.slices import placement
from mindformers_ixc.parallel.stages import stages_of_layers
from mindformers_ixc.parameters import Entry, layer_of, parameter_table
from mindformers_ixc.planning.rows import RowMeans
from mindformers_ixc.preference_options import TASK, needs_reference
from mindformers_ixc.sections import check_value, whole
from mindformers_ixc.training_options import GROUP_NETWORK, PAIR_NETWORKS, PREFERENCE_NETWORK

# Parameters MindSpore does not shard over replicas because they are small, KiB (its documented default).
SHARD_THRESHOLD_KIB = 64


@dataclass(frozen=True)
class OptimizerSharding:
    """How parameters and moments are spread over the devices that would hold copies of them.

    Attributes:
        enabled: MindSpore's `enable_parallel_optimizer`.
        threshold: bytes of a whole parameter below which it is left alone.
        size: devices of a shard group at most; -1 for all that hold a copy.
        shards_gradients: accumulated gradients are spread too.
        gathers_again: weights may be gathered a second time for the backward pass instead of kept.
    """

    enabled: bool = False
    threshold: int = SHARD_THRESHOLD_KIB * 1024
    size: int = -1
    shards_gradients: bool = False
    gathers_again: bool = False

    def shards(self, entry: Entry, local: tuple[int, ...], item_bytes: int, replicas: int) -> int:
        """Into how many the first axis of a slice is cut once more.

        Args:
            entry: the whole parameter.
            local: its slice after tensor parallel.
            item_bytes: bytes of a number.
            replicas: devices that hold this slice.
        """
        if not self.enabled or replicas == 1 or math.prod(entry.shape) * item_bytes < self.threshold:
            return 1
        shards = replicas if self.size == -1 else self.size
        return 1 if replicas % shards or local[0] % shards else shards


@dataclass(frozen=True)
class LocalParameter:
    """One parameter as a rank of a stage holds it.

    Attributes:
        name: public name.
        part: key of `parameters.PARTS`.
        shape: of the whole.
        local: of the slice, optimizer sharding included.
        optimizer_shards: into how many optimizer sharding cuts the slice of tensor parallel.
        slices: different slices there are over all ranks.
        replicas: devices that would hold a copy without optimizer sharding.
        trained: whether it has a gradient.
        item_bytes: bytes of a number.
        stage: pipeline stage.
        layer: decoder layer, `None` outside of them.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    local: tuple[int, ...]
    optimizer_shards: int
    slices: int
    replicas: int
    trained: bool
    item_bytes: int
    stage: int
    layer: int | None

    @cached_property
    def size(self) -> int:
        """Numbers in the slice."""
        return math.prod(self.local)

    @cached_property
    def used_size(self) -> int:
        """Numbers in the slice a product uses: what optimizer sharding spread is gathered."""
        return self.size * self.optimizer_shards


class ModelTable:
    """What many layouts of one model have in common.

    Args:
        config: all sizes.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self._stages: dict[int, list[int]] = {}

    @cached_property
    def entries(self) -> list[tuple[Entry, int | None]]:
        """Every parameter with its decoder layer."""
        return [(entry, layer_of(name)) for name, entry in parameter_table(self.config).items()]

    def stages(self, count: int) -> list[int]:
        """Pipeline stage of each decoder layer, of `count` stages."""
        if count not in self._stages:
            self._stages[count] = stages_of_layers(self.config, count)
        return self._stages[count]


@dataclass(frozen=True)
class Workload:
    """A training step and its layout.

    Attributes:
        table: of the model.
        layout: degrees; `micro_batch_num` counts accumulation steps where there is one stage.
        samples: of a micro batch of one replica (pairs for preferences).
        trained_parts: parts that train; `None` for all.
        preference: the step is one of pairs, for preferences or for a reward model.
        reference: such a step computes its reference too.
        full_batch: every device gets the whole batch and takes its slice.
        whole_table: without pipeline stages the embedding is whole on every device (MindFormers' `vocab_emb_dp`).
        sharding: of optimizer states.
        target: the YAML's `context.device_target`.
        columns: of the batch.
        rows: what the rows hold, if the data or a number of samples a row were given.
    """

    table: ModelTable
    layout: Degrees
    samples: int
    trained_parts: tuple[str, ...] | None = None
    preference: bool = False
    reference: bool = False
    full_batch: bool = True
    whole_table: bool = False
    sharding: OptimizerSharding = OptimizerSharding()
    target: str = "Ascend"
    columns: tuple[str, ...] = BATCH_COLUMNS
    rows: RowMeans | None = None

    @property
    def config(self) -> ModelConfig:
        """Sizes and dtypes of the model; the degrees in it need not be those of the layout."""
        return self.table.config

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step."""
        return self.layout.micro_batch_num

    @property
    def accumulates(self) -> bool:
        """Whether gradients are added up over micro batches."""
        return self.micro_batches > 1 or self.layout.pipeline_stage > 1

    @property
    def global_batch(self) -> int:
        """Samples (rows where samples are packed) of a step over all devices."""
        return self.samples * self.layout.data_parallel * self.micro_batches

    @property
    def squares(self) -> float:
        """Sum of the squared lengths of a sequence's segments, as the attention computes them.

        Packed samples see only themselves; unless the data said how long they are, they are taken to be equally long.
        """
        length = self.config.seq_length
        if not self.config.packing or self.rows is None:
            return float(length ** 2)
        return self.rows.squares if self.rows.squares is not None else length ** 2 / max(1.0, self.rows.samples)

    @property
    def sequences(self) -> int:
        """Sequences of a micro batch of one replica."""
        return self.samples * (2 if self.preference else 1)

    @property
    def positions(self) -> int:
        """Text and image positions of a micro batch of one replica."""
        return self.sequences * self.config.seq_length

    @property
    def tile_positions(self) -> int:
        """Positions of a tile in the vision tower, as the attention takes them."""
        vision = self.config.vision_config
        return vision.padded_positions if self.flash else vision.positions

    @property
    def vision_degree(self) -> int:
        """Devices the vision tower is cut over."""
        return self.layout.model_parallel if self.config.vision_parallel == "heads" else 1

    @property
    def sequence_parallel(self) -> bool:
        """Whether positions between the linears are cut over the tensor-parallel devices."""
        return self.layout.model_parallel > 1 and bool(self.config.parallel_config.use_seq_parallel)

    @property
    def flash(self) -> bool:
        """Whether attention is Ascend's fused one."""
        return self.target == "Ascend" and self.config.use_flash_attention

    @property
    def shares_graph(self) -> bool:
        """Whether micro batches share a graph (lazy inline); sharded weights are gathered outside of it, once a step.

        MindFormers turns it off where there is a single micro batch.
        """
        return self.target == "Ascend" and not self.config.disable_lazy_inline and self.accumulates

    @property
    def gathers_again(self) -> bool:
        """Whether sharded weights are gathered a second time for the backward pass, and not kept.

        MindSpore gathers again inside cells that are computed again; what is gathered outside of a shared graph is not.
        """
        return self.sharding.gathers_again and not self.shares_graph

    def gathered_bytes(self, parameter: LocalParameter) -> int:
        """Bytes a number has when optimizer sharding gathers a parameter: after its cast, if it is cast.

        Norms and the embedding are used in the dtype they are kept in.
        """
        is_norm = len(parameter.shape) < 2 and "norm" in parameter.name
        if is_norm or parameter.name == "model.tok_embeddings.weight":
            return parameter.item_bytes
        return dtype_bytes(self.config.compute_dtype)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Task LoRAs in the graph."""
        return MODE_ADAPTERS[self.config.adapter_mode]

    @property
    def preference_task(self) -> str:
        """The task LoRA that learns from preferences, which the reference does without."""
        return (self.config.preference or {}).get("task", TASK)

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether the rows of the embedding are cut over the tensor-parallel devices."""
        return self.layout.model_parallel > 1 and not (self.whole_table and self.layout.pipeline_stage == 1)

    @property
    def layer_stages(self) -> list[int]:
        """Pipeline stage of each decoder layer."""
        return self.table.stages(self.layout.pipeline_stage)

    @cached_property
    def recomputed(self) -> int:
        """Leading decoder layers that keep only their inputs."""
        section = self.config.parallel_config.recompute
        return recomputed_layers(section.recompute, self.config.num_hidden_layers, "recompute")

    @cached_property
    def selected(self) -> int:
        """Leading decoder layers whose attention cores and gates are computed again, `recomputed` ones included."""
        section = self.config.parallel_config.recompute
        return max(self.recomputed,
                   recomputed_layers(section.select_recompute, self.config.num_hidden_layers, "select_recompute"))

    def trains(self, part: str) -> bool:
        """Whether a part trains."""
        return self.trained_parts is None or part in self.trained_parts

    def first_rank(self, stage: int) -> int:
        """The first rank of a stage; ranks of a stage are in a row, tensor-parallel ones next to each other."""
        return stage * self.layout.data_parallel * self.layout.model_parallel

    def with_layout(self, layout: Degrees, samples: int) -> Workload:
        """The same step with another layout."""
        return replace(self, layout=layout, samples=samples)


def local_parameters(workload: Workload) -> list[list[LocalParameter]]:
    """For each stage the parameters of its graph, as the stage's first rank holds them."""
    config, layout = workload.config, workload.layout
    tensor, ranks = layout.model_parallel, layout.data_parallel * layout.model_parallel
    item_bytes = dtype_bytes(config.param_init_type)
    found: list[list[LocalParameter]] = [[] for _ in range(layout.pipeline_stage)]
    for entry, layer in workload.table.entries:
        place = placement(entry.name, config, workload.layer_stages, workload.adapters, not workload.cuts_vocabulary)
        if not place.in_graph:
            continue
        local = place.local_shape(entry.shape, tensor)
        cuts = tensor if place.axis is not None else 1
        replicas = ranks // cuts
        shards = workload.sharding.shards(entry, local, item_bytes, replicas)
        found[place.stage].append(LocalParameter(
            entry.name, entry.part, entry.shape, (local[0] // shards, *local[1:]), shards, shards * cuts, replicas,
            workload.trains(entry.part), item_bytes, place.stage, layer))
    return found


def read_workload(fields: dict) -> Workload:
    """The workload of a YAML's fields, its own layout not yet checked against anything.

    Args:
        fields: of the YAML, overrides applied.

    Raises:
        ConfigError: for what a plan does not know, and for degrees that are no numbers.
    """
    section = (fields.get("model") or {}).get("model_config") or {}
    if section.get("type") != "IXC25Config":
        raise ConfigError(f"model.model_config.type is {section.get('type')!r}; a plan knows IXC25Config only.")
    if (section.get("pet_config") or {}).get("pet_type"):
        raise ConfigError("model.model_config.pet_config: a plan does not know PET; say what trains with train_parts.")
    for name, where in ABSENT_DEGREES.items():
        value = ((fields.get("parallel_config") or {}) if where else fields).get(name)
        if value not in (None, 1):
            raise ConfigError(f"{where}{name} is {value!r}, which this model does not have; the only choice is 1.")
    layout, runner = degrees_of(fields), fields.get("runner_config") or {}
    if layout.pipeline_stage == 1:       # MindFormers then counts accumulation steps instead
        layout = replace(layout, micro_batch_num=runner.get("gradient_accumulation_steps") or 1)
    arch = (fields["model"].get("arch") or {}).get("type")
    if arch == GROUP_NETWORK:
        raise ConfigError(f"model.arch.type is {GROUP_NETWORK}, whose graph is not cut; a plan knows layouts that are. "
                          "Its devices hold the whole model each.")
    preference = arch in PAIR_NETWORKS
    columns = tuple((fields.get("train_dataset") or {}).get("input_columns") or BATCH_COLUMNS)
    reference = (arch == PREFERENCE_NETWORK and REFERENCE_COLUMN not in columns
                 and needs_reference(section.get("preference")))
    parts, parallel = fields.get("train_parts"), fields.get("parallel_config") or {}
    return Workload(
        ModelTable(_config(fields)), layout, runner.get("batch_size") or 1, None if parts is None else tuple(parts),
        preference, reference, bool((fields.get("parallel") or {}).get("full_batch", True)),
        bool(parallel.get("vocab_emb_dp", True)), _sharding(fields),
        (fields.get("context") or {}).get("device_target") or "Ascend", columns)


def place(workload: Workload, devices: int, options: dict[str, int | None] | None = None,
          global_batch: int | None = None) -> Workload:
    """The workload with the layout asked for, checked.

    Args:
        workload: of the YAML.
        devices: of the cluster.
        options: degrees that replace the YAML's, by the names of `degrees.DEGREES`. Without `data_parallel` it becomes
            what the other degrees leave, without `micro_batch_num` the number that keeps the samples of a micro batch.
        global_batch: samples of a step; by default the YAML's or, where that does not divide, as many as the layout
            makes of the YAML's micro batches.

    Raises:
        ConfigError: for a layout or a batch that cannot be.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for name, value in [*given.items(), ("global_batch", global_batch), ("devices", devices)]:
        if value is not None:
            check_value(f"--{name}", value, whole(1))
    layout = replace(workload.layout, **given)
    if given.keys() & {"model_parallel", "pipeline_stage"} and "data_parallel" not in given:
        layout = replace(layout, data_parallel=max(1, devices // (layout.model_parallel * layout.pipeline_stage)))
    batch = global_batch or workload.global_batch
    if "micro_batch_num" not in given and (given or global_batch):
        parts = batch // (layout.data_parallel * workload.samples)
        least = 1 if global_batch else layout.pipeline_stage
        layout = replace(layout, micro_batch_num=max(least, parts))
    if not global_batch and batch % (layout.data_parallel * layout.micro_batch_num):
        batch = layout.data_parallel * layout.micro_batch_num * workload.samples
    check_possible(workload.config, layout, devices)
    check_global_batch(layout, batch)
    placed = workload.with_layout(layout, batch // layout.data_parallel // layout.micro_batch_num)
    reason = refusal(placed)
    if reason:
        raise ConfigError(reason)
    return placed


def refusal(workload: Workload) -> str | None:
    """Why this package does not train a workload in its layout; `None` if it does."""
    ranks = workload.layout.data_parallel * workload.layout.model_parallel
    if workload.sharding.enabled and workload.sharding.size > ranks:
        return (f"parallel_optimizer_config.optimizer_weight_shard_size is {workload.sharding.size}, more than the "
                f"{ranks} devices of a pipeline stage.")
    return None


def _config(fields: dict) -> ModelConfig:
    section = {key: value for key, value in fields["model"]["model_config"].items() if key != "type"}
    parallel = {key: value for key, value in (fields.get("parallel_config") or {}).items() if key not in DEGREES}
    return ModelConfig(**section, parallel_config=ParallelOptions.of(parallel, fields.get("recompute_config")))


def _sharding(fields: dict) -> OptimizerSharding:
    parallel = fields.get("parallel") or {}
    options = parallel.get("parallel_optimizer_config") or {}
    threshold = options.get("parallel_optimizer_threshold", SHARD_THRESHOLD_KIB)
    size = options.get("optimizer_weight_shard_size", parallel.get("optimizer_weight_shard_size", -1))
    return OptimizerSharding(
        bool(parallel.get("enable_parallel_optimizer")), threshold * 1024, -1 if size is None or size < 2 else size,
        bool(options.get("gradient_accumulation_shard")) or options.get("optimizer_level") in ("level2", "level3"),
        bool((fields.get("recompute_config") or {}).get("parallel_optimizer_comm_recompute")))
