"""The typing side of a chat: messages of one or several lines, the history of earlier sessions, Ctrl-C."""
from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mindformers_ixc.resources import home_folder

# Questions kept for later sessions.
HISTORY_LINES = 1000

FENCE = "```"

# What wakes the main thread; MindSpore leaves this one alone.
_WAKE = signal.SIGUSR1


class Failed(Exception):
    """What the session was waiting for in another thread has failed."""


class Interrupts:
    """Ctrl-C of a session: where it may raise, it raises `KeyboardInterrupt`; elsewhere it is noted, to be looked for.

    MindSpore puts a handler of its own in place of SIGINT's when it runs a graph, which ends the process. So the signal
    is blocked in all threads (they inherit the mask the program started with, see `mindformers_ixc_cli`), a thread of
    its own waits for it, and wakes the main thread by another one.
    """

    def __init__(self) -> None:
        self.pressed = threading.Event()
        self.failed = threading.Event()
        self._may_raise = False
        self._main = threading.get_ident()

    def start(self) -> None:
        """Begins to listen; for the main thread only, which is the one that is woken."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        signal.signal(_WAKE, self._wake)
        threading.Thread(target=self._listen, name="interrupts", daemon=True).start()

    def _listen(self) -> None:
        while True:
            signal.sigwait({signal.SIGINT})
            self.pressed.set()
            # again and again: one that comes just before the terminal is waited for would be seen with the next key
            while self.pressed.is_set() and self._may_raise:
                self._send()
                time.sleep(0.1)

    def fail(self) -> None:
        """Lets the main thread raise `Failed` where it may; for any thread."""
        self.failed.set()
        self._send()

    def _send(self) -> None:
        signal.pthread_kill(self._main, _WAKE)

    def _wake(self, *_: object) -> None:
        if self._may_raise:
            if self.failed.is_set():
                raise Failed
            self.check()

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C has been pressed since it was last looked for."""
        if self.pressed.is_set():
            self.pressed.clear()
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Lets Ctrl-C and `fail` raise at once; no graph may run meanwhile."""
        self.pressed.clear()                # one that came too late to stop anything
        self._may_raise = True
        try:
            if self.failed.is_set():
                raise Failed
            yield
        finally:
            self._may_raise = False


@contextlib.contextmanager
def line_history(commands: list[str]) -> Iterator[None]:
    """Line editing with the questions of earlier sessions, where there is a terminal; Tab completes commands, paths."""
    if not sys.stdin.isatty():
        yield
        return
    import readline  # noqa: PLC0415 - importing it gives input() its editing

    path = None
    with contextlib.suppress(OSError, RuntimeError):     # no earlier session, or no home directory
        state = os.environ.get("XDG_STATE_HOME") or home_folder() / ".local" / "state"
        path = Path(state) / "mindformers_ixc" / "chat_history"
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(lambda text, number: dict(enumerate(completions(
        readline.get_line_buffer()[:readline.get_begidx()], text, commands))).get(number))
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):               # a read-only home is no reason to fail at the end
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(path)


def completions(before: str, text: str, commands: list[str]) -> list[str]:
    """What a word that begins with `text`, behind `before`, may be: a command first in the line, else a path."""
    if not before:
        return [f"{command} " for command in commands if command.startswith(text)] if text.startswith("/") else []
    folder, start = os.path.split(text)
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(os.path.expanduser(folder) or "."))
        paths = [os.path.join(folder, name) for name in names
                 if name.startswith(start) and (start.startswith(".") or not name.startswith("."))]
        return [f"{path}/" if os.path.isdir(os.path.expanduser(path)) else f"{path} " for path in paths]
    return []


def read_message(read: Callable[[str], str] = input) -> str:
    r"""Reads a message: a line, or several.

    A line that ends in a backslash goes on in the next one, without it. A line that begins with three backquotes begins
    a stretch that goes on to such a line of their own; where these two lines alone enclose the message, they are no
    part of it.

    Args:
        read: shows a prompt and reads a line.

    Raises:
        EOFError: at the end of input, when nothing has been read.
    """
    lines, fenced = [read("> ").rstrip("\r")], False
    while True:
        fenced = _fenced_after(lines[-1], fenced)
        more = not fenced and lines[-1].endswith("\\")
        if more:
            lines[-1] = lines[-1][:-1]
        if not more and not fenced:
            break
        try:
            lines.append(read("... ").rstrip("\r"))
        except EOFError:
            break
    if len(lines) > 1 and lines[0].strip() == FENCE and lines[-1].strip() == FENCE:
        return "\n".join(lines[1:-1]).strip("\n")
    return "\n".join(lines).strip()


def _fenced_after(line: str, fenced: bool) -> bool:
    """Whether what follows a line is inside a fence; a line that opens and closes one changes nothing."""
    text = line.strip()
    if fenced:
        return text.rstrip("\\") != FENCE
    return text.startswith(FENCE) and FENCE not in text[len(FENCE):]
