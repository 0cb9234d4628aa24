"""Tries a library of kernels that was just built: `python check.py LIBRARY`, a program of its own.

Some functions are compared, with NumPy and with Pillow: whether each kernel is right is what the tests are for; here it
is whether this compiler on this machine makes of them what it should. Where a function has a form of its own for a kind
of processor, the plain form must agree with it.
"""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image


def resizes_as_pillow(functions: ctypes.CDLL) -> bool:
    """Whether a picture is resized to the same bytes."""
    width, height, wide, high = 37, 23, 19, 31
    pixels = (np.arange(height * width * 3) * 7919 % 256).astype(np.uint8).reshape(height, width, 3)
    out = np.empty((high, wide, 3), np.uint8)
    failed = functions.resize_image(pixels.ctypes, width, height, out.ctypes, wide, high)
    expected = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
    return not failed and np.array_equal(out, expected)


def call(function: Callable[..., int], arrays: Sequence[np.ndarray]) -> int:
    """Calls a kernel as MindSpore does; the last array is the output."""
    count, pointer = len(arrays), ctypes.POINTER(ctypes.c_int64)
    shapes = [(ctypes.c_int64 * array.ndim)(*array.shape) for array in arrays]
    return function(count, (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
                    (ctypes.c_int * count)(*[array.ndim for array in arrays]),
                    (pointer * count)(*[ctypes.cast(shape, pointer) for shape in shapes]), None, None, None)


def multiplies_as_numpy(functions: ctypes.CDLL) -> bool:
    """Whether a product is right that is large enough for threads."""
    rows, width, outputs = 2, 512, 260
    x = np.sin(np.arange(rows * width, dtype=np.float32)).reshape(rows, width)
    weight = np.cos(np.arange(outputs * width, dtype=np.float32)).reshape(outputs, width)
    out = np.zeros((rows, outputs), np.float32)
    failed = call(functions.linear, (x, weight, out))
    return not failed and np.allclose(out, x @ weight.T, rtol=1e-4, atol=1e-3)


def whole_numbers_as_numpy(functions: ctypes.CDLL) -> bool:
    """Whether products with weights of 8 and 4 bits are right, of few rows and of many, in both forms."""
    width, outputs = 256, 20
    numbers = (np.arange(outputs * width) * 7919 % 255 - 127).astype(np.int8).reshape(outputs, width)
    scales = np.linspace(0.5, 1.5, outputs, dtype=np.float32)
    # every half of a byte is the same number, so that their order does not matter here
    halves = (np.arange(outputs, dtype=np.uint8) % 16 * 17)[:, None].repeat(width // 2, 1)
    ones, zeros = np.ones((outputs, width // 128), np.float16), np.full((outputs, width // 128), 7, np.uint8)
    eight = numbers * scales[:, None]
    four = np.broadcast_to((np.arange(outputs) % 16 - 7.0)[:, None], (outputs, width))
    right = True
    for plain in (1, 0):
        functions.plain_form(plain)
        for rows in (3, 20):
            x = np.sin(np.arange(rows * width, dtype=np.float32)).reshape(rows, width)
            for name, arrays, weight in (("linear_int8", (numbers, scales), eight),
                                         ("linear_int4", (halves, ones, zeros), four)):
                out = np.zeros((rows, outputs), np.float32)
                failed = call(getattr(functions, name), (x, *arrays, out))
                size = np.abs(x) @ np.abs(weight).T
                right &= not failed and bool((np.abs(out - x @ weight.T) <= 2e-4 * size + 1e-4).all())
    return right


def main(path: str) -> None:
    """Ends the process with a sentence unless the library loads and is right."""
    functions = ctypes.CDLL(path)
    if not resizes_as_pillow(functions):
        sys.exit("Error: a picture is resized to other bytes than Pillow's.")
    if not multiplies_as_numpy(functions):
        sys.exit("Error: a product has other numbers than NumPy's.")
    if not whole_numbers_as_numpy(functions):
        sys.exit("Error: a product with whole numbers has other numbers than NumPy's.")


if __name__ == "__main__":
    main(sys.argv[1])
