"""What the YAML does not choose of Ascend's fused operators is composed; what it does is in test_ascend_rules."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindformers_ixc.config import VisionConfig
from mindformers_ixc.device import assume_device, on_ascend
from mindformers_ixc.models.attention import compressed_causal_mask, padding_mask

SCRIPT = Path(__file__).parents[1] / "helpers" / "ascend_primitives.py"
SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "plora_rank": 4, "plora_alpha": 4, "task_lora_ranks": {},
         "seq_length": 32, "max_segments": 4, "max_tiles": 2, "compute_dtype": "bfloat16",
         "vision_config": {"image_size": 56, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
                           "intermediate_size": 32}}
LENGTH = 1024               # of a row whose square would show: two blocks of queries


def described(device: str, *given: dict) -> list[dict]:
    """What the script says of training graphs made for a device, each of some fields.

    They are made in a process of their own, which stops at the front end.
    """
    fields = [json.dumps({**SIZES, **changes}) for changes in given]
    done = subprocess.run([sys.executable, str(SCRIPT), device, "1", *fields], check=False,
                          env={**os.environ, "MS_SIMULATION_LEVEL": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu() -> list[dict]:
    """Graphs for the CPU: one that asks for fused attention, and one of a long row, packed and not."""
    return described("CPU", {"use_flash_attention": True},
                     *({"seq_length": LENGTH, "packing": packing} for packing in (False, True)))


@pytest.fixture(scope="module")
def on_device() -> list[dict]:
    """Graphs for Ascend: one without the fused norm, and one as it comes."""
    return described("Ascend", {"fused_norm": False}, {})


def test_the_device_is_assumed_for_a_while_only():
    assert not on_ascend()
    with assume_device("Ascend"):
        assert on_ascend()
    assert not on_ascend()


@pytest.mark.slow
def test_what_is_not_asked_for_is_composed(on_cpu, on_device):
    assert not {"FlashAttentionScore", "RotaryPositionEmbedding", "RmsNorm"} & set(on_device[0]["primitives"])
    assert not {"FlashAttentionScore", "RmsNorm"} & set(on_cpu[0]["primitives"])


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_no_scores_of_composed_attention_are_as_large_as_the_square_of_a_length(packing, on_cpu):
    heads, block, found = 2, 512, on_cpu[1 + packing]
    assert "Softmax" in found["primitives"]
    assert found["largest"] == heads * block * LENGTH        # of the last block of queries; not heads * length * length


@pytest.mark.slow
def test_rows_of_vision_tables_are_taken_by_kernels_of_cann(on_device):
    # a gather with a batch axis has none, forward or backward; Embedding and its gradient are aclnnEmbedding and
    # aclnnEmbeddingDenseBackward in MindSpore's library of Ascend operators
    found = on_device[1]
    assert found["gather_batch_axes"] and not any(found["gather_batch_axes"])
    assert {"Embedding", "EmbeddingDenseBackward"} <= set(found["primitives"])


def test_masks_of_the_fused_kernel():
    assert VisionConfig().padded_positions == 1601 and padding_mask(VisionConfig()) is None
    padded = VisionConfig(image_size=56, pad_positions=True)
    assert VisionConfig(pad_positions=True).padded_positions == 1616 and padded.padded_positions == 32
    hidden = padding_mask(padded).asnumpy()
    assert hidden.shape == (1, 1, 32, 32) and hidden.dtype == np.uint8
    assert not hidden[..., :17].any() and hidden[..., 17:].all()
    causal = compressed_causal_mask().asnumpy()
    assert causal.shape == (2048, 2048) and causal[3, 3] == 0 and causal[3, 4] == 1 and causal[4, 3] == 0
