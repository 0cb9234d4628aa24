"""Attention of the decoder and of the tower: composed of primitive operations, or Ascend's fused kernel.

Which one a training graph has is decided in `decoder_attention` and `decoder_mask`, and nowhere else:

| graph for | rows | attention | what it takes as mask |
|---|---|---|---|
| Ascend with `use_flash_attention` | one conversation | `FlashAttention`, layout BNSD | the compressed causal mask |
| | packed | `PackedFlashAttention`, layout TND | the same, and the cumulative lengths of all segments |
| the CPU, float32, where it has kernels | both | `native.training.causal_attention` | where segments end |
| anything else | both | `BlockwiseAttention` | additive masks, one for each block of queries |

The tower has the first, `native.training.tile_attention` or `AttentionCore`, without a mask.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.ops.operations.nn_ops import FlashAttentionScore
from mindspore.ops.primitive import constexpr

from mindformers_ixc.config import VisionConfig
from mindformers_ixc.device import on_ascend
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import COMPRESSED_MASK, MOST_SEGMENTS
from mindformers_ixc.models.configuration import IXC25Config, IXC25VisionConfig
from mindformers_ixc.native import training

# Added to attention scores that must not be seen. Finite, so that a row with nothing to see is not NaN; exp() of it is
# exactly 0 in float32 beside any real score.
MASKED = -1e9

# Queries that attend at once where attention is composed: no L x L scores, and half of the work is skipped.
BLOCK = 512


def uses_flash_attention(config: IXC25Config | IXC25VisionConfig) -> bool:
    """Whether training attention is Ascend's fused kernel: the YAML asks for it and the graph is Ascend's."""
    return bool(getattr(config, "use_flash_attention", False)) and on_ascend()


def decoder_attention(config: IXC25Config) -> nn.Cell:
    """The attention of a decoder layer; its `positions_first` says in which layout it takes heads (`SplitHeads`)."""
    if not uses_flash_attention(config):
        return BlockwiseAttention(config.head_size, config.softmax_compute_type)
    if config.packing:
        return PackedFlashAttention(config.num_attention_heads, config.head_size)
    return FlashAttention(config.num_attention_heads, config.head_size, CAUSAL)


def decoder_mask(config: IXC25Config) -> nn.Cell:
    """What makes the mask that `decoder_attention` takes, once for all layers."""
    if attends_natively(config):
        return SegmentEnds()
    return FlashMask() if uses_flash_attention(config) else BlockMasks(config.softmax_compute_type)


def attends_natively(config: IXC25Config) -> bool:
    """Whether training attention is the kernel for the CPU, which takes the product of `wqkv` whole."""
    return training.available(config.compute_dtype, config.softmax_compute_type)


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
        self.repeat_mask = P.Tile()
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
            scores = self.masked(self.reshape(scores, (b, kv, g, length, s)), mask)     # (B, KV, G, L, S)
            scores = self.reshape(scores, (b, kv, g * length, s))                       # (B, KV, G*L, S)
        weights = self.cast(self.softmax(scores), value.dtype)
        return self.reshape(self.weighted_sum(weights, value), (b, kv, g, length, d))   # (B, KV, G, L, d)

    def masked(self, scores, mask):
        """Adds a mask `(B or 1, 1, 1, L, S)` to scores `(B, KV, G, L, S)`.

        The mask is repeated first: a kernel of the CPU that broadcasts keeps two 8-byte indices for each of its results
        as long as the graph lives, four times the scores of every layer.
        """
        b, kv, g, _, _ = scores.shape
        return self.add_mask(scores, self.repeat_mask(mask, (b // mask.shape[0], kv, g, 1, 1)))

    def shard(self, dp: int, tp: int) -> None:
        """Cuts samples by `dp` and key/value heads by `tp`."""
        heads = (dp, tp, 1, 1)
        self.mul.shard(((dp, tp, 1, 1, 1), ()))
        self.scores.shard((heads, heads))
        self.softmax.shard((heads,))
        self.weighted_sum.shard((heads, heads))
        # an axis that Tile repeats is cut in its result only
        self.repeat_mask.shard(((dp, tp, 1, 1, 1),))
        self.add_mask.shard(((dp, tp, 1, 1, 1), (dp, tp, 1, 1, 1)))


class BlockwiseAttention(AttentionCore):
    """Causal attention, a block of queries after the other, each over the positions up to its end only."""

    positions_first = False

    def __init__(self, head_size: int, softmax_dtype: mstype.Type = mstype.float32):
        super().__init__(head_size, softmax_dtype)
        self.blocks = QueryBlocks(head_size, softmax_dtype)

    def construct(self, query, key, value, masks):
        """As `AttentionCore.construct`, keys and queries of the same L positions.

        Args:
            query: `(B, KV, G, L, d)`.
            key: `(B, KV, L, d)`.
            value: `(B, KV, L, d)`.
            masks: see `BlockMasks.construct`.

        Returns:
            Tensor `(B, KV, G, L, d)`.
        """
        query = self.mul(query, self.scale)
        if len(masks) == 1:
            return self.attend(query, key, value, masks[0])
        return self.blocks(query, key, value, masks)

    def shard(self, dp: int, tp: int) -> None:
        """As `AttentionCore.shard`."""
        super().shard(dp, tp)
        self.blocks.shard(dp, tp)


class QueryBlocks(AttentionCore):
    """Attention of scaled queries in several blocks, whose backward pass keeps no scores but computes them again.

    The gradient is written out, because the compiler's own keeps the scores of every block and layer. The parallel
    compiler does not look into it: it works on a device's own samples and heads, for which nothing has to be sent.
    """

    def __init__(self, head_size: int, softmax_dtype: mstype.Type):
        super().__init__(head_size, softmax_dtype)
        self.cut_queries, self.cut_keys = P.StridedSlice(), P.StridedSlice()
        self.concat, self.concat_keys = P.Concat(3), P.Concat(2)
        self.transposed = P.BatchMatMul(transpose_a=True)

    def construct(self, query, key, value, masks):
        """As `BlockwiseAttention.construct`, of queries that are scaled already."""
        done = None
        # one after the other, or their scores would live together; the largest first, whose memory serves the rest
        for number in range(len(masks) - 1, -1, -1):
            if done is not None:
                query = F.depend(query, done)
            part, keys, values = self.block(query, key, value, masks[number].shape)
            y = self.attend(part, keys, values, masks[number])                          # (B, KV, G, c, d)
            # in pairs: a strategy of Concat has as many entries as inputs
            done = y if done is None else self.concat((y, done))
        return done                                                                     # (B, KV, G, L, d)

    def block(self, query, key, value, shape):
        """Queries `(B, KV, G, c, d)`, keys and values `(B, KV, S, d)` of a block; its mask ends in `(c, S)`."""
        b, kv, g, _, d = query.shape
        start, end = shape[4] - shape[3], shape[4]
        part = self.cut_queries(query, (0, 0, 0, start, 0), (b, kv, g, end, d), (1, 1, 1, 1, 1))
        if end == key.shape[2]:
            return part, key, value
        stop, steps = (b, kv, end, d), (1, 1, 1, 1)
        return (part, self.cut_keys(key, (0, 0, 0, 0), stop, steps), self.cut_keys(value, (0, 0, 0, 0), stop, steps))

    def bprop(self, query, key, value, masks, out, dout):
        """Gradients of queries, keys and values; the masks have none."""
        d_query, d_key, d_value, none = None, None, None, ()
        rest = F.sum(self.cast(dout, self.dtype) * self.cast(out, self.dtype), -1, True)     # (B, KV, G, L, 1)
        for number in range(len(masks) - 1, -1, -1):
            mask = masks[number]
            none = (F.zeros_like(mask), *none)
            start, end = mask.shape[4] - mask.shape[3], mask.shape[4]
            if number < len(masks) - 1:
                query = F.depend(query, d_value)
            part, keys, values = self.block(query, key, value, mask.shape)
            b, kv, g, c, d = part.shape
            rows, scores_of = (b, kv, g * c, d), (b, kv, g, c, end)
            part, d_part = self.reshape(part, rows), self.reshape(dout[:, :, :, start:end], rows)
            scores = self.reshape(self.cast(self.scores(part, keys), self.dtype), scores_of)
            weights = self.softmax(self.masked(scores, mask))                           # (B, KV, G, c, S)
            d_weights = self.reshape(self.cast(self.scores(d_part, values), self.dtype), scores_of)
            # repeated as masks are, see `masked`
            d_scores = weights * (d_weights - F.tile(rest[:, :, :, start:end], (1, 1, 1, 1, end)))
            flat = (b, kv, g * c, end)
            weights = self.reshape(self.cast(weights, value.dtype), flat)
            d_scores = self.reshape(self.cast(d_scores, key.dtype), flat)
            q = self.reshape(self.weighted_sum(d_scores, keys), (b, kv, g, c, d))
            k, v = self.transposed(d_scores, part), self.transposed(weights, d_part)    # (B, KV, S, d)
            if d_value is None:
                d_query, d_key, d_value = q, k, v
            else:
                d_query = self.concat((q, d_query))
                d_key = self.concat_keys((d_key[:, :, :end] + k, d_key[:, :, end:]))
                d_value = self.concat_keys((d_value[:, :, :end] + v, d_value[:, :, end:]))
        return d_query, d_key, d_value, none

    def shard(self, dp: int, tp: int) -> None:
        """As `AttentionCore.shard`."""
        super().shard(dp, tp)
        heads = (dp, tp, 1, 1, 1)
        self.cut_queries.shard((heads,))
        self.cut_keys.shard(((dp, tp, 1, 1),))
        self.concat.shard((heads, heads))

    def recompute(self, **kwargs: bool) -> None:
        """Nothing to do: no scores are kept."""


class BlockMasks(nn.Cell):
    """Additive causal masks for `BlockwiseAttention`, made inside the graph so that no constant of L x L is stored.

    Args:
        dtype: of the softmax.
    """

    def __init__(self, dtype: mstype.Type):
        super().__init__()
        self.dtype = dtype
        self.greater, self.less_equal, self.not_equal = P.Greater(), P.LessEqual(), P.NotEqual()
        self.logical_or = P.LogicalOr()
        self.to_rows, self.to_columns, self.to_samples = P.ExpandDims(), P.ExpandDims(), P.ExpandDims()
        self.count = P.ReduceSum()
        self.cut = P.StridedSlice()
        self.mul, self.mul_packed = P.Mul(), P.Mul()
        self.cast = P.Cast()
        self.reshape = P.Reshape()

    def construct(self, length, ends=None):
        """The masks of a sequence length, for one conversation a row or several.

        Args:
            length: positions L, a compile-time constant.
            ends: int32 `(B, S)`, where the segments of packed rows end; a position sees its own segment only.

        Returns:
            For each block of `BLOCK` queries, c of them up to position S', a tensor `(1, 1, 1, c, S')`, with segments
            `(B, 1, 1, c, S')`.
        """
        numbers = None if ends is None else self.numbers(ends, length)
        masks = ()
        for start in range(0, length, BLOCK):
            masks += (self.block(start, min(start + BLOCK, length), numbers),)
        return masks

    def numbers(self, ends, length):
        """The segment of each position, `(B, L)`: how many of the ends `(B, S)` do not lie behind it."""
        positions = self.reshape(F.arange(length), (1, length, 1))
        behind = self.less_equal(self.to_rows(ends, 1), positions)                      # (B, L, S)
        return self.count(self.cast(behind, mstype.float32), 2)

    def block(self, start, end, numbers):
        """The mask of queries `start` up to `end` over the positions up to `end`."""
        queries = self.reshape(F.arange(start, end), (end - start, 1))
        later = self.greater(self.reshape(F.arange(end), (1, end)), queries)            # (c, S')
        if numbers is None:
            return self.reshape(self.mul(self.cast(later, self.dtype), MASKED), (1, 1, 1, end - start, end))
        rows = numbers.shape[0]
        own = self.cut(numbers, (0, start), (rows, end), (1, 1))                        # (B, c)
        others = self.cut(numbers, (0, 0), (rows, end), (1, 1))                         # (B, S')
        hidden = self.not_equal(self.to_columns(own, 2), self.to_rows(others, 1))       # (B, c, S')
        hidden = self.logical_or(self.to_samples(later, 0), hidden)
        hidden = self.mul_packed(self.cast(hidden, self.dtype), MASKED)
        return self.reshape(hidden, (rows, 1, 1, end - start, end))

    def shard(self, dp: int) -> None:
        """Every device makes the whole causal masks (cheaper than sending them) and those of its own packed rows."""
        rows = (dp, 1, 1)
        self.greater.shard(((1, 1), (1, 1)))
        self.mul.shard(((1, 1), ()))
        self.less_equal.shard((rows, (1, 1, 1)))
        self.count.shard((rows,))
        for primitive in (self.cut, self.to_rows, self.to_columns):
            primitive.shard(((dp, 1),))
        self.to_samples.shard(((1, 1),))
        self.not_equal.shard((rows, rows))
        self.logical_or.shard(((1, 1, 1), rows))
        self.mul_packed.shard((rows, ()))


class SegmentEnds(nn.Cell):
    """What the kernel for the CPU takes as mask."""

    def construct(self, length, ends=None):
        """Where segments end, int32 `(B, S)`; without segments `(1, 1)`, the length."""
        return F.fill(mstype.int32, (1, 1), length) if ends is None else ends

    def shard(self, dp: int) -> None:
        """Nothing is cut where this is used."""


# What a fused attention hides: nothing, what comes later, or what a mask says, uint8 broadcast to `(B, 1, L, L)`, 1
# where a position must not be seen.
NOTHING, CAUSAL, GIVEN = "nothing", "causal", "given"

# `sparse_mode` of FlashAttentionScore: 0 takes the mask as it is, or none; 2 and 3 are causal with the compressed mask,
# from the upper left or the lower right corner (MindSpore 2.9, documentation of the operator).
SPARSE_MODES = {NOTHING: 0, CAUSAL: 2, GIVEN: 0}
PACKED_SPARSE_MODE = 3


class FlashAttention(nn.Cell):
    """`AttentionCore` through Ascend's FlashAttentionScore, which never holds the scores; float16 or bfloat16.

    Args:
        heads: query heads H = KV * G.
        head_size: width d of a head.
        hides: `NOTHING`, `CAUSAL` or `GIVEN`.
    """

    positions_first = False

    def __init__(self, heads: int, head_size: int, hides: str):
        super().__init__()
        self.heads, self.hides = heads, hides
        self.attention = FlashAttentionScore(head_num=heads, keep_prob=1.0, scale_value=float(head_size) ** -0.5,
                                             inner_precise=0, input_layout="BNSD", sparse_mode=SPARSE_MODES[hides])
        self.reshape = P.Reshape()

    def construct(self, query, key, value, mask):
        """As `AttentionCore.construct`; the mask is `None`, the compressed causal one, or the one given."""
        b, kv, g, length, d = query.shape
        query = self.reshape(query, (b, self.heads, length, d))                         # (B, H, L, d)
        _, _, _, y = self.attention(query, key, value, None, None, None, mask, None)    # (B, H, L, d)
        return self.reshape(y, (b, kv, g, length, d))                                   # (B, KV, G, L, d)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts samples by `dp` and key/value heads by `tp`; given masks are one for all samples."""
        masks = {NOTHING: (), CAUSAL: ((1, 1),), GIVEN: ((1, 1, 1, 1),)}
        self.attention.shard(((dp, tp, 1, 1),) * 3 + masks[self.hides])

    def recompute(self, **kwargs: bool) -> None:
        """Nothing to do where attention alone is to be recomputed: the kernel keeps no scores."""


class PackedFlashAttention(nn.Cell):
    """Causal attention of packed rows through FlashAttentionScore: a small triangle for each segment.

    The layout is TND: the positions of all rows behind one another, T = B * L of them, and the cumulative lengths of
    their segments. MindSpore 2.9's documentation of the operator asks for: the compressed mask and `sparse_mode` 2 or 3
    (the same here, where queries and keys are as many), `next_tokens` 0, at most 1024 segments and none of length 0.

    Args:
        heads: query heads H.
        head_size: width d of a head.
    """

    positions_first = True

    def __init__(self, heads: int, head_size: int):
        super().__init__()
        self.attention = FlashAttentionScore(
            head_num=heads, keep_prob=1.0, scale_value=float(head_size) ** -0.5, next_tokens=0, inner_precise=0,
            input_layout="TND", sparse_mode=PACKED_SPARSE_MODE)

    def construct(self, query, key, value, mask):
        """Attention of each segment over itself.

        Args:
            query: `(B*L, H, d)`.
            key: `(B*L, KV, d)`.
            value: `(B*L, KV, d)`.
            mask: see `FlashMask.construct`.

        Returns:
            Tensor `(B*L, H, d)`.
        """
        causal, lengths = mask
        _, _, _, y = self.attention(query, key, value, None, None, None, causal, None, lengths, lengths)
        return y

    def shard(self, dp: int, tp: int) -> None:
        """Cuts rows, and with them their lengths, by `dp` and key/value heads by `tp`."""
        self.attention.shard(((dp, tp, 1),) * 3 + ((1, 1), (dp,), (dp,)))

    def recompute(self, **kwargs: bool) -> None:
        """As `FlashAttention.recompute`."""


class FlashMask(nn.Cell):
    """The mask of the fused kernels: the compressed causal one, and for packed rows where all segments end."""

    def __init__(self):
        super().__init__()
        self.compressed = compressed_causal_mask()
        self.replicas = 1
        self.add = P.Add()
        self.cast = P.Cast()
        self.reshape = P.Reshape()

    def construct(self, length, ends=None):
        """The mask of a sequence length.

        Every data-parallel replica runs a kernel of its own on its own rows, so lengths accumulate over the rows of a
        replica and start again with the next one.

        Args:
            length: positions L, a compile-time constant.
            ends: int32 `(B, S)`, where the segments of packed rows end.

        Returns:
            The compressed causal mask, uint8 `(2048, 2048)`; with segments also int64 `(B*S,)`, their cumulative
            lengths.
        """
        if ends is None:
            return self.compressed
        b, segments = ends.shape
        rows = b // self.replicas
        check_segments(rows, segments)
        starts = self.reshape(F.arange(rows) * length, (1, rows, 1))
        ends = self.add(self.reshape(ends, (self.replicas, rows, segments)), self.cast(starts, ends.dtype))
        return self.compressed, self.cast(self.reshape(ends, (b * segments,)), mstype.int64)

    def shard(self, dp: int) -> None:
        """Cuts rows; the starts of rows are the same in every replica."""
        self.replicas = dp
        self.add.shard(((dp, 1, 1), (1, 1, 1)))


@constexpr
def check_segments(rows: int, segments: int) -> None:
    """Refuses more segments in a call than the kernel takes.

    Args:
        rows: rows of a data-parallel replica that are computed together.
        segments: segments of a row.

    Raises:
        ConfigError: for more than `MOST_SEGMENTS` in all.
    """
    if rows * segments > MOST_SEGMENTS:
        raise ConfigError(f"batch_size {rows} x max_segments {segments} are {rows * segments} segments in a call of "
                          f"Ascend's fused attention, which takes {MOST_SEGMENTS}; lower one of them.")


def compressed_causal_mask() -> Tensor:
    """The causal mask in the kernel's compressed form, uint8 `(2048, 2048)`, 1 above the diagonal."""
    return Tensor(np.triu(np.ones((COMPRESSED_MASK, COMPRESSED_MASK), np.uint8), 1))


def padding_mask(vision: VisionConfig) -> Tensor | None:
    """Hides the positions a tile was padded with, uint8 `(1, 1, L, L)`, L `padded_positions`; `None` without such."""
    positions, length = vision.positions, vision.padded_positions
    if length == positions:
        return None
    mask = np.zeros((1, 1, length, length), np.uint8)
    mask[..., positions:] = 1
    return Tensor(mask)
