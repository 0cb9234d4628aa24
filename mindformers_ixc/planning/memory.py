"""What a device of each pipeline stage holds: state exactly, activations by closed formulae.

Parameters, gradients and optimizer states are counted number by number. Activations are an estimate: the tensors the
backward pass of these cells reads, plus the largest set of tensors that are alive only for a moment. What is left out
is in docs/scaling.md. All sizes are bytes of one device.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.data.batch import column_shapes
from mindformers_ixc.fields import COMPRESSED_MASK
from mindformers_ixc.planning.workload import LocalParameter, Workload

# MindFormers' AdamW keeps two moments, and gradients after unscaling, in float32.
MOMENT_BYTES = 4

# Float32 tensors as large as the logits of a chunk that are alive at once in the cross entropy: log-softmax, one-hot
# labels, softmax, gradient.
LOGIT_COPIES = 4

# Of a float32 softmax the fused attention keeps 8 columns of maxima and of sums for each query.
FLASH_STATISTICS = 2 * 8 * 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one device of a stage.

    Attributes:
        parameters: slices of the parameters.
        gradients: of what trains.
        optimizer: two moments.
        terms: estimated activations, by what they are.
        compiled: whether the first three are MindSpore's compiler's.
    """

    parameters: int
    gradients: int
    optimizer: int
    terms: dict[str, int]
    compiled: bool = False

    @property
    def activations(self) -> int:
        """Sum of the estimated terms."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        """Bytes of parameters, gradients, optimizer states and activations together."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def stage_memory(workload: Workload, stage: int, parameters: list[LocalParameter]) -> StageMemory:
    """Memory of a stage.

    Args:
        workload: the step.
        stage: pipeline stage.
        parameters: of that stage.
    """
    return StageMemory(sum(parameter.size * parameter.item_bytes for parameter in parameters),
                       gradient_bytes(workload, parameters),
                       2 * MOMENT_BYTES * sum(parameter.size for parameter in parameters if parameter.trained),
                       activation_terms(workload, stage, parameters))


def gradient_bytes(workload: Workload, parameters: Iterable[LocalParameter]) -> int:
    """Bytes of the gradients of some parameters.

    MindFormers' `MFTrainOneStepCell` turns each gradient into float32 when it takes the loss scale out, so 4 bytes a
    number. Where micro batches are added up, `MFPipelineWithLossScaleCell` has a parameter `accu_grads` for each, in
    the dtype of the weight and, unless MindSpore's `gradient_accumulation_shard` says otherwise, not spread over the
    replicas.
    """
    trained = [parameter for parameter in parameters if parameter.trained]
    if not workload.accumulates:
        return MOMENT_BYTES * sum(parameter.size for parameter in trained)
    if workload.sharding.shards_gradients:
        return sum(parameter.size * parameter.item_bytes for parameter in trained)
    return sum(parameter.used_size * parameter.item_bytes for parameter in trained)


def activation_terms(workload: Workload, stage: int, parameters: list[LocalParameter]) -> dict[str, int]:
    """Estimated bytes beside the state at the fullest moment of a step, by what they are.

    That moment is in the backward pass, or, with few activations, in the update, when accumulated gradients are there a
    second time, in float32.
    """
    backward = _backward_terms(workload, stage, parameters)
    if workload.accumulates:
        update = MOMENT_BYTES * sum(parameter.size for parameter in parameters if parameter.trained)
        update_terms = {"inputs of the step": backward["inputs of the step"], "unscaled gradients": update}
        if sum(update_terms.values()) > sum(backward.values()):
            return update_terms
    return backward


def _backward_terms(workload: Workload, stage: int, parameters: list[LocalParameter]) -> dict[str, int]:
    sizes = _Sizes(workload)
    layers = [number for number, place in enumerate(workload.layer_stages) if place == stage]
    last = stage == workload.layout.pipeline_stage - 1
    in_flight = min(workload.micro_batches, workload.layout.pipeline_stage - stage)
    terms: defaultdict[str, float] = defaultdict(int, {"inputs of the step": sizes.inputs()})
    at_work: dict[str, float] = {}
    terms["gathered and cast weights"] = _copied_weights(workload, parameters)
    for number in layers:
        kept = sizes.kept_of_layer(number)
        for name, size in kept.items():
            terms[name] += in_flight * size
    if layers:
        terms["causal mask"] = sizes.mask()
        recomputes = layers[0] < workload.recomputed
        at_work["a decoder layer"] = sizes.layer_at_work(recomputes)
    if stage == 0:
        for name, size in sizes.kept_of_vision().items():
            terms[name] += in_flight * size
        at_work["a vision layer"] = sizes.vision_at_work()
    if last:
        at_work["logits and loss"] = sizes.logits()
        if workload.reference:
            terms["losses of the policy"] = 2 * 4 * workload.positions
    name = max(at_work, key=at_work.__getitem__)
    terms[f"at work: {name}"] = at_work[name]
    return {name: int(size) for name, size in terms.items() if size}


def _copied_weights(workload: Workload, parameters: list[LocalParameter]) -> int:
    """Copies of weights that live from the forward to the backward pass.

    A product takes its weight in the compute dtype; that copy is kept where the cell is not computed again. Weights
    spread over replicas are gathered, and kept until the backward pass unless they are gathered a second time.
    """
    compute = dtype_bytes(workload.config.compute_dtype)
    again = _recomputed_prefixes(workload)
    total = 0
    for parameter in parameters:
        if len(parameter.shape) < 2:
            continue
        held = parameter.item_bytes
        if parameter.optimizer_shards > 1 and not workload.gathers_again:
            held = workload.gathered_bytes(parameter)
            total += parameter.used_size * held
        # the embedding's rows are taken from the parameter itself
        if held != compute and parameter.name != "model.tok_embeddings.weight" \
                and not parameter.name.startswith(again):
            total += parameter.used_size * compute
    return total


def _recomputed_prefixes(workload: Workload) -> tuple[str, ...]:
    prefixes = [f"model.layers.{number}." for number in range(workload.recomputed)]
    if workload.recomputed == workload.config.num_hidden_layers:
        prefixes.append("vit.vision_tower.vision_model.encoder.")
    return tuple(prefixes)


class _Sizes:
    """Sizes of activations of a micro batch on one device.

    Args:
        workload: the step.
    """

    def __init__(self, workload: Workload):
        self.workload, config = workload, workload.config
        self.compute, self.norm = dtype_bytes(config.compute_dtype), dtype_bytes(config.layernorm_compute_type)
        self.softmax = dtype_bytes(config.softmax_compute_type)
        self.tensor = workload.layout.model_parallel
        self.rows = workload.positions / (self.tensor if workload.sequence_parallel else 1)
        # a norm in another dtype reads a copy of its input, and so does its gradient
        self.norm_copy = self.norm if self.norm != self.compute else 0

    def inputs(self) -> int:
        """The batch as the data pipeline hands it over."""
        workload = self.workload
        rows = workload.global_batch if workload.full_batch else workload.samples * workload.micro_batches
        columns = column_shapes(workload.config, workload.columns, 2 if workload.preference else 1)
        return rows * sum(math.prod(shape) * dtype_bytes(dtype) for dtype, shape in columns.values())

    def scores(self, sequences: float, heads: float, length: int) -> float:
        """Attention weights that are kept: in the softmax's dtype and, where that differs, the products'."""
        if self.workload.flash:
            return sequences * heads * length * FLASH_STATISTICS
        return sequences * heads * length ** 2 * (self.softmax + (self.compute if self.compute != self.softmax else 0))

    def kept_of_layer(self, number: int) -> dict[str, float]:
        """What the backward pass reads of decoder layer `number`, by kind."""
        config, width = self.workload.config, self.workload.config.hidden_size
        if number < self.workload.recomputed:
            return {"layer inputs": self.rows * width * self.compute}
        kept = self.whole_layer()
        if number < self.workload.selected:
            inner = self.workload.positions * config.intermediate_size / self.tensor * self.compute
            kept["attention scores"] = 0
            kept["feed-forward"] -= 3 * inner               # sigmoid and the two products of the gate
        return kept

    def whole_layer(self) -> dict[str, float]:
        """Everything the backward pass reads of a decoder layer that is not computed again, by kind."""
        workload, config, n = self.workload, self.workload.config, self.workload.positions
        width, heads = config.hidden_size, config.num_attention_heads
        head_width = (heads + 2 * config.num_key_value_heads) * config.head_size
        inner, compute = n * config.intermediate_size / self.tensor, self.compute
        # inputs of the layer and of its second half, both norms' copies; both norms' results, whole for the products
        rows = self.rows * width * 2 * (compute + self.norm_copy) + n * width * 2 * compute
        return {"norms and residuals": rows,
                "queries, keys, values": n * (head_width + heads * config.head_size) / self.tensor * compute,
                "attention scores": self.scores(workload.sequences, heads / self.tensor, config.seq_length),
                "feed-forward": 5 * inner * compute,
                "low-rank pairs": self.low_rank()}

    def low_rank(self) -> float:
        """Inputs of Partial LoRA after dropout, with its mask of bits, and the narrow products of all pairs."""
        workload, config, n = self.workload, self.workload.config, self.workload.positions
        size = 0.0
        if config.plora_rank:
            size += 5 * n * config.plora_rank * self.compute
            if config.plora_dropout and workload.trains("partial_lora"):
                narrow = (config.num_attention_heads * config.head_size + config.intermediate_size) / self.tensor
                size += n * (3 * config.hidden_size + narrow) * (self.compute + 1 / 8)
        return size + sum(5 * n * config.task_lora_ranks[task] * self.compute for task in workload.adapters)

    def layer_at_work(self, recomputes: bool) -> float:
        """A decoder layer in the backward pass: what it computes again, and its largest gradients."""
        config, n = self.workload.config, self.workload.positions
        inner = 3 * n * config.intermediate_size / self.tensor * self.compute
        scores = 0.0
        if not self.workload.flash:
            scores = self.scores(self.workload.sequences, config.num_attention_heads / self.tensor, config.seq_length)
        gradients = max(inner, scores) + 2 * self.rows * config.hidden_size * self.compute
        again = sum(self.whole_layer().values()) - self.rows * config.hidden_size * self.compute if recomputes else 0
        return again + gradients

    def mask(self) -> float:
        """The causal mask, which the fused attention takes in a compressed form; else of packed samples one each."""
        config, length = self.workload.config, self.workload.config.seq_length
        if self.workload.flash:
            return COMPRESSED_MASK ** 2
        return (self.workload.sequences if config.packing else 1) * length ** 2 * self.softmax

    def logits(self) -> float:
        """Logits of a chunk and their gradient in the compute dtype, and the loss's float32 copies."""
        config = self.workload.config
        if config.reward_pooling is not None:       # one value a position
            return self.workload.positions * (2 * self.compute + 4 * LOGIT_COPIES)
        positions = min(self.workload.positions, config.loss_chunk)
        return positions * config.vocab_size / self.tensor * (2 * self.compute + 4 * LOGIT_COPIES)

    @property
    def tile_positions(self) -> int:
        """Positions of a tile in the vision tower."""
        return self.workload.tile_positions

    @property
    def vision_trains(self) -> bool:
        """Whether the vision tower has a backward pass."""
        return self.workload.trains("vision")

    def kept_of_vision(self) -> dict[str, float]:
        """What the backward pass reads of the vision side, by kind."""
        workload, config, vision = self.workload, self.workload.config, self.workload.config.vision_config
        tiles = workload.samples * config.max_tiles
        n, width = tiles * self.tile_positions, vision.hidden_size
        kept = {}
        if self.vision_trains:
            again = workload.recomputed == config.num_hidden_layers
            layer = n * width * self.compute if again else self.vision_layer()
            kept["vision layer inputs" if again else "vision layers"] = vision.num_hidden_layers * layer
            kept["vision patches"] = tiles * vision.patches_per_side ** 2 * 3 * vision.patch_size ** 2 * self.compute
        if self.vision_trains or workload.trains("projector") or workload.trains("separators"):
            rows = workload.samples * config.vision_rows
            kept["projector"] = rows * (4 * width + 5 * config.hidden_size / self.tensor) * self.compute
        kept["vision table"] = workload.sequences * config.vision_rows * config.hidden_size * self.compute
        return kept

    def vision_layer(self) -> float:
        """Everything the backward pass reads of a vision layer that is not computed again."""
        vision, compute = self.workload.config.vision_config, self.compute
        tiles = self.workload.samples * self.workload.config.max_tiles
        n, width, degree = tiles * self.tile_positions, vision.hidden_size, self.workload.vision_degree
        rows = n * width * (2 * (compute + self.norm_copy) + 2 * compute)
        cut = n * (4 * width + 3 * vision.intermediate_size) / degree * compute
        return rows + cut + self.scores(tiles, vision.num_attention_heads / degree, self.tile_positions)

    def vision_at_work(self) -> float:
        """A vision layer at work: forward only, or in the backward pass."""
        vision = self.workload.config.vision_config
        tiles, degree = self.workload.samples * self.workload.config.max_tiles, self.workload.vision_degree
        inner = 3 * tiles * self.tile_positions * vision.intermediate_size / degree * self.compute
        scores = self.scores(tiles, vision.num_attention_heads / degree, self.tile_positions)
        if not self.vision_trains:
            return max(inner, scores) + 2 * tiles * self.tile_positions * vision.hidden_size * self.compute
        again = self.vision_layer() if self.workload.recomputed == self.workload.config.num_hidden_layers else 0
        return again + max(inner, scores)
