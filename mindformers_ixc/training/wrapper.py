"""Train-step cells whose overflow check works on every back end.

MindFormers' cells ask the device for an overflow flag with operators that exist on Ascend only. On CPU and GPU the same
question is answered from the gradients: the step overflowed if their sum is not finite. Everything else (loss scaling,
clipping, grouped learning rates, the skipped update) is MindFormers' own.
"""
from __future__ import annotations

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindspore import Parameter, Tensor, nn
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.models.loss import IGNORE_INDEX

# What the names of averaged weights start with, in checkpoints too.
AVERAGE_PREFIX = "ema"

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


_add = C.MultitypeFuncGraph("add_gradients")
_times = C.MultitypeFuncGraph("times_gradient")
_move_average = C.MultitypeFuncGraph("move_average")


@_add.register("Tensor", "Tensor")
def _add_tensors(x, y):
    return x + y


@_times.register("Tensor", "Tensor")
def _times_tensor(factor, gradient):
    return F.cast(gradient, mstype.float32) * factor


@_move_average.register("Tensor", "Tensor", "Tensor")
def _move_average_tensor(decay, average, weight):
    return F.assign(average, average * decay + F.cast(weight, average.dtype) * (1.0 - decay))


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class IXC25TrainOneStepCell(FiniteGradientCheck, MFTrainOneStepCell):
    """`MFTrainOneStepCell` for stand-alone runs on any back end, which can do three more things.

    MindFormers accumulates gradients in semi-auto parallel only; this cell goes through the batch in micro batches. It
    keeps a moving average of the trained weights. And it takes a network that gives `(loss, report)` and holds the
    step's report, summed over micro batches, in `train_report` (the outputs are as many as MindFormers' monitor reads).

    Args:
        network: gives the loss, or loss and report.
        optimizer: MindFormers' optimizer.
        micro_batches: parts of a batch, one after another; divides the batch.
        labels_column: which input has the labels: the parts' losses then weigh as their labelled positions, so that the
            step is that of the whole batch. `None` weighs all parts the same (losses that are means over samples).
        ema_decay: share of the moving average that a step keeps; `None` for none.
        report_shape: shape of the report; `None` if the network gives just a loss.
        **kwargs: see `MFTrainOneStepCell`.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Cell, micro_batches: int = 1, labels_column: int | None = None,
                 ema_decay: float | None = None, report_shape: tuple | None = None, **kwargs):
        super().__init__(network, optimizer, **kwargs)
        self.micro_batches, self.labels_column = micro_batches, labels_column
        self.map = C.HyperMap()
        self.has_report = report_shape is not None
        if report_shape is not None:
            self.train_report = Parameter(Tensor(np.zeros(report_shape, np.float32)), name="train_report",
                                          requires_grad=False)
        self.has_average = ema_decay is not None
        if self.has_average:
            self.decay = Tensor(ema_decay, mstype.float32)
            self.average = self.weights.clone(prefix=AVERAGE_PREFIX, init="same")
            for parameter in self.average:
                parameter.requires_grad = False

    def construct(self, *inputs):
        """One step; the outputs are those of `MFTrainOneStepCell`."""
        loss, report, grads = self.accumulate(inputs)
        status, scale = self.start_overflow_check(loss, self.scale_sense)
        grads = self.map(F.partial(_times, 1.0 / scale), grads)
        grads = self.grad_reducer(grads)
        cond = self.get_overflow_status(status, grads)
        overflow = self.process_loss_scale(cond)
        norm = None
        if self.use_clip_grad:
            grads, norm = self.clip_grad_norm(grads)
        rate = self.current_rate()
        if self.has_report:
            loss = F.depend(loss, F.assign(self.train_report, report))
        if not overflow:
            done = self.optimizer(grads)
            loss = F.depend(loss, done)
            if self.has_average:
                weights = F.depend(self.weights, done)
                loss = F.depend(loss, self.map(F.partial(_move_average, self.decay), self.average, weights))
        return loss, overflow, scale, rate, norm

    def current_rate(self):
        """The learning rate of this step; of groups the default one (MindFormers' log shows the others)."""
        rate = self.learning_rate
        if self.optimizer.dynamic_lr:
            step = self.optimizer.global_step
            if self.use_grouped_lr:
                rate = self.default_lr(step).reshape(())
                self.default_lr_parameter = rate
                for number, schedule in enumerate(self.grouped_lr):
                    self.grouped_lr_parameter[number] = schedule(step).reshape(())
            elif self.optimizer.is_group_lr:
                rate = self.learning_rate[-1](step).reshape(())
            else:
                rate = self.learning_rate(step).reshape(())
        return rate

    def accumulate(self, inputs):
        """Loss, report and scaled gradients of the batch, part by part."""
        if self.micro_batches == 1:
            return self.loss_and_gradients(inputs, F.cast(self.scale_sense, mstype.float32))
        total = None
        if self.labels_column is not None:
            total = self.labelled(inputs[self.labels_column])
        loss, report, grads = None, None, None
        for number in range(self.micro_batches):
            part = ()
            for column in inputs:
                size = column.shape[0] // self.micro_batches
                part = (*part, column[number * size:(number + 1) * size])
            weight = 1.0 / self.micro_batches
            if total is not None:
                weight = self.labelled(part[self.labels_column]) / F.maximum(total, 1.0)
            value, extra, gradient = self.loss_and_gradients(part, self.scale_sense * weight)
            loss = value * weight if loss is None else loss + value * weight
            grads = gradient if grads is None else self.map(_add, grads, gradient)
            if self.has_report:
                report = extra if report is None else report + extra
        return loss, report, grads

    @staticmethod
    def labelled(labels):
        """Number of labelled positions, float32."""
        return F.cast(labels != IGNORE_INDEX, mstype.float32).sum()

    def loss_and_gradients(self, inputs, sens):
        """Loss, report and gradients times `sens` of one part."""
        if self.has_report:
            loss, report = self.network(*inputs)
            grads = self.grad(self.network, self.weights)(*inputs, (C.ones_like(loss) * sens, C.zeros_like(report)))
            return loss, report, grads
        loss = self.network(*inputs)
        return loss, None, self.grad(self.network, self.weights)(*inputs, C.ones_like(loss) * sens)


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
