"""Which checkpoint a run goes on from, and whether it is the same run that wrote it."""
from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.digests import DIGEST_FILE, read_digests, verify_folder, write_digests
from mindformers_ixc.checkpoint.sources import read_file
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.files import RESULTS, read_json, write_whole
from mindformers_ixc.training.relayout import joined, write_counters
from mindformers_ixc.training.run_folder import RECORD, new_run_id

logger = logging.getLogger(__name__)

# What a resumed run must share with the one it goes on with; the rest (callbacks, folders, workers) may change.
SAME_SECTIONS = ("seed", "train_dataset", "train_parts", "part_learning_rates", "model", "optimizer", "lr_schedule",
                 "runner_wrapper", "preference", "rollout")
FREE_KEYS = {"num_parallel_workers", "python_multiprocessing", "prefetch_size", "numa_enable", "max_bad_share",
             "batch_size"}
# What a record has beside those sections: degrees, the weights the run began with, its name, what it left at its end,
# and when and how it was started, each time.
OTHER_KEYS = ("layout", "start", "run", "finished", "joined", "closing", "starts", "ended")

# The step, as `epoch_step`, that `mindformers launch` has found whole; its ranks need not read every checkpoint again.
CHOSEN = "MINDFORMERS_IXC_RESUME_STEP"

# The command that `mindformers launch` was given; its ranks are started with another one.
COMMAND = "MINDFORMERS_IXC_COMMAND"

_NAME = re.compile(r"(?P<prefix>.+)_rank_(?P<rank>\d+)(_\d+)?-(?P<epoch>\d+)_(?P<step>\d+)\.(safetensors|ckpt)$")

Step = tuple[int, int]


def step_of(path: Path) -> Step:
    """Epoch, and step in it, that a checkpoint's name states.

    Raises:
        ConfigError: for another name.
    """
    match = _NAME.match(path.name)
    if match is None:
        raise ConfigError(f"{path} is no checkpoint of a run: its name has no epoch and step.")
    return int(match["epoch"]), int(match["step"])


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """Whole checkpoints of one rank's folder, oldest first."""
    found = [path for path in Path(folder).glob("*-*_*.*")
             if _NAME.match(path.name) and not path.name.startswith("unfinished_")]
    return sorted(found, key=lambda path: (step_of(path), path))


def note_checkpoint(target: Path, content: Path) -> None:
    """Writes down the digests of a checkpoint that is about to take its name, and whose it is.

    Args:
        target: the checkpoint, `OUTPUT/checkpoint/rank_N/NAME`.
        content: where it is now.
    """
    folder = target.parent
    try:
        before = read_digests(folder)
    except CheckpointError as error:
        terminal.current.say(f"{error} It is written anew.")
        (folder / DIGEST_FILE).unlink()
        before = None
    record = read_record(target.parents[2] / RECORD) if (target.parents[2] / RECORD).is_file() else {}
    known = before.metadata.get("checkpoints", {}) if before is not None else {}
    owners = {name: owner for name, owner in known.items() if (folder / name).is_file()}
    owners[target.name] = {"run": record.get("run"), "layout": record.get("layout")}
    match = re.fullmatch(r"rank_(\d+)", folder.name)
    write_digests(folder, {target.name: content}, rank=int(match[1]) if match else 0, checkpoints=owners)


def last_checkpoint(output_dir: str | os.PathLike) -> Path:
    """The newest checkpoint of a stand-alone run, damaged or not.

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


def newest_whole(run: Path, record: dict, only: Step | None = None) -> list[Path]:
    """The files of the newest step that every rank has saved and whose files are undamaged, by rank.

    A damaged one is named on standard error, left where it is, and the one before it is looked at.

    Args:
        run: folder of the run.
        record: what was written down of it; its layout says how many ranks there are.
        only: the step to take, instead of the newest.

    Raises:
        ConfigError: when there is none, or a checkpoint is another run's.
    """
    by_step: dict[Step, dict[int, Path]] = {}
    for folder in run.glob("checkpoint/rank_[0-9]*"):
        for path in checkpoints_in(folder):
            by_step.setdefault(step_of(path), {})[int(folder.name[5:])] = path
    if only is not None:
        by_step = {step: files for step, files in by_step.items() if step == only}
    known = _owners(run)
    damaged = []
    for _, files in sorted(by_step.items(), reverse=True):
        owner = known.get(files[min(files)].name, {})
        ranks = math.prod(owner.get("layout") or record["layout"])
        if set(range(ranks)) - set(files):
            continue      # the run was cut off while its ranks saved
        chosen = [files[rank] for rank in range(ranks)]
        _check_owner(chosen[0], owner, record)
        problem = next((found for path in chosen if (found := damage(path))), None)
        if problem is None:
            return chosen
        damaged.append(problem)
        terminal.current.say(f"Checkpoint left out, since it is damaged: {problem}")
    if damaged:
        raise ConfigError(f"resume_training: every checkpoint in {run / 'checkpoint'} is damaged ({damaged[0]}). "
                          "Restore one from a copy, or start anew.")
    if by_step:
        raise ConfigError(f"resume_training: the ranks in {run / 'checkpoint'} have no step in common; a run was cut "
                          "off while it saved its first checkpoint. Start anew.")
    last_checkpoint(run)      # says what is missing
    raise ConfigError(f"resume_training: {run} has no checkpoint of step {only}.")


def _owners(run: Path) -> dict[str, dict]:
    """What is known of each checkpoint's run, by name of rank 0's file."""
    try:
        digests = read_digests(run / "checkpoint" / "rank_0")
    except CheckpointError:
        return {}         # said when the files are compared
    return digests.metadata.get("checkpoints", {}) if digests is not None else {}


def _check_owner(path: Path, owner: dict, record: dict) -> None:
    if owner.get("run") and record.get("run") and owner["run"] != record["run"]:
        raise ConfigError(f"resume_training: {path} is of run {owner['run']}, but {RECORD} speaks of run "
                          f"{record['run']}: two runs were mixed in this folder. Take the files of one of them out.")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, if anything: its header, its length, its digest if it has one."""
    try:
        if not read_file(path):
            return f"{path} holds no tensors."
    except (CheckpointError, OSError) as error:
        return str(error)
    try:
        read_digests(path.parent)
    except CheckpointError as error:
        terminal.current.say(f"{error} The checkpoints beside it are taken as they are.")
        return None
    try:
        digests = read_digests(path.parent)
        if digests is not None and path.name in digests.files:
            verify_folder(path.parent, [path.name])
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def prepare_resume(fields: dict) -> None:
    """Points a run that resumes at the newest whole checkpoint, in place.

    Args:
        fields: of the YAML; `load_checkpoint` is the earlier run's folder, or one of its checkpoints to go on from that
            one, by default this run's own folder. The layout may be another one than the earlier run's.

    Raises:
        ConfigError: when there is no checkpoint, or the earlier run had another configuration.
    """
    source, files = chosen_checkpoint(fields)
    target = resume_folder(fields)
    before = read_record(source / RECORD)
    if len(files) == 1 and layout_record(fields) == layout_record({}):
        checkpoint = _as_directory(files[0], target)
    else:
        checkpoint = joined(files, source / "strategy", target, before.get("start"))
    fields.update(load_checkpoint=str(checkpoint), resume_training=True, run_mode="finetune",
                  load_ckpt_format="safetensors", auto_trans_ckpt=bool(fields.get("use_parallel")))
    logger.info(f"Going on from {checkpoint}.")


def chosen_checkpoint(fields: dict) -> tuple[Path, list[Path]]:
    """The run that a resume goes on with, and the files of its checkpoint by rank; nothing is changed.

    Raises:
        ConfigError: see `prepare_resume`.
    """
    given, only = resume_source(fields), None
    if given.is_file():
        given, only = given.parents[2], step_of(given)
    record = check_same_run(fields, given / RECORD)
    if CHOSEN in os.environ:
        epoch, step = os.environ[CHOSEN].split("_")
        only = int(epoch), int(step)
        files = {int(path.parent.name[5:]): path for path in given.glob(f"checkpoint/rank_[0-9]*/*-{epoch}_{step}.*")
                 if _NAME.match(path.name)}
        ranks = math.prod(_owners(given).get(files[0].name, {}).get("layout") or record["layout"])
        return given, [files[rank] for rank in range(ranks)]
    return given, newest_whole(given, record, only)


def resume_source(fields: dict) -> Path:
    """The folder of the run to go on with, or a checkpoint's file.

    That is `load_checkpoint`, unless the run's own folder already holds checkpoints of the same run: a command that is
    given again goes on from those.
    """
    own = Path(fields["output_dir"]).resolve()
    given = Path(fields.get("load_checkpoint") or own).resolve()
    folder = given.parents[2] if given.is_file() else given
    if folder != own and (own / RECORD).is_file() and any(own.glob("checkpoint/rank_[0-9]*/*-*_*.*")):
        ours, theirs = read_record(own / RECORD).get("run"), read_record(folder / RECORD).get("run")
        if ours != theirs or not ours:
            raise ConfigError(f"resume_training: {own} already has checkpoints of another run than {folder}; give "
                              "another --output_dir.")
        terminal.current.say(f"{own} has checkpoints of this run already, so it goes on from those.")
        return own
    return given


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


def read_record(path: Path) -> dict:
    """What was written down of a run.

    Raises:
        ConfigError: when it is missing or damaged, naming the file.
    """
    if not path.is_file():
        raise ConfigError(f"resume_training: {path} is missing, so the checkpoint's configuration is unknown; resume "
                          "from the folder of a run.")
    record = read_json(path, _Damaged)
    layout = record.get("layout") if isinstance(record, dict) else None
    if not (isinstance(layout, list) and layout and all(isinstance(degree, int) and degree > 0 for degree in layout)):
        raise _Damaged(f"{path} is not what a run writes down of itself (`layout` is missing or no list of degrees).")
    return record


class _Damaged(ConfigError):
    """A record that cannot be used; says what to do about it."""

    def __init__(self, text: str):
        super().__init__(f"resume_training: {text} The file says which configuration the checkpoints are of: restore "
                         "it from a copy, or start anew with the weights of a checkpoint (load_checkpoint without "
                         "resume_training).")


def recorded_model(fields: dict) -> dict:
    """The `model_config` that the run which is gone on with has written down; empty without a record."""
    given = resume_source(fields)
    path = (given.parents[2] if given.is_file() else given) / RECORD
    record = read_record(path) if path.is_file() else {}
    model = record.get("model")
    section = model.get("model_config") if isinstance(model, dict) else None
    return section if isinstance(section, dict) else {}


def record_run(fields: dict, command: str = "") -> None:
    """Writes down what a later resume is compared with, and how the run was started; one that starts anew gets a name.

    Args:
        fields: of the YAML.
        command: that started it, as it was typed.
    """
    path = Path(fields["output_dir"]) / RECORD
    earlier = _earlier_record(fields, path)
    start = fields.get("load_checkpoint") or None
    if fields.get("resume_training"):
        start = earlier.get("start")
    record = {**_comparable(fields), "layout": layout_record(fields), "run": earlier.get("run") or new_run_id(),
              "start": str(Path(start).resolve()) if start else None,
              "starts": [*(earlier.get("starts") or ()), _start_entry(fields, command)]}
    write_whole(path, json.dumps(record, indent=1, sort_keys=True, default=str), sync=True)


def _start_entry(fields: dict, command: str) -> dict:
    return {"time": _now(), "command": command, "device_target": (fields.get("context") or {}).get("device_target")}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")


def _earlier_record(fields: dict, own: Path) -> dict:
    """The record of the run that is gone on with, if one is."""
    if not fields.get("resume_training"):
        return {}
    given = resume_source(fields)
    path = (given.parents[2] if given.is_file() else given) / RECORD
    return read_record(path) if path.is_file() else {}


def mark_finished(output_dir: str | os.PathLike, results: list[str], closing: str = "", joined: bool = True) -> None:
    """Notes in a run's record that it has come to its end.

    Args:
        output_dir: folder of the run.
        results: names of the model directories it has left there.
        closing: what the user is told at the end.
        joined: whether that is all; not where the ranks' parts of a parallel run were left as they are.
    """
    path = Path(output_dir) / RECORD
    if path.is_file():
        record = {**read_record(path), "finished": results, "joined": joined, "closing": closing, "ended": _now()}
        write_whole(path, json.dumps(record, indent=1, sort_keys=True), sync=True)


def closing_of(output_dir: str | os.PathLike) -> str | None:
    """What a run that has come to its end told the user; `None` if it has not noted its end."""
    path = Path(output_dir) / RECORD
    record = read_record(path) if path.is_file() else {}
    return None if record.get("finished") is None else str(record.get("closing") or "")


def is_complete(fields: dict) -> bool:
    """Whether a resume has nothing to do: the run in the output folder has ended and all it left is still there.

    Raises:
        ConfigError: when the run had another configuration.
    """
    own = Path(fields["output_dir"]).resolve()
    given = Path(fields.get("load_checkpoint") or own).resolve()
    if not fields.get("resume_training") or given != own or not (own / RECORD).is_file():
        return False
    record = check_same_run(fields, own / RECORD)
    finished = record.get("finished")
    joined = record.get("joined", True) or fields.get("no_join") or (own / "model").is_dir()
    if finished is None or not joined:
        return False
    return all((own / name).is_dir() for name in finished if name in RESULTS)


def check_same_run(fields: dict, record: Path) -> dict:
    """Refuses to resume a run under another configuration.

    Returns:
        What was written down of the earlier run.

    Raises:
        ConfigError: naming the keys that differ, with both values; or the record, when it is missing or damaged.
    """
    recorded = read_record(record)
    before = dict(_flat({name: value for name, value in recorded.items() if name not in OTHER_KEYS}))
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
