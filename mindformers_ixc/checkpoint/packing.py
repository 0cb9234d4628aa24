"""Weights as whole numbers of 4 or 8 bits with scales, and back: rounding, and the two layouts of four-bit weights.

Own layout, which the kernels of `native/quantised.c` compute on as it lies in the file. For a weight `(O, F)`:

    8 bits   qweight int8 (O, F), scales float32 (O,)                                w = q * scale
    4 bits   qweight uint8 (O, F/2), scales float16 (O, G), qzeros uint8 (O, G)      w = (q - zero) * scale

with G = F / 128 groups along the input. 64 weights are 16 little-endian words of 16 bits; word j holds the weights j,
16 + j, 32 + j and 48 + j from its lowest four bits on, so that a shift and a mask give 16 neighbours.

AWQ's layout (`version: gemm`), in which four-bit models are published: qweight int32 (F, O/8), scales float16 (G, O),
qzeros int32 (G, O/8). The eight numbers of a word are the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight, lowest bits first.
"""
from __future__ import annotations

import numpy as np

from mindformers_ixc.parameters import INT4_GROUP as GROUP

# Largest number of each width: unsigned with a zero of its own, and signed without.
MOST_4, MOST_8 = 15, 127

# Which of eight neighbouring outputs each four bits of a word of AWQ's hold.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def round_8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a float32 weight as int8 with a float32 scale a row."""
    highest = np.abs(weight).max(-1) if weight.shape[-1] else np.zeros(weight.shape[:-1], np.float32)
    scales = (highest / np.float32(MOST_8)).astype(np.float32)
    safe = np.where(scales > 0, scales, np.float32(1))
    # the scale of the smallest numbers of all is rounded itself
    return np.clip(np.rint(weight / safe[..., None]), -MOST_8, MOST_8).astype(np.int8), scales


def round_4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a float32 weight `(O, F)` as whole numbers 0 to 15 `(O, F)`, float16 scales and uint8 zeros `(O, G)`.

    The range of a group is that of its weights and 0. The numbers are rounded with the scale as float16 keeps it.
    """
    rows, width = weight.shape
    grouped = weight.reshape(rows, width // GROUP, GROUP)
    low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    # a scale that float16 would lose, or round to less than half, becomes its smallest ordinary number
    smallest = np.float32(np.finfo(np.float16).tiny)
    with np.errstate(over="ignore"):         # whoever writes them looks for infinities
        scales = np.maximum((high - low) / np.float32(MOST_4), smallest).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / wide), 0, MOST_4)
    numbers = np.clip(np.rint(grouped / wide[..., None]) + zeros[..., None], 0, MOST_4)
    return numbers.astype(np.uint8).reshape(rows, width), scales, zeros.astype(np.uint8)


def pack_4(numbers: np.ndarray) -> np.ndarray:
    """Numbers 0 to 15 `(O, F)`, F a multiple of 64, in the own layout `(O, F/2)`."""
    rows, width = numbers.shape
    parts = numbers.reshape(rows, width // 64, 4, 16).astype("<u2")
    words = parts[:, :, 0] | parts[:, :, 1] << 4 | parts[:, :, 2] << 8 | parts[:, :, 3] << 12      # (O, F/64, 16)
    return words.view(np.uint8).reshape(rows, width // 2)


def unpack_4(packed: np.ndarray) -> np.ndarray:
    """The numbers 0 to 15 `(O, F)` of the own layout `(O, F/2)`."""
    rows, half = packed.shape
    words = np.ascontiguousarray(packed).view("<u2").reshape(rows, half // 32, 1, 16)
    shifts = np.array([0, 4, 8, 12], np.uint16)[:, None]
    return (words >> shifts & 15).astype(np.uint8).reshape(rows, 2 * half)


def widen_4(numbers: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """float32 weights `(O, F)` of numbers `(O, F)`, scales and zeros `(O, G)`."""
    rows, width = numbers.shape
    grouped = numbers.reshape(rows, -1, GROUP).astype(np.float32) - zeros[..., None].astype(np.float32)
    return (grouped * scales[..., None].astype(np.float32)).reshape(rows, width)


def widen_8(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 weights of int8 numbers and a scale a row."""
    return numbers.astype(np.float32) * scales[..., None]


def pack_awq(numbers: np.ndarray) -> np.ndarray:
    """Numbers 0 to 15 `(N, O)`, O a multiple of 8, as AWQ's words, int32 `(N, O/8)`."""
    eights = numbers.reshape(len(numbers), -1, 8)
    words = np.zeros(eights.shape[:2], np.uint32)
    for place, output in enumerate(AWQ_ORDER):
        words |= eights[..., output].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """The numbers 0 to 15 `(N, O)` of AWQ's words, int32 `(N, O/8)`."""
    bits = np.ascontiguousarray(words).view(np.uint32)
    numbers = np.empty((*bits.shape, 8), np.uint8)
    for place, output in enumerate(AWQ_ORDER):
        numbers[..., output] = bits >> np.uint32(4 * place) & 15
    return numbers.reshape(len(bits), -1)
