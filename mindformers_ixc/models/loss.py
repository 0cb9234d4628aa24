"""Next-token cross entropy, the mean over labelled positions.

MindFormers' loss is the one that the parallel compiler can cut by vocabulary; in a stand-alone run it holds about twice
as many copies of the logits (a one-hot matrix among them) as the fused operators, which matters when a vocabulary of
92544 pieces meets 24 GiB of a laptop.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.core.loss.loss import CrossEntropyLoss
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.models.configuration import IXC25Config

# Labels with this value carry no loss (the convention of PyTorch's cross entropy, which the public code relies on).
IGNORE_INDEX = -100


class FusedCrossEntropy(nn.Cell):
    """Mean cross entropy by the fused log-softmax and negative log-likelihood operators.

    Args:
        classes: V.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.log_softmax = P.LogSoftmax(-1)
        self.nll = P.NLLLoss(reduction="sum", ignore_index=IGNORE_INDEX)
        self.weight = Tensor(np.ones(classes, np.float32))

    def construct(self, logits, labels):
        """Scalar loss of float32 logits `(N, V)` and int32 labels `(N,)`; 0 when nothing is labelled."""
        total, count = self.nll(self.log_softmax(logits), labels, self.weight)
        return total / F.maximum(count, 1.0)


class TokenLosses(nn.Cell):
    """Cross entropy of every position, 0 where nothing is labelled; for one device.

    Composed, because the unreduced NLLLoss leaves ignored positions undefined on the CPU (MindSpore 2.9).
    """

    def __init__(self):
        super().__init__()
        self.log_softmax = P.LogSoftmax(-1)
        self.gather_target = P.GatherD()
        self.not_equal = P.NotEqual()
        self.cast = P.Cast()
        self.reshape = P.Reshape()

    def construct(self, logits, labels):
        """Losses `(N,)` of float32 logits `(N, V)` and int32 labels `(N,)`."""
        labelled = self.not_equal(labels, IGNORE_INDEX)
        targets = self.reshape(labels * self.cast(labelled, mstype.int32), (-1, 1))   # (N, 1)
        picked = self.reshape(self.gather_target(self.log_softmax(logits), 1, targets), (-1,))
        return -picked * self.cast(labelled, mstype.float32)


class SummedCrossEntropy(nn.Cell):
    """Sum of the losses and number of labelled positions, from a cell that gives each position's loss.

    Micro batches of a step have different numbers of labelled positions; MindFormers' pipeline and accumulation cells
    add both up and divide once (`calculate_per_token_loss`), so that the step is that of the whole batch.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.losses = token_losses(config)
        self.not_equal, self.sum_losses, self.sum_labelled = P.NotEqual(), P.ReduceSum(), P.ReduceSum()
        self.cast = P.Cast()
        if is_parallel():
            dp = config.parallel_config.data_parallel
            self.not_equal.shard(((dp,), ()))
            for primitive in (self.sum_losses, self.sum_labelled):
                primitive.shard(((dp,),))

    def construct(self, logits, labels):
        """Two float32 scalars of float32 logits `(N, V)` and int32 labels `(N,)`."""
        labelled = self.cast(self.not_equal(labels, IGNORE_INDEX), mstype.float32)
        return self.sum_losses(self.losses(logits, labels)), self.sum_labelled(labelled)


class ParallelCrossEntropy(nn.Cell):
    """MindFormers' cross entropy with -100 for unlabelled positions; the vocabulary is cut as the head cuts it.

    Args:
        config: gives the data-parallel and tensor-parallel degrees.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        dp = config.parallel_config.data_parallel
        self.loss = CrossEntropyLoss(parallel_config=_degrees(config),
                                     calculate_per_token_loss=config.calculate_per_token_loss)
        self.not_equal = P.NotEqual().shard(((dp,), ()))
        self.cast = P.Cast()
        self.mul = P.Mul().shard(((dp,), (dp,)))

    def construct(self, logits, labels):
        """Loss of float32 logits `(N, V)` and int32 labels `(N,)`; sum and count with `calculate_per_token_loss`."""
        labelled = self.not_equal(labels, IGNORE_INDEX)
        targets = self.mul(labels, self.cast(labelled, mstype.int32))
        return self.loss(logits, targets, self.cast(labelled, mstype.float32))


class ParallelTokenLosses(nn.Cell):
    """`TokenLosses` from the two cells that MindFormers' cross entropy is made of, the vocabulary cut.

    Args:
        config: gives the data-parallel and tensor-parallel degrees.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        dp, tp = config.parallel_config.data_parallel, config.parallel_config.model_parallel
        cells = CrossEntropyLoss(parallel_config=_degrees(config))
        self.log_softmax, self.nll = cells._log_softmax, cells._nllloss
        self.not_equal = P.NotEqual().shard(((dp,), ()))
        self.cast = P.Cast()
        self.mul, self.mul_mask = P.Mul().shard(((dp,), (dp,))), P.Mul().shard(((dp,), (dp,)))
        # as in MindFormers' cell: whatever has to be moved is moved before those two, whose gradients are their own
        self.add_zero = P.Add().shard(((dp, tp), ())).add_prim_attr("keep_alive", True)
        self.add_zero_targets = P.Add().shard(((dp,), ())).add_prim_attr("keep_alive", True)

    def construct(self, logits, labels):
        """Losses `(N,)` of float32 logits `(N, V)` and int32 labels `(N,)`."""
        labelled = self.not_equal(labels, IGNORE_INDEX)
        targets = self.add_zero_targets(self.mul(labels, self.cast(labelled, mstype.int32)), 0)
        losses = self.nll(*self.log_softmax(self.add_zero(logits, 0), targets))
        return self.mul_mask(losses, self.cast(labelled, mstype.float32))


def _degrees(config: IXC25Config) -> TransformerOpParallelConfig:
    parallel = config.parallel_config
    return TransformerOpParallelConfig(data_parallel=parallel.data_parallel, model_parallel=parallel.model_parallel)


def token_losses(config: IXC25Config) -> nn.Cell:
    """The cell of each position's loss for the current parallel mode."""
    return ParallelTokenLosses(config) if is_parallel() else TokenLosses()


def next_token_loss(config: IXC25Config) -> nn.Cell:
    """The loss cell for the current parallel mode."""
    if is_parallel():
        return ParallelCrossEntropy(config)
    return SummedCrossEntropy(config) if config.calculate_per_token_loss else FusedCrossEntropy(config.vocab_size)
