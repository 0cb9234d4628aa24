"""Signals that ask a process to end, and processes that must not outlive another.

A run that is asked to end by SIGTERM or Ctrl-C finishes its step and saves a checkpoint first. Python's own handlers do
not serve: they wait for the main thread, and MindSpore puts its own in place of SIGINT's while a graph runs. So both
signals are blocked before the libraries start their threads, and a thread of its own waits for them.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from mindformers_ixc import terminal

# Every process of a parallel run that `mindformers launch` started has this variable, with a value of the launch's own.
JOB = "MINDFORMERS_IXC_JOB"

_PR_SET_PDEATHSIG = 1      # of prctl(2)


class Interruption:
    """What this process was asked, and how far it is.

    Attributes:
        number: of the signal that asked the run to stop, `None` until then.
        phase: `starting` (a signal ends the process at once), `training` (it stops after a step), `ending` (what is
            being written is finished first).
        stopped: whether the run ended before its last step because of it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.phase = "starting"
        self.stopped = False

    def ask(self, number: int) -> bool:
        """Notes a signal; returns whether the process is to go on until it has saved its work."""
        if self.phase == "starting" or self.number is not None:
            return False
        self.number = number
        what = ("the step in progress is finished and a checkpoint saved" if self.phase == "training" else
                "training is over and the results are being written")
        _say(f"{name_of(number)}: {what}; a second signal ends the run at once.")
        return True

    @property
    def exit_code(self) -> int:
        """Of a run by itself: 128 and the signal's number if it was stopped, else 0."""
        return 128 + self.number if self.stopped and self.number is not None else 0


current = Interruption()


def name_of(number: int) -> str:
    """`SIGTERM` of 15; a number without a name stays a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Lets SIGTERM and SIGINT ask this process's run to stop; call it before any library starts threads.

    What the process was told to ignore stays ignored, as `nohup` and background jobs want it.
    """
    global current
    numbers = {number for number in (signal.SIGINT, signal.SIGTERM)
               if signal.getsignal(number) is not signal.SIG_IGN}
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return
    current = Interruption()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    _unblock_in_children()
    threading.Thread(target=_wait, args=(numbers,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(numbers: set[int]) -> None:
    found = signal.sigwaitinfo(numbers)
    if found.si_pid == os.getpid():
        # MindSpore does so when data workers have died or the scheduler is lost: no step can be finished then
        _say(f"MindSpore ended this process by {name_of(found.si_signo)}; the lines above say why. Go on with "
             "--resume_training True.")
        os._exit(128 + found.si_signo)
    if not current.ask(found.si_signo):
        _say(f"{name_of(found.si_signo)} ended the run before there was anything to save.")
        os._exit(128 + found.si_signo)
    # the next one ends the process by the system's own hand: a graph that compiles lets no Python code run
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    for number in numbers:
        library.signal(number, None)        # SIG_DFL
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    threading.Event().wait()


_staying = threading.Event()      # set while an interrupt does not end the process


@contextlib.contextmanager
def leaving_at_interrupt() -> Iterator[None]:
    """Ends the process when SIGINT comes in the block; enter it before any library starts threads.

    An import can take Python's `KeyboardInterrupt` for an error of its own and go on, and MindSpore puts another
    handler in place while it works.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _staying.clear()
    threading.Thread(target=_leave, name="interrupt", daemon=True).start()
    try:
        yield
    finally:
        _staying.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave() -> None:
    while not _staying.is_set():
        found = signal.sigtimedwait({signal.SIGINT}, 0.1)
        if found is None:
            continue
        if _staying.is_set():
            os.kill(os.getpid(), signal.SIGINT)       # it was meant for somebody else
            return
        terminal.current.leave_line()
        if found.si_pid:        # 0 of the keys on a terminal; what a program sends is no wish of the one who reads this
            _say(f"SIGINT of {sender_of(found.si_pid)} ended this command.")
        os._exit(128 + signal.SIGINT)


def sender_of(pid: int) -> str:
    """The process that sent a signal, with its name while it runs: `process 7 (bash)`."""
    name = ""
    with contextlib.suppress(OSError):
        name = f" ({Path(f'/proc/{pid}/comm').read_text(encoding='utf-8', errors='replace').strip()})"
    return f"{'this process itself, ' if pid == os.getpid() else ''}process {pid}{name}"


def _unblock_in_children() -> None:
    """Lets SIGTERM end forked children again; Ctrl-C, which a terminal sends to them too, stays blocked."""
    global _registered
    if not _registered:
        os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}))
        _registered = True


_registered = False


def _say(text: str) -> None:
    terminal.current.say(text)


def die_with(parent: int) -> None:
    """Lets the system kill this process when its parent's main thread ends, however that ends (Linux only).

    Args:
        parent: number of the parent as it was; if it is gone already this process ends now.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def die_with_launcher() -> None:
    """`die_with` for a rank or scheduler of `mindformers launch`: not to outlive the msrun that started it."""
    parent = os.getppid()
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
        if f"{JOB}={os.environ[JOB]}".encode() not in variables:     # another one has taken the orphan over
            os._exit(128 + signal.SIGKILL)
    die_with(parent)
