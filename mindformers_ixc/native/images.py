"""Resizing and cutting images in C, where a compiler is at hand.

The functions give what Pillow and NumPy give (resizing to the last bit); without the library they are not used.
"""
from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np

from mindformers_ixc.native import is_switched_on, library

_BYTES = np.ctypeslib.ndpointer(np.uint8, flags="C")
_FLOATS = np.ctypeslib.ndpointer(np.float32, flags="C")
_INDICES = np.ctypeslib.ndpointer(np.int64, flags="C")


@functools.cache
def _functions():
    if library() is None:
        return None
    functions = ctypes.CDLL(library())
    functions.resize_image.argtypes = [_BYTES, ctypes.c_int, ctypes.c_int, _BYTES, ctypes.c_int, ctypes.c_int]
    functions.split_tiles.argtypes = [_BYTES, ctypes.c_int, ctypes.c_int, ctypes.c_int, _BYTES]
    functions.split_tiles.restype = None
    functions.shrink_image.argtypes = [_BYTES, ctypes.c_int, ctypes.c_int, _INDICES, _FLOATS, _INDICES, _FLOATS,
                                         _FLOATS, _FLOATS]
    functions.shrink_image.restype = None
    return functions


def available() -> bool:
    """Whether the functions are there and not switched off."""
    return is_switched_on() and _functions() is not None


def resize(pixels: np.ndarray, out: np.ndarray) -> None:
    """Bilinear resize of uint8 `(height, width, 3)`, antialiased, equal to Pillow's.

    Rows are resized along their length first. So does Pillow, but for images whose height shrinks by more than twice
    what their width does (from Pillow 13 on), which partitions never ask for.

    Args:
        pixels: the image.
        out: uint8 `(height, width, 3)` for the result, rows without gaps.

    Raises:
        MemoryError: when there is no room for the image.
    """
    height, width = out.shape[:2]
    pixels = np.ascontiguousarray(pixels)
    if _functions().resize_image(pixels, pixels.shape[1], pixels.shape[0], out, width, height):
        raise MemoryError(f"No memory to resize a picture to {width} x {height} pixels.")


def cut(pixels: np.ndarray, out: np.ndarray) -> None:
    """Cuts an image into tiles of separate colours, row by row.

    Args:
        pixels: uint8 `(rows * P, columns * P, 3)`.
        out: uint8 `(rows * columns, 3, P, P)` for the result.
    """
    side = out.shape[-1]
    _functions().split_tiles(np.ascontiguousarray(pixels), pixels.shape[0] // side, pixels.shape[1] // side, side, out)


def shrink(pixels: np.ndarray, table: np.ndarray, taps: Sequence[tuple[np.ndarray, np.ndarray]],
           out: np.ndarray) -> None:
    """Resizes a normalised image to one tile, bicubically.

    Args:
        pixels: uint8 `(height, width, 3)`.
        table: normalised value of each pixel value, float32 `(3, 256)`.
        taps: indices and weights `(P, 4)` of the rows and of the columns.
        out: float32 `(3, P, P)` for the result.
    """
    (row_indices, row_weights), (column_indices, column_weights) = taps
    _functions().shrink_image(np.ascontiguousarray(pixels), pixels.shape[1], out.shape[-1],
                              np.ascontiguousarray(row_indices), np.ascontiguousarray(row_weights),
                              np.ascontiguousarray(column_indices), np.ascontiguousarray(column_weights), table, out)
