"""The two attentions of packed rows: segments, masks, the fused one's layout and lengths, the composed one's blocks."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.cpu_cluster.build import preload_environment
from mindformers_ixc.data.packing import segment_ends
from mindformers_ixc.device import assume_device
from mindformers_ixc.errors import ConfigError, PromptError
from mindformers_ixc.models import attention
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.internlm2 import Attention

HELPERS = Path(__file__).parents[1] / "helpers"
SIZES = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 8, "num_key_value_heads": 2, "plora_rank": 4, "plora_alpha": 4, "task_lora_ranks": {},
         "seq_length": 32, "max_segments": 4, "max_tiles": 2, "packing": True, "plora_dropout": 0.0,
         "vision_config": {"image_size": 56, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 32}}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 12), st.integers(1, 12))
def test_segments_are_never_empty_and_end_with_the_sequence(lengths, padding, segments):
    total, spare = sum(lengths) + padding, segments - len(lengths)
    if (padding and not spare) or spare < 0 or padding < spare:
        with pytest.raises(PromptError, match="max_segments"):
            segment_ends(lengths, total, segments)
        return
    ends = segment_ends(lengths, total, segments)
    assert ends.dtype == np.int32 and ends.shape == (segments,) and ends[-1] == total
    assert list(ends[:len(lengths)]) == list(np.cumsum(lengths))
    own = np.diff(ends, prepend=0)
    assert own.min() >= 1 and all(own[len(lengths):-1] == 1)


@pytest.mark.parametrize(("lengths", "total", "segments", "words"), [
    ([3, 0, 2], 16, 8, r"\[3, 0, 2\] positions; .* none may be empty"), ([], 16, 8, "one sample at least"),
    ([9, 8], 16, 8, "are 17 together and do not fit seq_length 16"),
    ([2, 2, 2], 16, 3, "3 samples and 10 positions of padding, but max_segments is 3"),
    ([2, 2, 2], 6, 2, "3 samples and 0 positions of padding, but max_segments is 2"),
    ([10, 4], 16, 6, "2 positions of padding, too few for the 4 segments")])
def test_rows_that_cannot_be_cut_into_segments_are_refused(lengths, total, segments, words):
    with pytest.raises(PromptError, match=words):
        segment_ends(lengths, total, segments)


@pytest.mark.parametrize("segments", [0, 1025, 2.5, "many"])
def test_more_segments_than_the_kernel_takes_are_refused(segments):
    with pytest.raises(ConfigError, match=r"max_segments is .*a whole number from 1 to 1024"):
        ModelConfig(max_segments=segments)
    assert ModelConfig(max_segments=1024).max_segments == 1024


def lengths_of(ends: np.ndarray, length: int, replicas: int) -> np.ndarray:
    mask = attention.FlashMask()
    mask.replicas = replicas
    causal, lengths = mask(length, Tensor(ends))
    assert causal.shape == (2048, 2048) and lengths.dtype == ms.int64
    return lengths.asnumpy()


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_lengths_accumulate_over_a_replicas_rows_and_start_again_with_the_next(replicas):
    ends = np.array([[5, 9, 15, 16], [1, 2, 3, 16], [16 - 3, 14, 15, 16], [4, 8, 12, 16]], np.int32)
    found = lengths_of(ends, 16, replicas).reshape(replicas, -1)
    rows = 4 // replicas
    for own, share in zip(found, np.split(ends, replicas)):
        assert own[0] == share[0][0] and own[-1] == 16 * rows     # the last is T of the replica
        assert np.diff(own, prepend=0).min() >= 1                      # no segment is empty
        np.testing.assert_array_equal(np.diff(own, prepend=0),
                                      np.concatenate([np.diff(row, prepend=0) for row in share]))


def test_a_call_of_more_than_1024_segments_is_refused():
    ends = np.tile(np.arange(1, 257, dtype=np.int32), (4, 1))
    assert len(lengths_of(ends, 256, 1)) == 1024
    five = np.tile(ends[:1], (5, 1))
    with pytest.raises(Exception, match="batch_size 5 x max_segments 256 are 1280 segments"):
        lengths_of(five, 256, 1)
    assert len(lengths_of(np.tile(ends[:1], (8, 1)), 256, 2)) == 2048       # each replica has a call of its own


class Kernel(nn.Cell):
    """What FlashAttentionScore is documented to compute in layout TND with causal masks, of primitive operations."""

    def construct(self, query, key, value, shift, drop, padding, causal, prefix, lengths, key_lengths):
        t, heads, d = query.shape
        query, key, value = (ms.ops.cast(x, ms.float32) for x in (query, key, value))
        key = ms.ops.repeat_interleave(key, heads // key.shape[1], 1)          # query head h has key head h // group
        value = ms.ops.repeat_interleave(value, heads // value.shape[1], 1)
        places = ms.ops.arange(t)
        segment = (lengths.reshape(1, -1) <= places.reshape(-1, 1)).astype(ms.int32).sum(1)
        hidden = (segment.reshape(-1, 1) != segment.reshape(1, -1)) | (places.reshape(1, -1) > places.reshape(-1, 1))
        scores = ms.ops.matmul(query.transpose(1, 0, 2), key.transpose(1, 2, 0)) * d ** -0.5
        weights = ms.ops.softmax(scores + hidden.astype(ms.float32) * -1e9)
        y = ms.ops.matmul(weights, value.transpose(1, 0, 2)).transpose(1, 0, 2)
        return None, None, None, ms.ops.cast(y, ms.float16)


class OneLayer(nn.Cell):
    """Attention of one layer with the mask it takes."""

    def __init__(self, config):
        super().__init__()
        self.layer, self.mask = Attention(config), attention.decoder_mask(config)

    def construct(self, x, cos, sin, shape, ends):
        return self.layer(x, None, cos, sin, self.mask(shape[1], ends), (), shape)


def test_the_fused_layout_gives_what_the_composed_one_gives():
    rng = np.random.default_rng(0)
    fields = {**SIZES, "compute_dtype": "float16", "use_flash_attention": True}
    with assume_device("Ascend"):
        fused = OneLayer(IXC25Config(**fields))
    composed = OneLayer(IXC25Config(**fields))
    assert isinstance(fused.layer.core, attention.PackedFlashAttention)
    assert isinstance(composed.layer.core, attention.BlockwiseAttention)
    fused.layer.core.attention = Kernel()
    for one, other in zip(fused.get_parameters(), composed.get_parameters()):
        one.set_data(Tensor(rng.normal(0, 0.1, one.shape).astype(np.float32)))
        other.set_data(one)
    x = Tensor(rng.normal(0, 1, (2 * 32, 128)).astype(np.float16))
    angles = rng.uniform(0, 6, (2, 32, 1, 1, 8))
    tables = [Tensor(np.concatenate((f(angles), f(angles)), -1).astype(np.float32)) for f in (np.cos, np.sin)]
    ends = Tensor(np.array([[5, 20, 31, 32], [16, 17, 18, 32]], np.int32))
    found, expected = (cell(x, *tables, (2, 32), ends).asnumpy() for cell in (fused, composed))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=4e-3 * np.abs(expected).max())


class Gradients(nn.Cell):
    """Output and gradients of an attention, weighted so that every one of its numbers counts differently."""

    def __init__(self, blockwise: bool, weight: np.ndarray):
        super().__init__()
        self.core = attention.BlockwiseAttention(4) if blockwise else attention.AttentionCore(4)
        self.blockwise, self.masks, self.weight = blockwise, attention.BlockMasks(ms.float32), Tensor(weight)
        self.grad = ms.ops.GradOperation(get_all=True)

    def output(self, query, key, value, ends):
        length = query.shape[3]
        if self.blockwise:
            return self.core(query, key, value, self.masks(length, ends))
        return self.core(query, key, value, self.masks.block(0, length, self.masks.numbers(ends, length)))

    def loss(self, query, key, value, ends):
        return (self.output(query, key, value, ends) * self.weight).sum()

    def construct(self, *inputs):
        return self.output(*inputs), self.grad(self.loss)(*inputs)


def test_blocks_of_queries_give_the_outputs_and_gradients_of_one():
    rng = np.random.default_rng(0)
    length = 2 * attention.BLOCK + 30
    shapes = [(2, 2, 3, length, 4), (2, 2, length, 4), (2, 2, length, 4)]
    inputs = [Tensor(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    ends = Tensor(np.array([[3, 500, length - 1, length], [600, 1024, 1025, length]], np.int32))
    weight = rng.normal(size=shapes[0]).astype(np.float32)
    found, expected = (Gradients(blockwise, weight)(*inputs, ends) for blockwise in (True, False))
    np.testing.assert_allclose(found[0].asnumpy(), expected[0].asnumpy(), atol=2e-6)
    for one, other in zip(found[1][:3], expected[1][:3]):
        assert np.abs(other.asnumpy()).max() > 0.1
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), atol=2e-6 * np.abs(other.asnumpy()).max())


def test_masks_hide_what_is_later_or_in_another_segment():
    length, ends = attention.BLOCK + 3, np.array([[2, 500, 514, 515]])
    masks = attention.BlockMasks(ms.float32)(length, Tensor(ends.astype(np.int32)))
    assert [mask.shape for mask in masks] == [(1, 1, 1, 512, 512), (1, 1, 1, 3, 515)]
    segment = np.searchsorted(ends[0], np.arange(length), side="right")
    seen = (segment[:, None] == segment) & (np.arange(length)[:, None] >= np.arange(length))
    whole = np.concatenate([np.pad(mask.asnumpy()[0, 0, 0], ((0, 0), (0, length - mask.shape[-1])),
                                   constant_values=attention.MASKED) for mask in masks])
    np.testing.assert_array_equal(whole, np.where(seen, 0, np.float32(attention.MASKED)))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor", "sequence"), [(1, 2, False), (2, 1, False), (2, 2, True)],
                         ids=["tp2", "dp2", "dp2tp2seq"])
def test_layouts_cut_rows_lengths_and_heads_and_send_nothing_for_it(tmp_path, data, tensor, sequence):
    fields = {**SIZES, "compute_dtype": "bfloat16", "use_flash_attention": True, "apply_rope_fusion": True,
              "use_seq_parallel": sequence}
    done = subprocess.run(
        [sys.executable, str(HELPERS / "packed_layout.py"), str(data), str(tensor), json.dumps(fields), str(tmp_path)],
        env={**os.environ, **preload_environment(simulated=True)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    own = [[64, 8 // tensor, 16], [64, 2 // tensor, 16]]        # two rows of 32 positions and 4 segments a replica
    assert found["attention"] == [["FlashAttentionScore", *own], ["FlashAttentionScoreGrad", *own]]
    assert found["lengths"] == [["Int64", "8"]] * 2             # of the kernel and of its gradient
    inside = [scope for scope in found["layout_changes"] if "core-" in scope or "mask-" in scope or "split-" in scope]
    assert not inside
