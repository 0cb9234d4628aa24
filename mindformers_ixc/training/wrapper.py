"""Train-step cells whose overflow check works on every back end.

MindFormers' cells ask the device for an overflow flag with operators that exist on Ascend only. On CPU and GPU the same
question is answered from the gradients: the step overflowed if their sum is not finite. Everything else (loss scaling,
clipping, grouped learning rates, the skipped update) is MindFormers' own.
"""
from __future__ import annotations

import mindspore as ms
import mindspore.common.dtype as mstype
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindspore import Tensor
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

_sum_of = C.MultitypeFuncGraph("sum_of_gradient")


@_sum_of.register("Tensor")
def _sum_of_tensor(gradient):
    return F.cast(P.ReduceSum()(gradient), mstype.float32)


class FiniteGradientCheck:
    """Overflow test on the gradients themselves, for back ends without an overflow register."""

    def start_overflow_check(self, pre_cond, compute_input):
        """Returns a dummy status and the input unchanged: nothing has to be armed."""
        return Tensor([0] * 8, mstype.int32), compute_input

    def get_overflow_status(self, status, compute_output):
        """Returns a bool scalar, true if any gradient (on any rank) is not finite."""
        total = F.addn(self.hyper_map(_sum_of, compute_output))
        if self.is_distributed:
            total = self.allreduce(total)
        return F.logical_not(F.isfinite(total))


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class IXC25TrainOneStepCell(FiniteGradientCheck, MFTrainOneStepCell):
    """`MFTrainOneStepCell` for back ends without an overflow register."""


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class IXC25PipelineWithLossScaleCell(FiniteGradientCheck, MFPipelineWithLossScaleCell):
    """`MFPipelineWithLossScaleCell` for back ends without an overflow register."""


# MindFormers' wrapper types and the ones that replace them where there is no Ascend device.
PORTABLE_WRAPPERS = {
    "MFTrainOneStepCell": "IXC25TrainOneStepCell",
    "MFPipelineWithLossScaleCell": "IXC25PipelineWithLossScaleCell",
}


def portable_wrapper(name: str) -> str:
    """The wrapper type to use for `name` on the current back end."""
    if ms.get_context("device_target") == "Ascend":
        return name
    return PORTABLE_WRAPPERS.get(name, name)
