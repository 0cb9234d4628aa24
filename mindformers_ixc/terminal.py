"""What a command shows its user: sentences, what it is doing just now, and how far it is.

MindSpore and MindFormers write hundreds of lines to standard output and standard error, from Python and from C++, so a
command that uses them sends both descriptors to a log file (`Terminal.libraries_to`) and talks to the user through
`current`, which keeps the descriptor that was standard error. On a terminal a live line below the sentences says what
goes on, a spinner or a bar; elsewhere such things are plain lines, few of them.

A rank of `mindformers launch` has its log as standard error already. What the user is to see, it writes to a file that
the launcher copies to its own terminal (`SHOWN`).
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from mindformers_ixc.tables import PAINT, broken, clip

Item = TypeVar("Item")

# What the launcher tells its ranks: the one that shows something, columns of the terminal (0: it is none), whether to
# be quiet, and the file to write to.
SHOWN = "MINDFORMERS_IXC_SHOWN"

# Seconds of silence after which something that is no terminal gets a line that says what goes on.
PATIENCE_S = 0.8
# Seconds after which a terminal gets a spinner, and between two of its pictures.
SPINNER_AFTER_S, SPINNER_EVERY_S = 0.3, 0.12

SPINNER, PLAIN_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"
COLOURS = {"bold": "1", "red": "31", "cyan": "36"}

# Seconds between two pictures of a live line at least; more where a launcher copies them from a file, which keeps all.
LIVE_EVERY_S, LIVE_IN_FILE_EVERY_S = 0.1, 1.0

# Columns where nobody says how many there are.
COLUMNS = 80

# What a line with a command begins with.
COMMAND = "    "


class Terminal:
    """Standard error as the user sees it, or a file in its place.

    Args:
        stream: what is written to; by default whatever `sys.stderr` is at that time.
        log: gets every sentence as well, without colours; `None` for none.
        interactive: whether the stream is a terminal, on which lines can be taken back; by default it is asked.
        columns: of the terminal; by default it is asked each time, for windows change.

    Attributes:
        quiet: show sentences only, neither what goes on nor how far it is.
        verbose: let the libraries write to the terminal too.
        log_path: where the libraries write to instead, if they do.
        last_log: the file that has the traceback of the last exception, if one has.
    """

    def __init__(self, stream: TextIO | None = None, log: TextIO | None = None, interactive: bool | None = None,
                 columns: int | None = None):
        self._stream, self._log, self._interactive, self._columns = stream, log, interactive, columns
        self.quiet = self.verbose = False
        self.log_path: Path | None = None
        self.last_log: Path | None = None
        self._lock = threading.RLock()
        self._live = ""                      # what stands in the live line
        self._drawn_at = -LIVE_IN_FILE_EVERY_S
        self._doing: list[_Doing] = []       # what goes on, the outermost first
        self._drawer: threading.Thread | None = None
        self._counting = 0                   # bars of `tqdm` that are shown

    @property
    def stream(self) -> TextIO:
        """What sentences are written to."""
        return self._stream if self._stream is not None else sys.stderr

    @property
    def interactive(self) -> bool:
        """Whether lines can be taken back."""
        if self._interactive is not None:
            return self._interactive
        try:
            return self.stream.isatty() and os.environ.get("TERM") != "dumb"
        except (ValueError, AttributeError):          # closed, or something that a program put in its place
            return False

    @property
    def columns(self) -> int:
        """Of the terminal."""
        if self._columns:
            return self._columns
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return os.get_terminal_size(self.stream.fileno()).columns or COLUMNS
        return shutil.get_terminal_size((COLUMNS, 24)).columns

    @property
    def knows_unicode(self) -> bool:
        """Whether signs beyond ASCII can be expected to be shown."""
        given = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := os.environ.get(name))), "")
        return "utf" in given.lower()

    def paint(self, text: str, *styles: str) -> str:
        """A text in colours (`COLOURS`), where there are any: on a terminal, unless NO_COLOR is set."""
        if not self.interactive or os.environ.get("NO_COLOR"):
            return text
        return f"\033[{';'.join(COLOURS[style] for style in styles)}m{text}\033[0m"

    def say(self, text: str, logged: str | None = None) -> None:
        """Shows lines that stay; they are in the log too, or what is `logged` in their place."""
        with self._lock:
            self._erase()
            # the bar comes again below; in a file, where only those of checkpoints are shown, its line stays
            over = "" if not self._counting else "\r\033[K" if self.interactive else "\n"
            self._write(self.stream, over + self._fitted(text) + "\n")
            self.log(text if logged is None else logged)

    def fault(self, sentence: str) -> None:
        """Shows what is wrong."""
        self.say(f"{self.paint('error:', 'red', 'bold')} {sentence}")

    def _fitted(self, text: str) -> str:
        """Lines broken between words where the terminal would break them inside; commands, which are copied, are not.
        """
        if not self.interactive:
            return text
        return "\n".join(line if line.startswith(COMMAND) else "\n".join(broken(line, self.columns))
                         for line in text.split("\n"))

    def note(self, text: str, logged: str | None = None) -> None:
        """Shows lines that stay, unless the user wants it quiet; they are in the log in any case."""
        if self.quiet:
            self.log(text if logged is None else logged)
        else:
            self.say(text, logged)

    def log(self, text: str) -> None:
        """Writes lines to the log alone, if there is one."""
        if self._log is not None:
            self._write(self._log, PAINT.sub("", text) + "\n")

    def live(self, text: str) -> None:
        """Puts a text into the live line, in place of what stood there; nothing where lines cannot be taken back."""
        if self.quiet or not self.interactive:
            return
        with self._lock:
            now = time.monotonic()
            if now - self._drawn_at >= (LIVE_EVERY_S if self._columns is None else LIVE_IN_FILE_EVERY_S):
                self._drawn_at = now
                self._draw(text)

    def pass_on(self, text: str) -> None:
        """Shows what another terminal has written, live line included."""
        with self._lock:
            self._write(self.stream, text)
            self._live = re.split(r"[\r\n]", self._live + text)[-1].removesuffix("\033[K")

    def rest(self) -> None:
        """Takes the live line away."""
        with self._lock:
            self._erase()

    def leave_line(self) -> None:
        """Takes the live line away and, on a terminal, goes to the next line: Ctrl-C has put its sign there."""
        with self._lock:
            self._erase()
            if self.interactive:
                self._write(self.stream, "\n")

    @contextlib.contextmanager
    def doing(self, what: str, at_once: bool = False) -> Iterator[None]:
        """Says what goes on while the block runs, if it takes its time: a spinner, or a line.

        Args:
            what: such as `Compiling the step`.
            at_once: it is known to take long, so the line of what is no terminal comes immediately.
        """
        if self.quiet:
            yield
            return
        entry = _Doing(what, self, at_once)
        with self._lock:
            self._doing.append(entry)
        if at_once:
            entry.tick()
        self._start_drawing()
        try:
            yield
        finally:
            with self._lock:
                if entry in self._doing:
                    self._doing.remove(entry)
                if self.interactive:
                    self._erase()

    def waiting(self, what: str) -> contextlib.ExitStack:
        """What `doing` shows on a terminal, until it is closed; elsewhere nothing, not even a line."""
        stack = contextlib.ExitStack()
        if self.interactive:
            stack.enter_context(self.doing(what))
        return stack

    @contextlib.contextmanager
    def counting(self, total: int, what: str, unit: str, **options: Any) -> Iterator[Any]:
        """A bar of `tqdm` on a terminal, in place of what `doing` shows.

        Args:
            total: how much there is to do.
            what: is done.
            unit: of what is counted.
            **options: further ones of `tqdm`.

        Yields:
            It; `update` moves it on.
        """
        tqdm = importlib.import_module("tqdm").tqdm
        options = {"disable": None, "ascii": not self.knows_unicode, **options}
        options["disable"] = True if self.quiet else options["disable"]
        with self._lock:
            self._erase()
        with tqdm(total=total, desc=what, unit=unit, file=self.stream, **options) as bar:
            shown = not bar.disable
            self._counting += shown
            try:
                yield bar
            finally:
                self._counting -= shown

    def counted(self, items: Iterable[Item], total: int, what: str, unit: str, **options: Any) -> Iterator[Item]:
        """The items, which `counting` counts."""
        with self.counting(total, what, unit, **options) as bar:
            for item in items:
                yield item
                bar.update()

    @contextlib.contextmanager
    def libraries_to(self, path: Path) -> Iterator[None]:
        """Sends descriptors 1 and 2, whoever writes to them, to the end of a file while the block runs.

        Sentences go on to what was standard error. An exception's traceback stays in the file too.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace"))
            before = [os.dup(1), os.dup(2)]
            for number in before:
                stack.callback(os.close, number)
            shown = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
            stack.enter_context(shown)
            with self._lock:
                outside, self._stream, self._log = (self._stream, self._log), self._stream or shown, log
                self.log_path = path
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            try:
                yield
            except BaseException:
                traceback.print_exc(file=log)
                self.last_log = path
                raise
            finally:
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(OSError, ValueError):
                        stream.flush()
                ctypes.CDLL(None).fflush(None)        # what C++ has printed and not written yet belongs there too
                for number, kept in zip((1, 2), before):
                    os.dup2(kept, number)
                with self._lock:
                    self._erase()
                    self._doing.clear()
                    self._stream, self._log = outside
                    self.log_path = None

    def unlock(self) -> None:
        """Takes a new lock, in a child process that has none of the threads which may hold this one."""
        self._lock = threading.RLock()
        self._doing, self._drawer = [], None

    def _start_drawing(self) -> None:
        with self._lock:
            if self._drawer is None or not self._drawer.is_alive():
                self._drawer = threading.Thread(target=self._draw_on, name="spinner", daemon=True)
                self._drawer.start()

    def _draw_on(self) -> None:
        """Shows what goes on until nothing does; in a thread of its own."""
        while True:
            time.sleep(SPINNER_EVERY_S)
            with self._lock:
                if not self._doing:
                    self._drawer = None
                    return
                if not self._counting:
                    with contextlib.suppress(OSError, ValueError):
                        self._doing[-1].tick()

    def _draw(self, text: str) -> None:
        clipped = clip(text, self.columns - 1)
        if clipped != self._live:
            self._write(self.stream, "\r" + clipped + "\033[K")
            self._live = clipped

    def _erase(self) -> None:
        if self._live:      # elsewhere it is a line that another process has not finished yet
            self._write(self.stream, "\r\033[K" if self.interactive else "\n")
            self._live = ""

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        """Writes, as far as somebody takes it: a terminal that was closed, or a full disk, ends no run."""
        with contextlib.suppress(OSError, ValueError):
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode("ascii", "backslashreplace").decode())
            stream.flush()


class _Doing:
    """Something that goes on, and what of it has been said.

    Args:
        what: its name.
        terminal: where it is said.
        at_once: say it without waiting whether it takes long.
    """

    def __init__(self, what: str, terminal: Terminal, at_once: bool):
        self.what, self.terminal, self.since = what, terminal, time.monotonic()
        self.patience = 0.0 if at_once else None
        self.said = False

    def tick(self) -> None:
        """Says it anew, if it is time."""
        terminal, seconds = self.terminal, time.monotonic() - self.since
        if terminal.interactive:
            if seconds >= (SPINNER_AFTER_S if self.patience is None else 0):
                signs = SPINNER if terminal.knows_unicode else PLAIN_SPINNER
                sign = signs[int(seconds / SPINNER_EVERY_S) % len(signs)]
                terminal._draw(f"{sign} {self.what}" + (f", {seconds:.0f} s" if seconds >= 2 else ""))
        elif not self.said and seconds >= (PATIENCE_S if self.patience is None else 0):
            self.said = True
            terminal.say(f"{self.what} ...")


def claim_stdout() -> TextIO:
    """Sends descriptor 1 to standard error from now on and returns a stream to the real standard output."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return answers


class Answers:
    """A stream to which something is told before the first thing is written to it.

    Args:
        stream: what is written to.
        first: called once, before.
    """

    def __init__(self, stream: TextIO, first: Callable[[], None]):
        self._stream, self._first = stream, first

    def isatty(self) -> bool:
        """Whether it goes to a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Writes a text."""
        self._first()
        return self._stream.write(text)

    def flush(self) -> None:
        """Hands over what was written."""
        self._stream.flush()

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self._stream.fileno()


current = Terminal()
# of a process that is forked while another thread draws nobody would give the lock back
os.register_at_fork(after_in_child=lambda: current.unlock())


def configure(verbose: bool = False, quiet: bool = False) -> None:
    """Sets what the options of a command say; a rank that the launcher shows gets the launcher's file to write to.

    Args:
        verbose: let the libraries write to the terminal too.
        quiet: show sentences only.
    """
    global current
    current = _of_launch() or Terminal()
    current.verbose, current.quiet = verbose, quiet or current.quiet


def tell_ranks(path: Path, rank: int) -> dict[str, str]:
    """The variable that lets a rank show its user the same as a run by itself, by way of a file.

    Args:
        path: the file; the launcher copies it to its terminal.
        rank: the one that writes it.
    """
    return {SHOWN: f"{rank}:{current.columns if current.interactive else 0}:{int(current.quiet)}:{path}"}


def _of_launch() -> Terminal | None:
    """What the rank of a launch writes to, if this process is one: the launcher's file, and its own log."""
    if SHOWN not in os.environ:
        return None
    number, columns, quiet, path = os.environ[SHOWN].split(":", 3)
    if os.environ.get("RANK_ID") != number or os.environ.get("MS_ROLE") == "MS_SCHED":
        return None
    try:
        file: Any = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - stays
    except OSError:
        return None
    shown = Terminal(file, sys.stderr, interactive=columns != "0", columns=int(columns) or None)
    shown.quiet = quiet == "1"
    return shown


def quiet_libraries() -> None:
    """Keeps the libraries' warnings off the terminal; they still reach the log folder."""
    os.environ.setdefault("GLOG_v", "3")             # MindSpore: 3 = errors only
    warnings.filterwarnings("ignore")
    logging.getLogger().addHandler(logging.NullHandler())


class Sentences(logging.Handler):
    """Shows what is logged as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record."""
        current.say(record.getMessage())


def show_warnings(checkpoints: int) -> None:
    """Shows what this package logs as warnings, whatever happens to the libraries' logs.

    Args:
        checkpoints: level from which on it is shown what is to be said of a checkpoint.
    """
    own = logging.getLogger("mindformers_ixc")
    if not any(isinstance(handler, Sentences) for handler in own.handlers):
        own.addHandler(Sentences())
    logging.getLogger("mindformers_ixc.checkpoint").setLevel(checkpoints)


@contextlib.contextmanager
def to_be_said_later() -> Iterator[None]:
    """Shows no warning about a checkpoint in the block: it is read again, and then it is time."""
    logger = logging.getLogger("mindformers_ixc.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
