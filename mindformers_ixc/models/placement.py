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


def mark_backward_end(model: nn.Cell) -> None:
    """Tells the compiler where the backward pass of a micro batch ends, if the tower does not train.

    Accumulating without stages, MindSpore (2.9) lets a micro batch wait for the gradient of the first operator that
    takes a parameter. That is the tower's first; where it is frozen there is no such gradient and the compiler gives up
    ("Cannot find grad_accumulation border node"). Its mark is an attribute that any operator may have.

    Args:
        model: of a parallel run, whose parameters say whether they train.
    """
    if any(parameter.requires_grad for parameter in model.vit.get_parameters()):
        return
    first = next((cell for _, cell in model.cells_and_names() if hasattr(cell, "matmul")
                  and any(parameter.requires_grad for parameter in cell.get_parameters(expand=False))), model.head)
    first.matmul.add_prim_attr("first_parameter_cnode", 0)


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
                 model.noise, model.embedding_noise):
        cell.pipeline_stage = 0
    layers = model.model.layers
    for layer, stage in zip(layers, stages_of_layers(model.config, stages)):
        layer.pipeline_stage = stage
    for cell in (model.model.norm, model.head, model.chunked_losses, model.loss):
        cell.pipeline_stage = stages - 1
    if model.reports_sources:
        model.source_sums.pipeline_stage = model.kept_report.pipeline_stage = stages - 1
