"""What a training step reports beside its loss: losses by source, and where a parallel run keeps a report.

Of two outputs the parallel compiler finds no loss, and would not divide the loss's gradient by the devices that compute
it alike. So there a report is no output but a parameter of the network, to which every micro batch adds; the host reads
and zeroes it after each step.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.loss import IGNORE_INDEX

# The parameter's name in checkpoints of a run, which is none of the model's (`checkpoint.sources.STATE_NAMES`).
REPORT_NAME = "train_report"


class SourceSums(nn.Cell):
    """Of each source the sum of losses and the number of labelled positions, float32 `(2, R)`.

    Args:
        config: gives R, `num_sources`, and the data-parallel degree.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.sources = config.num_sources
        self.one, self.zero = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.not_equal, self.cast, self.reshape = P.NotEqual(), P.Cast(), P.Reshape()
        self.one_hot = P.OneHot()
        # no matrix product: on Ascend it might round the sums
        self.mul_losses, self.mul_counts = P.Mul(), P.Mul()
        self.sum_losses, self.sum_counts = P.ReduceSum(keep_dims=True), P.ReduceSum(keep_dims=True)
        self.join = P.Concat(0)
        if is_parallel():
            dp, whole = config.parallel_config.data_parallel, (1, 1)
            rows = (dp, 1)
            self.not_equal.shard((rows, ()))
            self.one_hot.shard((rows, (), ()))
            for primitive in (self.mul_losses, self.mul_counts):
                primitive.shard((rows, rows))
            for primitive in (self.sum_losses, self.sum_counts):
                primitive.shard((rows,))
            self.join.shard((whole, whole))

    def construct(self, losses, labels, source):
        """Takes `(B, L)` each: float32 losses, 0 where unlabelled, int32 labels and numbers of sources."""
        counts = self.cast(self.not_equal(labels, IGNORE_INDEX), mstype.float32)
        column = (-1, 1)
        members = self.one_hot(self.reshape(source, (-1,)), self.sources, self.one, self.zero)       # (B*L, R)
        losses = self.mul_losses(members, self.reshape(losses, column))
        counts = self.mul_counts(members, self.reshape(counts, column))
        return self.join((self.sum_losses(losses, 0), self.sum_counts(counts, 0)))


class KeptReport(nn.Cell):
    """A report in a parameter, which grows by that of every micro batch until the host sets it to zero.

    Args:
        shape: of the report.
    """

    def __init__(self, *shape: int):
        super().__init__()
        # whole on every device, also where optimizer sharding cuts parameters however small
        self.train_report = Parameter(Tensor(np.zeros(shape, np.float32)), name=REPORT_NAME, requires_grad=False,
                                      parallel_optimizer=False)
        self.add = P.AssignAdd()
        if is_parallel():
            whole = (1,) * len(shape)      # left to itself the compiler cuts it over the devices
            self.add.shard((whole, whole))

    def construct(self, loss, report):
        """The loss, which now comes after its report has been added."""
        return F.depend(loss, self.add(self.train_report, F.stop_gradient(report)))


def keep_report(model: nn.Cell, *shape: int) -> None:
    """Gives a network the cell `kept_report`, and its parameter a name that does not tell where it is."""
    model.kept_report = KeptReport(*shape)
    model.kept_report.train_report.name = REPORT_NAME
    model.train_report = model.kept_report.train_report


def take_report(report: Parameter) -> np.ndarray:
    """The report of the step that has ended; the next one begins from zero."""
    values = report.asnumpy().copy()
    report.set_data(Tensor(np.zeros(report.shape, np.float32)))
    return values
