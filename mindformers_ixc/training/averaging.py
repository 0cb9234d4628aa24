"""The moving average of the weights: kept beside the optimizer, and put in place of the weights for a while."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import mindspore.common.dtype as mstype
from mindspore import Parameter, ParameterTuple, Tensor, nn
from mindspore.common.initializer import Zero, initializer
from mindspore.ops import composite as C
from mindspore.ops import functional as F

from mindformers_ixc.checkpoint.sources import AVERAGE_PREFIX

_begin_average = C.MultitypeFuncGraph("begin_average")
_move_average = C.MultitypeFuncGraph("move_average")


@_begin_average.register("Tensor", "Tensor", "Tensor")
def _begin_average_tensor(begins, average, weight):
    # no selection: it would keep the shapes from before the parameters are cut
    return F.assign(average, average * (1.0 - begins) + F.cast(weight, average.dtype) * begins)


@_move_average.register("Tensor", "Tensor", "Tensor")
def _move_average_tensor(decay, average, weight):
    return F.assign(average, average * decay + F.cast(weight, average.dtype) * (1.0 - decay))


class AveragedOptimizer(nn.Cell):
    """An optimizer that also keeps a moving average of what it trains: `average * decay + weight * (1 - decay)`.

    The average begins from the weights before the first step (`global_step` 0), so it does not matter when they are
    loaded; a resumed run has both. Averages are copies of the parameters as the optimizer's moments are, so the
    parallel compiler cuts them alike. A step that is skipped for an overflow leaves them as they are. What step cells
    and callbacks ask of an optimizer is here too.

    Args:
        optimizer: MindFormers' or MindSpore's.
        decay: share of the average that a step keeps.
    """

    def __init__(self, optimizer: nn.Optimizer, decay: float):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.decay = Tensor(decay, mstype.float32)
        self.parameters, self.global_step = optimizer.parameters, optimizer.global_step
        self.dynamic_lr, self.is_group, self.is_group_lr = (optimizer.dynamic_lr, optimizer.is_group,
                                                            optimizer.is_group_lr)
        self.average = ParameterTuple([_averaged(parameter) for parameter in optimizer.parameters])
        self.map = C.HyperMap()

    @property
    def learning_rate(self) -> Any:
        """The optimizer's rate, or schedule."""
        return self.optimizer.learning_rate

    def construct(self, gradients):
        """The optimizer's step, then that of the average."""
        begins = F.reshape(F.cast(F.equal(self.global_step, 0), mstype.float32), ())
        begun = self.map(F.partial(_begin_average, begins), self.average, self.parameters)
        done = self.optimizer(F.depend(gradients, begun))
        weights = F.depend(self.parameters, done)
        return F.depend(done, self.map(F.partial(_move_average, self.decay), self.average, weights))


def _averaged(parameter: Parameter) -> Parameter:
    """The average of a parameter, which the parallel compiler cuts as it cuts that one (as in MindFormers' AdamW)."""
    zeros = initializer(Zero(), shape=parameter.shape, dtype=mstype.float32)
    average = Parameter(zeros)
    average.param_info = parameter.param_info.clone()
    if not hasattr(parameter.param_info, "cloned_obj"):
        parameter.param_info.cloned_obj = []
    parameter.param_info.cloned_obj.append(average)
    average.is_init = False
    average.set_data(initializer(Zero(), shape=parameter.shape, dtype=mstype.float32))
    average.name = f"{AVERAGE_PREFIX}{parameter.name}"
    average.requires_grad = False
    return average


def averages_of(wrapper: nn.Cell) -> dict[str, Parameter]:
    """Averaged parameters of a step cell by the names of the weights; none without a moving average."""
    optimizer = getattr(wrapper, "optimizer", None)
    if not isinstance(optimizer, AveragedOptimizer):
        return {}
    return {weight.name: average for weight, average in zip(optimizer.parameters, optimizer.average)}


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
