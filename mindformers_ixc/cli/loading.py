"""Work in the background while somebody types: what it writes waits, and what it raises comes with its result."""
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, TextIO, TypeVar

Result = TypeVar("Result")


class HeldBack:
    """A text stream that keeps what one thread writes until it is released; everybody else's goes through.

    Args:
        stream: where it goes in the end.
        thread: whose writing waits.
    """

    def __init__(self, stream: TextIO, thread: threading.Thread):
        self.stream, self.thread = stream, thread
        self.kept: list[str] = []
        self.released = False

    def write(self, text: str) -> int:
        """As of a file."""
        if not self._waits():
            return self.stream.write(text)
        self.kept.append(text)
        return len(text)

    def isatty(self) -> bool:
        """Whether somebody watches: nobody does while it waits, so no progress bar is drawn."""
        return not self._waits() and self.stream.isatty()

    def _waits(self) -> bool:
        return not self.released and threading.current_thread() is self.thread

    def release(self, show: bool) -> None:
        """Ends the waiting; what was kept is shown or dropped."""
        self.released = True
        if show:
            self.stream.write("".join(self.kept))
            self.stream.flush()
        self.kept = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Idle:
    """Work that nobody waits for, one piece at a time; while one is being done, another is left out."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], object]) -> None:
        """Begins; what `work` raises shows itself when its result is needed."""
        def run() -> None:
            with contextlib.suppress(Exception):
                work()

        if not self.busy:
            self._thread = threading.Thread(target=run, name="idle", daemon=True)
            self._thread.start()


class Loading(Generic[Result]):
    """Something that is made in a thread of its own, once it is started.

    What that thread writes on standard error is shown when the result is asked for, so that it does not come into a
    line that is being typed. Standard output has the libraries' notes, which the log folder has too.

    Args:
        load: makes it.
        failed: called in the thread when `load` has raised.
        verbose: show what was written on standard output, too.
    """

    def __init__(self, load: Callable[[], Result], failed: Callable[[], None] = lambda: None, verbose: bool = False):
        self.load, self.failed, self.verbose = load, failed, verbose
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._result: list[Result] = []
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._held: list[HeldBack] = []

    def start(self) -> None:
        """Begins."""
        # input() takes them for the terminal they stand for, and handlers that libraries make meanwhile keep them
        self._held = [HeldBack(sys.stdout, self._thread), HeldBack(sys.stderr, self._thread)]
        sys.stdout, sys.stderr = self._held     # type: ignore[assignment]
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = [self.load()]
        except BaseException as error:
            self.error = error
        self.done.set()
        if self.error is not None:
            self.failed()

    def result(self) -> Result:
        """Waits for it.

        Raises:
            BaseException: what `load` raised.
        """
        while not self.done.wait(0.1):      # in pieces, for the sake of signals
            pass
        for stream, show in zip(self._held, (self.verbose, True)):
            if not stream.released:
                stream.release(show)
        if self.error is not None:
            raise self.error
        return self._result[0]
