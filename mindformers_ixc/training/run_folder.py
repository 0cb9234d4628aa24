"""The output folder of a run: one run at a time, the files of one run, nothing left over of killed processes.

One process answers for the folder: a run by itself, or the `mindformers launch` of server 0 for all its ranks. It
holds a lock on the first byte of `run.lock`; each rank holds one on a byte of its own. They are POSIX record locks: the
kernel frees them when their process ends, forked children do not inherit them, and they work across servers on NFS and
the parallel file systems that have locks.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.unused import UNUSED_FILE
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import (
    ANSWERS_FILE,
    EVALUATIONS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RESULTS,
    RUN_RECORD,
    refuse_used,
    tidy,
    traces_of_run,
)
from mindformers_ixc.interruption import JOB
from mindformers_ixc.resources import shown
from mindformers_ixc.trackers import TRACKED

RECORD = RUN_RECORD

# Parts that ranks put down to be joined, by the name of what is made of them.
SLICES = ".slices_{}"

# What `--overwrite` moves aside.
OWN = (*RESULTS, "checkpoint", "checkpoint_network", "checkpoint_trainable", METRICS_FILE, EVALUATIONS_FILE,
       ANSWERS_FILE, "resume", "strategy", UNUSED_FILE, "report", "report.html", "tensorboard", *TRACKED, RECORD)

# Seconds that the ranks of a killed launch get to be gone before the next run begins.
ORPHANS_S = 60

_held: dict[Path, int] = {}       # folders that this process holds, and the descriptors of their lock files


def new_run_id() -> str:
    """A name for a run that no other has."""
    return secrets.token_hex(8)


def in_job() -> bool:
    """Whether this process is a rank or scheduler of `mindformers launch`, which answers for the folder."""
    return JOB in os.environ


def answers(fields: dict) -> bool:
    """Whether this process answers for the run's folder: a run by itself, or rank 0 of one that plain msrun started."""
    if in_job() or os.environ.get("MS_ROLE") == "MS_SCHED":
        return False
    return not fields.get("use_parallel") or os.environ.get("RANK_ID", "0") == "0"


@contextlib.contextmanager
def claimed(folder: Path, fields: dict, overwrite: bool = False) -> Iterator[None]:
    """Holds the output folder for a run, as the process that answers for it; a run that starts anew finds it unused.

    Args:
        folder: the run's; it is made.
        fields: of the YAML.
        overwrite: move an earlier run's files aside instead of refusing.

    Raises:
        ConfigError: when another run is using it, or an earlier one has left files that are not to be mixed.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        sweep(folder)
        if fields.get("run_mode") != "predict" and (overwrite or not fields.get("resume_training")):
            make_room(folder, fields, overwrite)
        yield


@contextlib.contextmanager
def locked(folder: Path, rank: int | None = None) -> Iterator[None]:
    """Holds a folder's lock, or a rank's part of it.

    Args:
        folder: the run's.
        rank: a rank of a run whose folder its launch holds.

    Raises:
        ConfigError: when another process has it, naming that one.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    path = folder / LOCK_FILE
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0 if rank is None else 1 + rank)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                # no locks here: a sentence, since refusing would forbid every run on such a file system
                terminal.current.say(f"{folder} is on a file system without locks ({error.strerror}), so nothing keeps "
                                     "a second run out of it; start one at a time.")
                yield
                return
            raise ConfigError(_in_use(folder, handle, rank)) from error
        if rank is None:
            _wait_for_ranks(handle, folder)
            _sign(handle)
        _held[folder] = handle
        yield
    finally:
        _held.pop(folder, None)
        os.close(handle)


def _wait_for_ranks(handle: int, folder: Path) -> None:
    """Waits for ranks whose launch was killed; they end by themselves."""
    until = time.monotonic() + ORPHANS_S
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 1)      # all bytes from the second on
            fcntl.lockf(handle, fcntl.LOCK_UN, 0, 1)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(f"Ranks of an earlier run still work in {folder}, {ORPHANS_S} s after its launch has "
                                  "ended; end them, or give another --output_dir.") from error
        time.sleep(0.2)


def _sign(handle: int) -> None:
    """Writes who holds the lock, for the sentence that refuses others."""
    record = {"host": socket.gethostname(), "pid": os.getpid(),
              "since": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime())}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(record).encode() + b"\n", 0)


def _in_use(folder: Path, handle: int, rank: int | None) -> str:
    if rank is not None:
        return f"Another rank {rank} already works in {folder}; give every run an --output_dir of its own."
    try:
        record = json.loads(os.pread(handle, 4096, 0))
        who = f"process {record['pid']} on {record['host']}, since {record['since']}"
    except (ValueError, KeyError, TypeError):
        who = "a process that has not told its name"
    return (f"{folder} is in use by another run ({who}). Wait until that one has ended, or end it, or give another "
            "--output_dir.")


def sweep(folder: Path) -> None:
    """Removes what writers left that were killed; only names that this package and its checkpoints use."""
    found = tidy(folder)
    for below in [folder / "resume", *sorted(folder.glob("checkpoint/rank_[0-9]*"))]:
        if not below.is_dir():
            continue
        found += tidy(below)
        for path in below.iterdir():
            if path.name.startswith("unfinished_") or (re.fullmatch(r"tmp[a-z0-9_]{8}", path.name) and path.is_file()):
                found.append(path.name)
                path.unlink()
    for slices in folder.glob(SLICES.format("*")):
        shutil.rmtree(slices, ignore_errors=True)
        found.append(slices.name)
    for name in ("stop_request", "stop_after"):       # of `stopping.py`
        (folder / name).unlink(missing_ok=True)
    if found:
        terminal.current.say(f"{len(found)} unfinished files or folders of a run that was killed were removed from "
                             f"{folder}.")


def make_room(folder: Path, fields: dict, overwrite: bool) -> None:
    """Refuses a folder that an earlier run has used, or moves that run's files to `old-N` in it.

    Raises:
        ConfigError: when it is used and not to be overwritten, or when what is to be moved is what the run needs.
    """
    if not overwrite:
        refuse_used(folder)
    if not traces_of_run(folder):
        return
    start = fields.get("load_checkpoint")
    place = Path(start or folder).resolve()
    if any(place.is_relative_to(folder / name) for name in OWN) or (place == folder and fields.get("resume_training")):
        raise ConfigError(f"--overwrite would move {start or folder} aside, which this run starts from; give another "
                          "--output_dir.")
    number = 1 + max((int(path.name[4:]) for path in folder.glob("old-*") if path.name[4:].isdigit()), default=0)
    aside = folder / f"old-{number}"
    aside.mkdir()
    for name in OWN:
        if (folder / name).exists():
            shutil.move(folder / name, aside / name)
    terminal.current.say(f"The earlier run's files were moved to {shown(aside)}.")
