"""Checkpoints that a crash cannot spoil, and resuming from them.

MindFormers' monitor writes a checkpoint under its final name and deletes the oldest one before it writes the next. A
run that dies in between leaves a file cut short, or with one kept none at all. Here a checkpoint takes its name only
once it is whole and on the disk, and older ones go afterwards.
"""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindformers.core.callback.callback import CheckpointMonitor
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.train.callback import RunContext

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import write_whole
from mindformers_ixc.training.log import not_finite
from mindformers_ixc.training.relayout import joined, write_counters

logger = logging.getLogger(__name__)

# What a resumed run must share with the one it goes on with; the rest (callbacks, folders, workers) may change.
SAME_SECTIONS = ("seed", "train_dataset", "train_parts", "part_learning_rates", "model", "optimizer", "lr_schedule",
                 "runner_wrapper", "preference")
FREE_KEYS = {"num_parallel_workers", "python_multiprocessing", "prefetch_size", "numa_enable", "max_bad_share",
             "batch_size"}
RECORD = "run_config.json"

# MindFormers' name of the callback that writes checkpoints.
MONITOR = "CheckpointMonitor"

_NAME = re.compile(r"(?P<prefix>.+)_rank_(?P<rank>\d+)(_\d+)?-(?P<epoch>\d+)_(?P<step>\d+)\.(safetensors|ckpt)$")


class SafeCheckpointMonitor(CheckpointMonitor):
    """`CheckpointMonitor` whose files are whole or absent; arguments as there.

    Files are numbered by the step in the epoch, also in a run resumed inside one.
    """

    _append_step_num: int     # steps of the epoch that were done before the run was resumed

    def save_checkpoint(self, cb_params: Any) -> None:
        """Saves a checkpoint, then lets go of those above `keep_checkpoint_max`; none of a step that failed."""
        if not_finite(cb_params.net_outputs):
            return     # MindFormers calls this before the callback that ends the run
        keep = self._config.keep_checkpoint_max
        self._config._keep_checkpoint_max = 0                  # nothing is deleted before the new one is there
        done, here, epoch = self._append_step_num, cb_params.cur_step_num, cb_params.cur_epoch_num
        # a run resumed inside an epoch counts from there; names and counters are to count from the start
        cb_params.cur_step_num, self._append_step_num = done + here, 0
        cb_params.cur_epoch_num = (done + here - 1) // cb_params.batch_num + 1
        try:
            super().save_checkpoint(cb_params)
        finally:
            self._config._keep_checkpoint_max = keep
            cb_params.cur_step_num, cb_params.cur_epoch_num, self._append_step_num = here, epoch, done
        self._last_triggered_step = here
        for old in checkpoints_in(self._directory)[:-keep] if keep else []:
            os.chmod(old, 0o600)
            old.unlink()

    def remove_redundancy(self, network, cur_file, append_dict, train_network) -> None:
        """What MindFormers calls to write: here first under a name that nobody looks for."""
        target = Path(cur_file)
        unfinished = target.with_name(f"unfinished_{target.name}")
        super().remove_redundancy(network, str(unfinished), append_dict, train_network)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, target)

    def end(self, run_context: RunContext) -> None:
        """Saves at the end of a run that went well; MindSpore calls this after a crash as well."""
        if "run_failed" in run_context.original_args():
            return
        super().end(run_context)


@contextmanager
def safe_checkpoints() -> Iterator[None]:
    """Makes the YAML's `CheckpointMonitor` the safe one for a while.

    MindFormers' trainer hands its settings to callbacks of that type's name only, so the name has to stay; other
    trainers of the process get MindFormers' own.
    """
    before = MindFormerRegister.get_cls(MindFormerModuleType.CALLBACK, MONITOR)
    MindFormerRegister.register_cls(SafeCheckpointMonitor, MindFormerModuleType.CALLBACK, alias=MONITOR)
    try:
        yield
    finally:
        MindFormerRegister.register_cls(before, MindFormerModuleType.CALLBACK, alias=MONITOR)


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """Whole checkpoints of one rank's folder, oldest first."""
    found = [(int(match["epoch"]), int(match["step"]), path) for path in Path(folder).glob("*-*_*.*")
             if (match := _NAME.match(path.name)) and not path.name.startswith("unfinished_")]
    return [path for *_, path in sorted(found)]


def last_checkpoint(output_dir: str | os.PathLike) -> Path:
    """The newest whole checkpoint of a stand-alone run.

    Args:
        output_dir: folder of the run.

    Raises:
        ConfigError: when there is none.
    """
    found = checkpoints_in(Path(output_dir) / "checkpoint" / "rank_0")
    if not found:
        raise ConfigError(f"resume_training: {output_dir} holds no checkpoint (checkpoint/rank_0 is empty or missing); "
                          "start the run without resume_training, or name the folder of the run to go on with as "
                          "load_checkpoint.")
    return found[-1]


def prepare_resume(fields: dict) -> None:
    """Points a run that resumes at the newest whole checkpoint, in place.

    Args:
        fields: of the YAML; `load_checkpoint` is the earlier run's folder, by default this run's own. The layout may
            be another one than the earlier run's.

    Raises:
        ConfigError: when there is no checkpoint, or the earlier run had another configuration.
    """
    source, target = Path(fields.get("load_checkpoint") or fields["output_dir"]).resolve(), resume_folder(fields)
    if source.is_file():
        source = source.parents[2]
    before = check_same_run(fields, source / RECORD)
    alone = before["layout"] == layout_record(fields) == layout_record({})
    if alone:
        checkpoint = _as_directory(last_checkpoint(source), target)
    else:
        if not any((source / "checkpoint").glob("rank_[0-9]*/*.safetensors")):
            last_checkpoint(source)      # says what is missing
        single = before["layout"] == layout_record({})      # one file, which nothing says how to join
        checkpoint = joined(last_checkpoint(source) if single else source, target, before.get("start"))
    fields.update(load_checkpoint=str(checkpoint), resume_training=True, run_mode="finetune",
                  load_ckpt_format="safetensors", auto_trans_ckpt=bool(fields.get("use_parallel")))
    logger.info(f"Going on from {checkpoint}.")


def resume_folder(fields: dict) -> Path:
    """Where a run keeps what it resumes from."""
    return Path(fields["output_dir"]).resolve() / "resume"


def layout_record(fields: dict) -> list[int]:
    """Data, tensor and pipeline parallel degrees of a run."""
    section = (fields.get("parallel_config") or {}) if fields.get("use_parallel") else {}
    return [section.get(name) or 1 for name in ("data_parallel", "model_parallel", "pipeline_stage")]


def _as_directory(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint as MindFormers resumes from it in a stand-alone run: alone in a folder, its counters in a file.

    (It refuses the path of a file, and takes one with rank_0 in it for a parallel run's.)
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / checkpoint.name).symlink_to(checkpoint)
    write_counters(folder, checkpoint)
    return folder


def record_run(fields: dict) -> None:
    """Writes down what a later resume is compared with."""
    path = Path(fields["output_dir"]) / RECORD
    record = {**_comparable(fields), "layout": layout_record(fields), "start": _start_of(fields, path)}
    write_whole(path, json.dumps(record, indent=1, sort_keys=True, default=str))


def _start_of(fields: dict, own: Path) -> str | None:
    """The weights a run began with; of one that resumes, those of the run it goes on with."""
    start = fields.get("load_checkpoint") or None
    if not fields.get("resume_training"):
        return str(Path(start).resolve()) if start else None
    earlier = Path(start).resolve() / RECORD if start else own
    return json.loads(earlier.read_text(encoding="utf-8")).get("start") if earlier.is_file() else None


def check_same_run(fields: dict, record: Path) -> dict:
    """Refuses to resume a run under another configuration.

    Returns:
        What was written down of the earlier run.

    Raises:
        ConfigError: naming the keys that differ, with both values.
    """
    if not record.is_file():
        raise ConfigError(f"resume_training: {record} is missing, so the checkpoint's configuration is unknown; resume "
                          "from the folder of a run.")
    recorded = json.loads(record.read_text(encoding="utf-8"))
    before = dict(_flat({name: value for name, value in recorded.items() if name not in ("layout", "start")}))
    now = dict(_flat(json.loads(json.dumps(_comparable(fields), default=str))))
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if different:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in sorted(different)[:5])
        raise ConfigError(f"resume_training: the run in {record.parent} had another configuration: {shown}. Use the "
                          "same YAML and options, or start anew with its weights (load_checkpoint without "
                          "resume_training).")
    return recorded


def _comparable(fields: dict) -> dict:
    kept = {name: fields[name] for name in SAME_SECTIONS if fields.get(name) is not None}
    runner = fields.get("runner_config") or {}
    parallel = (fields.get("parallel_config") or {}) if fields.get("use_parallel") else {}
    # layouts may change, what a step takes in may not
    size = runner.get("batch_size") or 1
    for number in (runner.get("gradient_accumulation_steps"), parallel.get("data_parallel"),
                   parallel.get("micro_batch_num") if (parallel.get("pipeline_stage") or 1) > 1 else 1):
        size *= number or 1
    return {**kept, "runner_config": {"epochs": runner.get("epochs"), "global_batch": size}}


def _flat(value: Any, prefix: str = ""):
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key not in FREE_KEYS:
                yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix[:-1], value
