"""The reward model: the network with one number a position in place of scores of the next token, and its loss.

It learns from preference pairs: the two answers of a pair are two sequences, whose pictures are encoded once. The
losses are those of `mindformers_ixc.reward_options`.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.layers import Linear
from mindformers_ixc.models.pairs import IXC25PairModel, PairLoss
from mindformers_ixc.reward_options import BARRIER, EDGE, reward_options

# Entries of the report of a step, in their order; the last is the number of pairs that the others are sums over.
REPORT = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "pairs")

# What the column `score_positions` says of a position: the one that a score of pooling `last` is read at.
LAST = 2


# What a reward model says where an answer is asked of it.
WRITES_NONE = ("This is a reward model: it scores answers (get_score, get_scores, compare, rank) and writes none; ask "
               "a model that writes.")


class ScorePooling(nn.Cell):
    """Scores of sequences from the values of their positions.

    Args:
        pooling: `last` or `mean`.
        dp: data-parallel degree; `None` in stand-alone runs.
    """

    def __init__(self, pooling: str, dp: int | None = None):
        super().__init__()
        self.is_mean = pooling == "mean"
        self.equal, self.not_equal, self.cast = P.Equal(), P.NotEqual(), P.Cast()
        self.mul, self.sum, self.count, self.div = P.Mul(), P.ReduceSum(), P.ReduceSum(), P.Div()
        if dp is not None:
            rows = (dp, 1)
            self.equal.shard((rows, ()))
            self.not_equal.shard((rows, ()))
            self.mul.shard((rows, rows))
            self.sum.shard((rows,))
            self.count.shard((rows,))
            self.div.shard(((dp,), (dp,)))

    def construct(self, values, positions):
        """Takes float32 values and int32 `score_positions`, `(N, L)` each; gives `(N,)`."""
        if self.is_mean:
            weights = self.cast(self.not_equal(positions, 0), mstype.float32)
            return self.div(self.sum(self.mul(values, weights), 1), self.count(weights, 1))
        return self.sum(self.mul(values, self.cast(self.equal(positions, LAST), mstype.float32)), 1)


class RewardLoss(PairLoss):
    """Loss and report of pairs from their scores; the options are those of `reward_options`.

    Args:
        loss: `ranking` or `focal`.
        log_barrier: weight of what keeps scores within a range.
        summed: gives the sum of the losses and the number of pairs instead of the mean.
    """

    def __init__(self, loss: str = "ranking", log_barrier: float = 0.0, summed: bool = False):
        super().__init__(len(REPORT), summed)
        self.focal, self.weight = loss == "focal", log_barrier
        self.mul, self.equal, self.sum_real = P.Mul(), P.Equal(), P.ReduceSum()

    def shard(self, dp: int) -> None:
        """See `PairLoss.shard`."""
        super().shard(dp)
        for primitive in (self.mul, self.equal):
            primitive.shard(((dp, 1), (dp, 1)))
        self.sum_real.shard(((dp, 1),))

    def barrier(self, scores):
        """What keeps scores `(B, 1)` within the range."""
        inside = self.at_least(self.min_number(scores, BARRIER - EDGE), EDGE - BARRIER)
        upper = self.log(self.add_number(self.mul_number(inside, -1.0), BARRIER))
        return self.mul_number(self.add(self.log(self.add_number(inside, BARRIER)), upper), -1.0)

    def losses(self, chosen, rejected, margin):
        """Losses `(B, 1)` of pairs from their scores and the margin, `(B, 1)` each."""
        logp = self.log_sigmoid(margin)
        loss = self.mul_number(logp, -1.0)
        if self.focal:
            easy = self.at_least(self.add_number(self.exp(logp), -0.5), 0.0)
            loss = self.mul(self.square(self.add_number(self.mul_number(easy, -2.0), 1.0)), loss)
        if self.weight:
            both = self.add(self.barrier(chosen), self.barrier(rejected))
            loss = self.add(loss, self.mul_number(both, 0.5 * self.weight))
        return loss

    def construct(self, scores):
        """Takes float32 `(B, 2)`, the chosen answers' scores first.

        Returns:
            Scalar loss (or sum and number of pairs, float32 scalars) and the report, float32, the entries of `REPORT`:
            sums of chosen and rejected scores, margins and right orders, and the number of pairs.
        """
        chosen, rejected = self.chosen(scores), self.rejected(scores)
        margin = self.sub(chosen, rejected)                                            # (B, 1)
        losses = self.losses(chosen, rejected, margin)
        right = self.cast(self.greater(margin, 0.0), mstype.float32)
        entries = (chosen, rejected, margin, right, self.ones(margin))
        report = F.stop_gradient(self.sum_entries(self.join(entries), 0))
        if self.summed:
            # counted from the data: what is known while compiling becomes a constant of every pipeline stage
            real = self.cast(self.equal(margin, margin), mstype.float32)
            return self.sum(losses), F.stop_gradient(self.sum_real(real)), report
        return self.mean(losses), report


class IXC25RewardModel(IXC25PairModel):
    """IXC2.5 with the head `v_head` in place of `output`; a score is its value at the last position, or their mean.

    The head has no bias, so the mean of its values is its value of the mean state. A fresh one starts at zero.

    Args:
        config: all sizes and dtypes; `reward_pooling` says which positions count, `reward` has the options of training.

    Raises:
        ConfigError: without `reward_pooling`, or for unknown options.
    """

    def __init__(self, config: IXC25Config):
        if config.reward_pooling is None:
            raise ConfigError("model_config.reward_pooling is not set, so this model writes and has no score head; a "
                              "reward model's is last or mean.")
        super().__init__(config)
        dp = config.parallel_config.data_parallel if is_parallel() else None
        self.pooling = ScorePooling(config.reward_pooling, dp)
        self.reward_loss = RewardLoss(**reward_options(config.reward), summed=config.calculate_per_token_loss)
        self.end_with(self.reward_loss, self.pooling)

    def add_head(self, config: IXC25Config) -> None:
        """Gives the network its score head."""
        self.v_head = Linear(config.hidden_size, 1, sigma=0.0, param_dtype=config.param_init_type,
                             compute_dtype=config.compute_dtype)

    @property
    def head(self) -> Linear:
        """The last linear."""
        return self.v_head

    def values(self, x, shape):
        """float32 values of positions in the shape `(N, L)`, of the output of the last norm `(N*L, D)`."""
        return self.reshape(self.cast(self.v_head(x), mstype.float32), shape)

    def scores(self, input_ids, pixel_values, global_views, view_index, vision_index, image_mask, score_positions):
        """float32 scores `(B, 2)` of pairs; arguments as in `construct`."""
        b, _, length = input_ids.shape
        rows = self.answer_rows(input_ids, pixel_values, global_views, view_index, vision_index, image_mask)
        x, shape = self.hidden_states(*rows, None, None, None, self.adapters), (2 * b, length)
        pooled = self.pooling(self.values(x, shape), self.reshape(score_positions, shape))
        return self.reshape(pooled, (b, 2))

    def construct(self, input_ids, labels=None, pixel_values=None, global_views=None, view_index=None,
                  vision_index=None, image_mask=None, score_positions=None):
        """Loss and report of pairs; arguments as in `mindformers_ixc.data.batch`, of which `labels` are not used.

        In parallel runs the loss alone (or the sum of losses and the number of pairs); the report is added to the
        parameter `train_report`.
        """
        return self.kept(self.reward_loss(self.scores(input_ids, pixel_values, global_views, view_index, vision_index,
                                                      image_mask, score_positions)))
