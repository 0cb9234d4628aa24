"""What decoding options do to scores: repetition penalty, temperature, top-k, top-p, sampling.

The semantics are those of Hugging Face's generate(), which the public model uses; all of it is numpy on the host.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.options import GenerationOptions


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
        scores: `(B, V)`; minus infinity is never drawn.
        generators: one a row, so that a row's draws do not depend on its neighbours.

    Returns:
        int64 `(B,)`.
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


def checked_scores(logits: np.ndarray, rows: int, step: int) -> np.ndarray:
    """float32 logits, after a look at their rows and at each row's highest (which a single NaN makes NaN)."""
    if len(logits) != rows:
        raise GenerationError(f"The decoder gave scores of {len(logits)} rows; prompts x num_beams are {rows}.")
    good = np.isfinite(logits.max(-1))
    if not good.all():
        raise GenerationError(f"The scores of row {int(np.argmin(good))} at new token {step + 1} are not numbers; "
                              "check the weights, or use a compute_dtype of wider range (float32, bfloat16).")
    return logits.astype(np.float32, copy=False)
