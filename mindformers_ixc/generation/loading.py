"""Models from model directories, ready to answer."""
from __future__ import annotations

import os
from typing import Any

from mindspore import nn

from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.config import read_config
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model

__all__ = ["load_model", "load_weights"]


def load_model(directory: str | os.PathLike, model_class: type[IXC25Model] = IXC25Model,
               **overrides: Any) -> IXC25Model:
    """Builds the model of a directory and loads its weights, ready for inference.

    Args:
        directory: the model directory.
        model_class: `IXC25Model`, the network, or `IXC25ForCausalLM` with the public model's methods.
        **overrides: fields of a run of `config.FIELDS`.

    Returns:
        The model in evaluation mode.
    """
    config = read_config(directory, IXC25Config, **overrides)
    if config.use_past:
        prepare_inference(paged=True)
    with nn.no_init_parameters():    # the weights come from the files: drawing them first takes time and memory
        model = model_class(config)
    load_weights(model, directory)
    model.set_train(False)
    return model
