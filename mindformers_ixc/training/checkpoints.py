"""Checkpoints that a crash cannot spoil, and resuming from them.

MindFormers' monitor writes a checkpoint under its final name and deletes the oldest one before it writes the next. A
run that dies in between leaves a file cut short, or with one kept none at all. Here a checkpoint takes its name only
once it is whole and on the disk, and older ones go afterwards.
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers.core.callback.callback import CheckpointMonitor
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.train.callback import RunContext
from safetensors import SafetensorError

from mindformers_ixc import terminal
from mindformers_ixc.device import group_size, is_parallel
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.files import sync_folder
from mindformers_ixc.training.log import not_finite
from mindformers_ixc.training.resume import checkpoints_in, note_checkpoint, step_of

# MindFormers' name of the callback that writes checkpoints.
MONITOR = "CheckpointMonitor"


class SafeCheckpointMonitor(CheckpointMonitor):
    """`CheckpointMonitor` whose files are whole or absent; arguments as there.

    Files are numbered by the step in the epoch, also in a run resumed inside one. Beside each lies its digest. In a
    parallel run older ones go a step later than in others: only then have all ranks written theirs.
    """

    on_error = "stop"              # the YAML's `on_save_error`
    _newest: tuple[int, Path] | None = None      # step in this process, and file, of what was saved last
    _target: Path                  # the file that was written last
    _append_step_num: int          # steps of the epoch that were done before the run was resumed
    _older_to_go = False           # whether older ones wait for the other ranks to have written theirs
    saved: Saved | None = None     # told of what is written

    def save_checkpoint(self, cb_params: Any) -> None:
        """Saves a checkpoint, then lets go of those above `keep_checkpoint_max`; none of a step that failed.

        Raises:
            TrainingError: when it cannot be written and `on_save_error` is `stop`.
        """
        if not_finite(cb_params.net_outputs):
            return     # the run ends at this step
        keep = self._config.keep_checkpoint_max
        self._config._keep_checkpoint_max = 0                  # nothing is deleted before the new one is there
        done, here, epoch = self._append_step_num, cb_params.cur_step_num, cb_params.cur_epoch_num
        # a run resumed inside an epoch counts from there; names and counters are to count from the start
        cb_params.cur_step_num, self._append_step_num = done + here, 0
        cb_params.cur_epoch_num = (done + here - 1) // cb_params.batch_num + 1
        try:
            super().save_checkpoint(cb_params)
        except (OSError, RuntimeError, SafetensorError) as error:
            self._newest = None
            self._not_saved(error, done + here, cb_params)
            return
        finally:
            self._config._keep_checkpoint_max = keep
            cb_params.cur_step_num, cb_params.cur_epoch_num, self._append_step_num = here, epoch, done
            self._last_triggered_step = here
        self._newest = here, self._target
        self._older_to_go = True
        if not is_parallel():
            self._delete_older()

    def _not_saved(self, error: Exception, step: int, cb_params: Any) -> None:
        """Says that a checkpoint could not be written, and ends the run unless it is to go on."""
        folder = Path(self._directory)
        for partial in folder.glob("unfinished_*"):
            with suppress(OSError):
                partial.unlink()
        older = checkpoints_in(folder)
        kept = f"the last one is {older[-1]}" if older else "there is none before it"
        sentence = (f"Step {step}: the checkpoint could not be written to {folder} "
                    f"({' '.join(str(error).split())[:300]}); {kept}.")
        if self.on_error == "stop":
            cb_params.run_failed = True
            raise TrainingError(f"{sentence} Make room, then go on with resume_training; on_save_error: continue "
                                "would train on without it.") from error
        terminal.current.say(f"{sentence} The run goes on without it, as on_save_error says.")

    def remove_redundancy(self, network, cur_file, append_dict, train_network) -> None:
        """What MindFormers calls to write: here first under a name that nobody looks for."""
        self._target = target = Path(cur_file)
        unfinished = target.with_name(f"unfinished_{target.name}")
        super().remove_redundancy(network, str(unfinished), append_dict, train_network)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        note_checkpoint(target, unfinished)
        os.replace(unfinished, target)
        sync_folder(target.parent)

    def _delete_older(self) -> None:
        """Deletes what is older than the newest checkpoints that every rank has whose folder can be seen here."""
        keep = self._config.keep_checkpoint_max
        own, self._older_to_go = checkpoints_in(self._directory), False
        folders = [Path(self._directory).with_name(f"rank_{rank}") for rank in range(group_size())]
        steps = [{step_of(path) for path in checkpoints_in(folder)} for folder in folders if folder.is_dir()]
        shared = sorted({step_of(path) for path in own}.intersection(*(steps if is_parallel() else [])))
        for old in own[:-keep] if keep and shared else []:
            if step_of(old) < shared[-keep:][0]:
                os.chmod(old, 0o600)
                old.unlink()

    def step_end(self, run_context: RunContext) -> None:
        """Saves when it is time; in a parallel run older checkpoints go now, when every rank has begun this step."""
        if self._older_to_go:
            self._delete_older()
        super().step_end(run_context)

    def end(self, run_context: RunContext) -> None:
        """Saves at the end of a run that went well; MindSpore calls this after a crash as well."""
        if "run_failed" in run_context.original_args():
            return
        super().end(run_context)
        if self.saved is not None and self._newest is not None:
            step, path = self._newest
            if step == run_context.original_args().cur_step_num:
                self.saved.final = path


@dataclass
class Saved:
    """What a run has saved.

    Attributes:
        final: this rank's checkpoint of the last step; `None` if there is none.
    """

    final: Path | None = None


@contextmanager
def safe_checkpoints(on_error: str = "stop") -> Iterator[Saved]:
    """Makes the YAML's `CheckpointMonitor` the safe one for a while.

    MindFormers' trainer hands its settings to callbacks of that type's name only, so the name has to stay; other
    trainers of the process get MindFormers' own.

    Args:
        on_error: `stop` or `continue`, when a checkpoint cannot be written.

    Yields:
        What the run has saved, known when it has ended.
    """
    before = MindFormerRegister.get_cls(MindFormerModuleType.CALLBACK, MONITOR)
    SafeCheckpointMonitor.on_error, SafeCheckpointMonitor.saved = on_error, Saved()
    MindFormerRegister.register_cls(SafeCheckpointMonitor, MindFormerModuleType.CALLBACK, alias=MONITOR)
    try:
        yield SafeCheckpointMonitor.saved
    finally:
        MindFormerRegister.register_cls(before, MindFormerModuleType.CALLBACK, alias=MONITOR)
