"""Real tensor parallel over processes, from the slices `convert` writes (test_layouts.py trains)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from parallel_answers import run_ranks

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.loading import load_model

HELPERS = Path(__file__).parents[1] / "helpers"
LENGTH = 24


def batch(config) -> dict[str, np.ndarray]:
    """Two samples with pictures, whose image positions take rows in no particular order."""
    rng = np.random.default_rng(0)
    side, rows = config.vision_config.image_size, 3 * config.vision_config.tokens_per_tile + 2
    mask = np.zeros((2, LENGTH), np.int32)
    mask[0, 2:12] = mask[1, 5:9] = 1
    return {"input_ids": rng.integers(3, config.vocab_size, (2, LENGTH)).astype(np.int32) * (1 - mask) + 2 * mask,
            "pixel_values": rng.integers(0, 256, (2, 3, 3, side, side), np.uint8),
            "global_views": rng.standard_normal((2, 2, 3, side, side)).astype(np.float32),
            "view_index": np.array([[1, 0, 2], [0, 1, 0]], np.int32),
            "vision_index": rng.integers(0, rows, (2, LENGTH)).astype(np.int32) * mask, "image_mask": mask}


@pytest.mark.slow
def test_logits_equal_the_single_process(tmp_path, goldens):
    convert(goldens / "t1", tmp_path / "cut", tensor_parallel=2, mode="write")
    model = load_model(goldens / "t1", IXC25ForCausalLM, seq_length=LENGTH, max_tiles=3, adapter_mode="write")
    arrays = batch(model.config)
    np.savez(tmp_path / "inputs.npz", **arrays)
    run_ranks(2, tmp_path, HELPERS / "rank_logits.py", tmp_path / "cut", tmp_path / "inputs.npz",
              tmp_path / "logits.npy")
    expected = model(Tensor(arrays["input_ids"]), None,
                     *(Tensor(arrays[name]) for name in BATCH_COLUMNS[2:])).asnumpy()
    found = np.load(tmp_path / "logits.npy")
    assert found.shape == expected.shape
    # sums over devices are taken in another order: float32's resolution of the largest logit
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
