"""MindFormers' AdamW on the CPU in one pass over memory, where the kernels for training are.

MindFormers composes the step of a dozen operations for each parameter. Groups, schedules, states and their names are
MindFormers' own here too, so checkpoints and resuming know no difference.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mindformers.core.optim.adamw import AdamW
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor
from mindspore.ops import composite as C
from mindspore.ops import functional as F

from mindformers_ixc.native import training

_update = C.MultitypeFuncGraph("update_parameter")


@_update.register("Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor")
def _update_parameter(kernel, numbers, step, factor, rate, decay, parameter, gradient, mean, square):
    weight, first, second = kernel(parameter, mean, square, gradient, factor, rate, decay, step, numbers)
    F.assign(mean, first)          # the compiler knows what is assigned; what a kernel wrote to parameters it would not
    F.assign(square, second)
    F.assign(parameter, weight)
    return weight


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER)
class IXC25AdamW(AdamW):
    """MindFormers' AdamW through the kernel for the CPU.

    Args:
        params: float32 parameters, or groups of them.
        use_fused: MindFormers' key for the fused operator of Ascend; false.
        **kwargs: see MindFormers' `AdamW`.
    """

    def __init__(self, params: list, use_fused: bool = False, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.kernel = training.adamw()
        numbers = [float(value.asnumpy()[0]) for value in (self.beta1, self.beta2, self.eps)]
        self.numbers, self.whole = Tensor(np.array(numbers, np.float32)), Tensor(np.ones(1, np.float32))

    def construct(self, gradients, factor=None):
        """One step.

        Args:
            gradients: of the parameters.
            factor: float32 `(1,)`, what the gradients are multiplied by; 1 by default.
        """
        decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        factor, step = self.whole if factor is None else factor, self.global_step
        states = (self._parameters, gradients, self.exp_avg, self.exp_avg_sq)
        if self.is_group_lr:
            return self.hyper_map(F.partial(_update, self.kernel, self.numbers, step, factor), rate, decay, *states)
        if self.is_group:
            return self.hyper_map(F.partial(_update, self.kernel, self.numbers, step, factor, rate), decay, *states)
        return self.hyper_map(F.partial(_update, self.kernel, self.numbers, step, factor, rate, decay), *states)


@contextmanager
def native_optimizer(section: MindFormerConfig, parameters: Iterable[Parameter],
                     averages: bool = False) -> Iterator[None]:
    """Lets a section name the optimizer of the current back end while it is built; a run's record has the YAML's.

    Args:
        section: the YAML's `optimizer`.
        parameters: what trains.
        averages: whether a moving average is kept of them; the optimizer is MindFormers' then.
    """
    name = section.type
    if (name == "AdamW" and not averages and not section.get("swap") and not section.get("use_fused")
            and training.available(*[parameter.dtype for parameter in parameters])):
        section.type = IXC25AdamW.__name__
    try:
        yield
    finally:
        section.type = name


def takes_factor(optimizer: Any) -> bool:
    """Whether an optimizer multiplies gradients by a factor itself."""
    return isinstance(optimizer, IXC25AdamW)
