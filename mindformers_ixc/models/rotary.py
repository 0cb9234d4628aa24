"""Rotary position tables with dynamic NTK scaling, computed on the host.

The public code keeps the tables it once grew for a long input, so an answer there depends on what was asked before.
Here every request begins with fresh tables: up to `max_position_embeddings` positions the trained base, beyond it the
NTK base of a length that the caller names.
"""
from __future__ import annotations

import numpy as np

from mindformers_ixc.models.configuration import IXC25Config


def rotary_base(config: IXC25Config, length: int) -> float:
    """Base of the rotary embedding for a sequence of `length` positions.

    Dynamic NTK: `theta * (factor * length / trained - (factor - 1)) ** (d / (d - 2))` beyond the trained length.
    """
    trained, size = config.max_position_embeddings, config.head_size
    if config.rope_scaling is None or length <= trained:
        return config.rope_theta
    factor = float(config.rope_scaling["factor"])
    return config.rope_theta * (factor * length / trained - (factor - 1)) ** (size / (size - 2))


def rotary_rows(config: IXC25Config, positions: np.ndarray,
                lengths: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of some positions.

    Args:
        config: rotary base, scaling and head size.
        positions: `(N,)`, counted from 0.
        lengths: the length that sets the base, one of each position `(N,)` or one of all.

    Returns:
        Two float32 arrays `(N, d)`; both halves of the last axis hold the same angles.
    """
    size = config.head_size
    exponents = -np.arange(0, size, 2, dtype=np.float64) / size                               # (d/2,)
    bases = np.array([rotary_base(config, int(length)) for length in np.atleast_1d(lengths)])
    angles = np.asarray(positions, np.float64)[:, None] * bases[:, None] ** exponents         # (N, d/2)
    angles = np.concatenate((angles, angles), axis=-1)                                        # (N, d)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotary_tables(config: IXC25Config, length: int, ntk_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of positions 0 .. length - 1.

    Args:
        config: rotary base, scaling and head size.
        length: positions to tabulate.
        ntk_length: length that sets the base; by default `length`.

    Returns:
        Two float32 arrays `(L, d)`, L `length`; both halves of the last axis hold the same angles.
    """
    return rotary_rows(config, np.arange(length), length if ntk_length is None else ntk_length)
