"""Which pipeline stage computes what: the vision side and the embedding first, head and loss last, layers between."""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindformers.tools.utils import get_real_group_size, get_real_rank

from mindformers_ixc.parallel.cuts import check_stages


def is_parallel() -> bool:
    """Whether graphs are made by MindSpore's parallel compiler."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


def reports_loss() -> bool:
    """Whether this process is the one that writes down what a step gave: the first rank of the last stage."""
    if not is_parallel():
        return True
    size, stages = get_real_group_size(), ms.get_auto_parallel_context("pipeline_stages") or 1
    return get_real_rank() == size - size // stages


def has_loss() -> bool:
    """Whether this process's pipeline stage computes the loss."""
    if not is_parallel():
        return True
    size, stages = get_real_group_size(), ms.get_auto_parallel_context("pipeline_stages") or 1
    return get_real_rank() >= size - size // stages


def layer_stages(layers: int, stages: int, offset=0) -> list[int]:
    """Stage of each decoder layer.

    Args:
        layers: number of decoder layers.
        stages: pipeline stages.
        offset: 0, or for each stage how many layers more (or fewer) than `layers // stages` it gets, as MindFormers'
            key of this name.
    """
    counts = np.full(stages, layers // stages) + np.array(offset)
    if not np.any(offset):
        counts[:layers % stages] += 1
    return np.repeat(np.arange(stages), counts).tolist()


def set_pipeline_stages(model, parallel_config) -> None:
    """Gives every cell of the model its `pipeline_stage`; with one stage there is nothing to do.

    Raises:
        ConfigError: for more stages than layers.
    """
    stages = parallel_config.pipeline_stage
    if stages == 1:
        return
    check_stages(model.config, stages)
    for cell in (model.vit, model.vision_merge, model.vision_proj, model.choose, model.model.tok_embeddings):
        cell.pipeline_stage = 0
    layers = model.model.layers
    for layer, stage in zip(layers, layer_stages(len(layers), stages, getattr(model.config, "offset", 0))):
        layer.pipeline_stage = stage
    for cell in (model.model.norm, model.output, model.loss):
        cell.pipeline_stage = stages - 1
