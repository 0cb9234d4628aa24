"""The one rule for "which slice of this parameter has this rank", of the table of cuts and the pipeline stages.

Conversion, parallel loading, plans and the tests of the cells' strategies all ask here. Ranks of a stage are in a row,
tensor-parallel ones next to each other.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.parallel.cuts import cut_axis
from mindformers_ixc.parallel.stages import stage_of_parameter, stages_of_layers
from mindformers_ixc.parameters import VISION, part_of

# Carried by the checkpoint, in no graph.
NEVER_COMPUTED = f"{VISION}.post_layernorm."

EMBEDDING = "model.tok_embeddings.weight"


@dataclass(frozen=True)
class Placement:
    """Where a parameter is in a layout.

    Attributes:
        stage: pipeline stage that holds it.
        axis: axis that tensor parallel cuts; `None` if it is whole on every device of its stage.
        in_graph: whether the stage's graph uses it.
    """

    stage: int
    axis: int | None
    in_graph: bool = True

    def region(self, shape: Sequence[int], degree: int, device: int) -> tuple[slice, ...]:
        """What a tensor-parallel device holds.

        Args:
            shape: of the whole parameter.
            degree: tensor-parallel devices of a stage.
            device: number among them.
        """
        found = [slice(0, length) for length in shape]
        if self.axis is not None:
            size = shape[self.axis] // degree
            found[self.axis] = slice(device * size, device * size + size)
        return tuple(found)

    def local_shape(self, shape: Sequence[int], degree: int) -> tuple[int, ...]:
        """Shape of what every tensor-parallel device holds."""
        return tuple(length // degree if axis == self.axis else length for axis, length in enumerate(shape))


def placement(name: str, config: ModelConfig, layer_stages: Sequence[int], adapters: Iterable[str] | None = None,
              whole_table: bool = False) -> Placement:
    """Where a parameter is.

    Args:
        name: public parameter name.
        config: sizes, and how tensor parallel treats the vision tower.
        layer_stages: pipeline stage of each decoder layer.
        adapters: task LoRAs in the graph, by default all; the pairs of others are whole on every device of their stage.
        whole_table: the embedding is whole on every device (MindFormers' `vocab_emb_dp`, without pipeline stages).
    """
    part, axis = part_of(name), cut_axis(name)
    unused = adapters is not None and part is not None and part.startswith("task_lora.") \
        and part.partition(".")[2] not in adapters
    in_graph = not unused and not name.startswith(NEVER_COMPUTED)
    if not in_graph or (part == "vision" and config.vision_parallel != "heads") or (whole_table and name == EMBEDDING):
        axis = None
    return Placement(stage_of_parameter(name, layer_stages), axis, in_graph)


def layers_of_rank(config: ModelConfig, rank: int) -> list[int]:
    """Decoder layers of a rank's pipeline stage, without data parallel."""
    stage = rank // config.parallel_config.model_parallel
    stages = stages_of_layers(config, config.parallel_config.pipeline_stage)
    return [layer for layer, place in enumerate(stages) if place == stage]


def slices_of_rank(shapes: dict[str, tuple[int, ...]], config: ModelConfig, rank: int) -> dict[str, tuple[slice, ...]]:
    """What a rank uses of the parameters of its stage, without data parallel.

    Args:
        shapes: of whole parameters, by public name.
        config: sizes and layout.
        rank: number of the process.
    """
    layout = config.parallel_config
    stage, device = divmod(rank, layout.model_parallel)
    stages = stages_of_layers(config, layout.pipeline_stage)
    places = {name: placement(name, config, stages) for name in shapes}
    return {name: place.region(shapes[name], layout.model_parallel, device)
            for name, place in places.items() if place.stage == stage}
