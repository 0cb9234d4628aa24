"""The callback that sends the numbers of a run to an experiment tracker: Weights & Biases, SwanLab or MLflow."""
from __future__ import annotations

from typing import Any

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.train.callback import Callback, RunContext

from mindformers_ixc import terminal
from mindformers_ixc.device import reports_loss
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.trackers import Tracker, TrackerOptions, in_one_line, open_tracker, plain
from mindformers_ixc.training.log import TrainingLog
from mindformers_ixc.training.throughput import scalars


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class IXC25Tracker(Callback):
    """Sends every row of the log to a tracker, and every evaluation as `evaluation/NAME`.

    A tracker that fails while the run trains is left out from then on: `metrics.jsonl` has all of it.

    Args:
        tracker: `wandb`, `swanlab` or `mlflow`.
        project: under which it files the run.
        name: of the run; by default that of the output folder.
        mode: `online`, or `offline`: everything stays in files in the output folder.
        every: steps between two rows.
        options: further arguments of the tracker's own function that begins a run.

    Raises:
        ConfigError: when the run is not `IXC25Trainer`'s, whose log it reads.
        TrainingError: before the first step, when the tracker cannot begin.
    """

    def __init__(self, tracker: str, project: str = TrackerOptions.project, name: str | None = None,
                 mode: str = TrackerOptions.mode, every: int = TrackerOptions.every, options: dict | None = None):
        super().__init__()
        self.options = TrackerOptions(tracker, project, name, mode, every, plain(options or {}))
        self.tracker: Tracker | None = None

    def on_train_begin(self, run_context: RunContext) -> None:
        """Begins the run there; of several ranks only the one that writes the log does."""
        if not reports_loss():
            return
        callbacks = run_context.original_args().list_callback
        log = next((one for one in callbacks if isinstance(one, TrainingLog)), None)
        if log is None:
            raise ConfigError(f"{type(self).__name__} reads the log of IXC25Trainer; set trainer.type to that, or take "
                              "the callback out.")
        self.total = log.total
        self.tracker = open_tracker(self.options, log.path.parent, log.trainer.config, goes_on=bool(log.start))
        log.watchers.append(self._step)
        for callback in callbacks:
            if callback is not log and hasattr(callback, "watchers"):
                callback.watchers.append(self._evaluation)
        terminal.current.note(f"{self.options.tracker} tracks the run {self.tracker.where}.")

    def _step(self, row: dict[str, Any]) -> None:
        if row["step"] % self.options.every == 0 or row["step"] == self.total:
            self._write(row["step"], dict(scalars(row)))

    def _evaluation(self, row: dict[str, Any]) -> None:
        self._write(row["step"], {f"evaluation/{name}": value for name, value in scalars(row)})

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.write(step, values)
        except Exception as error:      # each tracker has errors of its own, and none is worth the run
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        terminal.current.say(f"{self.options.tracker} cannot take what the run sends it ({in_one_line(error)}); the "
                             "run goes on without it, and metrics.jsonl has all rows.")
        self.tracker = None

    def __exit__(self, *error: Any) -> None:
        """Ends the run there, when all callbacks are done or the run has failed."""
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            try:
                tracker.close(failed=error[0] is not None)
            except Exception as failure:      # as above
                self._lose(failure)
