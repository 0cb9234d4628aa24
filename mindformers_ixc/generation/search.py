"""Greedy decoding, sampling and beam search, driven from the host over any decoder that can step and reorder."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mindformers_ixc.generation.sampling import (
    GenerationOptions,
    apply_repetition_penalty,
    log_softmax,
    row_generators,
    sample_rows,
    warp,
)


class Decoder(Protocol):
    """Continues B rows token by token."""

    def prefill(self) -> np.ndarray:
        """Logits `(B, V)` after each prompt."""

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits `(B, V)` after appending one id to each row."""

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i continue what row `rows[i]` held."""


def greedy_or_sample(decoder: Decoder, options: GenerationOptions, batch: int,
                     on_tokens: Callable[[list[int | None]], bool | None] | None = None) -> list[list[int]]:
    """Takes the likeliest token, or draws one, until every row has ended.

    Args:
        decoder: of `batch` rows.
        options: decoding options.
        batch: number of prompts.
        on_tokens: called after each step with each row's new id (`None` once a row has ended); a true result ends
            decoding.

    Returns:
        New ids of each row, with the stop id that ended it.
    """
    generated: list[list[int]] = [[] for _ in range(batch)]
    running = [True] * batch
    generators = row_generators(options.seed, batch)
    logits = decoder.prefill()
    for step in range(options.max_new_tokens):
        scores = apply_repetition_penalty(logits.astype(np.float32), generated, options.repetition_penalty)
        drawn = sample_rows(warp(scores, options), 1, generators)[:, 0] if options.do_sample else None
        tokens = scores.argmax(-1) if drawn is None else drawn
        shown: list[int | None] = []
        for row in range(batch):
            shown.append(int(tokens[row]) if running[row] else None)
            if running[row]:
                generated[row].append(int(tokens[row]))
                running[row] = tokens[row] not in options.stop_token_ids
        if (on_tokens is not None and on_tokens(shown)) or not any(running):
            break
        if step + 1 < options.max_new_tokens:
            logits = decoder.step(tokens)
    return generated


@dataclass
class Hypotheses:
    """The best finished beams of one prompt."""

    options: GenerationOptions
    beams: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, ids: list[int], log_probability: float) -> None:
        """Keeps a finished beam if it is among the best."""
        score = self._score(log_probability, len(ids))
        if len(self.beams) < self.options.num_beams or score > self.worst:
            self.beams.append((score, ids))
            # of equal scores the later one is the first to go
            self.beams.sort(key=lambda beam: beam[0], reverse=True)
            del self.beams[self.options.num_beams:]

    @property
    def worst(self) -> float:
        """Score of the worst kept beam."""
        return self.beams[-1][0]

    def done(self, best_running: float, length: int) -> bool:
        """Whether no running beam is expected to get among the best.

        Args:
            best_running: log-probability of the best running beam.
            length: its length.
        """
        if len(self.beams) < self.options.num_beams:
            return False
        if self.options.early_stopping is True:
            return True
        if self.options.early_stopping == "never" and self.options.length_penalty > 0:
            length = self.options.max_new_tokens
        return self.worst >= self._score(best_running, length)

    def _score(self, log_probability: float, length: int) -> float:
        return log_probability / max(length, 1) ** self.options.length_penalty


def beam_search(decoder: Decoder, options: GenerationOptions, batch: int) -> list[list[int]]:
    """Beam search, or beam sampling with `do_sample`.

    Args:
        decoder: of `batch * num_beams` rows, the beams of a prompt side by side.
        options: decoding options.
        batch: number of prompts.

    Returns:
        Ids of each prompt's best beam; one that ended is closed with the first stop id, whatever ended it.
    """
    beams = options.num_beams
    generated: list[list[int]] = [[] for _ in range(batch * beams)]
    totals = np.zeros((batch, beams), np.float32)
    if not options.do_sample:
        totals[:, 1:] = -1e9          # all beams start equal: only the first may be continued
    hypotheses = [Hypotheses(options) for _ in range(batch)]
    done = [False] * batch
    generators = row_generators(options.seed, batch)
    logits = decoder.prefill()
    for step in range(options.max_new_tokens):
        scores = log_softmax(logits.astype(np.float32))
        scores = apply_repetition_penalty(scores, generated, options.repetition_penalty)
        if options.do_sample:
            scores = warp(scores, options)
        vocabulary = scores.shape[-1]
        scores = (scores + totals.reshape(-1, 1)).reshape(batch, beams * vocabulary)
        tokens, rows = np.zeros(batch * beams, np.int64), np.arange(batch * beams)
        for prompt in range(batch):
            place = slice(prompt * beams, (prompt + 1) * beams)
            if done[prompt]:
                continue
            if options.do_sample:
                best = sample_rows(scores[prompt:prompt + 1], 2 * beams, [generators[prompt]])[0]
                best = best[np.argsort(-scores[prompt, best], kind="stable")]
            else:
                best = np.argsort(-scores[prompt], kind="stable")[:2 * beams]
            chosen = _continue(best, scores[prompt], vocabulary, prompt * beams, generated, hypotheses[prompt])
            totals[prompt] = [total for _, _, total in chosen]
            tokens[place] = [token for token, _, _ in chosen]
            rows[place] = [row for _, row, _ in chosen]
            done[prompt] = hypotheses[prompt].done(float(scores[prompt, best].max()), step + 1)
        generated = [[*generated[row], int(token)] for row, token in zip(rows, tokens)]
        if all(done):
            break
        if step + 1 < options.max_new_tokens:
            decoder.reorder(rows)
            logits = decoder.step(tokens)
    return [_best(hypotheses[i], done[i], generated[i * beams:(i + 1) * beams], totals[i], options)
            for i in range(batch)]


def _continue(best: np.ndarray, scores: np.ndarray, vocabulary: int, first_row: int, generated: list[list[int]],
              hypotheses: Hypotheses) -> list[tuple[int, int, float]]:
    """Next (token, row, log-probability) of each beam; candidates that end go to the hypotheses if ranked high."""
    chosen, beams = [], hypotheses.options.num_beams
    for rank, candidate in enumerate(best):
        row, token = first_row + int(candidate) // vocabulary, int(candidate) % vocabulary
        if token in hypotheses.options.stop_token_ids:
            if rank < beams:          # an end below the beams would not have been continued either
                hypotheses.add(generated[row], float(scores[candidate]))
            continue
        chosen.append((token, row, float(scores[candidate])))
        if len(chosen) == beams:
            break
    return chosen


def _best(hypotheses: Hypotheses, done: bool, running: list[list[int]], totals: np.ndarray,
          options: GenerationOptions) -> list[int]:
    if not done:
        for ids, total in zip(running, totals):
            hypotheses.add(ids, float(total))
    ids = list(hypotheses.beams[0][1])
    ended = len(ids) < options.max_new_tokens and options.stop_token_ids
    return [*ids, options.stop_token_ids[0]] if ended else ids
