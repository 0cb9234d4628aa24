"""Watches the processes of a parallel run: every rank's process and log, in short turns, and says who failed first.

The rank that failed first is the one whose process ended, or whose log told an error, first; what the others say then
only follows from it.
"""
from __future__ import annotations

import codecs
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from mindformers_ixc import terminal
from mindformers_ixc.interruption import JOB, die_with

POLL_S = 0.2
# Seconds that msrun and its scheduler get to end by themselves once a rank has ended with an error.
GRACE_S = 5
# Seconds that a rank gets to end once it has told its error.
STUCK_S = 30
# Seconds between an error that a log ends with and the end of its process; an older one was dealt with.
LINGER_S = 60
# Seconds within which a scheduler's error is still that of the ranks: it runs the same command.
SCHEDULER_LATE_S = 2
# Seconds that killed processes get to be gone: at once, unless the machine is so busy that they cannot even end.
KILL_S = 60

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_DIED = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")
_TOLD = re.compile(r"error: (.+)")                       # the last line of a command of this package
_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r"([A-Za-z_][\w.]*(?:: .+)?)$")     # the line that ends a traceback
_LOGGED = re.compile(r"\d{4}-\d\d-\d\d ")                # an ordinary line: the rank has gone on


class Stopped(BaseException):
    """The launcher was told to end at once; not an error that anything on the way should handle.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopped_by_signals(gently: Callable[[int], bool] = lambda number: False) -> Iterator[None]:
    """Raises `Stopped` where one of the signals arrives; further ones are ignored, so that nothing disturbs the end.

    Args:
        gently: asked once, at the first signal: whether the ranks were told to save and end, and are to be waited for.
    """
    asked = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        first, asked = not asked, True
        if first and gently(number):
            return
        for other in earlier:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    # what is ignored stays so: that is what nohup is for
    earlier = {number: handler for number in STOPPING
               if (handler := signal.getsignal(number)) is not signal.SIG_IGN}
    try:
        for number in earlier:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


class WatchedRank:
    """A process of the job: whether it runs, and what it has logged.

    Args:
        number: of the rank; `None` for the scheduler.
        log: its log file.
    """

    def __init__(self, number: int | None, log: Path):
        self.number, self.log = number, log
        self.process: psutil.Process | None = None
        self.code: int | None = None              # exit code, as soon as it is known
        self.ended_at: float | None = None
        self.sentence: str | None = None          # the error it told, if it has not gone on after it
        self.certain = False                      # whether that is the last line of a command
        self.told_at = 0.0
        self.reported = False                     # whether msrun named it
        self._offset, self._line, self._in_traceback = 0, "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def name(self) -> str:
        """What messages call it."""
        return "The scheduler" if self.number is None else f"Rank {self.number}"

    @property
    def failed_at(self) -> float | None:
        """When it was first seen to fail, `None` if it was not."""
        times = [self.told_at] if self.sentence else []
        times += [self.ended_at] if self.code and self.ended_at is not None else []
        return min(times) + (SCHEDULER_LATE_S if self.number is None else 0) if times else None

    def look(self) -> None:
        """Notes whether its process has ended."""
        if self.process is None or self.ended_at is not None:
            return
        try:
            if self.process.status() != psutil.STATUS_ZOMBIE:
                return
            code = _zombie_code(self.process.pid)
        except psutil.Error:
            code = None          # msrun has fetched it already, and says if its code was not 0
        self.has_ended(code)

    def has_ended(self, code: int | None) -> None:
        """Notes that its process has ended."""
        self.code = code
        if self.ended_at is None:
            self.ended_at = time.monotonic()
            if not self.certain and self.ended_at - self.told_at > LINGER_S:
                self.sentence = None

    def read(self) -> str:
        """What it has logged since the last time; notes errors in it."""
        try:
            with open(self.log, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return ""
        self._offset += len(data)
        text = self._decoder.decode(data)
        *lines, self._line = re.split(r"[\r\n]", self._line + text)
        for line in lines:
            self._note(line)
        return text

    def _note(self, line: str) -> None:
        told = _TOLD.match(line)
        if told:
            self.sentence, self.certain, self.told_at = told[1], True, time.monotonic()
        elif line.startswith(_TRACEBACK):
            self._in_traceback = True
        elif self._in_traceback and (raised := _RAISED.match(line)):
            self._in_traceback = False
            self.sentence, self.certain, self.told_at = raised[1], False, time.monotonic()
        elif _LOGGED.match(line):
            self.sentence = None

    def reason(self) -> str:
        """Why it failed, and where that can be read."""
        where = f"Its log is {self.log}."
        if self.code is not None and self.code < 0 and not self.sentence:
            hint = ", as the system does when memory runs out" if self.code == -signal.SIGKILL else ""
            return f"{self.name} was killed by {signal_name(-self.code)}{hint}, so all ranks were ended. {where}"
        if self.sentence:
            stop = "" if self.sentence.endswith((".", "!", "?")) else "."
            return f"{self.name} failed first: {self.sentence}{stop} All ranks were ended. {where}"
        return f"{self.name} ended with code {self.code} without telling an error, so all ranks were ended. {where}"


def _zombie_code(pid: int) -> int | None:
    """Exit code of a process that has ended and that its parent has not fetched; negative for a signal."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return os.waitstatus_to_exitcode(int(fields[49]))     # field 52 of the line, proc(5)
    except (OSError, ValueError, IndexError):
        return None


class Job:
    """An msrun process with its ranks.

    Args:
        command: msrun's.
        environment: of it.
        logs: folder of the logs.
        ranks: numbers of those that run on this server.
        shown: the one that shows how far the run is.
        screen: file into which it writes what the user is to see; by default all of its log is shown.
    """

    def __init__(self, command: list[str], environment: dict[str, str], logs: Path, ranks: range, shown: int,
                 screen: Path | None = None):
        self.command, self.logs = command, logs
        self.environment = {**environment, **(terminal.tell_ranks(screen, shown) if screen else {})}
        self.screen = WatchedRank(shown, screen) if screen else None
        self.ranks = {number: WatchedRank(number, logs / f"worker_{number}.log") for number in ranks}
        self.scheduler = WatchedRank(None, logs / "scheduler.log")
        self.shown = self.ranks[shown]
        # several servers may share the folder
        self.log = logs / ("msrun.log" if ranks.start == 0 else f"msrun_{ranks.start}.log")
        self.process: subprocess.Popen | None = None
        self.unknown: tuple[int, float] | None = None     # exit code and time of a process that never was a known rank

    def run(self) -> int:
        """Runs the job to its end; returns the exit code and leaves no process behind."""
        self.logs.mkdir(parents=True, exist_ok=True)
        for log in [self.log, *(rank.log for rank in self._watched()), *([self.screen.log] if self.screen else [])]:
            if log != self.scheduler.log or 0 in self.ranks:
                log.unlink(missing_ok=True)
        terminal.current.say(f"{len(self.ranks)} ranks are starting; their logs are in {self.logs}.")
        try:
            parent = os.getpid()
            with open(self.log, "wb") as output:
                # a launcher that is killed takes msrun with it, and msrun its ranks (`interruption.die_with_launcher`)
                self.process = process = subprocess.Popen(
                    self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=lambda: die_with(parent))
            while process.poll() is None and not self._hangs():
                self._look(process.pid)
                time.sleep(POLL_S)
        finally:
            self._end()
        self._read_logs()
        if process.returncode == 0 and not any(rank.code for rank in self._watched()):
            return 0
        terminal.current.say(f"error: {self._reason(process.returncode)}")
        return 1

    def _watched(self) -> list[WatchedRank]:
        return [*self.ranks.values(), self.scheduler]

    def _look(self, msrun: int) -> None:
        """Notes what has happened since the last time; `msrun` is its process's number."""
        self._find_processes(msrun)
        for rank in self._watched():
            rank.look()
        self._read_logs()

    def _read_logs(self) -> None:
        """Notes what logs tell, and shows what the shown rank has logged."""
        for rank in self._watched():
            text = rank.read()
            if rank is self.shown and text and self.screen is None:
                terminal.current.pass_on(text)
        if self.screen is not None and (text := self.screen.read()):
            terminal.current.pass_on(text)
        for pid, code in _DIED.findall(self.log.read_text(encoding="utf-8", errors="replace")):
            known = [rank for rank in self.ranks.values() if rank.process is not None and rank.process.pid == int(pid)]
            for rank in known:
                rank.has_ended(int(code))
                rank.reported = True
            if not known and self.unknown is None:
                self.unknown = int(code), time.monotonic()

    def _find_processes(self, msrun: int) -> None:
        """Notes which of msrun's children is which rank; their own children have the same variables."""
        if all(rank.process for rank in self._watched()):
            return
        try:
            children = psutil.Process(msrun).children()
        except psutil.Error:
            return
        for child in children:
            try:
                variables = child.environ()
            except (psutil.Error, OSError):
                continue
            role, number = variables.get("MS_ROLE"), variables.get("RANK_ID", "")
            if role == "MS_SCHED":
                self.scheduler.process = child
            elif role == "MS_WORKER" and number.isdigit() and int(number) in self.ranks:
                self.ranks[int(number)].process = child

    def _hangs(self) -> bool:
        """Whether a rank has failed and the others had their time."""
        now = time.monotonic()
        if self.unknown and now - self.unknown[1] > GRACE_S:
            return True
        return any((rank.code and rank.ended_at is not None and now - rank.ended_at > GRACE_S)
                   or (rank.sentence and rank.certain and now - rank.told_at > STUCK_S) for rank in self._watched())

    def _end(self) -> None:
        """Kills what is left of the job, and waits until it is gone."""
        waiting = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            if self.process is not None:
                self.process.kill()             # first, for it would take the others' end for a failure
                self.process.wait()
            until = time.monotonic() + KILL_S
            while (left := self._left()) and time.monotonic() < until:
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(left, timeout=1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, waiting)

    def _left(self) -> list[psutil.Process]:
        """Processes of the job that still run; also those whose parent is gone."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(JOB) == self.environment[JOB] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def _reason(self, code: int) -> str:
        """Who failed first and why; `code` is msrun's exit code."""
        failed = [(at, rank) for rank in self._watched() if (at := rank.failed_at) is not None]
        if self.unknown and not any(rank.sentence for _, rank in failed):
            return (f"A rank ended with code {self.unknown[0]} as soon as it was started, so all ranks were ended. The "
                    f"logs are in {self.logs}.")
        sure = [at for at, rank in failed if rank.code or rank.certain]
        if sure or code > 0:
            since = min(sure, default=0.0) - LINGER_S
            failed = [(at, rank) for at, rank in failed if rank.code or rank.certain or rank.told_at > since]
            if failed:
                return min(failed, key=lambda pair: (pair[0], not pair[1].reported))[1].reason()
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
        told = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
                if re.match(r"(\w*Error|error): ", line)]
        return f"msrun {how}, so all ranks were ended{': ' + told[-1] if told else '.'} Its output is {self.log}."
