"""What a training step is made of, decided from the configuration before MindFormers starts.

MindFormers' trainer builds data, network and step cell in an order of its own, each from sections that it changes on
the way. Everything this package has to say about them is said here, once: `StepPlan.put_into` before that, `cell` when
MindFormers has decided on its own step cell.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mindformers.tools.register import MindFormerConfig

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.preference import REPORT
from mindformers_ixc.training.wrapper import portable_wrapper

# The column that asks for the losses of sources, and what a step can report.
SOURCE_COLUMN = "source"
SOURCES, PREFERENCE = "sources", "preference"

OWN_CELL = "IXC25TrainOneStepCell"


@dataclass(frozen=True)
class StepPlan:
    """Parts of a step.

    Attributes:
        loss_form: what the network returns, see `IXC25Model.training_loss`.
        report: what it reports beside its loss: `sources`, `preference` or nothing.
        micro_batches: parts in which this package's cell takes a batch; those of a parallel step are MindFormers'.
        own_cell: whether the step cell is this package's, whatever the YAML or MindFormers say.
        labels_column: number of the column that parts are weighed by; `None` weighs them the same.
        in_model: whether the report is a parameter of the model, instead of an output for the step cell.
        sources: names of the sources; empty until the data are there.
    """

    loss_form: str = "mean"
    report: str | None = None
    micro_batches: int = 1
    own_cell: bool = False
    labels_column: int | None = None
    in_model: bool = False
    sources: tuple[str, ...] = ()

    def with_sources(self, names: Iterable[str]) -> StepPlan:
        """The plan once the data are there."""
        return replace(self, sources=tuple(names))

    @property
    def report_shape(self) -> tuple[int, ...] | None:
        """Shape of the report that the step cell takes from the network, if any."""
        if self.report is None or self.in_model:
            return None
        return (len(REPORT),) if self.report == PREFERENCE else (2, len(self.sources))

    def put_into(self, config: MindFormerConfig) -> None:
        """Says to MindFormers what it has to know before it builds anything.

        Args:
            config: the run's `MindFormerConfig`, changed in place.
        """
        config.model.model_config.loss_form = self.loss_form
        if self.loss_form == "sums":
            config.calculate_per_token_loss = True
        if not is_parallel():
            # MindFormers accumulates in semi-auto parallel only and would silently not do it here: a batch is as large
            # as all its parts together, and the step cell takes it apart
            config.runner_config.gradient_accumulation_steps = 1
            config.runner_config.batch_size *= self.micro_batches

    def cell(self, name: str) -> dict:
        """Entries of the section `runner_wrapper` that the step cell is built from.

        Args:
            name: type of the cell that the YAML or MindFormers wants.
        """
        if not self.own_cell:
            return {"type": portable_wrapper(name)}
        return {"type": OWN_CELL, "micro_batches": self.micro_batches, "labels_column": self.labels_column,
                "report_shape": self.report_shape}


def plan_step(config: MindFormerConfig) -> StepPlan:
    """The plan of a run's steps.

    Args:
        config: the run's `MindFormerConfig`.

    Raises:
        ConfigError: for preference pairs in micro batches of a parallel step, whose report MindFormers' accumulating
            step does not take, and for what works in stand-alone runs only.
    """
    columns = list(config.train_dataset.input_columns or BATCH_COLUMNS)
    accumulated = config.runner_config.gradient_accumulation_steps or 1
    averages = config.runner_wrapper.get("ema_decay") is not None
    preference = config.model.arch.type == "IXC25ForPreference"
    report = PREFERENCE if preference else SOURCES if SOURCE_COLUMN in columns else None
    loss_form, micro_batches, parallel = "mean", accumulated, is_parallel()
    if report == SOURCES:
        loss_form = "sources"
    if parallel:
        micro_batches = 1
        if accumulated > 1 or (config.parallel_config.pipeline_stage or 1) > 1:
            if preference:
                raise ConfigError(f"runner_config.gradient_accumulation_steps is {accumulated}, but preference pairs "
                                  "are not accumulated in parallel runs; raise batch_size or data_parallel instead.")
            loss_form = "sums"
    own_cell = micro_batches > 1 or averages or report is not None
    if parallel and (averages or report == SOURCES):
        raise ConfigError("runner_wrapper.ema_decay and the column source work in stand-alone runs only.")
    return StepPlan(loss_form, report, micro_batches, own_cell,
                    None if preference or not own_cell else columns.index("labels"), parallel and preference)
