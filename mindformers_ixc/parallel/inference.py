"""Inference in a parallel layout: which layouts there are, and what of the weights a rank loads."""
from __future__ import annotations

import mindspore as ms
from mindformers.tools.utils import get_real_rank

from mindformers_ixc.config import ConfigError, IXC25Config
from mindformers_ixc.parallel.cuts import cut_axis
from mindformers_ixc.parallel.stages import stage_of_parameter, stages_of_layers


def inference_layout(degrees) -> dict:
    """The `parallel_config` of a model that answers, from that of a run.

    Args:
        degrees: has `data_parallel`, `model_parallel` and `pipeline_stage`.

    Raises:
        ConfigError: for data parallel, which has no meaning here.
    """
    replicas = degrees.data_parallel
    if replicas != 1:
        raise ConfigError(
            f"parallel_config.data_parallel is {replicas}, but in run_mode predict all devices answer the same "
            "requests together; set it to 1, and split the request file over several runs to use more devices.")
    # a decoded position cannot be cut, so the positions between the linears are whole, whatever training does
    return {"data_parallel": 1, "model_parallel": degrees.model_parallel,
            "pipeline_stage": degrees.pipeline_stage, "vocab_emb_dp": False, "use_seq_parallel": False}


def share_results() -> None:
    """Lets every rank have what the last pipeline stage computes: each of them chooses the next token."""
    ms.set_auto_parallel_context(pipeline_result_broadcast=True)


def own_layers(config: IXC25Config) -> list[int]:
    """Decoder layers of this rank's pipeline stage."""
    stage = get_real_rank() // config.parallel_config.model_parallel
    stages = stages_of_layers(config, config.parallel_config.pipeline_stage)
    return [layer for layer, place in enumerate(stages) if place == stage]


def own_slices(shapes: dict[str, tuple[int, ...]], config: IXC25Config) -> dict[str, tuple[slice, ...]]:
    """What this rank uses of the parameters of its stage.

    Ranks of a stage are in a row; data parallel is 1.

    Args:
        shapes: of whole parameters, by public name.
        config: sizes and layout.
    """
    layout, found = config.parallel_config, {}
    own_stage, device = divmod(get_real_rank(), layout.model_parallel)
    stages = stages_of_layers(config, layout.pipeline_stage)
    for name, shape in shapes.items():
        if stage_of_parameter(name, stages) != own_stage:
            continue
        slices, axis = [slice(0, size) for size in shape], cut_axis(name)
        if axis is not None and not (name.startswith("vit.") and config.vision_parallel != "heads"):
            size = shape[axis] // layout.model_parallel
            slices[axis] = slice(device * size, device * size + size)
        found[name] = tuple(slices)
    return found
