"""Prompt-lookup decoding: what stands in the prompt or the answer behind the last few tokens is proposed as the next
ones, and one pass of the model verifies all of it.

Greedy decoding only: a proposal stays as long as each of its tokens is the one that decoding one by one would have
taken, by the scores of the same positions. So the answer is the same, and where it repeats its input, as transcripts
and web pages do, it comes several tokens a pass.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.sampling import apply_repetition_penalty, checked_scores

# Lengths of the n-grams that are looked for, the first one that is found counts: the longer, the surer.
LENGTHS = (4, 3, 2)

# After passes that proved nothing, so many tokens are decoded without a proposal: 1, 2, 4, ... up to this many.
LONGEST_PAUSE = 16


class VerifyingDecoder(Protocol):
    """A decoder that takes several tokens of a row at once, of which it keeps the first ones."""

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of each prompt, -1 in the place of a picture."""

    @property
    def may_step(self) -> bool:
        """Whether `step` is possible now; after tokens that were not accepted it may not be."""

    def prefill(self) -> np.ndarray:
        """float32 logits `(B, V)` after each prompt."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """float32 logits `(B, V)` after appending one id to each row, int32 `(B,)`."""

    def verify(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """float32 logits `(B, R, V)` after each of some more ids of every row; none of them is appended.

        Args:
            tokens: int32 `(B, R)`.
            real: `(B,)`, how many of them each row has.
        """

    def accept(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Appends the first `counts` `(B,)` of the ids that were verified last."""


class Proposals:
    """What may come next in one row.

    Args:
        ids: of the prompt.
        most: tokens proposed at most.
    """

    def __init__(self, ids: Sequence[int], most: int):
        self.ids: list[int] = []
        self.most = most
        # where each n-gram was seen last: the place behind it
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        self._fruitless, self._pause = 0, 0
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Takes the next token."""
        end = len(self.ids)
        for length, places in zip(LENGTHS, self._places):
            if end >= length:
                places[tuple(self.ids[-length:])] = end     # known once something stands behind it
        self.ids.append(token)

    def next(self, room: int) -> list[int]:
        """What stood behind the last tokens before, `room` tokens at most; often nothing."""
        if self._pause:
            self._pause -= 1
            return []
        wanted = min(self.most, room)
        if wanted < 1:
            return []
        for length, places in zip(LENGTHS, self._places):
            place = places.get(tuple(self.ids[-length:])) if len(self.ids) >= length else None
            if place is not None:
                proposed: list[int] = []
                while len(proposed) < wanted:       # a short period goes on in what is proposed
                    at = place + len(proposed)
                    token = self.ids[at] if at < len(self.ids) else proposed[at - len(self.ids)]
                    if token < 0:                   # a picture
                        break
                    proposed.append(token)
                return proposed
        return []

    def proved(self, right: int) -> None:
        """Learns how many tokens of a proposal were right."""
        if right:
            self._fruitless = 0
            return
        self._pause = min(2 ** self._fruitless, LONGEST_PAUSE)
        self._fruitless += 1


class Row:
    """One row of a batch in the making."""

    def __init__(self, ids: Sequence[int], options: GenerationOptions, ended: Callable[[list[int]], bool] | None):
        self.options, self.ended = options, ended
        self.proposals = Proposals(ids, options.prompt_lookup)
        self.generated: list[int] = []
        self.proposed: list[int] = []
        self.running = True

    def take(self, logits: np.ndarray) -> list[int]:
        """The new tokens by the logits `(1 + proposed, V)`: those proposed tokens that are right, and the next one."""
        new: list[int] = []
        for place, scores in enumerate(logits):
            scores = apply_repetition_penalty(scores[None], [self.generated], self.options.repetition_penalty)
            token = int(scores.argmax(-1)[0])
            new.append(token)
            self.generated.append(token)
            self.proposals.append(token)
            self.running = not (token in self.options.stop_token_ids or (self.ended and self.ended(self.generated))
                                or len(self.generated) == self.options.max_new_tokens)
            if not self.running or (place < len(self.proposed) and token != self.proposed[place]):
                break
        if self.proposed:
            self.proposals.proved(len(new) - 1)
        return new

    def propose(self) -> None:
        """Looks for what may come behind the last token."""
        room = self.options.max_new_tokens - len(self.generated) - 1
        self.proposed = self.proposals.next(room) if self.running else []


def lookup_steps(decoder: VerifyingDecoder, options: GenerationOptions, batch: int,
                 ended: Callable[[list[int]], bool] | None = None) -> Iterator[list[int | None]]:
    """Greedy decoding with proposals; arguments and errors as in `search.decode_steps`.

    A pass may find several tokens of a row. They are given one after the other, `None` for a row that has fewer, so a
    row's ids in order are those of decoding one by one.
    """
    rows = [Row(ids, options, ended) for ids in decoder.prompt_ids]
    logits, tokens = checked_scores(decoder.prefill(), batch, 0)[:, None], None
    while True:
        new = [row.take(scores[:1 + len(row.proposed)]) if row.running else [] for row, scores in zip(rows, logits)]
        if tokens is not None:
            decoder.accept(tokens, np.array([len(ids) for ids in new]))
        for place in range(max(map(len, new))):
            yield [ids[place] if place < len(ids) else None for ids in new]
        if not any(row.running for row in rows):
            return
        for row in rows:
            row.propose()
        logits, tokens = _next_scores(decoder, rows, options.prompt_lookup)


def _next_scores(decoder: VerifyingDecoder, rows: Sequence[Row], most: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits `(B, R, V)` behind the rows' last tokens and proposals, and the ids to be accepted, if any are."""
    step = max(len(row.generated) for row in rows)
    last = np.array([row.generated[-1] for row in rows], np.int32)
    if decoder.may_step and not any(row.proposed for row in rows):
        return checked_scores(decoder.step(last), len(rows), step)[:, None], None
    tokens = np.repeat(last[:, None], 1 + most, 1)
    for row, ids in zip(rows, tokens):
        ids[1:1 + len(row.proposed)] = row.proposed
    real = np.array([1 + len(row.proposed) if row.running else 0 for row in rows])
    logits = decoder.verify(tokens, real)
    # of each row the first scores that are not numbers, if any are; an ended row has none
    bad = ~np.isfinite(logits.max(-1)) & (np.arange(1 + most) < real[:, None])
    checked_scores(np.where(real[:, None] > 0, logits[np.arange(len(rows)), bad.argmax(1)], 0), len(rows), step)
    return logits.astype(np.float32, copy=False), tokens
