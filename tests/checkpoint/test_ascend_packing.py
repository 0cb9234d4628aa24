"""Weights packed for Ascend: the operator's documented formula over the packed arrays is the weight of the file."""
from __future__ import annotations

import numpy as np
import pytest
from random_model import make

from mindformers_ixc.checkpoint.ascend_packing import repacked
from mindformers_ixc.checkpoint.dtypes import from_float32, to_float32
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.quantised import StoredWeight, quantization_of, stored_weights
from mindformers_ixc.checkpoint.sources import open_source

# two groups for w2, one elsewhere
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


def signed_numbers(packed: np.ndarray) -> np.ndarray:
    """What MindSpore says of qint4x2, a byte at a time: the first number in the low half, two's complement."""
    found = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    for (row, column), byte in np.ndenumerate(packed.astype(int)):
        for place, half in enumerate((byte & 15, byte >> 4 & 15)):
            found[row, 2 * column + place] = half - 16 if half > 7 else half
    return found


def formula(arrays: dict[str, np.ndarray], dtype: str) -> np.ndarray:
    """`(numbers + offsets) * scales` of aclnnWeightQuantBatchMatmulV2, `(F, O)`."""
    numbers, scales = arrays["qweight"], to_float32(arrays["scales"], dtype)
    assert numbers.dtype == np.int8
    if "offsets" not in arrays:                                 # taken transposed
        return numbers.T.astype(np.float32) * scales
    numbers, offsets = signed_numbers(numbers), to_float32(arrays["offsets"], dtype)
    assert offsets.shape == scales.shape
    group = len(numbers) // len(scales)
    return np.concatenate([(numbers[place * group:(place + 1) * group] + offsets[place]) * scales[place]
                           for place in range(len(scales))])


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, dict[str, StoredWeight]]:
    """Weights of quantised directories."""
    place, found = tmp_path_factory.mktemp("packing"), {}
    model = make(place / "model", "BF16", **SIZES)
    for name, options in (("own", {}), ("awq", {"layout": "awq"}), ("eight", {"bits": 8})):
        source = open_source(quantize(model, place / name, **options))
        found[name] = stored_weights(source, quantization_of(source))
    return found


@pytest.mark.parametrize("layout", ["own", "awq"])
@pytest.mark.parametrize("linear", ["feed_forward.w2", "attention.wqkv"])
def test_four_bits_are_the_weights_of_the_file(stored, layout, linear):
    weight = stored[layout][f"model.layers.0.{linear}"]
    outputs, width = weight.shape
    arrays = repacked(weight, "F16")
    assert arrays["qweight"].shape == (width, outputs // 2)
    assert arrays["scales"].shape == arrays["offsets"].shape == (width // 128, outputs)
    np.testing.assert_array_equal(formula(arrays, "F16"), weight.widened(0, outputs).T)
    # in bfloat16 the scales are rounded, and nothing else
    zeros, scales = weight.zeros(0, outputs), to_float32(weight.scales(0, outputs), "F16")
    scales = to_float32(from_float32(scales, "BF16"), "BF16")
    numbers = weight.numbers(0, outputs).reshape(outputs, -1, 128)
    expected = (numbers.astype(np.float32) - zeros[..., None]) * scales[..., None]
    np.testing.assert_array_equal(formula(repacked(weight, "BF16"), "BF16"), expected.reshape(outputs, width).T)


def test_both_layouts_become_the_same(stored):
    for name, weight in stored["awq"].items():
        one, other = (repacked(found, "BF16") for found in (weight, stored["own"][name]))
        for part, array in one.items():
            np.testing.assert_array_equal(array, other[part])


@pytest.mark.parametrize(("dtype", "step"), [("F16", 2 ** -11), ("BF16", 2 ** -8)])
def test_eight_bits_are_the_weights_of_the_file_but_for_the_scales_rounding(stored, dtype, step):
    for name in ("model.layers.0.feed_forward.w2", "model.layers.0.attention.wo.lora_web_B", "output"):
        weight = stored["eight"][name]
        outputs = weight.shape[0]
        arrays = repacked(weight, dtype)
        np.testing.assert_array_equal(arrays["qweight"], weight.parts["qweight"].whole())
        assert arrays["scales"].shape == (outputs,) and arrays["qweight"].flags.writeable
        np.testing.assert_allclose(formula(arrays, dtype), weight.widened(0, outputs).T, rtol=step, atol=1e-7)
