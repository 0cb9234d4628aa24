"""Preference optimisation of one task LoRA: the reference is the same model with that pair left out.

So no second model is in memory, and images are encoded once for all passes. The losses, some of which need no
reference, are those of `mindformers_ixc.preference_options`.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.loss import IGNORE_INDEX
from mindformers_ixc.models.pairs import IXC25PairModel, PairLoss
from mindformers_ixc.preference_options import REFERENCE_FREE, preference_options

# Entries of the report of a step, in their order; the last is the number of pairs that the others are sums over.
REPORT = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected",
          "nll_chosen", "pairs")

# Of odds, the smallest -log p: an answer that is certain in float32 has no odds.
LEAST_NLL = 1e-6


class AnswerSums(nn.Cell):
    """Log-probability and number of tokens of every answer, float32 `(B, 2)` each.

    Args:
        dp: data-parallel degree; `None` in stand-alone runs.
    """

    def __init__(self, dp: int | None = None):
        super().__init__()
        self.not_equal, self.cast, self.reshape = P.NotEqual(), P.Cast(), P.Reshape()
        self.sum_losses, self.sum_tokens, self.negative = P.ReduceSum(), P.ReduceSum(), P.Mul()
        if dp is not None:
            self.not_equal.shard(((dp, 1), ()))
            for primitive in (self.sum_losses, self.sum_tokens):
                primitive.shard(((dp, 1),))
            self.negative.shard(((dp,), ()))

    def construct(self, losses, labels):
        """Takes losses and labels of all positions, `(2B, L)`, an answer a row and those of a pair together."""
        shape = (labels.shape[0] // 2, 2)
        tokens = self.sum_tokens(self.cast(self.not_equal(labels, IGNORE_INDEX), mstype.float32), 1)
        return self.reshape(self.negative(self.sum_losses(losses, 1), -1.0), shape), self.reshape(tokens, shape)


class PreferenceLoss(PairLoss):
    """Loss and report of pairs from their log-probabilities; the options are those of `preference_options`.

    Args:
        loss: `sigmoid`, `ipo`, `simpo` or `orpo`.
        beta: strength of the tie to the reference; without one a factor of rewards, or weight of the odds ratio.
        label_smoothing: share of pairs taken to be the wrong way round.
        rpo_alpha: weight of the chosen answer's negative log-likelihood a token.
        gamma: margin that rewards shall differ by.
        summed: gives the sum of the losses and the number of pairs instead of the mean.
    """

    def __init__(self, loss: str, beta: float, label_smoothing: float = 0.0, rpo_alpha: float = 0.0,
                 gamma: float = 0.0, summed: bool = False):
        super().__init__(len(REPORT), summed)
        self.loss, self.beta, self.smoothing, self.alpha, self.gamma = loss, beta, label_smoothing, rpo_alpha, gamma
        self.has_reference = loss not in REFERENCE_FREE
        self.div, self.tanh = P.Div(), P.Tanh()

    def shard(self, dp: int) -> None:
        """See `PairLoss.shard`."""
        super().shard(dp)
        self.div.shard(((dp, 1), (dp, 1)))
        self.tanh.shard(((dp, 1),))

    def log_odds(self, x):
        """`log(p / (1 - p))` of a log-probability `(B, 2)`; that of certainty is taken to be `-LEAST_NLL`."""
        x = self.min_number(x, -LEAST_NLL)
        # 1 - exp(x) = -2 t / (1 - t) with t = tanh(x / 2), exact near 0, where the CPU's expm1 (MindSpore 2.9) is not
        t = self.mul_number(self.tanh(self.mul_number(x, 0.5)), -1.0)
        rest = self.sub(self.log(self.mul_number(t, 2.0)), self.log(self.add_number(t, 1.0)))
        return self.sub(x, rest)

    def losses(self, margin, nll, each):
        """Losses `(B, 1)` of pairs.

        Args:
            margin: rewards of the chosen less those of the rejected, `(B, 1)`.
            nll: negative log-likelihood of the chosen a token, `(B, 1)`.
            each: log-probabilities a token, `(B, 2)`.
        """
        if self.loss == "orpo":
            odds = self.log_odds(each)
            ratio = self.log_sigmoid(self.sub(self.chosen(odds), self.rejected(odds)))
            return self.add(nll, self.mul_number(ratio, -self.beta))
        if self.loss == "simpo":
            return self.mul_number(self.log_sigmoid(self.add_number(margin, -self.gamma)), -1.0)
        if self.loss == "ipo":
            loss = self.square(self.add_number(self.mul_number(margin, 1.0 / self.beta), -1.0 / (2.0 * self.beta)))
        else:
            loss = self.mul_number(self.log_sigmoid(margin), self.smoothing - 1.0)
            if self.smoothing:
                wrong_way = self.log_sigmoid(self.mul_number(margin, -1.0))
                loss = self.add(loss, self.mul_number(wrong_way, -self.smoothing))
        if self.alpha:
            loss = self.add(loss, self.mul_number(nll, self.alpha))
        return loss

    def construct(self, policy, tokens, reference=None):
        """Takes float32 `(B, 2)` each, chosen and rejected: summed log-probabilities, numbers of tokens, and the
        reference's log-probabilities if the loss has a reference.

        Returns:
            Scalar loss (or sum and number of pairs, float32 scalars) and the report, float32, the entries of `REPORT`:
            sums of chosen and rejected rewards, margins, right orders, policy log-probabilities of chosen and rejected,
            negative log-likelihoods a token of the chosen, and the number of pairs. Rewards are `beta` times the
            log-probability less the reference's, or, without a reference, times that a token.
        """
        each = self.div(policy, self.at_least(tokens, 1.0))                            # (B, 2)
        rewards = self.mul_number(self.sub(policy, reference) if self.has_reference else each, self.beta)
        margin = self.sub(self.chosen(rewards), self.rejected(rewards))                # (B, 1)
        nll = self.mul_number(self.chosen(each), -1.0)
        losses = self.losses(margin, nll, each)
        right = self.cast(self.greater(margin, 0.0), mstype.float32)
        entries = (self.chosen(rewards), self.rejected(rewards), margin, right, self.chosen(policy),
                   self.rejected(policy), nll, self.ones(margin))
        report = F.stop_gradient(self.sum_entries(self.join(entries), 0))
        if self.summed:
            # counted from the data: what is known while compiling becomes a constant of every pipeline stage
            real = self.cast(self.greater(self.chosen(tokens), 0.0), mstype.float32)
            return self.sum(losses), F.stop_gradient(self.sum(real)), report
        return self.mean(losses), report


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class IXC25ForPreference(IXC25PairModel):
    """IXC2.5 that learns from preferred answers; the same parameters as `IXC25Model`.

    Args:
        config: `adapter_mode` must use the task that trains (`write` for `dpo`); `preference` has the options.

    Raises:
        ConfigError: for unknown options, or a mode without the task.
    """

    def __init__(self, config: IXC25Config):
        super().__init__(config)
        options = preference_options(config.preference)
        self.without_task = self.adapters_without(options.pop("task"), "preference")
        self.preference_loss = PreferenceLoss(**options, summed=config.calculate_per_token_loss)
        self.has_reference = self.preference_loss.has_reference
        self.answer_sums = AnswerSums(config.parallel_config.data_parallel if is_parallel() else None)
        self.end_with(self.preference_loss, self.answer_sums)

    def answer_logps(self, rows, labels, adapters):
        """Summed log-probabilities and numbers of the labelled positions, float32 `(B, 2)` each."""
        losses = self.head_losses(self.hidden_states(*rows, None, None, None, adapters), labels)
        return self.answer_sums(losses, labels)

    def construct(self, input_ids, labels=None, pixel_values=None, global_views=None, view_index=None,
                  vision_index=None, image_mask=None, reference_logps=None):
        """Loss and report of pairs; arguments as in `mindformers_ixc.data.batch`, see `PreferenceLoss.construct`.

        In parallel runs the loss alone (or the sum of losses and the number of pairs); the report is added to the
        parameter `train_report`.
        """
        inputs = self.answer_rows(input_ids, pixel_values, global_views, view_index, vision_index, image_mask)
        labels = self.reshape(labels, (2 * labels.shape[0], labels.shape[2]))
        policy, tokens = self.answer_logps(inputs, labels, self.adapters)
        if self.has_reference and reference_logps is None:
            reference_logps = F.stop_gradient(self.answer_logps(inputs, labels, self.without_task)[0])
        return self.kept(self.preference_loss(policy, tokens, reference_logps))
