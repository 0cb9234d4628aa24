"""GRPO of one task LoRA: groups of sampled answers, their rewards, and the model without that pair as the reference.

The formulae are in `mindformers_ixc.grpo_options`. As for preference pairs no second model is in memory, and a prompt's
pictures are encoded once for all answers and both passes.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.grpo_options import grpo_options
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.loss import IGNORE_INDEX
from mindformers_ixc.models.pairs import IXC25PairModel

# Entries of the report of a step, in their order; the last is the number of answers that the others are sums over.
REPORT = ("reward", "reward_std", "exact_match", "kl", "clip_fraction", "answer_length", "equal_groups", "answers")

# Added to a group's standard deviation. The paper has none; this is that of Hugging Face's TRL (GRPOTrainer).
STD_EPS = 1e-4


class GroupLoss(nn.Cell):
    """Loss and report of groups from the losses of positions.

    Args:
        beta: weight of the distance to the reference; at 0 there is none.
        clip: c, by so much the ratio of probabilities may leave 1 before an answer's gradient ends.
    """

    def __init__(self, beta: float, clip: float):
        super().__init__()
        self.beta, self.clip = beta, clip
        self.mean, self.sum, self.largest, self.smallest = (P.ReduceMean(keep_dims=True), P.ReduceSum(),
                                                            P.ReduceMax(keep_dims=True), P.ReduceMin(keep_dims=True))
        self.exp, self.sqrt, self.square, self.cast, self.reshape = P.Exp(), P.Sqrt(), P.Square(), P.Cast(), P.Reshape()
        self.at_least, self.at_most, self.stack = P.Maximum(), P.Minimum(), P.Stack()

    def advantages(self, rewards):
        """Of float32 rewards `(B, N)` the advantages `(B, N)`, the standard deviations `(B, 1)`, and 1 where all
        rewards of a group are equal `(B, 1)`."""
        centred = rewards - self.mean(rewards, 1)
        std = self.sqrt(self.mean(self.square(centred), 1))
        # a mean of equal numbers need not be that number, so the deviation does not tell
        equal = self.cast(self.largest(rewards, 1) == self.smallest(rewards, 1), mstype.float32)
        return centred / (std + STD_EPS) * (1.0 - equal), std, equal

    def construct(self, losses, labels, rewards, matches, sampled, reference=None):
        """Loss and report.

        Args:
            losses: float32 `(B*N, L)`, negative log-probabilities, 0 where nothing is labelled; answers of a group
                stand together.
            labels: int32 `(B*N, L)`.
            rewards: float32 `(B, N)`.
            matches: float32 `(B, N)`, 1 where an answer is exactly what was expected.
            sampled: float32 `(B*N, L)`, log-probabilities when the answers were sampled.
            reference: as `losses`, of the reference; not looked at where `beta` is 0.

        Returns:
            Scalar loss and the report, float32, the entries of `REPORT`: sums over answers of the reward, its deviation
            in the group, exact matches, the mean distance to the reference a token, the share of tokens that are
            clipped, the number of tokens, whether all rewards of the group are equal; and the number of answers.
        """
        count = losses.shape[0]
        advantages, std, equal = self.advantages(rewards)
        advantage = self.reshape(advantages, (count, 1))
        real = self.cast(labels != IGNORE_INDEX, mstype.float32)                       # (B*N, L)
        tokens = self.sum(real, 1)                                                     # (B*N,)
        share = real / self.reshape(self.at_least(tokens, 1.0), (count, 1))            # weighs a mean over tokens
        ratio = self.exp(-losses - sampled)
        limited = F.stop_gradient(self.at_most(self.at_least(ratio, 1.0 - self.clip), 1.0 + self.clip))
        # where the clipped product is the smaller one it is a constant; at a tie the gradient is the ratio's
        clipped = F.stop_gradient(self.cast(ratio * advantage > limited * advantage, mstype.float32))
        value = ((1.0 - clipped) * ratio + clipped * limited) * advantage
        kl = F.zeros_like(value)
        if self.beta:
            log_ratio = losses - reference                   # of the reference's probability to the model's
            kl = self.exp(log_ratio) - log_ratio - 1.0
        loss = self.sum((self.beta * kl - value) * share) / count
        group = 1.0 * count / rewards.shape[0]
        entries = (self.sum(rewards), self.sum(std) * group, self.sum(matches), self.sum(kl * share),
                   self.sum(clipped * share), self.sum(tokens), self.sum(equal) * group,
                   self.sum(F.ones_like(rewards)))
        return loss, F.stop_gradient(self.stack(entries))


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class IXC25ForGRPO(IXC25PairModel):
    """IXC2.5 that learns from rewards of its own answers; the same parameters as `IXC25Model`.

    Args:
        config: `adapter_mode` must use the task that trains (`write` for `dpo`); `grpo` has the options.

    Raises:
        ConfigError: for unknown options, a mode without the task, or a graph that is cut.
    """

    def __init__(self, config: IXC25Config):
        super().__init__(config)
        if is_parallel():
            raise ConfigError("GRPO trains on one device or in parallel.parallel_mode 0 (data parallel), where every "
                              "device has the whole model; set that.")
        options = grpo_options(config.grpo)
        self.without_task = self.adapters_without(options["task"], "grpo")
        self.group_loss = GroupLoss(options["beta"], options["clip"])
        self.has_reference = options["beta"] > 0

    def construct(self, input_ids, labels=None, pixel_values=None, global_views=None, view_index=None,
                  vision_index=None, image_mask=None, rewards=None, matches=None, sampled_logps=None):
        """Loss and report of groups; arguments as in `mindformers_ixc.data.batch`, see `GroupLoss.construct`."""
        rows = self.answer_rows(input_ids, pixel_values, global_views, view_index, vision_index, image_mask)
        shape = rows[0].shape
        labels, sampled = self.reshape(labels, shape), self.reshape(sampled_logps, shape)
        losses = self.head_losses(self.hidden_states(*rows, None, None, None, self.adapters), labels)
        reference = None
        if self.has_reference:
            states = self.hidden_states(*rows, None, None, None, self.without_task)
            reference = F.stop_gradient(self.head_losses(states, labels))
        return self.group_loss(losses, labels, rewards, matches, sampled, reference)
