"""Reads that may never return: a file system that is gone holds whoever reads from it, and no read can be cancelled.

Every read of data is noted while it lasts (`reading`), and one thread of the process looks at the notes: it says once
what is waited for, and after a limit says so and ends the process, since nothing else can. That thread needs Python's
lock, so what is noted must not keep it: files are read by calls, which let it go, not through mapped memory, which does
not.

Nothing is watched until a limit is set: a program that only uses this package's functions is never ended by them.
"""
from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from mindformers_ixc import terminal

Item = TypeVar("Item")

# Seconds that a read may take unless the YAML says otherwise, and the key that does.
LIMIT, KEY = 600, "train_dataset.data_loader.read_timeout"

# Part of the limit, and seconds at most, after which it is said what is waited for.
TOLD_AFTER, TOLD_AFTER_AT_MOST = 0.1, 60.0

# Seconds between two looks at most, and how many looks a limit has at least.
TICK, LOOKS = 1.0, 20

# Seconds that the process has for its own end whose data worker has said the last sentence.
GRACE = 5.0


def _end(sentence: str) -> None:
    terminal.current.fault(sentence)
    if current.ended is not None:
        current.ended[0] = 1
        if os.getpid() != current.owner:
            time.sleep(GRACE)
            if os.getppid() == current.owner:       # its main thread may keep Python's lock while it waits for this one
                os.kill(current.owner, signal.SIGKILL)
    os._exit(1)         # the thread that reads is in the kernel, and may be the main one


def _say(sentence: str) -> None:
    terminal.current.say(sentence)


class Watch:
    """Looks at what the threads of a process read.

    Args:
        limit: seconds that a read may take; 0: nothing is watched.
        say: shows a sentence.
        end: says the last sentence, and ends the process.
    """

    def __init__(self, limit: float = 0.0, say: Callable[[str], object] = _say,
                 end: Callable[[str], object] = _end):
        self.limit, self.say, self.end = limit, say, end
        self.running: dict[int, reading] = {}      # by number of the thread; of nested reads the innermost
        self.thread: threading.Thread | None = None
        # shared with forked processes: whether one has ended; who waits for what a worker reads would wait for ever
        self.ended: mmap.mmap | None = None
        self.owner = os.getpid()                   # who set the limit

    def start(self) -> None:
        """Lets a thread look from now on."""
        self.thread = threading.Thread(target=self._look_on, name="reads", daemon=True)
        self.thread.start()

    def forget(self) -> None:
        """Begins anew in a child process, which has none of the threads."""
        self.running, self.thread = {}, None

    @property
    def tick(self) -> float:
        """Seconds between two looks."""
        return min(TICK, self.limit / LOOKS) or TICK

    def _look_on(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(self.tick)
            now = time.monotonic()
            # a process that was stopped meanwhile has not waited for a file
            self.look(min(now - last, 2 * self.tick))
            last = now

    def look(self, passed: float) -> None:
        """Adds to the age of every read, says what is waited for, and ends the process when a limit is reached.

        Args:
            passed: seconds since the last look.
        """
        if not self.limit:
            return
        if self.ended is not None and self.ended[0]:
            os._exit(1)
        for one in list(self.running.values()):
            one.age += passed
            if one.age >= self.limit:
                self.end(f"{one.name} has not been read within {self.limit:g} s, the limit {KEY}: the file system "
                         "that it lies on is gone, or as slow as that. See whether `ls` of its folder comes back, "
                         "mount it anew or raise the limit, and start again (a training run with --resume_training "
                         "True).")
            elif not one.told and one.age >= min(self.limit * TOLD_AFTER, TOLD_AFTER_AT_MOST):
                one.told = True
                self.say(f"Waiting for {one.name}, which has not been read for {one.age:.2g} s; after {self.limit:g} s "
                         f"({KEY}) that ends this process.")


current = Watch()
os.register_at_fork(after_in_child=lambda: current.forget())


def watch_reads(limit: float | None) -> None:
    """Ends this process, and those that are forked of it, when a read takes longer.

    Args:
        limit: seconds; `None` for `LIMIT`.
    """
    current.limit = float(limit or LIMIT)
    if current.ended is None:
        current.ended, current.owner = mmap.mmap(-1, 1), os.getpid()
    if current.thread is None:
        current.start()


class reading:
    """Notes in a block that this thread waits for a file; in another block, that one's time begins anew afterwards.

    Args:
        name: of the file, for messages.

    Attributes:
        age: seconds it has taken, as far as anybody has looked.
        told: whether it was said.
    """

    __slots__ = ("_outer", "age", "name", "told")

    def __init__(self, name: object):
        self.name, self.age, self.told = name, 0.0, False
        self._outer: reading | None = None

    def __enter__(self) -> reading:
        if current.limit:
            thread = threading.get_ident()
            self._outer = current.running.get(thread)
            current.running[thread] = self
            if current.thread is None:
                current.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        thread = threading.get_ident()
        if self._outer is None:
            current.running.pop(thread, None)
        else:
            self._outer.age = 0.0
            current.running[thread] = self._outer


def read_on(name: object, items: Iterable[Item]) -> Iterator[Item]:
    """The items, each of which is read from a file when it is asked for.

    Args:
        name: of the file, for messages.
        items: that come of it.
    """
    iterator, nothing = iter(items), object()
    while True:
        with reading(name):
            item = next(iterator, nothing)
        if item is nothing:
            return
        yield item           # type: ignore[misc]
