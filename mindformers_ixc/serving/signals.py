"""SIGTERM and Ctrl-C of a server, from before the libraries are imported.

MindSpore puts handlers of its own in place of SIGINT's when it runs a graph, and starts threads that any signal may
come to. So both signals are blocked before there are any, and a thread of its own waits for them.
"""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from mindformers_ixc import terminal
from mindformers_ixc.interruption import name_of

ASKING = {signal.SIGTERM, signal.SIGINT}


class Signals:
    """Waits for signals.

    Attributes:
        end: what one does; until a server says otherwise it ends the process.
    """

    def __init__(self) -> None:
        self.end: Callable[[], object] | None = None

    def listen(self) -> None:
        """Begins; for the main thread, before any other is started."""
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(ASKING)
            terminal.current.leave_line()
            if self.end is None:
                terminal.current.say(f"{name_of(number)} ended the server before it was ready.")
                os._exit(128 + number)
            self.end()


current = Signals()
