"""What a run writes down of every step, and when it has to stop."""
from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.trainer.base_trainer import BaseTrainer
from mindspore.dataset import GeneratorDataset
from mindspore.train.callback import Callback, RunContext

from mindformers_ixc import interruption, terminal
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.data.batch import REFERENCE_COLUMN
from mindformers_ixc.device import group_size, has_loss, reports_loss
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.files import METRICS_FILE, read_metrics, write_whole
from mindformers_ixc.models.report import take_report
from mindformers_ixc.parameters import part_of
from mindformers_ixc.preference_options import needs_reference, preference_options
from mindformers_ixc.sections import is_whole
from mindformers_ixc.training.averaging import averages_of
from mindformers_ixc.training.progress import Progress
from mindformers_ixc.training.spikes import SpikeWatch
from mindformers_ixc.training.step import ENTRIES, GROUPS, PREFERENCE, StepPlan
from mindformers_ixc.training.stopping import Stopping
from mindformers_ixc.training.tensorboard import TENSORBOARD_FOLDER, ScalarFile
from mindformers_ixc.training.throughput import Throughput, TimeLeft, scalars, work_of
from mindformers_ixc.training_options import spike_options

logger = logging.getLogger(__name__)


class TrainingLog(Callback):
    """Writes `metrics.jsonl`, one JSON object a step, and stops a run whose loss is no number.

    Each row has step, epoch, loss, learning_rate, grad_norm, overflow and, where steps may be skipped, `skipped`;
    `samples`, the numbers of the batch's samples; `seconds` of a step, `data_wait`, the share of them that went by
    before the batch was there (unknown with a data sink, where the device itself takes it), `seconds_left` of the run,
    `samples_per_second`, and what `throughput.Throughput` gives; with sources `sources`: loss and labelled tokens of
    each, and `tokens` of all; for preference pairs and groups of answers their report. Some of it is printed as a line,
    and all of it may be drawn in TensorBoard.

    Args:
        folder: the run's.
        on_error: `stop` or `continue`, when a row cannot be written: the YAML's `on_save_error`.
        device_tflops: peak of a device, 10^12 operations a second; 0 if unknown.
        tensorboard: whether the numbers go to `<folder>/tensorboard` too.
        print_every: steps between two lines at most, where there is no bar.
        skip_spikes: options of `SpikeWatch`, where steps may be skipped; rows say then whether they were (`skipped`).

    Attributes:
        stopped_after: the step after which the run stopped because it was asked to, else `None`.
        step_end: `StepEnd`, which has to be the last callback of the run.
        watchers: are told every row that is written.
        header: gives what is shown before the first step.
        next_step: the step that is being made, counted from 0 over the whole run.
    """

    def __init__(self, folder: str | os.PathLike, on_error: str = "stop", device_tflops: float = 0.0,
                 tensorboard: bool = False, print_every: int = 1, skip_spikes: dict | None = None):
        self.path, self.on_error = Path(folder) / METRICS_FILE, on_error
        self.device_tflops, self.tensorboard, self.print_every = device_tflops, tensorboard, print_every
        self.spikes = None if skip_spikes is None else SpikeWatch(**skip_spikes)
        self.average: dict = {}
        self.stopping = Stopping(Path(folder))
        self.stopped_after: int | None = None
        self.lost_rows = False
        self.step_end = StepEnd()
        self.scalars: ScalarFile | None = None
        self.watchers: list[Callable[[dict], None]] = []
        self.header: Callable[[], str] | None = None
        self.first_step = contextlib.ExitStack()       # closed when it has been taken

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
        self.last = self.start
        self.total = steps_of(self.trainer.config.runner_config, self.dataset)
        self.average = averages_of(run_context.original_args().train_network)
        self.writes = reports_loss()
        if self.writes:
            rows = {row["step"]: row for row in read_metrics(self.path) if _is_step(row)} if self.start else {}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows)
                                           if step <= self.start), sync=True)
            if self.spikes is not None:
                for step in sorted(step for step in rows if step <= self.start):
                    self.spikes.add(rows[step])
                self.spikes.set_limits(run_context.original_args().train_network)
                if self.spikes.is_too_wide(self.total):
                    logger.warning(f"skip_spikes.window is {self.spikes.window}, and the run has {self.total} steps: "
                                   "its medians, and the limits made of them, never begin. Lower it.")
            self.throughput, self.time_left = self._throughput(), TimeLeft()
            if self.tensorboard:
                self._open_scalars(run_context.original_args())
            self.progress = Progress(self.total, self.start, self.print_every)
            if self.header is not None:
                terminal.current.note(self.header())
            if self.start < self.total:
                self.first_step.enter_context(terminal.current.doing("Compiling the first step", at_once=True))
        self.stopping.begin()
        self.step_end.mark()

    def _throughput(self) -> Throughput | None:
        """What numbers of operations rest on; none for a model that is not this package's, and for sampled answers."""
        model = self.trainer.trained_model
        config = getattr(model, "config", None)
        if not isinstance(config, ModelConfig) or self.plan.report == GROUPS:
            return None
        trained = {str(part_of(parameter.name)) for parameter in model.trainable_params()}
        return Throughput(config, trained, group_size(), self.device_tflops, self._reference(config))

    def _reference(self, config: ModelConfig) -> str | None:
        """The task LoRA which the reference that a step computes does without, if it computes one."""
        if self.plan.report != PREFERENCE or not needs_reference(config.preference) \
                or REFERENCE_COLUMN in self.dataset.conversations.columns:
            return None
        return preference_options(config.preference)["task"]

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Notes when the batch was there, and of which step it is."""
        self.began = time.perf_counter()
        self.next_step = self.start + run_context.original_args().cur_step_num - 1

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Writes the row of the step that has ended.

        Raises:
            TrainingError: when the loss or the gradients are not finite.
        """
        self.first_step.close()
        parameters = run_context.original_args()
        loss, overflow, _, rate, norm = parameters.net_outputs
        step = self.start + parameters.cur_step_num
        if step >= self.total and not parameters.dataset_sink_mode:
            run_context.request_stop()     # an iteration over the data that began inside an epoch goes on too far
        row = {"step": step, "epoch": (step - 1) // parameters.batch_num + 1, "loss": _number(loss),
               "learning_rate": _number(rate), "overflow": bool(np.any(overflow.asnumpy()))}
        if norm is not None:
            row["grad_norm"] = _number(norm)
        if self.spikes is not None:
            row["skipped"] = bool(_number(parameters.train_network.was_spike))
        if self.writes:
            row.update(self._speed(step, parameters.dataset_sink_mode))
        if self.plan.report:
            # a parallel run has no cell around the model that adds it up
            holder = self.trainer.trained_model if self.plan.in_model else parameters.train_network
            row.update(self._report(take_report(holder.train_report)))
        what = not_finite(parameters.net_outputs)
        if self.writes:
            self._record({**row, "loss": None} if what == "loss" else row, parameters)
        if what:
            parameters.run_failed = True
            raise TrainingError(f"Step {step}: the {what} of this batch is not finite (its samples: "
                                f"{self.describe(step - 1)}). The step was not taken and no checkpoint was written; "
                                "the last one is good. Look at those samples or lower the learning rate, then go on "
                                "with resume_training.")
        if self.spikes is not None:
            self._watch_spikes(self.spikes, row, parameters)
        if step < self.total and self.stopping.is_due(step):
            self.stopped_after = step
            run_context.request_stop()
        self.step_end.mark()

    def _watch_spikes(self, spikes: SpikeWatch, row: dict, parameters: Any) -> None:
        """Says of a step that it was skipped, and sets the limits of the next one.

        Raises:
            TrainingError: when too many in a row were skipped.
        """
        step = row["step"]
        if row["skipped"]:
            samples = self.describe(step - 1)
            terminal.current.say(f"Step {step} was skipped: {spikes.why(row)} (its samples: {samples}).")
        spikes.add(row)
        if spikes.in_a_row > spikes.most_in_a_row:
            parameters.run_failed = True
            raise TrainingError(f"Step {step}: {spikes.in_a_row} steps in a row were skipped as spikes, more than "
                                f"skip_spikes.most_in_a_row {spikes.most_in_a_row}. The weights are those before them "
                                "and the last checkpoint is good; raise the limits or lower the learning rate, then go "
                                "on with resume_training.")
        spikes.set_limits(parameters.train_network)

    def on_train_end(self, run_context: RunContext) -> None:
        """Notes that what follows is written whole before the process may end."""
        interruption.current.phase = "ending"
        terminal.current.rest()
        self._close_scalars()

    def _speed(self, step: int, sinks: bool) -> dict:
        """How fast the steps were that have ended since the last row, what they were fed, and what is left."""
        seconds = time.perf_counter() - (self.began if sinks else self.step_end.since)
        steps, self.last = range(self.last, step), step
        works = [work_of(self.dataset, number) for number in steps]
        samples = [index for work in works for index in work.samples]
        each = seconds / len(steps)
        found: dict = {"samples": samples, "seconds": each, "samples_per_second": len(samples) / seconds}
        if not sinks:
            found["data_wait"] = (self.began - self.step_end.since) / seconds
        if self.throughput is not None:
            found.update(self.throughput.of(works, seconds))
        found["seconds_left"] = self.time_left.after(each, self.total - step)
        return found

    def _record(self, row: dict, parameters: Any) -> None:
        """Writes a row down wherever it belongs."""
        step = row["step"]
        self._append(json.dumps(row) + "\n", parameters)
        if self.scalars is not None:
            try:
                self.scalars.write(step, scalars(row))
            except OSError as error:
                self._lose_scalars(error, parameters)
        for watch in self.watchers:
            watch(row)
        self.progress.show(row)

    def _open_scalars(self, parameters: Any) -> None:
        try:
            self.scalars = ScalarFile(self.path.parent / TENSORBOARD_FOLDER, self.start + 1)
        except OSError as error:
            self._lose_scalars(error, parameters)

    def _close_scalars(self) -> None:
        if self.scalars is not None:
            with contextlib.suppress(OSError):      # of what was written before
                self.scalars.close()
            self.scalars = None

    def _lose_scalars(self, error: OSError, parameters: Any) -> None:
        """Of a file that could not be written whole TensorBoard reads no further, so it is given up."""
        self._close_scalars()
        sentence = (f"{self.path.parent / TENSORBOARD_FOLDER}: the numbers of a step could not be written "
                    f"({error.strerror or error})")
        if self.on_error == "stop":
            parameters.run_failed = True
            raise TrainingError(f"{sentence}. Make room, then go on with resume_training.") from error
        terminal.current.say(f"{sentence}; the run goes on without TensorBoard, as on_save_error says.")

    def _append(self, text: str, parameters: Any) -> None:
        """Appends a row; of one that cannot be written whole nothing stays."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            sentence = f"{self.path}: the row of a step could not be written ({error.strerror or error})"
            if self.on_error == "stop":
                parameters.run_failed = True
                raise TrainingError(f"{sentence}. Make room, then go on with resume_training.") from error
            if not self.lost_rows:
                terminal.current.say(f"{sentence}; the run goes on without such rows, as on_save_error says.")
            self.lost_rows = True

    def _report(self, report: np.ndarray) -> dict:
        names = ENTRIES.get(self.plan.report or "")
        if names is not None:
            values = report[:-1] / report[-1]
            return dict(zip(names, (float(value) for value in values)))
        by_source = {name: {"loss": float(total / count), "tokens": int(count)}
                     for name, total, count in zip(self.plan.sources, *report) if count}
        return {"sources": by_source, "tokens": int(report[1].sum())}


class StepEnd(Callback):
    """Knows since when a run has been waiting for its next batch: as the last callback, since all others are done.

    Attributes:
        since: seconds of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """The wait for the next batch begins now."""
        self.since = time.perf_counter()

    def on_train_begin(self, run_context: RunContext) -> None:
        """Begins the wait for the first batch."""
        self.mark()

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Begins the wait for the next batch."""
        self.mark()


def log_options(config: Any) -> dict:
    """Arguments of `TrainingLog` that stand in a run's YAML.

    Args:
        config: the run's `MindFormerConfig`. A section `tensorboard` is MindFormers' own.
    """
    monitor: dict = next((one for one in config.get("callbacks") or () if one.get("type") == "MFLossMonitor"), {})
    every, spikes = monitor.get("per_print_times"), config.get("skip_spikes")
    return {"on_error": config.get("on_save_error") or "stop", "device_tflops": config.get("device_tflops") or 0.0,
            "tensorboard": config.get("tensorboard") is True, "print_every": every if is_whole(every, 1) else 1,
            "skip_spikes": None if spikes is None else spike_options(dict(spikes))}


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
