"""The compiled image functions: the pixels of Pillow, the tiles of NumPy."""
from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.native import SWITCH, images
from mindformers_ixc.processing.image import image_to_tiles, partition_image, plan_partition

# without a compiler the package has no such functions, and takes Pillow and NumPy
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")

SIDES = st.integers(1, 90)


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    out = np.empty((height, width, 3), np.uint8)
    images.resize(pixels, out)
    return out


def noise(width: int, height: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_resized_pixels_are_pillows(width, height, new_width, new_height, seed):
    # there Pillow 13 takes the columns first, earlier ones do not; no partition shrinks an image like that
    assume(height - new_height <= max(0, 2 * (width - new_width)))
    pixels = noise(width, height, seed)
    expected = Image.fromarray(pixels).resize((new_width, new_height), Image.BILINEAR)
    np.testing.assert_array_equal(resized(pixels, new_width, new_height), np.asarray(expected))


@pytest.mark.parametrize("size", [(1920, 1080), (640, 481), (333, 1000)])
def test_resized_photographs_are_pillows(size):
    pixels, plan = noise(*size, 0), plan_partition(*size, 18, training=True)
    expected = Image.fromarray(pixels).resize(plan.resized, Image.BILINEAR)
    np.testing.assert_array_equal(resized(pixels, *plan.resized), np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 14, 28, 56]), st.integers(0, 2**32 - 1))
def test_tiles_are_numpys(rows, columns, side, seed):
    board = noise(columns * side, rows * side, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        expected = image_to_tiles(board, side)
    assert images.available()
    found = image_to_tiles(board, side)
    np.testing.assert_array_equal(found[1:], expected[1:])
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-6)     # sums in another order


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_partition_is_the_same_without_the_library(width, height, hd_num, training, seed):
    image = Image.fromarray(noise(width, height, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        expected = partition_image(image, hd_num, 28, training)
    np.testing.assert_array_equal(np.asarray(partition_image(image, hd_num, 28, training)), np.asarray(expected))


def test_a_library_without_the_functions_counts_as_none(monkeypatch):
    monkeypatch.setattr(images, "library", lambda: None)
    assert images._functions.__wrapped__() is None
    # an older build of the package; any library serves that has other functions
    monkeypatch.setattr(images, "library", lambda: ctypes.pythonapi._name)
    assert images._functions.__wrapped__() is None
