"""Rotary position tables with dynamic NTK scaling, computed on the host.

The public code keeps the tables it once grew for a long input, so an answer there depends on what was asked before.
Here they are a pure function of the sequence's own length: up to `max_position_embeddings` the trained base, beyond
it the NTK base for that length.
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


def rotary_tables(config: IXC25Config, length: int, ntk_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of positions 0 .. length - 1.

    Args:
        config: rotary base, scaling and head size.
        length: positions to tabulate.
        ntk_length: length that sets the base; by default `length`.

    Returns:
        Two float32 arrays `(L, d)`, L `length`; both halves of the last axis hold the same angles.
    """
    size = config.head_size
    base = rotary_base(config, length if ntk_length is None else ntk_length)
    frequencies = base ** (-np.arange(0, size, 2, dtype=np.float64) / size)                  # (d/2,)
    angles = np.outer(np.arange(length, dtype=np.float64), frequencies)                      # (L, d/2)
    angles = np.concatenate((angles, angles), axis=-1)                                       # (L, d)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
