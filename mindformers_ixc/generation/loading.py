"""Models from model directories, ready to answer."""
from __future__ import annotations

import os
from typing import Any

from mindspore import nn

from mindformers_ixc.checkpoint.family import check_kind
from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.checkpoint.quantised import quantization_of
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.caches import check_held_dtype
from mindformers_ixc.generation.stored_weights import load_stored, suits_stored
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.reward import IXC25RewardModel

__all__ = ["load_model", "load_weights"]


def load_model(directory: str | os.PathLike, model_class: type[IXC25Model] = IXC25Model, stored: bool = False,
               config: IXC25Config | None = None, **overrides: Any) -> IXC25Model:
    """Builds the model of a directory and loads its weights, ready for inference.

    Args:
        directory: the model directory; quantised weights stay as they are stored.
        model_class: `IXC25Model`, the network, or `IXC25ForCausalLM` with the public model's methods.
        stored: leave weights of 16 bits as they are stored, too, where that is no slower. Such a model answers, and
            has no gradients.
        config: configuration to use instead of the directory's.
        **overrides: fields of a run of `fields.FIELDS`.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: for a reward model where another class is wanted, and the other way round.
    """
    if config is None:
        config = read_config(directory, IXC25Config, **overrides)
    config.check()
    check_held_dtype(config)
    source = open_source(directory)
    check_kind(config, source, directory, scores=issubclass(model_class, IXC25RewardModel))
    if config.use_past:
        prepare_inference(paged=True)
    with nn.no_init_parameters():    # the weights come from the files: drawing them first takes time and memory
        model = model_class(config)
    if quantization_of(source) is not None or (stored and suits_stored(config, source)):
        load_stored(model, source)
    else:
        load_weights(model, source)
    model.set_train(False)
    return model
