"""The one thread that computes, and the way of its results to the event loop."""
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from mindformers_ixc.serving.answering import Piece
from mindformers_ixc.serving.scheduling import Job, Scheduler

# Seconds after which an idle thread looks around, should it have been told nothing.
LOOK = 0.5


class Mailbox:
    """What comes of one request, for a coroutine: pieces of its answers, then `None` or an error."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    def put(self, item: Piece | Exception | None) -> None:
        """For the thread that computes."""
        self.worker.outbox.append((self.queue, item))


class Worker:
    """Lets a scheduler tick in a thread of its own while there is something to do.

    Args:
        scheduler: is ticked.
        failed: told what a tick has raised that was not foreseen.

    Attributes:
        outbox: what has come since the event loop was told last.
    """

    def __init__(self, scheduler: Scheduler, failed: Callable[[BaseException], None] = lambda error: None):
        self.scheduler, self.failed = scheduler, failed
        self.outbox: list[tuple[asyncio.Queue, Any]] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        scheduler.after_tick = self._deliver

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins; results go to this loop."""
        self.loop = loop
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Ends the thread after the present tick.

        Returns:
            Whether it ended within so many seconds.
        """
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, or has not begun."""
        return self._thread.is_alive() or self._thread.ident is None

    def submit(self, job: Job) -> None:
        """Takes a request; for any thread.

        Raises:
            Refused: see `Scheduler.submit`.
        """
        self.scheduler.submit(job)
        self._wake.set()

    def cancel(self, job: Job) -> None:
        """Says that nobody wants a request's answers any more; for any thread."""
        self.scheduler.cancel(job)
        self._wake.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if not self.scheduler.tick():
                    self._wake.wait(LOOK)
                    self._wake.clear()
            except Exception as error:      # none is foreseen: those of the decoder end requests, not the thread
                self.failed(error)
                self._stopped.wait(LOOK)

    def _deliver(self) -> None:
        if self.outbox and self.loop is not None:
            batch, self.outbox = self.outbox, []
            self.loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: list[tuple[asyncio.Queue, Any]]) -> None:
    for queue, item in batch:
        queue.put_nowait(item)
