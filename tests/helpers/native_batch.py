"""A tiny model and rows for it, on which steps of the kernels for the CPU are compared with MindSpore's own."""
from __future__ import annotations

import numpy as np
from mindspore import Tensor

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 4, "plora_alpha": 8, "plora_dropout": 0.3,
         "task_lora_ranks": {"web": 4}, "adapter_mode": "web", "max_tiles": 2, "seq_length": 24,
         "vision_config": {"image_size": 56, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 32}}
ROWS, LENGTH, TILES, TOKENS = 4, 24, 2, 4


def batch() -> list[Tensor]:
    """Rows of three segments, with a picture in the first two of them."""
    rng = np.random.default_rng(0)
    mask = np.zeros((ROWS, LENGTH), np.int32)
    mask[:, 2:6], mask[:, 12:15] = 1, 1
    labels = rng.integers(0, SIZES["vocab_size"], (ROWS, LENGTH))
    labels[mask == 1] = -100
    labels[0, 8:] = -100                                    # parts of a batch with unequal numbers of labels
    ends = np.array([[10, 18, 24], [9, 23, 24], [8, 17, 24], [10, 20, 24]], np.int32)
    positions = np.stack([np.arange(LENGTH) - np.repeat(np.r_[0, row[:-1]], np.diff(np.r_[0, row])) for row in ends])
    side = SIZES["vision_config"]["image_size"]
    arrays = [rng.integers(3, SIZES["vocab_size"], (ROWS, LENGTH)), labels,
              rng.integers(0, 256, (ROWS, TILES, 3, side, side)).astype(np.uint8),
              rng.standard_normal((ROWS, 1, 3, side, side)).astype(np.float32),
              np.tile(np.array([1, 0]), (ROWS, 1)), rng.integers(0, TILES * TOKENS + 2, (ROWS, LENGTH)) * mask, mask,
              positions, ends, rng.integers(0, 2 ** 31 - 1, ROWS)]
    return [Tensor(value if value.dtype in (np.uint8, np.float32) else value.astype(np.int32)) for value in arrays]
