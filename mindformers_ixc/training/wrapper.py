"""Train-step cells whose overflow check works on every back end.

MindFormers' cells ask the device for an overflow flag with operators that exist on Ascend only. On CPU and GPU the same
question is answered from the gradients: the step overflowed if their sum is not finite. Everything else (loss scaling,
clipping, grouped learning rates, the skipped update) is MindFormers' own.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindspore import Parameter, Tensor, nn
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.models.loss import IGNORE_INDEX, LEAST_WEIGHT
from mindformers_ixc.models.report import REPORT_NAME
from mindformers_ixc.native import training
from mindformers_ixc.training.kept_graphs import compile_kept
from mindformers_ixc.training.optimizer import takes_factor

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


@_add.register("Tensor", "Tensor")
def _add_tensors(x, y):
    return x + y


@_times.register("Tensor", "Tensor")
def _times_tensor(factor, gradient):
    return F.cast(gradient, mstype.float32) * factor


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class IXC25TrainOneStepCell(FiniteGradientCheck, MFTrainOneStepCell):
    """`MFTrainOneStepCell` for any back end, which can do two more things where graphs are not cut.

    MindFormers accumulates gradients in semi-auto parallel only; this cell goes through the batch in micro batches. And
    it takes a network that gives `(loss, report)` and holds the step's report, summed over micro batches and replicas,
    in `train_report` (the outputs are as many as MindFormers' monitor reads).

    Args:
        network: gives the loss, or loss and report.
        optimizer: MindFormers' optimizer.
        micro_batches: parts of a batch, one after another; divides the batch.
        labels_column: which input has the labels, or the weights of their losses: the parts' losses then weigh as their
            labelled positions, or the sum of the weights, so that the step is that of the whole batch. `None` weighs
            all parts the same (losses that are means over samples).
        report_shape: shape of the report; `None` if the network gives just a loss.
        skips_spikes: whether a step is not taken whose loss or gradient norm is above its limit in `spike_limits`;
            `was_spike` says whether that was so. Limits are infinite until somebody sets them.
        **kwargs: see `MFTrainOneStepCell`.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Cell, micro_batches: int = 1, labels_column: int | None = None,
                 report_shape: tuple | None = None, skips_spikes: bool = False, **kwargs: Any):
        super().__init__(network, optimizer, **kwargs)
        self.micro_batches, self.labels_column = micro_batches, labels_column
        self.map = C.HyperMap()
        self.has_report = report_shape is not None
        # in data parallel mode gradients are means over the devices, and so is what is said of the loss
        self.sum_replicas = P.AllReduce() if self.reducer_flag else None
        if report_shape is not None:
            self.train_report = Parameter(Tensor(np.zeros(report_shape, np.float32)), name=REPORT_NAME,
                                          requires_grad=False)
        self.skips_spikes = skips_spikes
        if skips_spikes:
            limits, was_spike = np.full(2, np.inf, np.float32), np.zeros(1, np.float32)
            self.spike_limits = Parameter(Tensor(limits), name="spike_limits", requires_grad=False)
            self.was_spike = Parameter(Tensor(was_spike), name="was_spike", requires_grad=False)
        self.is_native = (not self.is_distributed
                          and training.available(*[parameter.dtype for parameter in optimizer.parameters]))
        self.takes_factor = takes_factor(optimizer)
        if self.is_native:
            self.gradient_norm = training.gradient_norm()

    def compile(self, *args, **kwargs):
        """Compiles the step, or takes what an earlier run has compiled (`kept_graphs`)."""
        compile_kept(self, args, lambda: super(IXC25TrainOneStepCell, self).compile(*args, **kwargs))

    def construct(self, *inputs):
        """One step; the outputs are those of `MFTrainOneStepCell`."""
        loss, report, grads = self.accumulate(inputs)
        if self.sum_replicas is not None:
            loss = F.reshape(self.sum_replicas(F.reshape(loss, (1,))), loss.shape) / self.degree
        scale, norm, factor = self.scale_sense, None, None
        if self.is_native:
            grads, norm, factor, cond = self.clipped(F.depend(grads, loss), scale)
            overflow = self.process_loss_scale(cond)
        else:
            status, scale = self.start_overflow_check(loss, scale)
            grads = self.map(F.partial(_times, 1.0 / scale), grads)
            grads = self.grad_reducer(grads)
            cond = self.get_overflow_status(status, grads)
            overflow = self.process_loss_scale(cond)
            if self.use_clip_grad:
                grads, norm = self.clip_grad_norm(grads)
        rate = self.current_rate()
        if self.has_report:
            if self.sum_replicas is not None:
                report = self.sum_replicas(report)
            loss = F.depend(loss, F.assign(self.train_report, report))
        skipped = overflow
        if self.skips_spikes:
            spike = self.is_spike(loss, norm)
            loss = F.depend(loss, F.assign(self.was_spike, F.reshape(F.cast(spike, mstype.float32), (1,))))
            skipped = F.logical_or(overflow, spike)
        if not skipped:
            done = self.optimizer(grads, factor) if self.takes_factor else self.optimizer(grads)
            loss = F.depend(loss, done)
        return loss, overflow, scale, rate, norm

    def is_spike(self, loss, norm):
        """Whether loss or norm (`None` without clipping) is above its limit, bool; what is no number is not."""
        spike = F.greater(F.reshape(F.cast(loss, mstype.float32), ()), self.spike_limits[0])
        if norm is not None:
            spike = F.logical_or(spike, F.greater(F.reshape(norm, ()), self.spike_limits[1]))
        return spike

    def clipped(self, grads, scale):
        """Overflow check and clipping in one pass over gradients that are still multiplied by `scale`.

        Returns:
            The gradients, their norm (`None` without clipping), the factor that is to be applied to them (`None` if it
            is) and whether any is not finite.
        """
        length, finite = self.gradient_norm(*grads)
        factor, norm = F.reshape(1.0 / scale, (1,)), None
        if self.use_clip_grad:       # MindFormers' formula (ClipGradNorm)
            norm, limit = length * factor, self.clip_grad_norm.clip_norm
            factor = factor * F.minimum(limit / (F.maximum(norm, limit) + 1e-6), 1.0)
        if not self.takes_factor:
            grads, factor = self.map(F.partial(_times, F.reshape(factor, ())), grads), None
        return grads, norm, factor, F.reshape(F.equal(finite, 0.0), ())

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
                weight = self.labelled(part[self.labels_column]) / F.maximum(total, LEAST_WEIGHT)
            value, extra, gradient = self.loss_and_gradients(part, self.scale_sense * weight)
            loss = value * weight if loss is None else loss + value * weight
            grads = gradient if grads is None else self.map(_add, grads, gradient)
            if self.has_report:
                report = extra if report is None else report + extra
        return loss, report, grads

    @staticmethod
    def labelled(labels):
        """Number of labelled positions, float32; of weights (which are no whole numbers) their sum."""
        if labels.dtype == mstype.float32:
            return labels.sum()
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
class IXC25GroupStepCell(IXC25TrainOneStepCell):
    """`IXC25TrainOneStepCell` that makes its batches itself: a round of sampling, then steps over what was sampled.

    The report is that of all steps of a round together, the outputs those of the last one.

    Attributes:
        rollout: makes the columns of a round's batch from those of the data set; set before the first call.
        updates: steps of a round.
    """

    not_compiled = ("rollout", "updates")
    rollout: Callable[[tuple], tuple]
    updates = 1

    def __call__(self, *columns):
        """A round; the outputs are those of `IXC25TrainOneStepCell.construct`."""
        columns = self.rollout(columns)
        report, outputs = 0.0, None
        for _ in range(self.updates):
            outputs = super().__call__(*columns)
            report = report + self.train_report.asnumpy()
        self.train_report.set_data(Tensor(report))
        return outputs


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
