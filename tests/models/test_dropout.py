"""Seeded dropout without RightShift: the same bits, so that a run that resumes draws what it would have drawn."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn

from mindformers_ixc.models.dropout import (
    FEATURE_MIX_FIRST,
    FEATURE_MIX_SECOND,
    FEATURE_SHIFT,
    FeatureHash,
    PositionNoise,
    SeededDropout,
)


class Shift(nn.Cell):
    """What takes the place of the shift."""

    def __init__(self):
        super().__init__()
        self.hash = FeatureHash(8, 0)

    def construct(self, bits):
        return self.hash.shifted(bits)


class Drop(nn.Cell):
    def __init__(self, rate: float, features: int, salt: int):
        super().__init__()
        self.dropout = SeededDropout(rate, features, salt)
        self.set_train(True)

    def construct(self, x, noise):
        return self.dropout(x, noise)


def test_the_shift_is_that_of_signed_integers_over_their_whole_range():
    steps = np.arange(-2 ** 16, 2 ** 16, dtype=np.int64) * 2 ** 15       # every multiple of the divisor, its neighbours
    edges = np.concatenate([steps, steps - 1, steps + 1, np.arange(-2 ** 17, 2 ** 17), [-2 ** 31, 2 ** 31 - 1]])
    drawn = np.random.default_rng(0).integers(-2 ** 31, 2 ** 31, 1_000_000)
    bits = np.concatenate([edges[(edges >= -2 ** 31) & (edges < 2 ** 31)], drawn]).astype(np.int32)[None]
    shifted = Shift()(Tensor(bits)).asnumpy()
    assert shifted.dtype == np.int32
    np.testing.assert_array_equal(shifted, bits >> FEATURE_SHIFT)


@pytest.mark.parametrize(("rate", "salt"), [(0.05, 0), (0.5, 3)])
def test_the_noise_is_the_hash_it_has_been(rate, salt):
    """By NumPy, with a shift: what runs that are to be resumed have drawn."""
    rows, features = 64, 96
    noise = np.random.default_rng(1).integers(-2 ** 31, 2 ** 31 - 1, (rows, 1)).astype(np.int32)
    columns = np.random.RandomState((features, salt)).randint(-2 ** 31, 2 ** 31 - 1, (1, features)).astype(np.int32)
    with np.errstate(over="ignore"):
        bits = (noise ^ columns) * np.int32(FEATURE_MIX_FIRST)
        bits = (bits ^ (bits >> FEATURE_SHIFT)) * np.int32(FEATURE_MIX_SECOND)
    kept = bits >= int(rate * 2 ** 32) - 2 ** 31
    found = Drop(rate, features, salt)(Tensor(np.ones((rows, features), np.float32)), Tensor(noise)).asnumpy()
    np.testing.assert_array_equal(found != 0, kept)
    assert 0 < kept.mean() < 1


def test_the_seeds_of_positions_are_those_they_have_been():
    found = PositionNoise(4)(Tensor(np.array([0, 1, -7, 2 ** 31 - 1], np.int32))).asnumpy()
    steps = np.arange(4, dtype=np.int64) * 0x9E3779B + 1
    expected = 2 * (np.array([[0], [1], [-7], [2 ** 31 - 1]]) * 0x85EBCA7 + steps * 0x2C1B3C7) + 1
    np.testing.assert_array_equal(found, expected.astype(np.int32).reshape(-1, 1))
