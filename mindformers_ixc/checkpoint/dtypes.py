"""Number formats of checkpoints, named as safetensors names them, and conversion that rounds once.

NumPy has no bfloat16, so arrays of it are held as `uint16` and every array travels with the name of its format.
"""
from __future__ import annotations

import numpy as np

from mindformers_ixc.checkpoint.errors import CheckpointError

# NumPy's type for the bytes of each safetensors format.
STORAGE = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
           "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
# MindSpore's names in .ckpt files.
MINDSPORE = {"F64": "Float64", "F32": "Float32", "F16": "Float16", "BF16": "BFloat16", "I64": "Int64", "I32": "Int32",
             "I16": "Int16", "I8": "Int8", "U8": "UInt8", "BOOL": "Bool"}
# The formats weights are kept in, by the names users and YAML files know; MindFormers' short ones too.
WEIGHTS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
FLOATING = ("F64", "F32", "F16", "BF16")


def item_size(dtype: str) -> int:
    """Bytes of a number."""
    return np.dtype(STORAGE[dtype]).itemsize


def weight_format(name: str) -> str:
    """Format of a name such as `bfloat16` or `bf16`.

    Raises:
        CheckpointError: for another name.
    """
    if name not in WEIGHTS:
        raise CheckpointError(f"'{name}' is no format for weights; the choices are float32, bfloat16 and float16.")
    return WEIGHTS[name]


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """An array of any floating format in float32 (exact, but for float64)."""
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(np.float32, copy=False)


def from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array in another format, rounded to the nearest number, ties to even.

    Raises:
        CheckpointError: when a finite value is too large for float16.
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        # half of the last kept digit, less one unit where that digit is even already
        rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
        # a NaN must stay one: rounding could carry its payload away
        return np.where(np.isnan(array), (bits >> 16).astype(np.uint16) | np.uint16(0x40), rounded)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float16)
        lost = np.isinf(narrow) & np.isfinite(array)
        if lost.any():
            raise CheckpointError(f"{int(lost.sum())} values are beyond float16's range (largest magnitude "
                                  f"{float(np.abs(array[lost]).max()):.6g}, float16 ends at 65504); choose bfloat16 or "
                                  "float32.")
        return narrow
    return array.astype(STORAGE[dtype], copy=False)


def convert(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """An array in another floating format; the same array where nothing changes."""
    if source == target:
        return array
    return from_float32(to_float32(array, source), target)
