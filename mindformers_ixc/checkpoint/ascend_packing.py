"""Quantised weights as Ascend's operator takes them (`WeightQuantBatchMatmul`, aclnnWeightQuantBatchMatmulV2).

It computes `x @ ((numbers + offsets) * scales)`, with scales and offsets in x's format. For a weight `(O, F)`:

    8 bits   qweight int8 (O, F), taken transposed; scales (O,)                     w = q * scale
    4 bits   qweight (F, O/2), two signed numbers a byte; scales, offsets (G, O)    w = (q - 8 + 8 - zero) * scale

A byte of four-bit numbers holds those of an even output, in its low half, and of the output after it, each as two's
complement: MindSpore's qint4x2.
"""
from __future__ import annotations

import numpy as np

from mindformers_ixc.checkpoint.dtypes import from_float32, to_float32
from mindformers_ixc.checkpoint.quantised import NUMBERS, SCALES, StoredWeight

# What the numbers are added to, in the place of their zeros.
OFFSETS = "offsets"

# Numbers are from -8 on where the file counts them from 0.
SIGNED = 8


def pack_signed(numbers: np.ndarray) -> np.ndarray:
    """Numbers 0 to 15 `(F, O)`, O even, less 8, two a byte: int8 `(F, O/2)`."""
    halves = numbers ^ np.uint8(SIGNED)         # less 8 modulo 16
    return (halves[:, 0::2] | halves[:, 1::2] << 4).view(np.int8)


def repacked(weight: StoredWeight, dtype: str) -> dict[str, np.ndarray]:
    """The operator's arrays of a weight.

    Args:
        weight: of a file, in either layout.
        dtype: format of what it is multiplied with, `F16` or `BF16`, in which scales and offsets are given.
    """
    outputs = weight.shape[0]

    def narrow(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(from_float32(np.ascontiguousarray(values, np.float32), dtype))

    if weight.kind == "int8":
        return {NUMBERS: np.array(weight.numbers(0, outputs)), SCALES: narrow(weight.scales(0, outputs))}
    offsets = SIGNED - weight.zeros(0, outputs).astype(np.float32)
    return {NUMBERS: pack_signed(np.ascontiguousarray(weight.numbers(0, outputs).T)),
            SCALES: narrow(to_float32(weight.scales(0, outputs), "F16").T), OFFSETS: narrow(offsets.T)}
