"""What a run writes down of every step, and when it has to stop."""
from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.trainer.base_trainer import BaseTrainer
from mindspore.dataset import GeneratorDataset
from mindspore.train.callback import Callback, RunContext

from mindformers_ixc import interruption
from mindformers_ixc.device import has_loss, reports_loss
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.files import METRICS_FILE, read_metrics, write_whole
from mindformers_ixc.models.preference import REPORT
from mindformers_ixc.models.report import take_report
from mindformers_ixc.training.averaging import averages_of
from mindformers_ixc.training.step import StepPlan
from mindformers_ixc.training.stopping import Stopping


class TrainingLog(Callback):
    """Writes `metrics.jsonl`, one JSON object a step, and stops a run whose loss is no number.

    Each row has step, epoch, loss, learning_rate, grad_norm, overflow, seconds, samples_per_second, and `samples`, the
    batch's rows of the data set; with sources `sources`: loss and labelled tokens of each, and `tokens` of all; for
    preference pairs the rewards.

    Args:
        folder: the run's.
        on_error: `stop` or `continue`, when a row cannot be written: the YAML's `on_save_error`.

    Attributes:
        stopped_after: the step after which the run stopped because it was asked to, else `None`.
    """

    def __init__(self, folder: str | os.PathLike, on_error: str = "stop"):
        self.path, self.on_error = Path(folder) / METRICS_FILE, on_error
        self.average: dict = {}
        self.stopping = Stopping(Path(folder))
        self.stopped_after: int | None = None
        self.lost_rows = False

    def bind(self, dataset: GeneratorDataset, plan: StepPlan, trainer: BaseTrainer) -> None:
        """Tells what is known only once the data are there.

        Args:
            dataset: as `mindformers_ixc.training.datasets.batched` made it.
            plan: `StepPlan`; says what a step reports.
            trainer: `IXC25Trainer`; gives the configuration and the model when the run starts.
        """
        self.dataset, self.plan, self.trainer = dataset, plan, trainer

    def describe(self, step: int) -> str:
        """Names the samples of a step, counted from 0."""
        indices = self.dataset.plan_sampler.batch(step)
        more = f" and {len(indices) - 8} more" if len(indices) > 8 else ""
        return "; ".join(self.dataset.conversations.describe(index) for index in indices[:8]) + more

    def on_train_begin(self, run_context: RunContext) -> None:
        """Drops rows of steps that will be done again."""
        self.start = self.trainer.config.runner_config.initial_step or 0
        self.batch_size = self.dataset.get_batch_size() * self.dataset.plan_sampler.ranks
        self.total = steps_of(self.trainer.config.runner_config, self.dataset)
        self.average = averages_of(run_context.original_args().train_network)
        self.writes = reports_loss()
        if self.writes:
            rows = {row["step"]: row for row in read_metrics(self.path) if _is_step(row)} if self.start else {}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)
                                           if step <= self.start), sync=True)
        self.stopping.begin()

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Notes when the step began, for its `seconds`."""
        self.began = time.perf_counter()

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Writes the row of the step that has ended.

        Raises:
            TrainingError: when the loss or the gradients are not finite.
        """
        parameters = run_context.original_args()
        loss, overflow, _, rate, norm = parameters.net_outputs
        step = self.start + parameters.cur_step_num
        if step >= self.total and not parameters.dataset_sink_mode:
            run_context.request_stop()     # an iteration over the data that began inside an epoch goes on too far
        row = {"step": step, "epoch": (step - 1) // parameters.batch_num + 1, "loss": _number(loss),
               "learning_rate": _number(rate), "overflow": bool(np.any(overflow.asnumpy())),
               "samples": [int(index) for index in self.dataset.plan_sampler.batch(step - 1)]}
        if norm is not None:
            row["grad_norm"] = _number(norm)
        row["seconds"] = time.perf_counter() - self.began
        row["samples_per_second"] = self.batch_size / row["seconds"]
        if self.plan.report:
            # a parallel run has no cell around the model that adds it up
            holder = self.trainer.trained_model if self.plan.in_model else parameters.train_network
            row.update(self._report(take_report(holder.train_report)))
        what = not_finite(parameters.net_outputs)
        if self.writes:
            self._append(json.dumps({**row, "loss": None} if what == "loss" else row) + "\n", parameters)
        if what:
            parameters.run_failed = True
            raise TrainingError(f"Step {step}: the {what} of this batch is not finite (its samples: "
                                f"{self.describe(step - 1)}). The step was not taken and no checkpoint was written; "
                                "the last one is good. Look at those samples or lower the learning rate, then go on "
                                "with resume_training.")
        if step < self.total and self.stopping.is_due(step):
            self.stopped_after = step
            run_context.request_stop()

    def on_train_end(self, run_context: RunContext) -> None:
        """Notes that what follows is written whole before the process may end."""
        interruption.current.phase = "ending"

    def _append(self, line: str, parameters: Any) -> None:
        """Appends a row; of one that cannot be written whole nothing stays."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(line.encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            sentence = f"{self.path}: the row of a step could not be written ({error.strerror or error})"
            if self.on_error == "stop":
                parameters.run_failed = True
                raise TrainingError(f"{sentence}. Make room, then go on with resume_training.") from error
            if not self.lost_rows:
                print(f"{sentence}; the run goes on without such rows, as on_save_error says.", file=sys.stderr,
                      flush=True)
            self.lost_rows = True

    def _report(self, report: np.ndarray) -> dict:
        if self.plan.report == "preference":
            values = report[:-1] / report[-1]
            return dict(zip(REPORT, (float(value) for value in values)))
        by_source = {name: {"loss": float(total / count), "tokens": int(count)}
                     for name, total, count in zip(self.plan.sources, *report) if count}
        return {"sources": by_source, "tokens": int(report[1].sum())}


def steps_of(runner: Any, dataset: GeneratorDataset) -> int:
    """Steps of a whole run; with a data sink MindFormers counts its rounds in `epochs` and keeps the YAML's number."""
    return (getattr(runner, "origin_epochs", None) or runner.epochs) * dataset.get_dataset_size()


def _is_step(row: dict) -> bool:
    return isinstance(row.get("step"), int)


def not_finite(outputs: tuple) -> str | None:
    """What of a step is no number, "loss" or "gradient", if anything; the run must not go on then.

    Args:
        outputs: of the train-step cell. (A gradient beyond float16's range under a loss scale is no failure.)
    """
    loss, overflow, _, _, norm = outputs
    if has_loss() and not math.isfinite(_number(loss)):
        return "loss"
    if norm is not None and np.any(overflow.asnumpy()) and not math.isfinite(_number(norm)):
        return "gradient"
    return None


def _number(value: Any) -> float:
    return float(np.mean(value.asnumpy() if hasattr(value, "asnumpy") else value))
