"""Which answers of a conversation carry loss, and how much: all alike, the last one, or by a number with each."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mindformers_ixc.data.forms import WEIGHT_KEY
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.prompt import IGNORE_INDEX

# The YAML's `loss_on`.
ALL, LAST, WEIGHTS = "all", "last", "weights"
LOSS_ON = (ALL, LAST, WEIGHTS)


def answer_runs(labels: np.ndarray) -> list[slice]:
    """Where the answers are: stretches of positions that carry loss, which a question's positions always part.

    Args:
        labels: int `(n,)`, not shifted.
    """
    learnt = np.concatenate([[False], labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(learnt[1:] != learnt[:-1]).tolist()
    return [slice(first, end) for first, end in zip(edges[::2], edges[1::2])]


def with_loss_on(sample: EncodedSample, loss_on: str, weights: Sequence[float] = (), where: str = "") -> EncodedSample:
    """A sample of which the answers carry loss that `loss_on` says; of an answer that carries none no label is left.

    Args:
        sample: encoded, every answer with its labels (by its turns, and not by `control_tokens`).
        loss_on: `all`, `last`, or `weights`: every answer counts so many times.
        weights: of the answers, from 0 on; none given are 1.
        where: what the sample is, for messages.

    Raises:
        DataError: where no answer is left that carries loss.
    """
    if loss_on == ALL:
        return sample
    runs, labels = answer_runs(sample.labels), sample.labels.copy()
    if loss_on == LAST:
        for run in runs[:-1]:
            labels[run] = IGNORE_INDEX
        return replace(sample, labels=labels)
    given = list(weights) or [1.0] * len(runs)
    by_position = np.zeros(len(labels), np.float32)
    for run, weight in zip(runs, given):
        by_position[run] = weight
        if not weight:
            labels[run] = IGNORE_INDEX
    check_weights(given, where)
    return replace(sample, labels=labels, weights=by_position)


def check_weights(weights: Sequence[float], where: str) -> None:
    """Refuses a sample of which nothing is left that is learnt.

    Args:
        weights: of the answers that fit; none given are 1.
        where: what the sample is, for messages.

    Raises:
        DataError: when all of them are 0.
    """
    if weights and not any(weights):
        raise DataError(f"{where}: every answer of it that fits has the {WEIGHT_KEY} 0, so there is nothing to learn "
                        "from it; raise seq_length and max_tiles, or take it out.")
