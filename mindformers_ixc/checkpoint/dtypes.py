"""Number formats of checkpoints, named as safetensors names them, and conversion that rounds once.

NumPy has no bfloat16, so arrays of it are held as `uint16` and every array travels with the name of its format.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mindformers_ixc.errors import CheckpointError


class Format(NamedTuple):
    """A number format under the names that everybody has for it.

    Attributes:
        name: safetensors', by which this package names formats.
        label: what users, YAML files, PyTorch and NumPy write.
        mindspore: MindSpore's, in .ckpt files and of its types.
        graph: MindSpore's graph format's (mind_ir.proto).
        storage: NumPy's type for the bytes.
    """

    name: str
    label: str
    mindspore: str
    graph: str
    storage: type[np.generic]


# The one table of formats.
FORMATS = (
    Format("F64", "float64", "Float64", "DOUBLE", np.float64), Format("F32", "float32", "Float32", "FLOAT", np.float32),
    Format("F16", "float16", "Float16", "FLOAT16", np.float16),
    Format("BF16", "bfloat16", "BFloat16", "BFLOAT16", np.uint16),
    Format("I64", "int64", "Int64", "INT64", np.int64), Format("I32", "int32", "Int32", "INT32", np.int32),
    Format("I16", "int16", "Int16", "INT16", np.int16), Format("I8", "int8", "Int8", "INT8", np.int8),
    Format("U8", "uint8", "UInt8", "UINT8", np.uint8), Format("BOOL", "bool", "Bool", "BOOL", np.bool_),
)
FLOATING = ("F64", "F32", "F16", "BF16")

STORAGE = {entry.name: entry.storage for entry in FORMATS}
LABELS = {entry.name: entry.label for entry in FORMATS}
MINDSPORE = {entry.name: entry.mindspore for entry in FORMATS}

_BY_ANY_NAME = {name: entry.name for entry in FORMATS for name in entry[:4]}

# The formats weights are kept in, by the names users and YAML files know; MindFormers' short ones too.
WEIGHTS = {**{LABELS[name]: name for name in FLOATING if name != "F64"}, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def format_of(dtype: object) -> str | None:
    """Format of MindSpore's or PyTorch's type, or of any name in the table; `None` if it has none."""
    return _BY_ANY_NAME.get(str(dtype).removeprefix("torch."))


def item_size(dtype: str) -> int:
    """Bytes of a number of a format."""
    return np.dtype(STORAGE[dtype]).itemsize


def dtype_bytes(dtype: object) -> int:
    """Bytes of a number of MindSpore's type, or of any name in the table."""
    return item_size(_BY_ANY_NAME[str(dtype)])


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


def count_not_finite(array: np.ndarray, dtype: str) -> int:
    """How many numbers of an array are NaN or infinite; 0 for whole numbers."""
    if dtype == "BF16":     # all bits of the exponent are set
        return int(np.count_nonzero((array & np.uint16(0x7F80)) == 0x7F80))
    return int(array.size - np.count_nonzero(np.isfinite(array))) if dtype in FLOATING else 0


def convert_dtype(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """An array in another floating format; the same array where nothing changes."""
    if source == target:
        return array
    return from_float32(to_float32(array, source), target)
