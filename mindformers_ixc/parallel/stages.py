"""Which pipeline stage computes what: the vision side and the embedding first, head and loss last, layers between."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.parameters import layer_of, linear_shapes


def layer_stages(layers: int, stages: int, offset: int | Sequence[int] = 0) -> list[int]:
    """Stage of each decoder layer.

    Args:
        layers: number of decoder layers.
        stages: pipeline stages.
        offset: 0, or for each stage how many layers more (or fewer) than `layers // stages` it gets, as MindFormers'
            key of this name.

    Raises:
        ConfigError: when the offsets do not place every layer, or leave a stage without any.
    """
    if np.any(offset) and len(np.atleast_1d(offset)) != stages:
        raise ConfigError(f"offset is {offset}, but there are {stages} pipeline stages; give one number for each.")
    counts = np.full(stages, layers // stages) + np.array(offset)
    if not np.any(offset):
        counts[:layers % stages] += 1
    if counts.sum() != layers or counts.min() < 1:
        raise ConfigError(f"offset {offset} gives the {stages} pipeline stages {', '.join(map(str, counts))} layers; "
                          f"each needs one at least and all {layers} must have a place, so the offsets must sum to "
                          f"{layers % stages}.")
    return np.repeat(np.arange(stages), counts).tolist()


def stages_of_layers(config: ModelConfig, stages: int) -> list[int]:
    """Stage of each decoder layer of a configuration, by its `offset`; `auto` balances the work.

    Raises:
        ConfigError: see `layer_stages`.
    """
    layers = config.num_hidden_layers
    if config.offset != "auto":
        return layer_stages(layers, stages, config.offset)
    work = np.zeros(stages)
    vision, layer, head = work_of_sample(config)
    work[0] += vision
    work[-1] += head
    counts = np.ones(stages, int)
    work += layer
    for _ in range(layers - stages):        # each further layer goes where the least is done
        stage = int(np.argmin(work))
        counts[stage] += 1
        work[stage] += layer
    return np.repeat(np.arange(stages), counts).tolist()


def stage_of_parameter(name: str, layer_stages: Sequence[int]) -> int:
    """Pipeline stage that uses a parameter.

    Args:
        name: public parameter name.
        layer_stages: stage of each decoder layer; the last layer's is the last.
    """
    layer = layer_of(name)
    if layer is not None:
        return layer_stages[layer]
    return layer_stages[-1] if name.startswith(("model.norm.", "output.", "v_head.")) else 0


def work_of_sample(config: ModelConfig) -> tuple[float, float, float]:
    """Multiplications of a forward pass over one training sample: vision side, one decoder layer, head."""
    vision, length, width = config.vision_config, config.seq_length, config.hidden_size
    patches = config.max_tiles * (vision.patches_per_side ** 2 + 1)
    tower = vision.num_hidden_layers * patches * (
        4 * vision.hidden_size ** 2 + 2 * vision.hidden_size * vision.intermediate_size
        + 2 * (vision.patches_per_side ** 2 + 1) * vision.hidden_size)
    projector = config.vision_rows * (4 * vision.hidden_size * width + width ** 2)
    linears = linear_shapes(config).values()
    ranks = config.plora_rank + sum(config.task_lora_ranks[task] for task in MODE_ADAPTERS[config.adapter_mode])
    layer: float = length * sum(rows * columns + ranks * (rows + columns) for rows, columns in linears)
    layer += 2 * length * length * width / 2                       # scores and weighted sum, half of them masked
    return tower + projector, layer, length * width * (config.vocab_size if config.reward_pooling is None else 1)
