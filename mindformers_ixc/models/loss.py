"""Next-token cross entropy from hidden states: the head and the loss a chunk of positions at a time.

Logits are by far the widest activation: with 92544 pieces, 8192 positions are 3 GB in float32, and a loss holds them
several times. So the head is part of the loss here. Positions are cut into chunks; a chunk's logits are made, give
their losses and are dropped, and made again when the backward pass comes to them.

    hidden states (B*L, D) -> chunks (rows * c, D) -> logits (rows * c, V) -> losses (rows, c) -> (B, L)

`rows` is the data-parallel degree, so that a device has `config.loss_chunk` positions at work, whatever the layout.
Where there are kernels for training on the CPU (`native.training`) all of it is one operation on labelled positions.
`BatchLoss` makes the loss of a batch of the losses of all positions, `models.report.SourceSums` those of sources.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.parallel import Layout

from mindformers_ixc.device import is_parallel
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.native import training
from mindformers_ixc.parallel.cuts import CUTS, product_strategy

# Labels with this value carry no loss (the convention of PyTorch's cross entropy, which the public code relies on).
IGNORE_INDEX = -100


# What a sum of weights is divided by at least: losses without any weight are 0 then, and no weights come near it.
LEAST_WEIGHT = 1e-12


class TokenLosses(nn.Cell):
    """Cross entropy of every position, 0 where nothing is labelled; for one device.

    Composed, because the unreduced NLLLoss leaves ignored positions undefined on the CPU (MindSpore 2.9). Nothing of
    the logits' size is broadcast: the CPU's kernels keep 16 bytes of indices for every number of such a result.
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


class ParallelTokenLosses(nn.Cell):
    """`TokenLosses` with positions and vocabulary cut; every device gets the losses of its share of the positions.

    MindFormers' cross entropy has cells with gradients of their own. Those are no operators of the backward pass to
    the recomputation, which then keeps what they take: a copy of all the logits, wherever micro batches do not share a
    graph. So this is operators only; two more sums of a number per position go with their gradients.

    Args:
        config: gives the data-parallel and tensor-parallel degrees.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        dp, tp = config.parallel_config.data_parallel, config.parallel_config.model_parallel
        self.labelled, self.cast = P.NotEqual().shard(((dp,), ())), P.Cast()
        self.mul = P.Mul().shard(((dp,), (dp,)))
        self.one_hot = P.OneHot().shard(((dp, tp), (), ()))
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.largest = P.ReduceMax(keep_dims=True).shard(((dp, tp),))
        self.shift = P.Sub().shard(((dp, tp), (dp, 1)))
        self.exp = P.Exp().shard(((dp, tp),))
        self.pick = P.Mul().shard(((dp, tp), (dp, tp)))
        self.sum = P.ReduceSum().shard(((dp, tp),))
        self.log, self.sub = P.Log().shard(((dp,),)), P.Sub().shard(((dp,), (dp,)))

    def construct(self, logits, labels):
        """Losses `(N,)` of float32 logits `(N, V)` and int32 labels `(N,)`."""
        labelled = self.cast(self.labelled(labels, IGNORE_INDEX), mstype.int32)
        targets = self.one_hot(self.mul(labels, labelled), logits.shape[-1], self.on, self.off)    # (N, V)
        shifted = self.shift(logits, F.stop_gradient(self.largest(logits, -1)))
        total, picked = self.sum(self.exp(shifted), -1), self.sum(self.pick(shifted, targets), -1)
        return self.mul(self.sub(self.log(total), picked), self.cast(labelled, mstype.float32))


def token_losses(config: IXC25Config) -> nn.Cell:
    """The cell of each position's loss for the current parallel mode."""
    return ParallelTokenLosses(config) if is_parallel() else TokenLosses()


class ChunkLosses(nn.Cell):
    """Head and loss of one chunk. It is recomputed: only its inputs and the losses stay for the backward pass.

    Args:
        config: gives the compute dtype and the degrees.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.losses = token_losses(config)
        self.matmul = P.MatMul(transpose_b=True)
        self.cast, self.reshape = P.Cast(), P.Reshape()
        if is_parallel():
            parallel = config.parallel_config
            self.matmul.shard(product_strategy(CUTS["output"], parallel.data_parallel, parallel.model_parallel))

    def construct(self, x, weight, labels):
        """Losses `(rows, c)` of `(rows, c, D)` and `(V, D)`, both in the compute dtype, and labels `(rows, c)`."""
        logits = self.cast(self.matmul(self.reshape(x, (-1, x.shape[-1])), weight), mstype.float32)   # (rows * c, V)
        return self.reshape(self.losses(logits, self.reshape(labels, (-1,))), labels.shape)


def layout_of(config: IXC25Config) -> Layout:
    """Axes of the devices of a stage. A bare strategy would cut a weight over the wrong neighbours where dp > 1."""
    parallel = config.parallel_config
    return Layout((parallel.data_parallel, parallel.model_parallel), ("dp", "tp"))


class After(nn.Cell):
    """Puts one chunk after another, forward and backward; otherwise their logits may live at the same time.

    Args:
        config: gives the degrees.
        cut: for each axis of the tensor the name of the devices' axis that cuts it, "None" where it is whole.
    """

    def __init__(self, config: IXC25Config, cut: tuple[str, ...]):
        super().__init__()
        self.expand, self.squeeze, self.parallel = P.ExpandDims(), P.Squeeze(0), is_parallel()
        if self.parallel:
            layout = layout_of(config)
            self.expand.shard((layout(*cut),))
            self.squeeze.shard((layout("None", *cut),))
        # an operator, because recomputation waits for the gradient's operators and looks through what only orders
        self.add_zero = P.Add().add_prim_attr("keep_alive", True)

    def construct(self, x, losses):
        """Hidden states or weight for the next chunk, which waits for the losses of this one."""
        x = F.depend(x, losses)
        if self.parallel:      # the compiler needs an operator in a cell with its own gradient; these move no data
            x = self.squeeze(self.expand(x, 0))
        return x

    def bprop(self, x, losses, out, dout):
        """The losses' gradient gets nothing from here, but only once the next chunk's gradients are there."""
        return dout, self.add_zero(F.depend(F.zeros_like(losses), dout), 0.0)


class ForwardFirst(nn.Cell):
    """Lets the backward pass of the last chunk wait for the forward pass of all: a mean's gradient needs no loss."""

    def __init__(self):
        super().__init__()
        self.add_zero = P.Add().add_prim_attr("keep_alive", True)       # as in `After`

    def construct(self, losses):
        """The losses as they are."""
        return losses

    def bprop(self, losses, out, dout):
        """Their gradient, once they are there."""
        return (self.add_zero(F.depend(dout, losses), 0.0),)


class HeadLosses(nn.Cell):
    """Losses of all positions from the output of the last norm, a chunk of positions after the other.

    Args:
        config: gives `loss_chunk` (positions of a chunk on each device), the compute dtype and the degrees.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.chunk_size, self.rows = config.loss_chunk, 1
        self.chunk, self.forward_first = ChunkLosses(config), ForwardFirst()
        self.after_states = After(config, ("dp", "None", "None"))
        self.after_weight = After(config, ("tp", "None"))
        self.chunk.recompute()
        self.dtype = config.compute_dtype
        self.cast, self.reshape = P.Cast(), P.Reshape()
        self.slice_states, self.slice_labels = P.StridedSlice(), P.StridedSlice()
        self.join = P.Concat(1)
        # cells with gradients of their own hide from the parallel compiler what comes before and after them: these
        # operators say how it is cut. Positions are gathered (sequence parallel) and the weight's gradient is summed
        # over devices once, not for every chunk
        self.add_states, self.add_weight, self.add_losses = (P.Add().add_prim_attr("keep_alive", True)
                                                             for _ in range(3))
        self.parallel = is_parallel()
        if self.parallel:
            self._shard(config)
        self.is_native = training.available(config.compute_dtype)
        if self.is_native:
            self.native, self.frozen = training.head_losses(True), training.head_losses(False)
        self.weight_trains = True       # may be changed before a graph is compiled

    def _shard(self, config: IXC25Config) -> None:
        """Every device has its share of the positions in one row, which is then cut into chunks."""
        self.rows = dp = config.parallel_config.data_parallel
        layout = layout_of(config)
        self.add_states.shard(((dp, 1), ()))
        tp = config.parallel_config.model_parallel
        self.add_weight.shard((layout("tp", "None"), layout()) if dp > 1 else ((tp, 1), ()))
        self.add_losses.shard(((dp, 1), ()))
        self.slice_states.shard(((dp, 1, 1),))
        self.slice_labels.shard(((dp, 1),))
        self.join.shard(((dp, 1), (dp, 1)))

    def construct(self, x, weight, labels):
        """float32 losses `(B, L)`, 0 where nothing is labelled.

        Args:
            x: hidden states `(B*L, D)`.
            weight: the head's, `(V, D)`.
            labels: int32 `(B, L)`.
        """
        x, weight = self.cast(x, self.dtype), self.cast(weight, self.dtype)
        if self.is_native:
            targets = self.reshape(labels, (-1,))
            losses, _ = self.native(x, weight, targets) if self.weight_trains else self.frozen(x, weight, targets)
            return self.reshape(losses, labels.shape)
        if self.parallel:
            x, weight = self.add_states(x, 0), self.add_weight(weight, 0)
        rows, width = self.rows, x.shape[1]
        count = x.shape[0] // rows
        x, targets = self.reshape(x, (rows, count, width)), self.reshape(labels, (rows, count))
        if count <= self.chunk_size:
            return self.reshape(self.chunk(x, weight, targets), labels.shape)
        losses = last = None
        for start in range(0, count, self.chunk_size):
            end = min(start + self.chunk_size, count)
            if last is not None:      # cut from what has waited, so that its gradient is one running sum
                x, weight = self.after_states(x, last), self.after_weight(weight, last)
                losses = last if losses is None else self.join((losses, last))
            part = self.slice_states(x, (0, start, 0), (rows, end, width), (1, 1, 1))
            last = self.chunk(part, weight, self.slice_labels(targets, (0, start), (rows, end), (1, 1)))
        losses = self.forward_first(self.join((losses, last)))
        if self.parallel:
            losses = self.add_losses(losses, 0.0)
        return self.reshape(losses, labels.shape)


class BatchLoss(nn.Cell):
    """The loss of a batch from the losses of its positions.

    Micro batches of a step have different numbers of labelled positions; MindFormers' pipeline and accumulation cells
    add sums and numbers up and divide once (`calculate_per_token_loss`), so that the step is that of the whole batch.

    Args:
        config: gives the form and the data-parallel degree.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.gives_sums = config.loss_form == "sums" or config.calculate_per_token_loss
        self.not_equal, self.sum_losses, self.sum_labelled = P.NotEqual(), P.ReduceSum(), P.ReduceSum()
        self.cast, self.divide, self.maximum, self.weigh = P.Cast(), P.RealDiv(), P.Maximum(), P.Mul()
        if is_parallel():
            dp = config.parallel_config.data_parallel
            self.not_equal.shard(((dp, 1), ()))
            self.weigh.shard(((dp, 1), (dp, 1)))
            for primitive in (self.sum_losses, self.sum_labelled):
                primitive.shard(((dp, 1),))

    def construct(self, losses, labels, weights=None):
        """The mean over labelled positions, or the sum and their number, of losses and int32 labels `(B, L)`.

        With `weights`, float32 `(B, L)` and 0 where nothing is labelled, a position counts so many times: the sum of
        weighted losses, and that of the weights.
        """
        if weights is not None:
            total, count = self.sum_losses(self.weigh(losses, weights)), self.sum_labelled(weights)
            return (total, count) if self.gives_sums else self.divide(total, self.maximum(count, LEAST_WEIGHT))
        labelled = self.cast(self.not_equal(labels, IGNORE_INDEX), mstype.float32)
        total, count = self.sum_losses(losses), self.sum_labelled(labelled)
        if self.gives_sums:
            return total, count
        return self.divide(total, self.maximum(count, 1.0))
