"""What a training step is made of, decided from the configuration before MindFormers starts.

MindFormers' trainer builds data, network and step cell in an order of its own, each from sections that it changes on
the way. Everything this package has to say about them is said here, once: `StepPlan.put_into` before that, `cell` when
MindFormers has decided on its own step cell. Where graphs are cut the step cells and micro batches are MindFormers',
and what they cannot do is done inside: a report is a parameter of the network, a moving average the optimizer's.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mindformers.tools.register import MindFormerConfig
from mindspore import nn

from mindformers_ixc.data.batch import BATCH_COLUMNS, WEIGHTS_COLUMN
from mindformers_ixc.device import is_parallel
from mindformers_ixc.models import grpo, preference, reward
from mindformers_ixc.training.averaging import AveragedOptimizer
from mindformers_ixc.training.wrapper import portable_wrapper
from mindformers_ixc.training_options import GROUP_NETWORK, PREFERENCE_NETWORK, REWARD_NETWORK

# The column that asks for the losses of sources, and what a step can report.
SOURCE_COLUMN = "source"
SOURCES, PREFERENCE, REWARD, GROUPS = "sources", "preference", "reward", "groups"

# Reports of pairs and groups by the network that gives them: the names of their entries, the last what they are sums
# over.
ANSWER_REPORTS = {PREFERENCE_NETWORK: PREFERENCE, REWARD_NETWORK: REWARD, GROUP_NETWORK: GROUPS}
ENTRIES = {PREFERENCE: preference.REPORT, REWARD: reward.REPORT, GROUPS: grpo.REPORT}

OWN_CELL, GROUP_CELL = "IXC25TrainOneStepCell", "IXC25GroupStepCell"


@dataclass(frozen=True)
class StepPlan:
    """Parts of a step.

    Attributes:
        loss_form: what the network returns, see `IXC25Model.training_loss`.
        report: what it reports beside its loss: `sources`, `preference`, `reward`, `groups` or nothing.
        micro_batches: parts in which this package's cell takes a batch; those of a parallel step are MindFormers'.
        own_cell: whether the step cell is this package's, whatever the YAML or MindFormers say.
        labels_column: number of the column that parts are weighed by; `None` weighs them the same.
        in_model: whether the report is a parameter of the model, instead of an output for the step cell.
        per_token: whether the network gives the sum of losses and what it is to be divided by, which MindFormers' step
            adds up over micro batches and divides once.
        ema_decay: share of the moving average of the weights that a step keeps; `None` for no average.
        sources: names of the sources; empty until the data are there.
        skips_spikes: whether steps are not taken whose loss or gradient norm is a spike.
    """

    loss_form: str = "mean"
    report: str | None = None
    micro_batches: int = 1
    own_cell: bool = False
    labels_column: int | None = None
    in_model: bool = False
    per_token: bool = False
    ema_decay: float | None = None
    sources: tuple[str, ...] = ()
    skips_spikes: bool = False

    def with_sources(self, names: Iterable[str]) -> StepPlan:
        """The plan once the data are there."""
        return replace(self, sources=tuple(names))

    @property
    def report_shape(self) -> tuple[int, ...] | None:
        """Shape of the report that the step cell takes from the network, if any."""
        if self.report is None or self.in_model:
            return None
        return (len(ENTRIES[self.report]),) if self.report in ENTRIES else (2, len(self.sources))

    def put_into(self, config: MindFormerConfig) -> None:
        """Says to MindFormers what it has to know before it builds anything.

        Args:
            config: the run's `MindFormerConfig`, changed in place.
        """
        config.model.model_config.loss_form = self.loss_form
        if self.per_token:
            config.calculate_per_token_loss = True
        if self.ema_decay is not None:       # step cells take no such argument
            config.runner_wrapper.pop("ema_decay")
        if not is_parallel():
            # MindFormers accumulates in semi-auto parallel only and would silently not do it here: a batch is as large
            # as all its parts together, and the step cell takes it apart
            config.runner_config.gradient_accumulation_steps = 1
            config.runner_config.batch_size *= self.micro_batches

    def optimizer(self, optimizer: nn.Cell) -> nn.Cell:
        """The optimizer that the step cell is built with."""
        return optimizer if self.ema_decay is None else AveragedOptimizer(optimizer, self.ema_decay)

    def cell(self, name: str) -> dict:
        """Entries of the section `runner_wrapper` that the step cell is built from.

        Args:
            name: type of the cell that the YAML or MindFormers wants.
        """
        if not self.own_cell:
            return {"type": portable_wrapper(name)}
        own = GROUP_CELL if self.report == GROUPS else OWN_CELL
        return {"type": own, "micro_batches": self.micro_batches, "labels_column": self.labels_column,
                "report_shape": self.report_shape, "skips_spikes": self.skips_spikes}


def plan_step(config: MindFormerConfig) -> StepPlan:
    """The plan of a run's steps.

    Args:
        config: the run's `MindFormerConfig`.
    """
    columns = list(config.train_dataset.input_columns or BATCH_COLUMNS)
    accumulated = config.runner_config.gradient_accumulation_steps or 1
    decay = config.runner_wrapper.get("ema_decay")
    answers = ANSWER_REPORTS.get(config.model.arch.type)
    report = answers or (SOURCES if SOURCE_COLUMN in columns else None)
    loss_form = SOURCES if report == SOURCES else "mean"
    if is_parallel():
        per_token = accumulated > 1 or (config.parallel_config.pipeline_stage or 1) > 1
        if per_token and report != SOURCES:
            loss_form = "sums"
        return StepPlan(loss_form, report, in_model=report is not None, per_token=per_token, ema_decay=decay)
    spikes = config.get("skip_spikes") is not None
    own_cell = accumulated > 1 or report is not None or spikes
    weighed_by = WEIGHTS_COLUMN if WEIGHTS_COLUMN in columns else "labels"
    return StepPlan(loss_form, report, accumulated, own_cell,
                    None if answers or not own_cell else columns.index(weighed_by), ema_decay=decay,
                    skips_spikes=spikes)
