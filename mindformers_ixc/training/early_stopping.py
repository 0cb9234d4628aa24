"""Ending a run whose measurements no longer get better; all of it follows from the rows of `evaluations.jsonl`."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindformers_ixc.scores import as_text
from mindformers_ixc.training_options import sign_of


class AlreadyOver(Exception):
    """Raised where a resumed run begins that has nothing to train: its measurements have ended it before."""


@dataclass(frozen=True)
class Standing:
    """How a run stands by one metric.

    Attributes:
        step: of the best measurement; `None` where none is a number.
        value: of that measurement.
        without: measurements behind it that were not better.
    """

    step: int | None = None
    value: float = math.nan
    without: int = 0


def standing(rows: Sequence[Mapping[str, Any]], metric: str, min_delta: float) -> Standing:
    """How a run stands.

    Args:
        rows: measurements, in the order of their steps.
        metric: compared; of losses less is better, of scores more.
        min_delta: a measurement is better only if it beats the best one by more than this. A value that is no number
            beats nothing.
    """
    best, sign = Standing(), sign_of(metric)
    for row in rows:
        value = row.get(metric)
        if isinstance(value, (int, float)) and math.isfinite(value) and (
                best.step is None or sign * (value - best.value) > min_delta):
            best = Standing(row["step"], float(value), 0)
        else:
            best = Standing(best.step, best.value, best.without + 1)
    return best


def why_over(rows: Sequence[Mapping[str, Any]], metric: str, patience: int, min_delta: float) -> str | None:
    """The sentence that says why a run ends after its last measurement; `None` where it goes on.

    Args:
        rows: see `standing`, as `metric` and `min_delta`.
        patience: measurements without a better one after which a run ends.
    """
    found = standing(rows, metric, min_delta)
    if found.without < patience:
        return None
    than = "a number" if found.step is None else f"better than {as_text(metric, found.value)} of step {found.step}"
    return (f"Stopped early after step {rows[-1]['step']}: {metric} was not {than} in {found.without} "
            f"measurement{'s' * (found.without > 1)} in a row (evaluation.early_stopping: patience {patience}, "
            f"min_delta {min_delta:g}).")
