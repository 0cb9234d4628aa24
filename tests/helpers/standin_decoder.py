"""A stand-in for a model behind a server: its next token depends on all tokens of its row, and on nothing else."""
from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator

import numpy as np

VOCABULARY = 1024


def next_scores(ids: list[int], vocabulary: int = VOCABULARY) -> np.ndarray:
    """Scores after some tokens."""
    seed = int.from_bytes(hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=8).digest(), "big")
    return np.random.default_rng(seed).standard_normal(vocabulary).astype(np.float32)


class StandInRow:
    def __init__(self, ids: list[int], mode: str, memory: int = 0):
        self.ids, self.mode, self.prompt, self.done, self.is_open = list(ids), mode, len(ids), 0, True
        self.memory = memory


class StandInDecoder:
    """A `RowDecoder` that counts what it is asked.

    Args:
        most: rows.
        piece: positions of a piece of a prompt.
        step_seconds: that a step takes.
        ends: id that is the likeliest after so many new tokens, if any.
        memory: positions of all rows together, those promised to forks included; `None` for any number.
    """

    def __init__(self, most: int = 4, piece: int = 8, step_seconds: float = 0.0, ends: tuple[int, int] | None = None,
                 memory: int | None = None):
        self.most, self.piece, self.step_seconds, self.ends, self.memory = most, piece, step_seconds, ends, memory
        self.rows: list[StandInRow] = []
        self.steps: list[int] = []
        self.fails: Exception | None = None
        self._held_after: int | None = None
        self._go = threading.Event()

    @contextlib.contextmanager
    def held(self, after: int = 3) -> Iterator[None]:
        """In the block answers come to so many new tokens after the first, and no further however long it takes.

        All of them but the last are sent.
        """
        self._held_after = after
        self._go.clear()
        try:
            yield
        finally:
            self.go_on()

    def go_on(self) -> None:
        """Ends the hold."""
        self._held_after = None
        self._go.set()

    def prepare(self, sample):
        return sample

    def has_room(self, prompt, new_tokens, answers):
        ids = prompt if isinstance(prompt, list) else prompt.input_ids
        used = sum(row.memory for row in self.rows)
        return self.memory is None or used + answers * (len(ids) + new_tokens) <= self.memory

    def open(self, prompt, mode, new_tokens, answers=1):
        assert len(self.rows) < self.most, "more rows than there are"
        ids = prompt if isinstance(prompt, list) else prompt.input_ids.tolist()
        if not self.has_room(ids, new_tokens, answers):
            assert not self.rows, "it was not asked whether there is memory"
            raise MemoryError("never so much")
        row = StandInRow(ids, mode, answers * (len(ids) + new_tokens))
        self.rows.append(row)
        return row

    def rest(self, row):
        return row.prompt - row.done

    def known(self, row):
        return 0

    def advance(self, row):
        assert row.is_open
        time.sleep(self.step_seconds)
        row.done = min(row.prompt, row.done + self.piece)
        return self._scores(row) if row.done == row.prompt else None

    def fork(self, row):
        assert len(self.rows) < self.most, "more rows than there are"
        other = StandInRow(row.ids, row.mode)
        other.done = other.prompt
        self.rows.append(other)
        return other

    def step(self, rows, tokens):
        assert len({id(row) for row in rows}) == len(rows) <= self.most
        assert len({row.mode for row in rows}) == 1
        if self.fails is not None:
            raise self.fails
        if self._held_after is not None and any(len(row.ids) - row.prompt >= self._held_after for row in rows):
            self._go.wait(600)
        time.sleep(self.step_seconds)
        self.steps.append(len(rows))
        for row, token in zip(rows, tokens):
            assert row.is_open and row.done == row.prompt
            row.ids.append(int(token))
        return [self._scores(row) for row in rows]

    def _scores(self, row):
        scores = next_scores(row.ids)
        if self.ends is not None and len(row.ids) - row.prompt >= self.ends[1]:
            scores[self.ends[0]] = 100.0
        return scores

    def close(self, row):
        assert row.is_open, "closed twice"
        row.is_open = False
        self.rows.remove(row)

    def whole(self, prompt, job, between):
        row = StandInRow(prompt if isinstance(prompt, list) else prompt.input_ids.tolist(), job.mode)
        new = []
        for _ in range(job.new_tokens):
            between()
            new.append(int(self._scores(row).argmax()))
            row.ids.append(new[-1])
        return new


def alone(ids: list[int], count: int) -> list[int]:
    """What greedy decoding gives without neighbours."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(next_scores(ids).argmax()))
    return ids[len(ids) - count:]
