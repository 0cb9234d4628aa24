"""The moving average of the weights in place of the weights."""
from __future__ import annotations

from contextlib import contextmanager

from mindspore import Tensor, nn


@contextmanager
def averaged_weights(model: nn.Cell, average: dict):
    """Lets a model have the averaged weights for a while.

    Args:
        model: the model.
        average: averaged parameters by the model's names.
    """
    own = {}
    for parameter in model.get_parameters():
        if parameter.name in average:
            own[parameter.name] = parameter.asnumpy().copy()
            parameter.set_data(Tensor(average[parameter.name].asnumpy().copy(), parameter.dtype))
    try:
        yield
    finally:
        for parameter in model.get_parameters():
            if parameter.name in own:
                parameter.set_data(Tensor(own[parameter.name], parameter.dtype))
