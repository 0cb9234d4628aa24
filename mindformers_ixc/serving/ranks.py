"""One server over the ranks of a layout: rank 0 schedules and answers, the others compute what it computes.

Every graph of a layout runs on all its ranks, with the same inputs in the same order. So before rank 0 lets its decoder
do something it says so to the others, which do the same with theirs; a row is a number then. Afterwards each says how
it ended: a rank that came to another end, or to none, ends the server, since nothing that follows could be right.

The ranks are processes of one machine and talk over a socket in a folder of `mindformers launch`, which its user alone
can enter. While there is nothing to do nothing is exchanged, so no rank waits too long in a collective.
"""
from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.errors import RanksError
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.serving.scheduling import Ended, Job, Refused, RowDecoder

# Variable by which `mindformers launch` tells the ranks of a server the folder in which they meet.
MEETING = "MINDFORMERS_IXC_MEETING"

# In that folder: the socket of rank 0, and what is there as soon as the port is open.
SOCKET, READY = "rank_0", "ready"

# What rank 0 says to the others, with arguments: to do something (methods of `Rows`), to take a search's next step or
# to break it off, to end.
GO, BREAK, END = ("go",), ("break",), ("end",)

# Seconds between two looks whether rank 0 listens already.
LOOK = 0.1


class Rows:
    """What can be said to a rank: a decoder whose rows have numbers.

    Args:
        decoder: this rank's.
    """

    def __init__(self, decoder: RowDecoder):
        self.decoder = decoder
        self.rows: dict[int, Any] = {}

    def open(self, number: int, arguments: tuple, named: dict) -> None:
        """Opens a row; the arguments are the decoder's."""
        self.rows[number] = self.decoder.open(*arguments, **named)

    def advance(self, number: int) -> np.ndarray | None:
        """Computes one piece of a row's prompt."""
        return self.decoder.advance(self.rows[number])

    def fork(self, number: int, taken: int) -> None:
        """Makes a row that goes on from the end of another one's prompt."""
        self.rows[number] = self.decoder.fork(self.rows[taken])

    def step(self, numbers: Sequence[int], tokens: Sequence[int]) -> list[np.ndarray | Exception]:
        """One more token of each row."""
        return self.decoder.step([self.rows[number] for number in numbers], tokens)

    def close(self, number: int) -> None:
        """Frees a row."""
        self.decoder.close(self.rows.pop(number))

    def whole(self, prompt: Any, mode: str, options: GenerationOptions, between: Callable[[], None]) -> list[int]:
        """Makes an answer by a search; `between` its steps others go on."""
        job = Job(prompt, mode, options.max_new_tokens, [], "", lambda error: None, True, None, options)
        return self.decoder.whole(prompt, job, between)

    def warm_up(self, mode: str) -> None:
        """Compiles what a mode needs, where a decoder has something to compile beforehand."""
        if hasattr(self.decoder, "warm_up"):
            self.decoder.warm_up(mode)


def outcome(result: object) -> str:
    """How a call ended, for the ranks to compare: what failed, and the ids of a search, which each chose by itself."""
    if isinstance(result, (Ended, Refused)):        # a search that rank 0 broke off
        return "ended"
    if isinstance(result, Exception):
        return type(result).__name__
    if isinstance(result, list):
        return ", ".join(type(one).__name__ if isinstance(one, Exception) else str(one) if isinstance(one, int) else
                         "scores" for one in result)
    return "done"


class Leading:
    """The decoder of rank 0, which lets all ranks do what it is told (a `scheduling.RowDecoder`, of numbered rows).

    Args:
        decoder: of this rank.
        others: connections to the other ranks, in their order.
        failed: told in a sentence that the ranks are no longer together; must not return.

    Attributes:
        most: the decoder's.
    """

    def __init__(self, decoder: RowDecoder, others: Sequence[Connection], failed: Callable[[str], Any]):
        self.decoder, self.others, self.failed = decoder, others, failed
        self.most, self.own = decoder.most, Rows(decoder)
        self._numbers = itertools.count()

    def __getattr__(self, name: str) -> Any:
        """What only asks the decoder, for its memory say, and so computes nothing."""
        return getattr(self.decoder, name)

    def prepare(self, sample: EncodedSample) -> Any:
        """See `scheduling.RowDecoder`."""
        return self.decoder.prepare(sample)

    def rest(self, row: int) -> int:
        """See `scheduling.RowDecoder`."""
        return self.decoder.rest(self.own.rows[row])

    def known(self, row: int) -> int:
        """See `scheduling.RowDecoder`."""
        return self.decoder.known(self.own.rows[row])

    def has_room(self, prompt: Any, new_tokens: int, answers: int) -> bool:
        """See `scheduling.RowDecoder`; rank 0's decoder is as full as the others'."""
        return self.decoder.has_room(prompt, new_tokens, answers)

    def open(self, *arguments: Any, **named: Any) -> int:
        """See `scheduling.RowDecoder`."""
        number = next(self._numbers)
        self._all("open", number, arguments, named)
        return number

    def advance(self, row: int) -> np.ndarray | None:
        """See `scheduling.RowDecoder`."""
        return self._all("advance", row)

    def fork(self, row: int) -> int:
        """See `scheduling.RowDecoder`."""
        number = next(self._numbers)
        self._all("fork", number, row)
        return number

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> list[np.ndarray | Exception]:
        """See `scheduling.RowDecoder`."""
        return self._all("step", list(rows), [int(token) for token in tokens])

    def close(self, row: int) -> None:
        """See `scheduling.RowDecoder`."""
        self._all("close", row)

    def warm_up(self, mode: str) -> None:
        """Compiles what a mode needs, on all ranks."""
        self._all("warm_up", mode)

    def whole(self, prompt: Any, job: Job, between: Callable[[], None]) -> list[int]:
        """See `scheduling.RowDecoder`; what is told between two steps of a search, the ranks do between them."""
        def together() -> None:
            try:
                between()
            except BaseException:
                self._tell(BREAK)
                raise
            self._tell(GO)

        options = job.details
        if options.seed is None:        # all ranks must draw alike
            options = replace(options, seed=secrets.randbits(32))
        return self._all("whole", prompt, job.mode, options, between=together)

    def end(self) -> None:
        """Lets the other ranks end."""
        for other in self.others:
            with contextlib.suppress(OSError):
                other.send(END)

    def _all(self, name: str, *arguments: Any, **own: Any) -> Any:
        """Lets all ranks do something.

        Args:
            name: method of `Rows`.
            *arguments: of all ranks.
            **own: of this one.
        """
        self._tell((name, *arguments))
        try:
            result = getattr(self.own, name)(*arguments, **own)
        except Exception as error:
            self._compare(name, outcome(error))
            raise
        self._compare(name, outcome(result))
        return result

    def _tell(self, command: tuple) -> None:
        for rank, other in enumerate(self.others, 1):
            try:
                other.send(command)
            except OSError:
                self._lose(rank)

    def _compare(self, name: str, found: str) -> None:
        """Waits until all ranks have done it, and looks whether they came to the same end."""
        for rank, other in enumerate(self.others, 1):
            try:
                theirs = other.recv()
            except (OSError, EOFError):
                self._lose(rank)
                return
            if theirs != found:
                self.failed(f"Rank {rank} came to another end than rank 0 ({name}: {theirs:.80} and {found:.80}), so "
                            "the server cannot go on; its log says why. Start the server again.")

    def _lose(self, rank: int) -> None:
        self.failed(f"Rank {rank} has ended, so the server cannot go on; its log says why. Start the server again.")


class Following:
    """A rank that does what rank 0 says.

    Args:
        decoder: this rank's, made like rank 0's.
        leader: connection to rank 0.
    """

    def __init__(self, decoder: RowDecoder, leader: Connection):
        self.own, self.leader = Rows(decoder), leader

    def run(self) -> None:
        """Follows until rank 0 says that it is over.

        Raises:
            RanksError: when rank 0 is gone.
        """
        while (command := self._hear()) != END:
            self._do(*command)

    def _hear(self) -> tuple:
        try:
            return self.leader.recv()
        except (OSError, EOFError) as error:
            raise RanksError("Rank 0 has ended without a word, so this rank ends too.") from error

    def _do(self, name: str, *arguments: Any) -> None:
        own = {"between": self._between} if name == "whole" else {}
        try:
            result = getattr(self.own, name)(*arguments, **own)
        except RanksError:
            raise
        except Exception as error:      # rank 0 has the same one and tells its client, or finds that it has not
            result = error
        try:
            self.leader.send(outcome(result))
        except OSError as error:
            raise RanksError("Rank 0 has ended meanwhile, so this rank ends too.") from error

    def _between(self) -> None:
        """Does what rank 0 does between two steps of a search."""
        while (command := self._hear()) not in (GO, BREAK):
            self._do(*command)
        if command == BREAK:
            raise Ended("broken off by rank 0")


def accept(folder: Path, count: int) -> Callable[[], list[Connection]]:
    """Begins to listen for the other ranks; what is given waits for them.

    Args:
        folder: where the ranks meet.
        count: of ranks.

    Returns:
        A function that gives the connections to ranks 1, 2, ...
    """
    listener = Listener(str(folder / SOCKET), "AF_UNIX", backlog=count)

    def connections() -> list[Connection]:
        with listener:
            found = {(other := listener.accept()).recv(): other for _ in range(count - 1)}
        return [found[rank] for rank in range(1, count)]

    return connections


def connect(folder: Path, rank: int) -> Connection:
    """The connection of a rank to rank 0, which may have to begin yet."""
    while True:
        try:
            leader = Client(str(folder / SOCKET), "AF_UNIX")
            break
        except (FileNotFoundError, ConnectionRefusedError):     # the socket has its name before it is listened to
            time.sleep(LOOK)
    leader.send(rank)
    return leader


def meeting() -> Path | None:
    """Where the ranks of this server meet; `None` of a server that is one process."""
    folder = os.environ.get(MEETING)
    return Path(folder) if folder else None


def end_server(sentence: str) -> None:
    """Says why the ranks are no longer together and ends this one at once: a graph may wait for a rank that is gone."""
    terminal.current.fault(sentence)
    os._exit(1)
