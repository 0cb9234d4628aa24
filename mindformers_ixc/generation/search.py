"""Greedy decoding, sampling and beam search, driven from the host over any decoder that can step and reorder.

Beam search follows Hugging Face's `BeamSearchScorer`, which made the published results: the number of candidates, which
of them may end, when a prompt is done, what a tie does. Two points changed between its releases; here a beam's length
counts its new tokens including the one that ended it, and in beam sampling the temperature acts before a beam's
running score is added (at temperature 1, which the public tasks use, the order makes no difference).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Optional, Protocol, cast

import numpy as np

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.lookup import VerifyingDecoder, lookup_steps
from mindformers_ixc.generation.options import GenerationOptions
from mindformers_ixc.generation.sampling import (
    apply_repetition_penalty,
    checked_scores,
    highest,
    log_softmax,
    row_generators,
    sample_distinct,
    sample_rows,
    warp,
)

# Running score of a beam that must not be continued while any other can: every log-probability is far above it, and
# unlike minus infinity it can still be added to and compared.
DEAD = -1e9

# Called with each step's new id of every row, `None` where it has none any more; a true result ends decoding.
OnTokens = Callable[[list[Optional[int]]], Optional[bool]]

# Tells from a row's new ids whether they end it (stop strings).
Ended = Callable[[list[int]], bool]


class Decoder(Protocol):
    """Continues B rows token by token."""

    def prefill(self) -> np.ndarray:
        """float32 logits `(B, V)` after each prompt."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """float32 logits `(B, V)` after appending one id to each row, int32 `(B,)`."""

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i continue what row `rows[i]` held, int32 `(B,)`."""


class Watched:
    """A decoder that remembers the logits of its last step.

    Args:
        decoder: whose steps are watched.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.logits = np.zeros((0, 0), np.float32)

    def prefill(self) -> np.ndarray:
        """As the decoder's."""
        self.logits = self.decoder.prefill()
        return self.logits

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """As the decoder's."""
        self.logits = self.decoder.step(tokens)
        return self.logits

    def reorder(self, rows: np.ndarray) -> None:
        """As the decoder's."""
        self.decoder.reorder(rows)


def greedy_or_sample(decoder: Decoder, options: GenerationOptions, batch: int, on_tokens: OnTokens | None = None,
                     ended: Ended | None = None) -> list[list[int]]:
    """Takes the likeliest token, or draws one, until every row has ended.

    Args:
        decoder: of `batch` rows.
        options: decoding options.
        batch: number of prompts.
        on_tokens: see `OnTokens`.
        ended: see `Ended`.

    Returns:
        New ids of each row, with the stop id that ended it.

    Raises:
        GenerationError: if the decoder's scores are not numbers or not of `batch` rows.
    """
    generated: list[list[int]] = [[] for _ in range(batch)]
    for shown in decode_steps(decoder, options, batch, ended):
        for row, token in enumerate(shown):
            if token is not None:
                generated[row].append(token)
        if on_tokens is not None and on_tokens(shown):
            break
    return generated


def decode_steps(decoder: Decoder, options: GenerationOptions, batch: int, ended: Ended | None = None,
                 generators: list[np.random.Generator] | None = None) -> Iterator[list[int | None]]:
    """Greedy decoding or sampling as an iterator: each step's new id of every row, `None` once a row has ended.

    Nothing is computed ahead: who stops iterating stops decoding. Arguments and errors as in `greedy_or_sample`;
    `generators` draw for each row, by default by the options' seed. With `prompt_lookup` see `lookup.lookup_steps`,
    which goes by the same rules several tokens at a time.
    """
    if options.prompt_lookup:
        yield from lookup_steps(cast(VerifyingDecoder, decoder), options, batch, ended)
        return
    generated: list[list[int]] = [[] for _ in range(batch)]
    running = [True] * batch
    generators = row_generators(options.seed, batch) if generators is None else generators
    padding = options.stop_token_ids[0] if options.stop_token_ids else 0
    logits = decoder.prefill()
    for step in range(options.max_new_tokens):
        scores = apply_repetition_penalty(checked_scores(logits, batch, step), generated, options.repetition_penalty)
        tokens = sample_rows(warp(scores, options), generators) if options.do_sample else scores.argmax(-1)
        shown = [int(token) if going else None for token, going in zip(tokens, running)]
        for row, token in enumerate(shown):
            if token is not None:
                generated[row].append(token)
                running[row] = not (token in options.stop_token_ids or (ended and ended(generated[row])))
        yield shown
        if not any(running):
            return
        if step + 1 < options.max_new_tokens:
            logits = decoder.step(np.array([padding if token is None else token for token in shown], np.int32))


@dataclass
class Hypotheses:
    """The best finished beams of one prompt."""

    options: GenerationOptions
    beams: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, ids: list[int], log_probability: float) -> None:
        """Keeps a finished beam if it is among the best `num_beams`."""
        score = self._score(log_probability, len(ids))
        if not self.full:
            self.beams.append((score, ids))
        elif score > self.worst:
            self.beams.append((score, ids))
            # of equally bad beams the one that ended first has to go
            self.beams.pop(min(range(len(self.beams)), key=lambda i: self.beams[i][0]))

    @property
    def full(self) -> bool:
        """Whether there are `num_beams` of them."""
        return len(self.beams) == self.options.num_beams

    @property
    def worst(self) -> float:
        """Score of the worst kept beam."""
        return min(score for score, _ in self.beams)

    @property
    def best(self) -> list[int]:
        """Ids of the best kept beam, of equals the one that ended last."""
        return max(reversed(self.beams), key=lambda beam: beam[0])[1]

    def done(self, best_running: float, length: int) -> bool:
        """Whether no running beam is expected to get among the best.

        Args:
            best_running: log-probability of the best candidate.
            length: its length.
        """
        if not self.full:
            return False
        if self.options.early_stopping is True:
            return True
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = self.options.max_new_tokens      # the longer a beam, the less its log-probability counts
        return self.worst >= self._score(best_running, length)

    def _score(self, log_probability: float, length: int) -> float:
        return log_probability / length ** self.options.length_penalty


class BeamState:
    """The running beams of one prompt and those that have ended.

    Args:
        options: decoding options.
        ended: see `Ended`.
        generator: of beam sampling.
    """

    def __init__(self, options: GenerationOptions, ended: Ended | None, generator: np.random.Generator):
        beams = options.num_beams
        self.options, self.ended, self.generator = options, ended, generator
        self.hypotheses, self.done = Hypotheses(options), False
        self.ids: list[list[int]] = [[] for _ in range(beams)]
        # All beams start equal. Without sampling they would stay so, hence only the first may be continued.
        self.totals = np.array([0.0] + [0.0 if options.do_sample else DEAD] * (beams - 1), np.float32)

    def advance(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Continues every beam by one token.

        Args:
            scores: log-probabilities of each beam's next token after penalty and warping, `(num_beams, V)`.

        Returns:
            Next id of each beam and which beam it continues, two int64 arrays `(num_beams,)`.
        """
        vocabulary = scores.shape[-1]
        scores = (scores + self.totals[:, None]).reshape(-1)
        best = self._candidates(scores, vocabulary)
        parents, tokens = best // vocabulary, best % vocabulary
        chosen, length = [], len(self.ids[0]) + 1
        for rank, candidate in enumerate(best):
            if tokens[rank] not in self.options.stop_token_ids:
                chosen.append(rank)
            elif rank < self.options.num_beams:          # below, it would not have been continued either
                self.hypotheses.add([*self.ids[parents[rank]], self.options.stop_token_ids[0]],
                                    float(scores[candidate]))
            if len(chosen) == self.options.num_beams:
                break
        self.ids = [[*self.ids[parents[rank]], int(tokens[rank])] for rank in chosen]
        self.totals = scores[best[chosen]]
        self._end_by_test()
        self.done = self.hypotheses.done(float(scores[best[0]]), length)
        return tokens[chosen], parents[chosen]

    def answer(self) -> list[int]:
        """Ids of the best beam; running beams take part if the search was not done."""
        if not self.done:
            for ids, total in zip(self.ids, self.totals):
                self.hypotheses.add(ids, float(total))
        return self.hypotheses.best

    def _candidates(self, scores: np.ndarray, vocabulary: int) -> np.ndarray:
        """Flat indices of the candidates, best first, `num_beams` of which or more do not end."""
        beams, stops = self.options.num_beams, self.options.stop_token_ids
        enough = max(2, 1 + len(stops)) * beams
        if not self.options.do_sample:
            return highest(scores, enough)
        drawn = sample_distinct(scores, enough, self.generator)
        going_on = np.cumsum(~np.isin(drawn % vocabulary, stops))
        # 2 x num_beams are drawn, as Hugging Face does, and more only where that leaves too few to go on with
        drawn = drawn[:max(2 * beams, int(np.searchsorted(going_on, beams)) + 1)]
        return drawn[np.argsort(-scores[drawn], kind="stable")]

    def _end_by_test(self) -> None:
        if self.ended is None:
            return
        for beam, ids in enumerate(self.ids):
            # what follows a dead beam is long known
            if self.totals[beam] > DEAD / 2 and self.ended(ids):
                self.hypotheses.add(ids, float(self.totals[beam]))
                self.totals[beam] = DEAD


def beam_search(decoder: Decoder, options: GenerationOptions, batch: int,
                ended: Ended | None = None) -> list[list[int]]:
    """Beam search, or beam sampling with `do_sample`.

    Args:
        decoder: of `batch * num_beams` rows, the beams of a prompt side by side.
        options: decoding options.
        batch: number of prompts.
        ended: see `Ended`.

    Returns:
        Ids of each prompt's best beam; one that a stop id ended is closed with the first stop id, whichever it was.

    Raises:
        GenerationError: if the decoder's scores are not numbers, not of `batch * num_beams` rows, or of so few tokens
            that beams could not be continued.
    """
    beams = options.num_beams
    states = [BeamState(options, ended, generator) for generator in row_generators(options.seed, batch)]
    logits = decoder.prefill()
    if logits.shape[-1] <= max(1, len(options.stop_token_ids)):
        raise GenerationError(f"The vocabulary has {logits.shape[-1]} token(s) and stop_token_ids names "
                              f"{len(options.stop_token_ids)}; beam search needs at least one more than it may end on.")
    for step in range(options.max_new_tokens):
        scores = log_softmax(checked_scores(logits, batch * beams, step))
        scores = apply_repetition_penalty(scores, [ids for state in states for ids in state.ids],
                                          options.repetition_penalty)
        if options.do_sample:
            scores = warp(scores, options)
        tokens, rows = np.zeros(batch * beams, np.int32), np.arange(batch * beams, dtype=np.int32)
        for prompt, state in enumerate(states):
            if not state.done:
                place = slice(prompt * beams, (prompt + 1) * beams)
                tokens[place], parents = state.advance(scores[place])
                rows[place] = prompt * beams + parents
        if all(state.done for state in states):
            break
        if step + 1 < options.max_new_tokens:
            decoder.reorder(rows)
            logits = decoder.step(tokens)
    return [state.answer() for state in states]
