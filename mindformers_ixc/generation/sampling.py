"""Decoding options and what they do to scores: repetition penalty, temperature, top-k, top-p, sampling.

The semantics are those of Hugging Face's generate(), which the public model uses; all of it is numpy on the host.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np


class GenerationError(ValueError):
    """A decoding option outside its range, or scores that nothing can be decoded from."""


def _whole(value, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# What every option must be: a test and the words that follow "it must be" when the test fails.
_RULES = {
    "max_new_tokens": (lambda value: _whole(value, 1), "a whole number, at least 1"),
    "do_sample": (lambda value: isinstance(value, (bool, np.bool_)), "True or False"),
    "temperature": (lambda value: _number(value) and value > 0, "a number above 0"),
    "top_k": (lambda value: _whole(value, 0), "a whole number, at least 0 (0: no limit)"),
    "top_p": (lambda value: _number(value) and 0 <= value <= 1, "a number from 0 to 1 (1: no limit)"),
    "repetition_penalty": (lambda value: _number(value) and value > 0, "a number above 0 (1: no penalty)"),
    "num_beams": (lambda value: _whole(value, 1), "a whole number, at least 1 (1: no beam search)"),
    "length_penalty": (_number, "a finite number"),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "True, False or 'never'"),
    "stop_token_ids": (lambda value: all(_whole(i, 0) for i in value), "token ids, whole numbers of at least 0"),
    "stop_strings": (lambda value: all(isinstance(s, str) and s for s in value), "texts that are not empty"),
    "seed": (lambda value: value is None or _whole(value, 0), "a whole number, at least 0, or None"),
}


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: new tokens at most, at least 1 (public chat default 1024).
        do_sample: sample instead of taking the likeliest token.
        temperature: divides the scores before sampling, above 0.
        top_k: only the k likeliest tokens are sampled; 0 is no limit (Hugging Face's implicit default is 50).
        top_p: only the likeliest tokens that together reach this probability are sampled, 0 to 1; 0 leaves one token.
        repetition_penalty: divides positive and multiplies negative scores of tokens already generated, above 0. It
            acts on logits in greedy decoding and sampling, on log-probabilities in beam search, and never on the
            prompt's tokens, because the public code hands the prompt over as embeddings.
        num_beams: beams; 1 is no beam search.
        length_penalty: a finished beam's score is divided by its length to this power.
        early_stopping: when beam search ends: True as soon as `num_beams` beams have ended, False when no running beam
            can be expected to get better, "never" when none can at all.
        stop_token_ids: ids that end an answer; the first also stands for the end of every finished beam.
        stop_strings: texts that end an answer. Ids alone do not show them: the caller, who has the tokenizer, passes a
            test of ids to the search functions and cuts the text.
        seed: of sampling. An answer depends on its prompt and the seed, not on its place in a batch.

    Raises:
        GenerationError: for a value of the wrong type or outside its range; names the option.
    """

    max_new_tokens: int = 1024
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self):
        for name, single in (("stop_token_ids", Integral), ("stop_strings", str)):
            value = getattr(self, name)
            if isinstance(value, single):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, Sequence):
                object.__setattr__(self, name, tuple(value))
            else:
                raise GenerationError(f"{name} is {value!r}; it must be a list or a tuple.")
        for name, (good, wanted) in _RULES.items():
            if not good(getattr(self, name)):
                raise GenerationError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")

    @property
    def tokens_kept(self) -> int:
        """Tokens that top-k and top-p leave each row at least.

        A beam must be able to go on however likely all of its stop ids are, so beam sampling keeps one token more than
        there are stop ids, and two without any.
        """
        return max(2, 1 + len(self.stop_token_ids)) if self.num_beams > 1 else 1


def apply_repetition_penalty(scores: np.ndarray, generated_ids: Sequence[Sequence[int]],
                             penalty: float) -> np.ndarray:
    """Lowers the scores of tokens a row has already generated, once however often it has.

    Args:
        scores: `(B, V)`.
        generated_ids: ids of each row so far.
        penalty: divides positive scores and multiplies negative ones; 1 is none.

    Returns:
        Array `(B, V)`; `scores` itself stays as it was.
    """
    if penalty == 1.0:
        return scores
    scores = scores.copy()
    for row, ids in zip(scores, generated_ids):
        seen = np.asarray(ids, np.int64)
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


def apply_temperature(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Scores `(B, V)` divided by the temperature: above 1 flatter, below 1 sharper."""
    return scores if temperature == 1.0 else scores / np.float32(temperature)


def keep_top_k(scores: np.ndarray, k: int, tokens_kept: int = 1) -> np.ndarray:
    """Keeps each row's k highest scores.

    Args:
        scores: `(B, V)`.
        k: scores kept; ties with the k-th stay too. 0 is no limit.
        tokens_kept: scores kept at least.

    Returns:
        Array `(B, V)`, minus infinity where a score was not kept.
    """
    k = max(k, tokens_kept) if k else 0
    if k == 0 or k >= scores.shape[-1]:
        return scores
    threshold = np.partition(scores, -k, axis=-1)[:, -k, None]
    return np.where(scores < threshold, -np.inf, scores)


def keep_top_p(scores: np.ndarray, p: float, tokens_kept: int = 1) -> np.ndarray:
    """Keeps each row's smallest set of likeliest tokens whose probabilities together reach p.

    Args:
        scores: `(B, V)`.
        p: probability to reach; 1 is no limit.
        tokens_kept: tokens kept at least.

    Returns:
        Array `(B, V)`, minus infinity where a score was not kept.
    """
    if p >= 1.0:
        return scores
    scores = scores.copy()
    for row in scores:
        possible = np.flatnonzero(row > -np.inf)
        rising = possible[np.argsort(row[possible], kind="stable")]
        # Summed in double, compared in single precision, so that a probability of exactly 1 - p (0.2 for 0.8, which
        # neither precision can write) counts as reached.
        cumulative = np.cumsum(softmax(row[rising].astype(np.float64))).astype(np.float32)
        row[rising[:-tokens_kept][cumulative[:-tokens_kept] <= np.float32(1 - p)]] = -np.inf
    return scores


def warp(scores: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Temperature, then top-k, then top-p on scores `(B, V)`."""
    scores = apply_temperature(scores, options.temperature)
    scores = keep_top_k(scores, options.top_k, options.tokens_kept)
    return keep_top_p(scores, options.top_p, options.tokens_kept)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities of the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities of the last axis."""
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest of scores `(N,)`, best first, the lower index first among equals."""
    count = min(count, len(scores))
    # a full sort of beams x vocabulary scores would cost more than the rest of a decoding step's host work
    candidates = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


def sample_rows(scores: np.ndarray, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """Draws one index from each row by the row's own generator, one uniform number each.

    Args:
        scores: `(R, N)`; minus infinity is never drawn.
        generators: one a row, so that a row's draws do not depend on its neighbours.

    Returns:
        int64 `(R,)`.
    """
    drawn = []
    for row, generator in zip(scores, generators):
        cumulative = np.cumsum(softmax(row.astype(np.float64)))
        index = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
        drawn.append(min(index, np.flatnonzero(row > -np.inf)[-1]))
    return np.array(drawn, np.int64)


def sample_distinct(scores: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws different indices of scores `(N,)` one after another, in the order drawn, int64 `(count,)`.

    The highest of score + Gumbel noise are just such a draw, and need no second look at the probabilities.
    """
    return highest(scores + generator.gumbel(size=scores.shape), count)


def row_generators(seed: int | None, rows: int) -> list[np.random.Generator]:
    """One generator a prompt.

    With a seed all start alike: a prompt then draws in a batch what it draws alone. Without one all differ.
    """
    return [np.random.default_rng(seed) for _ in range(rows)]
