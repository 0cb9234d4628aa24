"""One thread at a time on the device: MindSpore compiles and runs graphs in process-wide state, without locks."""
from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that threads get in the order in which they came; who has it may take it again."""

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> Turns:
        me = threading.get_ident()
        with self._state:
            if self._owner in (None, me):
                self._owner = me
                self._depth += 1
                return self
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()              # whoever leaves opens it, and the lock is this thread's from then on
            self._owner = me
        except BaseException:           # such as Ctrl-C: this place in the queue must not stop those behind
            with self._state:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._pass_on()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with self._state:
            self._depth -= 1
            if not self._depth:
                self._pass_on()

    def _pass_on(self) -> None:
        """Makes the next in the queue the owner; with nobody waiting the lock is free."""
        if self._waiting:
            self._owner, self._depth = -1, 1        # nobody else's until the next one says its name
            self._waiting.popleft().release()
        else:
            self._owner, self._depth = None, 0


# Of all models of the process.
TURNS = Turns()
