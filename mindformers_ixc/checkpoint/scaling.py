"""Activation-aware scaling (AWQ, arXiv 2306.00978): inputs that are large get the finer numbers.

A weight's column is multiplied by a factor before it is rounded, and what makes its input is divided by the same: the
weight of the norm before, or rows of the linear before. So nothing is divided while the model runs, and in full
precision nothing changes. Whatever else reads the input is multiplied too: A of Partial LoRA and of the task LoRAs;
where rows are divided, so are those of their B. The factors come from the inputs' size and the weight's, to powers that
are searched on calibration samples.

| linears | what makes their inputs |
|---|---|
| wqkv | attention_norm |
| w1, w3 | ffn_norm |
| wo | the value rows of wqkv; query heads that share a value share its factors |
| w2 | w3, which the gate multiplies |
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mindformers_ixc.checkpoint.dtypes import from_float32, to_float32
from mindformers_ixc.checkpoint.packing import round_4, widen_4
from mindformers_ixc.config import ModelConfig

# Powers that are tried: of an input's size, and what is left of 1 of the weight's.
POWERS = tuple(step / 20 for step in range(20))

# Rows of a weight by whose outputs ways and factors are compared, at most; they are spread over it.
COMPARED_ROWS = 512

# Factors are between the inverse of this and this.
LARGEST = np.float32(256)


class Fold(NamedTuple):
    """Linears that share their inputs, and what makes these.

    Attributes:
        linears: paths below the layer.
        before: the norm or linear that is divided.
    """

    linears: tuple[str, ...]
    before: str


# In the order in which they are decided: rows of a linear are divided before it is rounded itself.
FOLDS = (Fold(("attention.wo",), "attention.wqkv"), Fold(("feed_forward.w2",), "feed_forward.w3"),
         Fold(("attention.wqkv",), "attention_norm"), Fold(("feed_forward.w1", "feed_forward.w3"), "ffn_norm"))
NORMS = ("attention_norm", "ffn_norm")

# Factors of a layer's columns, by the path of the linear; what is missing has none.
Factors = Mapping[str, np.ndarray]


def energy(weight: np.ndarray, moments: np.ndarray) -> float:
    """Sum of the squares of a linear's outputs over all positions, from its inputs' second moments `(F, F)`."""
    return float(np.einsum("of,of->", weight @ moments, weight, dtype=np.float64))


def compared_rows(weight: np.ndarray) -> slice:
    """Which rows of a weight are looked at."""
    return slice(None, None, -(-len(weight) // COMPARED_ROWS))


def shared(values: np.ndarray, linear: str, config: ModelConfig) -> np.ndarray:
    """Means of `(F,)` over the inputs of a linear that must have one factor: a value's in the heads that share it."""
    if linear != "attention.wo":
        return values
    heads = values.reshape(config.num_key_value_heads, config.query_groups, config.head_size)
    return np.broadcast_to(heads.mean(1, keepdims=True), heads.shape).reshape(-1)


def search(fold: Fold, weights: Sequence[np.ndarray], moments: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The factors `(F,)` with which the outputs of the rounded weights differ least.

    Args:
        fold: whose linears they are.
        weights: of them, `(O, F)`.
        moments: sum over positions of the inputs' products, `(F, F)`.
        config: of the model.
    """
    some = [weight[compared_rows(weight)] for weight in weights]
    whole = [energy(weight, moments) or 1 for weight in some]
    inputs = np.sqrt(shared(np.diagonal(moments), fold.linears[0], config))
    sizes = np.sqrt(shared(np.mean([(weight * weight).mean(0) for weight in some], 0), fold.linears[0], config))
    best, least = np.ones(len(moments), np.float32), np.inf
    for factors in _candidates(inputs, sizes):
        error = sum(energy(weight - widen_4(*round_4(weight * factors)) / factors, moments) / of
                    for weight, of in zip(some, whole))
        if error < least:
            best, least = factors, error
    return best


def _candidates(inputs: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Factors by the inputs' size alone, and by the weights' as well."""
    inputs, sizes = (np.maximum(one, 1e-4 * one.max() or 1) for one in (inputs, sizes))
    for power in POWERS:
        for factors in (inputs ** power, inputs ** power / sizes ** (1 - power)):
            yield np.clip(factors / np.sqrt(factors.max() * factors.min()), 1 / LARGEST, LARGEST).astype(np.float32)


def divided_norm(norm: np.ndarray, factors: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weight divided by factors, as a format keeps it, and the factors that it is then divided by.

    Args:
        norm: its weight `(F,)`, in float32.
        factors: `(F,)`.
        dtype: format in which the norm is written; its rounding goes into the factors, so that nothing is lost.
    """
    made = to_float32(from_float32(norm / factors, dtype), dtype)
    whole = (made != 0) & (norm != 0) & np.isfinite(made) & np.isfinite(norm)
    with np.errstate(all="ignore"):
        return np.where(whole, made, norm), np.where(whole, norm / made, 1).astype(np.float32)


def row_divisors(path: str, factors: Factors, config: ModelConfig) -> np.ndarray | None:
    """What the rows `(O,)` of a linear are divided by, by the factors of the one that reads them; `None` for 1."""
    if path == "feed_forward.w3":
        return factors.get("feed_forward.w2")
    if path != "attention.wqkv" or "attention.wo" not in factors:
        return None
    kv, groups, size = config.num_key_value_heads, config.query_groups, config.head_size
    rows = np.ones((kv, groups + 2, size), np.float32)
    rows[:, groups + 1] = factors["attention.wo"].reshape(kv, groups, size)[:, 0]
    return rows.reshape(-1)


def fitted(name: str, config: ModelConfig) -> Callable[[np.ndarray, int, int, Factors], np.ndarray] | None:
    """How rows of a low-rank pair follow the factors of their layer; `None` for what does not.

    Args:
        name: of a parameter.
        config: of the model.

    Returns:
        A function of rows in float32, the first and the last of them, and the layer's factors.
    """
    match = re.fullmatch(r"model\.layers\.\d+\.(\w+\.\w+)\.\w+_([AB])\.weight", name)
    if match is None:
        return None
    path, side = match[1], match[2]

    def columns(rows: np.ndarray, begin: int, end: int, factors: Factors) -> np.ndarray:
        return rows * factors[path] if path in factors else rows

    def outputs(rows: np.ndarray, begin: int, end: int, factors: Factors) -> np.ndarray:
        divisors = row_divisors(path, factors, config)
        return rows if divisors is None else rows / divisors[begin:end, None]

    return columns if side == "A" else outputs
