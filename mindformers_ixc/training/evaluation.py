"""Evaluation on held-out conversations while a run trains, and keeping the best model."""
from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mindformers.tools.register import MindFormerConfig
from mindformers.tools.utils import get_output_root_path
from mindspore.dataset import GeneratorDataset
from mindspore.mint.distributed import barrier
from mindspore.train.callback import Callback, RunContext

from mindformers_ixc import terminal
from mindformers_ixc.data.batch import SCORE_COLUMN
from mindformers_ixc.device import is_parallel, measuring, reports_loss
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.files import ANSWERS_FILE, EVALUATIONS_FILE, read_metrics, write_whole
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.cells import of_whole_batches, row_parts
from mindformers_ixc.generation.store import Store
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.reward_options import reward_options
from mindformers_ixc.scores import SCORES, score_answers
from mindformers_ixc.training.early_stopping import AlreadyOver, standing, why_over
from mindformers_ixc.training.held_out import HeldOut, HeldOutPairs, MeanLoss, PairScores
from mindformers_ixc.training.log import steps_of
from mindformers_ixc.training.progress import measured
from mindformers_ixc.training_options import evaluation_options

logger = logging.getLogger(__name__)


class Training(Protocol):
    """What a measurement needs of `IXC25Trainer`, which makes `Evaluation` and so cannot be imported here."""

    config: MindFormerConfig
    trained_model: IXC25Model
    train_dataset: GeneratorDataset

    def save_directory(self, name: str) -> None: ...


class Evaluation(Callback):
    """Measures every `every` steps and at the end, into `evaluations.jsonl`; keeps the best model in `best`.

    Some of the answers that were measured go to `answers.jsonl`, a row a measurement.

    A measurement that was due at the step from which a run is resumed, and that the earlier run did not come to, is
    made up first. So the rows of a resumed run are those of one that was not interrupted.

    With `early_stopping` it ends the run when too many measurements in a row were no better; that follows from the rows
    alone, so a resumed run ends where the other would have.

    Args:
        trainer: `IXC25Trainer`; gives the model and writes directories.
        section: `evaluation` of the YAML.
        data: `train_dataset` of the YAML.

    Raises:
        ConfigError: see `training_options.evaluation_options`.
        TrainingError: while training, when a measurement cannot be written and `on_save_error` is `stop`.
        AlreadyOver: when a run is resumed that has ended early.

    Attributes:
        why_over: why the run has ended early; `None` otherwise.
    """

    def __init__(self, trainer: Training, section: dict, data: MindFormerConfig):
        self.is_scored = SCORE_COLUMN in (data.get("input_columns") or ())
        self.trainer, self.options = trainer, evaluation_options(section, self.is_scored)
        self.held_out = (HeldOutPairs if self.is_scored else HeldOut)(data, self.options)
        self.path = Path(get_output_root_path()) / EVALUATIONS_FILE
        self.graph: Any = None       # `MeanLoss`, or `PairScores` of a reward model
        self.steps = 0       # of the whole run, once it has begun
        # what was measured so far, one row a step: in a parallel run every rank measures, knows all rows and so
        # decides alike, and one of them writes
        self.rows: list[dict] = []
        self.answers: list[dict] = []      # the answers that are written down, one row a step
        self.said: list[dict] = []         # those of the measurement that is being made
        self.watchers: list[Callable[[dict], None]] = []      # are told every row
        self.why_over: str | None = None

    def on_train_begin(self, run_context: RunContext) -> None:
        """Drops rows of steps that will be done again, and makes up what the step gone on from lacks."""
        runner = self.trainer.config.runner_config
        start = runner.initial_step or 0
        self.steps = steps_of(runner, self.trainer.train_dataset)
        if reports_loss():
            self._say_if_never_over()
        self.rows, self.answers = ([row for row in self._read(path) if row["step"] <= start] if start else []
                                   for path in (self.path, self.answers_path))
        has_best = (self.path.parent / "best").is_dir()
        if is_parallel():
            barrier()        # all have read what is there before one of them writes
        if (self.path.exists() or self.answers_path.exists()) and reports_loss():
            self._write()
        if start and self._is_due(start):
            if not self._is_measured(start):
                self._measure(start)
            elif self._is_best(self.rows) and not has_best:
                self.trainer.save_directory("best")
            if start < self.steps and self._is_over():
                run_context.original_args().run_failed = True      # there is no step of which to save anything
                raise AlreadyOver

    def _say_if_never_over(self) -> None:
        """Says of early stopping that the run has too few measurements for it to act."""
        section, every = self.options["early_stopping"], self.options["every"]
        # the first measurement is the best so far; the last one ends a run that is over anyway
        if section is not None and (soonest := (section["patience"] + 1) * every) >= self.steps:
            logger.warning(f"evaluation.early_stopping ends a run after step {soonest} at the soonest (patience "
                           f"{section['patience']}, every {every}), and this one has {self.steps} steps: it never "
                           "acts. Lower one of them.")

    def _is_due(self, step: int) -> bool:
        return step == self.steps or (bool(self.options["every"]) and step % self.options["every"] == 0)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Measures when it is time."""
        done = self._done(run_context)
        if done < self.steps and self._is_due(done):
            self._measure(done)
            if self._is_over():
                run_context.request_stop()

    def _is_over(self) -> bool:
        """Whether the measurements so far end the run."""
        if self.options["early_stopping"] is not None:
            self.why_over = why_over(self.rows, **self.options["early_stopping"])
        return self.why_over is not None

    def on_train_end(self, run_context: RunContext) -> None:
        """Measures the final model; not one that was stopped on the way."""
        done = self._done(run_context)
        if done >= self.steps and not self._is_measured(done):
            self._measure(done)

    def _done(self, run_context: RunContext) -> int:
        initial = self.trainer.config.runner_config.initial_step or 0
        return initial + run_context.original_args().cur_step_num

    @property
    def answers_path(self) -> Path:
        """Where answers are written down."""
        return self.path.with_name(ANSWERS_FILE)

    @staticmethod
    def _read(path: Path) -> list[dict]:
        """What an earlier run has measured, one row a step, in their order."""
        rows = {row["step"]: row for row in read_metrics(path) if isinstance(row.get("step"), int)}
        return [rows[step] for step in sorted(rows)]

    def _write(self) -> None:
        # the measurement last: without its row it is made again, and then with its answers
        if self.answers or self.answers_path.exists():
            write_whole(self.answers_path, "".join(json.dumps(row) + "\n" for row in self.answers), sync=True)
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows), sync=True)

    def _is_measured(self, step: int) -> bool:
        return any(row["step"] == step for row in self.rows)

    def _measure(self, step: int) -> None:
        row: dict[str, float] = {"step": step}
        with measuring(), terminal.current.doing("Evaluating"):
            row.update(self._values(self.trainer.trained_model))
        self.rows = [old for old in self.rows if old["step"] < step] + [row]
        self.answers = [old for old in self.answers if old["step"] < step]
        self.answers += [{"step": step, "answers": self.said}] if self.said else []
        try:
            if self._is_best(self.rows):      # before the row: a run that is killed in between measures again
                self.trainer.save_directory("best")
            if reports_loss():
                self._write()
        except OSError as error:
            if not is_parallel():       # there the other ranks, which know nothing of it, must go on deciding alike
                self.rows.pop()
                self.answers = [old for old in self.answers if old["step"] < step]
            self._not_saved(error, step)
        for watch in self.watchers:
            watch(row)
        if reports_loss():
            terminal.current.note(measured(row, self.steps))

    def _values(self, model: IXC25Model) -> dict[str, float]:
        """Every metric that was asked for."""
        model.set_train(False)
        if self.graph is None:
            self.graph = (PairScores if self.is_scored else MeanLoss)(model)      # one cell, one graph
            if is_parallel():
                self.graph = of_whole_batches(self.graph, model.config)
                parts = row_parts(model.config)
                self.options["batch_size"] = -(-self.options["batch_size"] // parts) * parts
        if isinstance(self.held_out, HeldOutPairs):
            values = self.held_out.values(self.graph, self.options["metrics"], reward_options(model.config.reward))
        else:
            values = self._of_conversations(model)
        model.set_train(True)
        return values

    def _of_conversations(self, model: IXC25Model) -> dict[str, float]:
        """Metrics of a model that writes."""
        values, metrics = {}, self.options["metrics"]
        if "loss" in metrics:
            values["loss"] = self.held_out.loss(self.graph)
        if "shuffled_loss" in metrics:
            values["shuffled_loss"] = self.held_out.loss(self.graph, shuffled=True)
        scores = [metric for metric in metrics if metric in SCORES]
        if scores:
            answers, expected = self.held_out.answers(self._assistant(model))
            values.update(score_answers(answers, expected, scores))
            self.said = self.held_out.shown(answers)
            self._assistant(model).engine.caches.clear()      # memory that training needs
        return values

    def _not_saved(self, error: OSError, step: int) -> None:
        """Says that a measurement could not be written, and ends the run unless it is to go on."""
        sentence = (f"Step {step}: its evaluation could not be written to {self.path.parent} "
                    f"({error.strerror or error}); what was there before is kept.")
        if getattr(self.trainer.config, "on_save_error", None) != "continue":
            raise TrainingError(f"{sentence} Make room, then go on with resume_training.") from error
        terminal.current.say(f"{sentence} The run goes on without it, as on_save_error says.")

    def _assistant(self, model: IXC25Model):
        if not hasattr(self, "assistant"):
            # of weights that change nothing stays right, and training needs the memory
            self.assistant = Assistant(model, self.held_out.processor, Store(0))
        return self.assistant

    def _is_best(self, rows: list[dict]) -> bool:
        """Whether the last row is better than all before it by the metric that is kept, if one is."""
        name = self.options["keep_best"]
        if name is None:
            return False
        return standing(rows, name, 0.0).step == rows[-1]["step"]
