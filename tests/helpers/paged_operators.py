"""Ascend's operators of the paged cache, composed of others for the CPU, in the places of MindFormers' cells.

They hold what the operators are documented to do: a negative slot is not written, a table is read as far as its row's
length goes, `sparse_mode` 2 is causal whatever the mask holds, 0 takes the mask as it is.
"""
from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindformers_ixc.generation import caches

HIDDEN = -1e9


class WriteAndAttend(nn.Cell):
    """`PagedAttentionMgr`."""

    def __init__(self, n_heads, head_dim, n_kv_heads, kv_shape, compute_dtype=ms.float32):
        super().__init__()
        self.heads, self.size, self.kv = n_heads, head_dim, n_kv_heads
        zeros = Tensor(np.zeros(kv_shape, np.float32))
        self.key_cache = Parameter(zeros, name="key_cache", requires_grad=False)
        self.value_cache = Parameter(zeros.copy(), name="value_cache", requires_grad=False)
        self.shape, self.slots = kv_shape, Tensor(np.arange(kv_shape[0] * kv_shape[1]), ms.int32)

    def construct(self, key, value, slot_mapping):
        """ReshapeAndCache."""
        goes = ops.cast(ops.equal(self.slots.reshape(-1, 1), slot_mapping.reshape(1, -1)), ms.float32)     # (N, T)
        places = ops.cast(ops.arange(slot_mapping.shape[0]), ms.float32).reshape(1, -1)
        # rows of nobody write to the same slot: one of them wins
        source = ops.cast((goes * places).max(1), ms.int32)
        is_new = goes.sum(1, keepdims=True) > 0
        ops.assign(self.key_cache, self.written(self.key_cache, key, source, is_new))
        ops.assign(self.value_cache, self.written(self.value_cache, value, source, is_new))
        return key

    def written(self, cache, new, source, is_new):
        flat, width = cache.reshape(-1, self.kv * self.size), self.kv * self.size
        new = ops.gather(new.reshape(-1, width), source, 0)                                                # (N, w)
        return ops.select(ops.broadcast_to(is_new, flat.shape), new, flat).reshape(self.shape)

    def paged_attn(self, query, batch_valid_length, block_tables):
        """PagedAttention."""
        rows, groups = query.shape[0], self.heads // self.kv
        keys = ops.gather(self.key_cache, block_tables, 0).reshape(rows, -1, self.kv, self.size)
        values = ops.gather(self.value_cache, block_tables, 0).reshape(rows, -1, self.kv, self.size)
        seen = ops.arange(keys.shape[1]).reshape(1, 1, 1, -1) < batch_valid_length.reshape(-1, 1, 1, 1)
        is_read = ops.broadcast_to(seen.reshape(rows, -1, 1, 1), values.shape)
        values = ops.select(is_read, values, ops.zeros_like(values))
        query = query.reshape(rows, self.kv, groups, self.size)
        scores = ops.BatchMatMul(transpose_b=True)(query, keys.transpose(0, 2, 1, 3)) * self.size ** -0.5
        weights = ops.softmax(ops.select(ops.broadcast_to(seen, scores.shape), scores, ops.full_like(scores, HIDDEN)))
        return ops.BatchMatMul()(weights, values.transpose(0, 2, 1, 3)).reshape(rows, 1, -1)


class Flash(nn.Cell):
    """`FlashAttention` of layout BSND with the mask as it is, and BNSD that is causal."""

    def __init__(self, head_num, scale_value, next_tokens=0, input_layout="BNSD", sparse_mode=0):
        super().__init__()
        assert (input_layout, sparse_mode) in {("BNSD", 2), ("BSND", 0)}
        self.scale, self.in_order = scale_value, input_layout == "BSND"

    def construct(self, query, key, value, mask):
        if self.in_order:
            query, key, value = query.transpose(0, 2, 1, 3), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
        b, heads, length, size = query.shape
        kv, seen = key.shape[1], key.shape[2]
        if self.in_order:
            hidden = ops.cast(mask, ms.float32) * HIDDEN                                    # (1, 1, L, S)
        else:
            hidden = ops.cast(ops.arange(seen) > ops.arange(length).reshape(-1, 1), ms.float32) * HIDDEN
            hidden = hidden.reshape(1, 1, length, seen)
        query = query.reshape(b, kv, heads // kv * length, size)
        scores = (ops.BatchMatMul(transpose_b=True)(query, key) * self.scale).reshape(b, heads, length, seen)
        weights = ops.softmax(scores + hidden).reshape(b, kv, -1, seen)
        y = ops.BatchMatMul()(weights, value).reshape(b, heads, length, size)
        return y.transpose(0, 2, 1, 3) if self.in_order else y


def stand_in(monkeypatch) -> None:
    """Lets paged caches that are built from now on be of these."""
    monkeypatch.setattr(caches, "PagedAttentionMgr", WriteAndAttend)
    monkeypatch.setattr(caches, "FlashAttention", Flash)
