"""The core of attention: composed of primitive operations, or Ascend's fused kernel where the YAML asks for it."""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P
from mindspore.ops.operations.nn_ops import FlashAttentionScore

from mindformers_ixc.config import COMPRESSED_MASK, VisionConfig
from mindformers_ixc.device import on_ascend
from mindformers_ixc.models.configuration import IXC25Config, IXC25VisionConfig


def uses_flash_attention(config: IXC25Config | IXC25VisionConfig) -> bool:
    """Whether training attention is Ascend's fused kernel: the YAML asks for it and the graph is Ascend's."""
    return bool(getattr(config, "use_flash_attention", False)) and on_ascend()


class AttentionCore(nn.Cell):
    """`softmax(Q K^T / sqrt(d) + mask) V` with grouped queries, composed of primitive operations.

    The queries that share a key/value head are stacked along the position axis, so keys and values are never repeated.

    Args:
        head_size: width d of a head.
        softmax_dtype: dtype of the softmax.
    """

    def __init__(self, head_size: int, softmax_dtype: mstype.Type = mstype.float32):
        super().__init__()
        self.scale = float(head_size) ** -0.5
        self.dtype = softmax_dtype
        self.scores = P.BatchMatMul(transpose_b=True)
        self.weighted_sum = P.BatchMatMul()
        self.softmax = P.Softmax(-1)
        self.mul = P.Mul()
        self.add_mask = P.Add()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, query, key, value, mask):
        """Scales the queries, then `attend`.

        Args:
            query: `(B, KV, G, L, d)`, G query heads for each of KV key/value heads.
            key: `(B, KV, S, d)`.
            value: `(B, KV, S, d)`.
            mask: additive, broadcast to `(B, KV, G, L, S)`, or `None`.

        Returns:
            Tensor `(B, KV, G, L, d)`.
        """
        # scaling the query instead of the scores saves an L x S tensor in each direction
        return self.attend(self.mul(query, self.scale), key, value, mask)

    def attend(self, query, key, value, mask):
        """The same for queries that are scaled already."""
        b, kv, g, length, d = query.shape
        s = key.shape[2]
        query = self.reshape(query, (b, kv, g * length, d))                             # (B, KV, G*L, d)
        scores = self.cast(self.scores(query, key), self.dtype)                         # (B, KV, G*L, S)
        if mask is not None:
            scores = self.add_mask(self.reshape(scores, (b, kv, g, length, s)), mask)   # (B, KV, G, L, S)
            scores = self.reshape(scores, (b, kv, g * length, s))                       # (B, KV, G*L, S)
        weights = self.cast(self.softmax(scores), value.dtype)
        return self.reshape(self.weighted_sum(weights, value), (b, kv, g, length, d))   # (B, KV, G, L, d)

    def shard(self, dp: int, tp: int, packed: bool = False) -> None:
        """Cuts samples by `dp` and key/value heads by `tp`; packed samples have masks of their own."""
        heads = (dp, tp, 1, 1)
        self.mul.shard(((dp, tp, 1, 1, 1), ()))
        self.scores.shard((heads, heads))
        self.softmax.shard((heads,))
        self.weighted_sum.shard((heads, heads))
        self.add_mask.shard(((dp, tp, 1, 1, 1), (dp if packed else 1, 1, 1, 1, 1)))


class FlashAttentionCore(nn.Cell):
    """The same through Ascend's FlashAttentionScore, which never holds the scores; float16 or bfloat16.

    Args:
        heads: query heads H = KV * G.
        head_size: width d of a head.
        compressed: the mask is causal and given in the kernel's compressed form, `compressed_causal_mask`; otherwise
            it is uint8, broadcast to `(B, 1, L, S)`, 1 where a position must not be seen.
    """

    def __init__(self, heads: int, head_size: int, compressed: bool):
        super().__init__()
        self.heads, self.compressed = heads, compressed
        self.attention = FlashAttentionScore(head_num=heads, keep_prob=1.0, scale_value=float(head_size) ** -0.5,
                                             inner_precise=0, input_layout="BNSD", sparse_mode=2 if compressed else 0)
        self.reshape = P.Reshape()

    def construct(self, query, key, value, mask):
        """As `AttentionCore.construct`; the mask as this class has it."""
        b, kv, g, length, d = query.shape
        query = self.reshape(query, (b, self.heads, length, d))                         # (B, H, L, d)
        _, _, _, y = self.attention(query, key, value, None, None, None, mask, None)    # (B, H, L, d)
        return self.reshape(y, (b, kv, g, length, d))                                   # (B, KV, G, L, d)

    def shard(self, dp: int, tp: int, packed: bool = False) -> None:
        """Cuts samples by `dp` and key/value heads by `tp`; packed samples have masks of their own."""
        heads = (dp, tp, 1, 1)
        mask = (1, 1) if self.compressed else (dp if packed else 1, 1, 1, 1)
        self.attention.shard((heads, heads, heads, mask))

    def recompute(self, **kwargs: bool) -> None:
        """Nothing to do where attention alone is to be recomputed: the kernel keeps no scores."""


def compressed_causal_mask() -> Tensor:
    """The causal mask in the kernel's compressed form, uint8 `(2048, 2048)`, 1 above the diagonal."""
    return Tensor(np.triu(np.ones((COMPRESSED_MASK, COMPRESSED_MASK), np.uint8), 1))


def decoder_attention(config: IXC25Config) -> nn.Cell:
    """The attention core of a decoder layer."""
    if uses_flash_attention(config):
        return FlashAttentionCore(config.num_attention_heads, config.head_size, not config.packing)
    return AttentionCore(config.head_size, config.softmax_compute_type)


def padding_mask(vision: VisionConfig) -> Tensor:
    """Hides the positions a tile was padded with, uint8 `(1, 1, L, L)`, L `padded_positions`."""
    positions, length = vision.positions, vision.padded_positions
    mask = np.zeros((1, 1, length, length), np.uint8)
    mask[..., positions:] = 1
    return Tensor(mask)
