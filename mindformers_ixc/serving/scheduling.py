"""Who is computed for next: continuous batching as host logic, over any decoder that keeps answers apart.

A tick is a part of one prompt, as much as its decoder computes at a time, and one more token of every answer that is
being written, so a prompt, however long, holds the others up for a part only. Requests wait in a queue of their own for
each client; the clients take turns. Nothing here knows MindSpore or HTTP. `tick` is for one thread; `submit` and
`cancel` are for any.
"""
from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

Row = TypeVar("Row")

# Pieces of other prompts, shorter ones, that may go before a prompt's next piece.
PATIENCE = 4


class RowDecoder(Protocol[Row]):
    """Keeps some answers apart and continues several at once.

    Attributes:
        most: rows that may be open at the same time.
    """

    most: int

    def prepare(self, sample: Any) -> Any:
        """What is opened for a sample; for any thread."""

    def has_room(self, prompt: Any, new_tokens: int, answers: int) -> bool:
        """Whether there is memory for so many answers of `new_tokens` at most beside those that are open."""

    def open(self, prompt: Any, mode: str, new_tokens: int, answers: int) -> Row:
        """A row for a prompt and at most `new_tokens` more, of which `fork` makes the other answers."""

    def advance(self, row: Row) -> np.ndarray | None:
        """Computes one piece of a row's prompt; after the last one the scores `(V,)` of the next token."""

    def rest(self, row: Row) -> int:
        """Positions of a row's prompt that are still to be computed."""

    def known(self, row: Row) -> int:
        """Positions of a row's prompt that were taken over from earlier ones."""

    def fork(self, row: Row) -> Row:
        """Another row that goes on from the end of the same prompt."""

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[np.ndarray | Exception]:
        """Scores `(V,)` after one more token of each row, or what went wrong with that row."""

    def close(self, row: Row) -> None:
        """Frees a row."""

    def whole(self, prompt: Any, job: Job, between: Callable[[], None]) -> list[int]:
        """Token ids of an answer that is not made step by step (beam search).

        Args:
            prompt: what is answered.
            job: says how.
            between: called between steps; what it raises ends the search.
        """


class Writer(Protocol):
    """Makes an answer of scores.

    Attributes:
        finished: why the answer has ended; empty while it goes on.
    """

    finished: str

    def take(self, scores: np.ndarray) -> int:
        """Chooses the next token and passes it on."""

    def take_all(self, ids: Sequence[int]) -> None:
        """Passes on a whole answer that a search has made."""


class Refused(Exception):
    """A request that is not taken: the sentence, the HTTP status, and seconds after which to try again, if at all."""

    def __init__(self, sentence: str, status: int, retry_after: int | None = 1):
        super().__init__(sentence)
        self.status, self.retry_after = status, retry_after


class Ended(Exception):
    """A job that was ended from outside; raised through a search that is going on."""


@dataclass(eq=False)
class Job:
    """A request.

    Attributes:
        prompt: what the decoder opens; `None` once it has been computed.
        mode: task LoRAs in use.
        new_tokens: of an answer at most.
        writers: one an answer.
        client: who asks; clients take turns.
        on_end: told `None` when all answers are there, or the error.
        is_whole: the answer is not made step by step.
        deadline: by the scheduler's clock; `None` for none.
        details: of the search of a whole answer.
        known: positions of the prompt that were taken over from earlier ones.
    """

    prompt: Any
    mode: str
    new_tokens: int
    writers: list[Writer]
    client: str
    on_end: Callable[[Exception | None], None]
    is_whole: bool = False
    deadline: float | None = None
    details: Any = None
    submitted: float = 0.0
    is_cancelled: bool = False
    has_ended: bool = False
    rows: list[Any] = field(default_factory=list)
    passed_over: int = 0
    known: int = 0


@dataclass
class Counts:
    """What has happened, for `/metrics`.

    Attributes:
        requests: by how they ended: `done`, `cancelled`, `failed`, `late`, `refused`.
        prompt_positions: computed or taken over.
        new_tokens: of all answers.
        steps: decoding steps.
        pieces: pieces of prompts.
        longest_tick: seconds, a step of a whole answer in front of it included.
    """

    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("done", "cancelled", "failed", "late", "refused"), 0))
    prompt_positions: int = 0
    new_tokens: int = 0
    steps: int = 0
    pieces: int = 0
    longest_tick: float = 0.0


class Scheduler(Generic[Row]):
    """Decides what a decoder computes next.

    Args:
        decoder: computes.
        queue: requests that may wait, of all clients together.
        queue_each: of one client.
        clock: seconds, for deadlines.

    Attributes:
        after_tick: called when a tick is over, also between the steps of a whole answer.
    """

    def __init__(self, decoder: RowDecoder[Row], queue: int = 64, queue_each: int = 32,
                 clock: Callable[[], float] = time.monotonic):
        self.decoder, self.clock = decoder, clock
        self.queue_limit, self.queue_limit_each = queue, queue_each
        self.counts = Counts()
        self.is_draining = self.has_given_up = False
        self.after_tick: Callable[[], None] = lambda: None
        self._lock = threading.RLock()              # of `waiting`
        self.waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self.reading: list[Job] = []                # whose prompts are being computed
        self.writing: list[tuple[Job, int]] = []    # answers in the making: job, number of the answer
        self.whole: Job | None = None
        self._unended = 0                           # requests, wherever they are just now
        self._next: dict[tuple[int, int], int] = {}

    @property
    def queued(self) -> int:
        """Requests that wait."""
        with self._lock:
            return sum(map(len, self.waiting.values()))

    @property
    def open_rows(self) -> int:
        """Rows in use, those that are promised to requests whose prompt is being computed included."""
        return sum(len(job.writers) for job in self.reading) + len(self.writing)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._unended

    def submit(self, job: Job) -> None:
        """Takes a request.

        Raises:
            Refused: while draining, and when too many wait.
        """
        with self._lock:
            own = len(self.waiting.get(job.client, ()))
            if self.is_draining:
                self._refuse("The server is shutting down and takes no new requests; ask another one, or later.", 503,
                             5)
            if own >= self.queue_limit_each:
                self._refuse(f"{own} of your requests are waiting already, the most that one client may have; wait for "
                             "some of them.", 429, 2)
            if self.queued >= self.queue_limit:
                self._refuse(f"{self.queued} requests are waiting, the most that this server keeps; try again later.",
                             503, 2)
            job.submitted = self.clock()
            self.waiting.setdefault(job.client, deque()).append(job)
            self._unended += 1

    def _refuse(self, sentence: str, status: int, retry_after: int) -> None:
        self.counts.requests["refused"] += 1
        raise Refused(sentence, status, retry_after)

    def give_up(self) -> None:
        """Ends all requests, those that wait included, with the next tick: the time to drain is over."""
        self.has_given_up = True

    def cancel(self, job: Job) -> None:
        """Says that nobody wants a request's answers any more; its rows are free after this tick."""
        job.is_cancelled = True

    def tick(self) -> bool:
        """Computes a piece of a prompt and one more token of every answer.

        Returns:
            Whether there was anything to do.
        """
        start = self.clock()
        self._drop()
        done = self._admit()
        done = self._read() or done
        done = self._write() or done
        if done:
            self._has_taken(start)
        if self.whole is None and self._start_whole():
            done = True
        self.after_tick()
        return done

    def _has_taken(self, since: float) -> None:
        """Counts a time that answers waited for their next token."""
        self.counts.longest_tick = max(self.counts.longest_tick, self.clock() - since)

    def _drop(self) -> None:
        """Ends what is cancelled or late."""
        for job in self._all():
            reason = self._reason_to_end(job)
            if reason is not None:
                self._end(job, reason, "cancelled" if isinstance(reason, Ended) else "late")

    def _reason_to_end(self, job: Job) -> Exception | None:
        """Why a request must not go on, if it must not."""
        if job.is_cancelled:
            return Ended("cancelled")
        if self.has_given_up:
            return Refused("The server has shut down before this answer was there; ask another one, or later.", 503, 5)
        if job.deadline is not None and self.clock() >= job.deadline:
            return Refused(f"The answer was not there within {self.clock() - job.submitted:.0f} s, the most that a "
                           "request may take; ask for fewer tokens or beams, or try again when less is going on.", 504)
        return None

    def _all_waiting(self) -> list[Job]:
        with self._lock:
            return [job for jobs in self.waiting.values() for job in jobs]

    def _all(self) -> list[Job]:
        return [*self._all_waiting(), *self.reading, *dict.fromkeys(job for job, _ in self.writing)]

    def _admit(self) -> bool:
        """Begins requests while there are rows and memory for them, clients in turn; whether there were any."""
        done = False
        with self._lock:
            heads = [(client, jobs[0]) for client, jobs in self.waiting.items() if not jobs[0].is_whole]
        for place, (client, job) in enumerate(heads):
            if not self._has_room(job):
                if job.passed_over >= PATIENCE:     # one that needs much must get it some time
                    break
                continue
            waiting = self._all_waiting()
            for _, earlier in heads[:place]:
                earlier.passed_over += earlier in waiting
            self._take(client)
            job.passed_over = 0
            self._open(job)
            done = True
        return done

    def _has_room(self, job: Job) -> bool:
        answers = len(job.writers)
        if self.open_rows + answers > self.decoder.most:
            return False
        # where nothing is open there will never be more: opening then says what is lacking
        return not self.open_rows or self.decoder.has_room(job.prompt, job.new_tokens, answers)

    def _open(self, job: Job) -> None:
        try:
            job.rows = [self.decoder.open(job.prompt, job.mode, job.new_tokens, len(job.writers))]
        except Exception as error:
            self._end(job, error, "failed")
        else:
            self.reading.append(job)

    def _take(self, client: str) -> Job:
        """A client's oldest request; the client goes behind the others."""
        with self._lock:
            job = self.waiting[client].popleft()
            if self.waiting[client]:
                self.waiting.move_to_end(client)
            else:
                del self.waiting[client]
            return job

    def _read(self) -> bool:
        """Computes one piece of one prompt: of the one with the least left, unless another was passed over too often.
        """
        if not self.reading:
            return False
        late = [job for job in self.reading if job.passed_over >= PATIENCE]
        job = late[0] if late else min(self.reading, key=lambda one: self.decoder.rest(one.rows[0]))
        for other in self.reading:
            other.passed_over = 0 if other is job else other.passed_over + 1
        self.counts.pieces += 1
        try:
            before = self.decoder.rest(job.rows[0])
            scores = self.decoder.advance(job.rows[0])
            self.counts.prompt_positions += before - (0 if scores is not None else self.decoder.rest(job.rows[0]))
            if scores is not None:
                self._begin_writing(job, scores)
        except Exception as error:
            self._end(job, error, "failed")
        return True

    def _begin_writing(self, job: Job, scores: np.ndarray) -> None:
        while len(job.rows) < len(job.writers):
            job.rows.append(self.decoder.fork(job.rows[0]))
        self.reading.remove(job)
        job.prompt, job.known = None, self.decoder.known(job.rows[0])     # its pixels are of no more use
        for number in range(len(job.writers)):
            self.writing.append((job, number))
        for number in range(len(job.writers)):
            if not job.has_ended:
                self._one_more(job, number, scores)

    def _one_more(self, job: Job, number: int, scores: np.ndarray) -> None:
        """Lets an answer take its next token, and ends it when that was the last."""
        writer = job.writers[number]
        try:
            self._next[id(job), number] = writer.take(scores)
            self.counts.new_tokens += 1
        except Exception as error:
            self._end(job, error, "failed")
            return
        if writer.finished:
            self.writing.remove((job, number))
            self._next.pop((id(job), number), None)
            self.decoder.close(job.rows[number])
            job.rows[number] = None
            if not any(one is job for one, _ in self.writing):
                self._end(job, None, "done")

    def _write(self) -> bool:
        """One more token of every answer, those of a mode together."""
        if not self.writing:
            return False
        self.counts.steps += 1
        for mode in dict.fromkeys(job.mode for job, _ in self.writing):
            self._write_part([(job, number) for job, number in self.writing if job.mode == mode])
        return True

    def _write_part(self, part: list[tuple[Job, int]]) -> None:
        rows = [job.rows[number] for job, number in part]
        tokens = [self._next[id(job), number] for job, number in part]
        try:
            found = self.decoder.step(rows, tokens)
        except Exception as error:
            for job in dict.fromkeys(job for job, _ in part):
                self._end(job, error, "failed")
            return
        for (job, number), scores in zip(part, found):
            if job.has_ended:               # another answer of the same request has failed
                continue
            if isinstance(scores, Exception):
                self._end(job, scores, "failed")
            else:
                self._one_more(job, number, scores)

    def _start_whole(self) -> bool:
        """Makes a whole answer; between its steps the others go on."""
        with self._lock:
            client = next((name for name, jobs in self.waiting.items() if jobs[0].is_whole), None)
            if client is None:
                return False
            job = self.whole = self._take(client)
        since = self.clock()

        def between() -> None:
            nonlocal since
            if self.tick():
                self._has_taken(since)
            since = self.clock()
            reason = self._reason_to_end(job)
            if reason is not None:
                raise reason

        try:
            ids = self.decoder.whole(job.prompt, job, between)
            job.writers[0].take_all(ids)
            self.counts.new_tokens += len(ids)
            self._end(job, None, "done")
        except Ended as error:
            self._end(job, error, "cancelled")
        except Refused as error:
            self._end(job, error, "late")
        except Exception as error:
            self._end(job, error, "failed")
        finally:
            self.whole = None
        return True

    def _end(self, job: Job, error: Exception | None, how: str) -> None:
        """Ends a request in whatever state it is."""
        if job.has_ended:
            return
        job.has_ended = True
        with self._lock:
            jobs = self.waiting.get(job.client)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self.waiting[job.client]
        if job in self.reading:
            self.reading.remove(job)
        self.writing = [(one, number) for one, number in self.writing if one is not job]
        for number, row in enumerate(job.rows):
            self._next.pop((id(job), number), None)
            if row is not None:
                self.decoder.close(row)
        job.rows, job.prompt = [], None
        self.counts.requests[how] += 1
        job.on_end(error)
        with self._lock:
            self._unended -= 1
