"""How a command ends that cannot go on: in a sentence, or quietly where nobody reads what it prints any more."""
from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a process that the system ends because nobody reads its output, as a shell shows it.
NOBODY_READS = 128 + signal.SIGPIPE

# What MindSpore puts before the places in its own code that an error came from.
_RULE = "-" * 20


def open_streams() -> None:
    """Gives the process the streams that it was started without (`>&-`), going nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:       # the lowest free descriptor is taken, which is the stream's
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays


def is_unread(*streams: Any) -> bool:
    """Whether one of some streams is a pipe whose other end is closed, as of `| head -1` once it has its line."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(state & select.POLLERR for _, state in poll.poll(0)):
                return True
    return False


def let_go(*streams: Any) -> None:
    """Lets streams that nobody reads lose what they still hold, so that the interpreter ends without a complaint."""
    with open(os.devnull, "wb") as nothing:
        for stream in streams:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(nothing.fileno(), stream.fileno())


@contextlib.contextmanager
def reading_help() -> Iterator[None]:
    """For a block that prints help on standard output and may end the process: quietly, where nobody reads it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        let_go(sys.stdout)
        sys.exit(NOBODY_READS)


def sentence_of(error: Exception) -> str:
    """What is said of an error in the input."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        # the system's own errors name a file and a reason
        return f"{error.filename} cannot be used: {error.strerror}."
    if isinstance(error, OSError) and error.strerror:
        return f"Something cannot be read or written: {error.strerror}."
    return str(error)


def fault_of(error: Exception, log: Path) -> str:
    """What is said of an error that nobody foresaw: what a library says, without the places in its code.

    Args:
        error: its traceback is in the log.
        log: the file.
    """
    text = str(error).partition(_RULE)[0].strip()
    return f"{type(error).__name__}: {text or 'no message'}\nThe lines that led there are in {log}."
