"""Decoding options and what they do to scores: repetition penalty, temperature, top-k, top-p, sampling.

The semantics are those of Hugging Face's generate(), which the public model uses; all of it is numpy on the host.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class GenerationError(ValueError):
    """A decoding option outside its range."""


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: new tokens at most, at least 1 (public chat default 1024).
        do_sample: sample instead of taking the likeliest token.
        temperature: divides the scores before sampling, above 0.
        top_k: only the k likeliest tokens are sampled; 0 is no limit (Hugging Face's implicit default is 50).
        top_p: only the likeliest tokens that together reach this probability are sampled, above 0 to 1.
        repetition_penalty: divides positive and multiplies negative scores of tokens already generated, above 0.
        num_beams: beams; 1 is no beam search.
        length_penalty: a finished beam's score is divided by its length to this power.
        early_stopping: when beam search ends: True as soon as `num_beams` beams have ended, False when no running beam
            can be expected to get better, "never" when none can at all.
        stop_token_ids: ids that end an answer; the first also stands for the end of every finished beam.
        stop_strings: texts that end an answer; they are cut off.
        seed: of sampling.
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
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
        ]
        for name, good, wanted in checks:
            if not good:
                raise GenerationError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")


def apply_repetition_penalty(scores: np.ndarray, generated: list[list[int]], penalty: float) -> np.ndarray:
    """Lowers the scores of tokens a row has already generated.

    Args:
        scores: `(B, V)`.
        generated: ids of each row so far.
        penalty: 1 is none.

    Returns:
        New array `(B, V)`.
    """
    if penalty == 1.0:
        return scores
    scores = scores.copy()
    for row, ids in zip(scores, generated):
        seen = np.unique(np.array(ids, np.int64))
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Scores `(B, V)` with all but each row's k highest at minus infinity (ties with the k-th stay)."""
    if k == 0 or k >= scores.shape[-1]:
        return scores
    threshold = np.partition(scores, -k, axis=-1)[:, -k, None]
    return np.where(scores < threshold, -np.inf, scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Scores `(B, V)` with the least likely tokens at minus infinity that together have at most 1 - p."""
    if p >= 1.0:
        return scores
    order = np.argsort(scores, axis=-1, kind="stable")
    cumulative = np.cumsum(softmax(np.take_along_axis(scores, order, -1)), axis=-1)
    drop_sorted = cumulative <= 1 - p
    drop_sorted[:, -1] = False
    drop = np.zeros_like(drop_sorted)
    np.put_along_axis(drop, order, drop_sorted, -1)
    return np.where(drop, -np.inf, scores)


def warp(scores: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Temperature, then top-k, then top-p."""
    return keep_top_p(keep_top_k(scores / options.temperature, options.top_k), options.top_p)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities of the last axis."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities of the last axis."""
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def sample_rows(scores: np.ndarray, count: int, generators: list[np.random.Generator]) -> np.ndarray:
    """Draws `count` different indices from each row of scores, by a generator of its own each.

    Args:
        scores: `(R, N)`; minus infinity is never drawn.
        count: draws a row, without repetition.
        generators: one a row, so that a row's draws do not depend on its neighbours.

    Returns:
        int64 `(R, count)`.
    """
    drawn = []
    for row, generator in zip(scores, generators):
        # the largest of score + Gumbel noise are a draw without repetition (Gumbel-top-k)
        noisy = row + generator.gumbel(size=row.shape)
        drawn.append(np.argsort(-noisy, kind="stable")[:count])
    return np.stack(drawn)


def row_generators(seed: int | None, rows: int) -> list[np.random.Generator]:
    """One generator a row; with a seed, row i of any batch draws the same."""
    if seed is None:
        return [np.random.default_rng() for _ in range(rows)]
    return [np.random.default_rng([seed, row]) for row in range(rows)]
