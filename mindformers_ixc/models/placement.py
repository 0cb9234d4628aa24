"""Gives the model's cells their pipeline stages, and lets micro batches share one graph."""
from __future__ import annotations

from typing import TYPE_CHECKING

from mindspore import lazy_inline, nn

from mindformers_ixc.parallel.cuts import check_stages
from mindformers_ixc.parallel.stages import stages_of_layers

if TYPE_CHECKING:
    from mindformers.modules.transformer import TransformerOpParallelConfig


def share_graph(cell: nn.Cell) -> None:
    """Lets the compiler keep one graph of a cell for all micro batches (MindSpore's lazy inline, Ascend only).

    The decorator is made for `__init__`; whether a cell wants it is known only when it has been built.
    """
    @lazy_inline
    def __init__(self):
        """Nothing is left to do."""

    __init__(cell)


def set_pipeline_stages(model: nn.Cell, parallel_config: TransformerOpParallelConfig) -> None:
    """Gives every cell of the model its `pipeline_stage`; with one stage there is nothing to do.

    Raises:
        ConfigError: for more stages than layers.
    """
    stages = parallel_config.pipeline_stage
    if stages == 1:
        return
    check_stages(model.config, stages)
    for cell in (model.vit, model.vision_merge, model.vision_proj, model.choose, model.model.tok_embeddings,
                 model.noise):
        cell.pipeline_stage = 0
    layers = model.model.layers
    for layer, stage in zip(layers, stages_of_layers(model.config, stages)):
        layer.pipeline_stage = stage
    for cell in (model.model.norm, model.output, model.chunked_losses, model.loss):
        cell.pipeline_stage = stages - 1
    if model.reports_sources:
        model.source_sums.pipeline_stage = model.kept_report.pipeline_stage = stages - 1
