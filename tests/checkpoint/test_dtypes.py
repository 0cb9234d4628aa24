"""Formats of numbers: exact widening, rounding once to the nearest, overflow refused."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mindformers_ixc.checkpoint.dtypes import convert_dtype, from_float32, to_float32, weight_format
from mindformers_ixc.errors import CheckpointError

ANY_BITS = arrays.arrays(np.uint32, st.integers(1, 64), elements=st.integers(0, 2**32 - 1))


@given(ANY_BITS)
def test_bfloat16_rounds_as_pytorch_does(bits):
    values = bits.view(np.float32)
    ours = from_float32(values, "BF16")
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    is_number = ~np.isnan(values)
    np.testing.assert_array_equal(ours[is_number], theirs[is_number])
    assert np.isnan(to_float32(ours[~is_number], "BF16")).all()


def test_every_bfloat16_comes_back():
    bits = np.arange(2**16, dtype=np.uint16)
    wide = to_float32(bits, "BF16")
    numbers = ~np.isnan(wide)
    np.testing.assert_array_equal(from_float32(wide, "BF16")[numbers], bits[numbers])


@given(arrays.arrays(np.float32, 20, elements=st.floats(-60000, 60000, width=32)))
def test_float16_rounds_as_numpy_does(values):
    np.testing.assert_array_equal(convert_dtype(values, "F32", "F16"), values.astype(np.float16))


def test_bfloat16_beyond_float16_is_refused_with_its_size():
    big = from_float32(np.array([1.0, -131072.0], np.float32), "BF16")
    with pytest.raises(CheckpointError, match=r"1 values are beyond float16's range \(largest magnitude 131072"):
        convert_dtype(big, "BF16", "F16")


def test_infinity_stays_infinity():
    assert np.isinf(convert_dtype(np.array([np.inf], np.float32), "F32", "F16")).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "BF16"), ("float32", "F32"), ("fp16", "F16")])
def test_names(name, dtype):
    assert weight_format(name) == dtype


def test_other_names_are_refused():
    with pytest.raises(CheckpointError, match="float32, bfloat16 and float16"):
        weight_format("int8")
