"""Direct preference optimisation of one task LoRA: the reference is the same model with that pair left out.

    h = (log p(chosen) - log p(rejected)) - (log p_ref(chosen) - log p_ref(rejected))
    sigmoid:  -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)        (arXiv 2305.18290, label smoothing s)
    ipo:      (h - 1 / (2 beta))^2                                          (arXiv 2310.12036)

So no second model is in memory, and images are encoded once for all four passes.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.sections import above_0, check_section, of_type, one_of

LOSSES = ("sigmoid", "ipo")
DEFAULTS = {"task": "dpo", "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}
RULES = {"task": of_type(str), "loss": one_of(LOSSES), "beta": above_0(), "label_smoothing": of_type(float)}

# Entries of the report of a step, in their order; the last is the number of pairs that the others are sums over.
REPORT = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected",
          "pairs")
REPORT_NAME = "train_report"


def preference_options(section: dict | None) -> dict:
    """Options of `model_config.preference` with their defaults.

    Raises:
        ConfigError: for an unknown option or value.
    """
    check_section(section or {}, RULES, "model_config.preference")
    options = {**DEFAULTS, **{key: value for key, value in (section or {}).items() if value is not None}}
    if not 0 <= options["label_smoothing"] < 0.5 or (options["loss"] == "ipo" and options["label_smoothing"]):
        raise ConfigError(f"model_config.preference.label_smoothing is {options['label_smoothing']!r}; the sigmoid "
                          "loss takes 0 up to 0.5, ipo takes none.")
    return options


class PreferenceLoss(nn.Cell):
    """Loss and report of pairs from their log-probabilities.

    Args:
        loss: `sigmoid` or `ipo`.
        beta: strength of the tie to the reference.
        label_smoothing: share of pairs taken to be the wrong way round.
    """

    def __init__(self, loss: str, beta: float, label_smoothing: float):
        super().__init__()
        self.is_ipo, self.beta, self.smoothing = loss == "ipo", beta, label_smoothing
        self.sub, self.add = P.Sub(), P.Add()
        self.mul_number, self.add_number, self.min_number = P.Mul(), P.Add(), P.Minimum()
        self.strided_slice = P.StridedSlice()
        self.square, self.absolute, self.exp, self.log = P.Square(), P.Abs(), P.Exp(), P.Log()
        self.mean = P.ReduceMean()

    def shard(self) -> None:
        """Everything is whole on every device: left to itself the compiler cuts pairs over tensor-parallel devices, and
        gradients that those take for copies of each other are not."""
        whole, number = (1, 1), ()
        for primitive in (self.sub, self.add):
            primitive.shard((whole, whole))
        for primitive in (self.mul_number, self.add_number, self.min_number):
            primitive.shard((whole, number))
        for primitive in (self.strided_slice, self.square, self.absolute, self.exp, self.log, self.mean):
            primitive.shard((whole,))

    def log_sigmoid(self, x):
        """Without overflow on either side, of `(B, 1)`."""
        shrunk = self.exp(self.mul_number(self.absolute(x), -1.0))
        return self.sub(self.min_number(x, 0.0), self.log(self.add_number(shrunk, 1.0)))

    def construct(self, policy, reference):
        """Takes summed log-probabilities (chosen, rejected), float32 `(B, 2)` each.

        Returns:
            Scalar loss and the report, float32, the entries of `REPORT`: sums of chosen and rejected rewards, margins,
            right orders, policy log-probabilities of chosen and rejected, and the number of pairs.
        """
        pairs, steps = policy.shape[0], (1, 1)
        rewards = self.mul_number(self.sub(policy, reference), self.beta)              # (B, 2)
        chosen = self.strided_slice(rewards, (0, 0), (pairs, 1), steps)                # (B, 1)
        rejected = self.strided_slice(rewards, (0, 1), (pairs, 2), steps)              # (B, 1)
        margin = self.sub(chosen, rejected)                                            # (B, 1)
        if self.is_ipo:
            loss = self.square(self.add_number(self.mul_number(margin, 1.0 / self.beta), -1.0 / (2.0 * self.beta)))
        else:
            loss = self.mul_number(self.log_sigmoid(margin), self.smoothing - 1.0)
            if self.smoothing:
                wrong_way = self.log_sigmoid(self.mul_number(margin, -1.0))
                loss = self.add(loss, self.mul_number(wrong_way, -self.smoothing))
        return self.mean(loss), F.stop_gradient(self.report(rewards, margin, policy))

    @staticmethod
    def report(rewards, margin, policy):
        """The report; see `construct`."""
        right = F.cast(margin > 0, mstype.float32)
        sums = {"reward_chosen": rewards[:, 0].sum(), "reward_rejected": rewards[:, 1].sum(),
                "reward_margin": margin.sum(), "reward_accuracy": right.sum(), "logp_chosen": policy[:, 0].sum(),
                "logp_rejected": policy[:, 1].sum(), "pairs": F.ones_like(margin).sum()}
        return F.stack([sums[name] for name in REPORT])


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class IXC25ForPreference(IXC25Model):
    """IXC2.5 that learns from preferred answers; the same parameters as `IXC25Model`.

    Args:
        config: `adapter_mode` must use the task that trains (`write` for `dpo`); `preference` has the options.

    Raises:
        ConfigError: for unknown options, a mode without the task, or several pipeline stages.
    """

    def __init__(self, config: IXC25Config):
        super().__init__(config)
        options = preference_options(config.preference)
        if options["task"] not in self.adapters:
            raise ConfigError(f"model_config.preference.task is '{options['task']}', which adapter_mode "
                              f"'{config.adapter_mode}' does not use ({', '.join(self.adapters) or 'it uses none'}).")
        if config.parallel_config.pipeline_stage > 1:
            raise ConfigError(f"parallel_config.pipeline_stage is {config.parallel_config.pipeline_stage}, but a "
                              "preference step's report of rewards cannot travel between stages; set it to 1 and use "
                              "data and tensor parallel.")
        self.without_task = tuple(name for name in self.adapters if name != options["task"])
        self.preference_loss = PreferenceLoss(options["loss"], options["beta"], options["label_smoothing"])
        self.tile_answers = P.Tile()
        self.sum_positions = P.ReduceSum()
        # of two outputs the parallel compiler finds no loss, and would not divide the loss's gradient by the devices
        # that compute it alike; so there the report is put down instead of given out
        self.keeps_report = is_parallel()
        self.mul_minus_one = P.Mul()
        if is_parallel():
            dp = config.parallel_config.data_parallel
            self.tile_answers.shard(((dp, 1, 1, 1),))
            self.sum_positions.shard(((dp, 1),))
            self.mul_minus_one.shard(((1,), ()))
            self.preference_loss.shard()
            self.train_report = Parameter(Tensor(np.zeros(len(REPORT), np.float32)), name=REPORT_NAME,
                                          requires_grad=False)

    def answer_logps(self, rows, labels, adapters):
        """Summed log-probabilities of the labelled positions, float32 `(2B,)`."""
        losses = self.head_losses(self.hidden_states(*rows, None, None, None, adapters), labels)
        # from here on the numbers are few, and whole on every device
        return self.mul_minus_one(self.sum_positions(losses, 1), -1.0)

    def construct(self, input_ids, labels=None, pixel_values=None, global_views=None, view_index=None,
                  vision_index=None, image_mask=None, reference_logps=None):
        """Loss and report of pairs; arguments as in `mindformers_ixc.data.batch`, see `PreferenceLoss.construct`.

        In parallel runs the loss alone; the report is in `train_report`.
        """
        b, _, length = input_ids.shape
        table = None
        if pixel_values is not None:
            table = self.vision_table(pixel_values, global_views, view_index)         # (B, T*k*k + 2, D)
            rows, width = table.shape[1], table.shape[2]
            table = self.tile_answers(self.reshape(table, (b, 1, rows, width)), (1, 2, 1, 1))
            table = self.reshape(table, (2 * b, rows, width))                         # (2B, T*k*k + 2, D)
        shape = (2 * b, length)
        labels = self.reshape(labels, shape)
        inputs = (self.reshape(input_ids, shape), table, self.reshape(vision_index, shape),
                  self.reshape(image_mask, shape))
        policy = self.reshape(self.answer_logps(inputs, labels, self.adapters), (b, 2))
        if reference_logps is None:
            reference = F.stop_gradient(self.answer_logps(inputs, labels, self.without_task))
            reference_logps = self.reshape(reference, (b, 2))
        loss, report = self.preference_loss(policy, reference_logps)
        if self.keeps_report:
            return F.depend(loss, F.assign(self.train_report, report))
        return loss, report
