"""The folder in which the ranks of one job leave messages for each other: agreed on, kept apart, removed at the end.

Ranks agree on the folder through MindSpore's own sum over the world, whose connections the job's scheduler made: it
reaches the ranks of this start of this job and no others. The name is drawn at random, so messages of another job, at
the same time or earlier, cannot be in the folder. Each rank locks a file in it for as long as it lives; see mailbox.h.
"""
from __future__ import annotations

import atexit
import contextlib
import fcntl
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

_NAME = "mindspore_cpu_parallel_{:016x}"
_NAMES = re.compile(r"mindspore_cpu_parallel_[0-9a-f]{16}")
_WORD, _WORDS = 16, 4           # a float32 holds integers of 24 bits


def timeout_s() -> float:
    """How long a rank waits for another that lives, from CPU_PARALLEL_TIMEOUT_S.

    Raises:
        ValueError: when that is not a positive number.
    """
    text = os.environ.get("CPU_PARALLEL_TIMEOUT_S") or "300"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"CPU_PARALLEL_TIMEOUT_S is {text!r}; it must be a positive number of seconds.")
    return value


def _parent() -> Path:
    """Where jobs have their folders."""
    chosen = os.environ.get("CPU_PARALLEL_MAILBOX")
    if chosen:
        return Path(chosen)
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


class Mailbox:
    """This process's place in its job's folder.

    Args:
        rank: this process's.
        size: number of ranks.
        total: sums a float32 array over all ranks; every rank must call it.
        holds_lock: 1 when another process may hold the lock on a file, 0 when none does, -1 when there is no file.
        finish: waits until all operators of this process have run.

    Raises:
        OSError: when this rank or another cannot write the folder; all ranks raise then.
    """

    def __init__(self, rank: int, size: int, total: Callable[[np.ndarray], np.ndarray],
                 holds_lock: Callable[[Path], int], finish: Callable[[], None]):
        self.rank, self.holds_lock, self.finish, self.process = rank, holds_lock, finish, os.getpid()
        self.lock: int | None = None
        job = self._agree(_parent(), total)
        self.folder = _parent() / _NAME.format(job)
        self._join(size, total)
        atexit.register(self.leave)

    def _agree(self, parent: Path, total: Callable[[np.ndarray], np.ndarray]) -> int:
        """The job's number, which rank 0 draws; it also makes the folder."""
        job, fault = 0, None
        if self.rank == 0:
            job = secrets.randbits(_WORD * _WORDS)
            try:
                self._make(parent, _NAME.format(job))
            except OSError as error:
                fault = error
        words = [job >> _WORD * i & (1 << _WORD) - 1 for i in range(_WORDS)]
        failed, *words = total(np.array([fault is not None, *words], np.float32)).astype(np.int64).tolist()
        if fault:
            raise _cannot_write(parent, fault) from fault
        if failed:
            raise OSError("Rank 0 cannot write the mailbox of this job; its log says which folder and why.")
        return sum(word << _WORD * i for i, word in enumerate(words))

    def _make(self, parent: Path, name: str) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        self._sweep(parent)
        # the folder gets its name when the lock is held: until then it would look like a dead job's
        making = parent / f"making_{name}"
        making.mkdir(mode=0o700)
        try:
            self._lock(making)
            making.rename(parent / name)
        except OSError:
            shutil.rmtree(making, ignore_errors=True)
            raise

    def _sweep(self, parent: Path) -> None:
        """Removes what jobs left that were killed: those none of whose ranks lives."""
        for folder in parent.iterdir():
            if _NAMES.fullmatch(folder.name) and self._is_deserted(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _is_deserted(self, folder: Path) -> bool:
        try:
            ranks = [file for file in folder.iterdir() if file.name.startswith("rank.")]
        except OSError:       # another user's, or just removed
            return False
        return bool(ranks) and all(self.holds_lock(file) == 0 for file in ranks)

    def _lock(self, folder: Path) -> None:
        # closing any descriptor of this file would drop the lock: it is opened here and nowhere else
        self.lock = os.open(folder / f"rank.{self.rank}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self.lock, fcntl.LOCK_EX)
        os.write(self.lock, f"{self.process}\n".encode())

    def _join(self, size: int, total: Callable[[np.ndarray], np.ndarray]) -> None:
        """From here on every rank's file is there and locked, so that one which is not means a death."""
        fault = None
        if self.lock is None:
            try:
                self._lock(self.folder)
            except OSError as error:
                fault = error
        failed = np.zeros(size, np.float32)
        failed[self.rank] = fault is not None
        failed = np.flatnonzero(total(failed)).tolist()
        if failed:
            self.leave()
        if fault:
            raise _cannot_write(self.folder, fault) from fault
        if failed:
            raise OSError(f"Ranks {failed} cannot write this job's mailbox {self.folder}; their logs say why. "
                          "CPU_PARALLEL_MAILBOX must be the same folder for all ranks.")

    def leave(self) -> None:
        """Tells the other ranks that this one ends in good order; the last one removes the folder."""
        if self.process != os.getpid():      # a fork
            return
        if self.lock is not None:
            with contextlib.suppress(Exception):     # one that failed has been reported
                self.finish()
            os.write(self.lock, b"ended\n")
            os.close(self.lock)
            self.lock = None
        if self._is_deserted(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(f"The ranks' mailbox {folder} cannot be written: {error.strerror or error}. CPU_PARALLEL_MAILBOX "
                   "must name a folder that all ranks can write and lock files in; unset, it is this machine's memory.")
