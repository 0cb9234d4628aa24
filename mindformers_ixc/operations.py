"""Operations of a training step by closed formulae: what a tile, a position and a segment take, and the goodput.

A product of N rows with a weight of P numbers is 2 N P operations forward. Counted are the products of the tower with
its attention, of the projector and of the language model with its head and its low-rank pairs. Embeddings, norms, gates
and softmaxes are left out, as usual. They are the model's operations: what recomputation does again is not counted, and
of the attention of a segment the masked half is (so it is by the usual formula of model FLOPs utilisation).
"""
from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.parameters import linear_shapes

# A part that trains is computed forward and twice as much backward (gradients of its input and of its weights); a
# frozen part forward only. Nothing is counted for what recomputation does again.
TRAINED, FROZEN = 3.0, 1.0


@dataclass(frozen=True)
class Costs:
    """Operations of a step, by what is fed to it.

    Attributes:
        tile: of one tile, global view or not: tower and projector.
        position: of one position in the language model's products.
        pair: of one query and key that attend to each other in the language model; a segment of n positions has n * n
            of them (the causal half is not taken off).
    """

    tile: float
    position: float
    pair: float

    def of(self, positions: float, tiles: float, lengths: Sequence[int] = ()) -> float:
        """Operations of so many positions and tiles, and of the attention of segments of the given lengths."""
        return self.position * positions + self.tile * tiles + self.pair * sum(float(n) * n for n in lengths)


def training_costs(config: ModelConfig, trained: Collection[str] | None = None, reference: str | None = None) -> Costs:
    """Costs of a training step.

    Args:
        config: sizes, and the task LoRAs in use (`adapter_mode`).
        trained: parts that train (keys of `parameters.PARTS`); `None` for all.
        reference: the task LoRA that learns from preferences, if the step computes the reference too. That is the
            forward pass of the language model once more, without that pair; pictures are encoded once for both.
    """
    costs = _costs(config, trained, MODE_ADAPTERS[config.adapter_mode])
    if reference is None:
        return costs
    other = _costs(config, (), [task for task in MODE_ADAPTERS[config.adapter_mode] if task != reference])
    return Costs(costs.tile, costs.position + other.position, costs.pair + other.pair)


def _costs(config: ModelConfig, trained: Collection[str] | None, tasks: Collection[str]) -> Costs:
    def factor(part: str) -> float:
        return TRAINED if trained is None or part in trained else FROZEN

    vision, width = config.vision_config, config.hidden_size
    merged = 4 * vision.hidden_size
    tile = (factor("vision") * tower_operations(config)
            + factor("projector") * 2.0 * vision.tokens_per_tile * (merged * width + width * width))
    shapes = linear_shapes(config).values()
    layer = factor("language") * 2.0 * sum(math.prod(shape) for shape in shapes)
    ranks = {f"task_lora.{task}": config.task_lora_ranks.get(task, 0) for task in tasks}
    for part, rank in {"partial_lora": config.plora_rank, **ranks}.items():
        layer += factor(part) * 2.0 * rank * sum(sum(shape) for shape in shapes)
    head = factor("language") * 2.0 * config.vocab_size * width if config.reward_pooling is None else \
        factor("reward_head") * 2.0 * width
    pair = factor("language") * 4.0 * config.num_attention_heads * config.head_size * config.num_hidden_layers
    return Costs(tile, config.num_hidden_layers * layer + head, pair)


def tower_operations(config: ModelConfig) -> float:
    """Forward operations of the vision tower for one tile: products, scores and weighted sums of all its layers."""
    vision = config.vision_config
    width, positions = vision.hidden_size, vision.positions
    layer = 2.0 * positions * (4 * width * width + 2 * width * vision.intermediate_size) + 4.0 * positions ** 2 * width
    patches = 2.0 * vision.patches_per_side ** 2 * 3 * vision.patch_size ** 2 * width
    return vision.num_hidden_layers * layer + patches


def goodput(costs: Costs, positions: float, tiles: float, rows: int, seq_length: int, max_tiles: int) -> float:
    """Share of the operations of some rows that real positions and real tiles need, from 0 to 1; 1 for no rows.

    Args:
        costs: of the step.
        positions: real ones of all rows.
        tiles: real ones of all rows.
        rows: there are.
        seq_length: positions that a row computes.
        max_tiles: tiles that a row computes.
    """
    computed = costs.of(rows * seq_length, rows * max_tiles)
    return costs.of(positions, tiles) / computed if computed else 1.0
