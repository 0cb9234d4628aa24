"""Key/value caches: attention of a prompt that fills the cache, and of one token a row over what it holds.

The second of the two places that know about devices (the first is `layers`). `ContiguousCache` is composed of
primitive operations and runs everywhere; `PagedCache` is Ascend's: MindFormers' paged attention manager and flash
attention, blocks handed out by its block tables. Both have the same methods, so that the graphs above them
(`mindformers_ixc.generation.engine`) do not choose.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.flash_attention import FlashAttention
from mindformers.modules.paged_attention_mgr import PagedAttentionMgr
from mindspore import Parameter, Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.attention import MASKED, AttentionCore
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.internlm2 import MergeHeads, SplitHeads
from mindformers_ixc.native import kernels, training

if TYPE_CHECKING:
    from mindformers.modules.transformer import TransformerOpParallelConfig

# Queries of a prompt that attend at once: long prompts need no L x L scores, and skip half of the work.
CHUNK = 512


def held_dtype(config: IXC25Config) -> mstype.Type:
    """Dtype of the keys and values in a cache."""
    return config.compute_dtype if config.cache_dtype is None else getattr(mstype, config.cache_dtype)


def check_held_dtype(config: IXC25Config) -> None:
    """Refuses a dtype of the cache that there is nothing to compute with.

    Raises:
        ConfigError: saying what it takes.
    """
    held = held_dtype(config)
    if held == config.compute_dtype or training.available(config.compute_dtype, config.softmax_compute_type):
        return
    raise ConfigError(f"cache_dtype is {config.cache_dtype}, which is for a single process on a CPU that computes in "
                      "float32, with the kernels that a C compiler makes of this package's sources (`mindformers "
                      "doctor` says whether they are there); leave it out.")


class ContiguousCache(nn.Cell):
    """One layer's keys and values, `(B*KV, S, d)` each: a row of S positions for every prompt and key/value head.

    Args:
        config: sizes and dtypes.
        batch: rows B.
        positions: positions S of each.
    """

    def __init__(self, config: IXC25Config, batch: int, positions: int):
        super().__init__()
        self.batch, self.positions = batch, positions
        self.kv, self.groups, self.size = config.num_key_value_heads, config.query_groups, config.head_size
        zeros = np.zeros((batch * self.kv, positions, self.size), numpy_type(held_dtype(config)))
        self.keys = Parameter(Tensor(zeros), name="key_cache", requires_grad=False)
        self.values = Parameter(Tensor(zeros), name="value_cache", requires_grad=False)
        self.split, self.merge = SplitHeads(config), MergeHeads(config)
        self.core = AttentionCore(self.size, config.softmax_compute_type)
        self.dtype, self.softmax_dtype = config.compute_dtype, config.softmax_compute_type
        self.half_order = Tensor([1, 0], mstype.int32)
        self.all_positions = Tensor(np.arange(positions, dtype=np.int32)[None, None, :])
        # in place on the CPU, unlike ScatterNdUpdate, which copies the whole cache there: unused positions are zero
        self.scatter_add = P.ScatterNdAdd()
        self.assign = P.Assign()
        self.gather_halves = P.Gather()
        self.slice = P.Slice()
        self.concat = P.Concat(3)
        self.mul = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.scores = P.BatchMatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)
        self.weighted_sum = P.BatchMatMul()

    def prefill_mask(self, length):
        """What `prefill` of every layer takes as `mask`: one a chunk of queries; L is a compile-time constant."""
        masks = ()
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            queries = self.reshape(F.arange(start, end), (end - start, 1))
            later = F.greater(self.reshape(F.arange(end), (1, end)), queries)
            mask = self.mul(self.cast(later, self.softmax_dtype), MASKED)                   # (c, S)
            masks += (self.reshape(mask, (1, 1, 1, end - start, end)),)
        return masks

    def decode_mask(self, _, positions):
        """What `decode` of every layer takes as `mask`; the arguments are its `places`."""
        return self.cast(F.greater(self.all_positions, positions), self.softmax_dtype) * MASKED   # (B*KV, 1, S)

    def prefill(self, qkv, cos, sin, mask, where, shape):
        """Attention of whole prompts over themselves; their keys and values go to the cache.

        Args:
            qkv: `(B*L, KV * (G+2) * d)`.
            cos: `(B, L, 1, 1, d)`.
            sin: like `cos`.
            mask: additive masks of the chunks of queries, see `prefill_mask`.
            where: int32 `(B, 1, L, 1)`, 1 on the prompt's positions and 0 on padding.
            shape: `(B, L)`, a compile-time constant.

        Returns:
            Tensor `(B*L, H*d)`.
        """
        query, key, value = self.split(qkv, cos, sin, shape)
        real = self.cast(where, self.dtype)
        # the prompt sees only itself, but the writes must happen
        key = F.depend(key, self._fill(self.keys, self.mul(key, real), shape[1]))
        value = F.depend(value, self._fill(self.values, self.mul(value, real), shape[1]))
        return self.merge(self._attend(self.mul(query, self.core.scale), key, value, mask, shape[1]), shape)

    def _attend(self, query, key, value, masks, length):
        """Attention of scaled queries, a chunk after the other: neither scores nor work beyond what may be seen."""
        if length <= CHUNK:
            return self._chunk(query, key, value, masks[0])
        b, kv, g, d = self.batch, self.kv, self.groups, self.size
        done = ()
        # one after the other, or their scores would live together; the largest first, whose memory serves the rest
        for i in range(len(masks) - 1, -1, -1):
            start, end = i * CHUNK, min(i * CHUNK + CHUNK, length)
            part = self.slice(query, (0, 0, 0, start, 0), (b, kv, g, end - start, d))
            if done:
                part = F.depend(part, done[0])
            seen = (b, kv, end, d)
            y = self._chunk(part, self.slice(key, (0, 0, 0, 0), seen), self.slice(value, (0, 0, 0, 0), seen), masks[i])
            done = (y, *done)
        return self.concat(done)                                                            # (B, KV, G, L, d)

    def _chunk(self, query, key, value, mask):
        """Attention of the last c of the S positions seen: `(B, KV, G, c, d)` over keys and values `(B, KV, S, d)`."""
        return self.core.attend(query, key, value, mask)

    def _fill(self, cache, new, length):
        """Makes a cache hold `(B, KV, L, d)` and zeros after it."""
        new = self.reshape(new, (self.batch * self.kv, length, self.size))
        if length < self.positions:
            new = P.Pad(((0, 0), (0, self.positions - length), (0, 0)))(new)                # (B*KV, S, d)
        return self.assign(cache, new)

    def decode(self, qkv, cos, sin, mask, where, _):
        """Attention of one more token a row.

        A step costs little more than reading the weights, so what counts here is the number of kernels: queries, keys
        and values are rotated as one (the tables leave values as they are and scale queries by 1 / sqrt(d)), and
        nothing is transposed.

        Args:
            qkv: `(B, KV * (G+2) * d)`.
            cos: `(B, 1, G+2, d)`, see `decode_tables`.
            sin: like `cos`.
            mask: additive `(B*KV, 1, S)`.
            where: int32 `(B*KV, 2)`, cache row and position of every new key.
            _: the positions, which the mask was made from.

        Returns:
            Tensor `(B, H*d)`.
        """
        rows, kv, g, d = self.batch * self.kv, self.kv, self.groups, self.size
        halves = self.reshape(qkv, (rows, g + 2, 2, d // 2))                                # (B*KV, G+2, 2, d/2)
        halves = self.gather_halves(halves, self.half_order, 2)
        shape = (self.batch, kv, g + 2, d)
        turned = self.mul(self.reshape(halves, shape), self.cast(sin, self.dtype))
        x = self.add(self.mul(self.reshape(qkv, shape), self.cast(cos, self.dtype)), turned)
        x = self.reshape(x, (rows, g + 2, d))                                               # (B*KV, G+2, d)
        query = self.slice(x, (0, 0, 0), (rows, g, d))                                      # (B*KV, G, d)
        key = self.reshape(self.slice(x, (0, g, 0), (rows, 1, d)), (rows, d))
        value = self.reshape(self.slice(x, (0, g + 1, 0), (rows, 1, d)), (rows, d))
        keys = self.scatter_add(self.keys, where, key)                                       # (B*KV, S, d)
        values = self.scatter_add(self.values, where, value)
        scores = self.add(self.cast(self.scores(query, keys), self.softmax_dtype), mask)    # (B*KV, G, S)
        weights = self.cast(self.softmax(scores), self.dtype)
        return self.reshape(self.weighted_sum(weights, values), (self.batch, kv * g * d))


class NativeCache(ContiguousCache):
    """A contiguous cache with the fused CPU kernels of `mindformers_ixc.native`: they compute in float32, same results.

    Arguments as for `ContiguousCache`. Its attention of a token reads the filled part of the cache only. With keys and
    values in bfloat16 (`held_dtype`) a prompt attends to them as the cache holds them, so that it makes no difference
    whether they come from there.
    """

    def __init__(self, config: IXC25Config, batch: int, positions: int):
        super().__init__(config, batch, positions)
        kv, g, d = self.kv, self.groups, self.size
        self.attention = kernels.kernel("decode_attention", lambda *_: (batch, kv * g * d))
        self.split_and_fill = kernels.kernel("prefill_heads", lambda _, cos, *__: (
            (batch, kv, g, cos[1], d), (batch, kv, cos[1], d), (batch, kv, cos[1], d)), outputs=3)
        self.query_scale = Tensor([self.size ** -0.5], mstype.float32)
        self.causal_softmax = kernels.kernel("causal_softmax")
        self.has_attention = training.has_product()
        self.prompt_attention = kernels.kernel("prompt_attention", lambda q, *_: (q[0] * q[3], q[1] * q[2] * q[4]))

    def prefill_mask(self, length):
        """No masks: the kernel knows what a position may see."""
        return (None,) * -(-length // CHUNK)

    def _chunk(self, query, key, value, mask):
        b, kv, g, c, d = query.shape
        scores = self.scores(self.reshape(query, (b, kv, g * c, d)), key)                   # (B, KV, G*c, S)
        weights = self.causal_softmax(self.reshape(scores, (b, kv, g, c, key.shape[2])))
        y = self.weighted_sum(self.reshape(weights, (b, kv, g * c, key.shape[2])), value)
        return self.reshape(y, (b, kv, g, c, d))                                            # (B, KV, G, c, d)

    def decode_mask(self, _, positions):
        """No mask: the kernel goes by the places."""
        return None

    def prefill(self, qkv, cos, sin, mask, where, shape):
        """As `ContiguousCache.prefill`, by one kernel that splits, rotates and fills."""
        # the kernel writes the caches in place
        query, key, value = self.split_and_fill(qkv, cos, sin, where, self.query_scale, self.keys, self.values)
        if self.has_attention:
            return self.prompt_attention(query, key, value)
        return self.merge(self._attend(query, key, value, mask, shape[1]), shape)

    def decode(self, qkv, cos, sin, mask, where, _):
        """As `ContiguousCache.decode`, by one kernel that rotates, appends and attends."""
        return self.attention(qkv, cos, sin, where, self.keys, self.values)


class TokenHeads(nn.Cell):
    """Rotated query and key heads, and value heads, of one more token a row, for caches cut by key/value heads.

    Args:
        config: sizes and dtype.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.kv, self.groups, self.size = config.num_key_value_heads, config.query_groups, config.head_size
        self.dtype = config.compute_dtype
        self.half_order = Tensor([1, 0], mstype.int32)
        self.gather_halves = P.Gather()
        self.slice = P.Slice()
        self.mul = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        self.reshape = P.Reshape()

    def construct(self, qkv, cos, sin):
        """Rotates the consolidated product of one token a row and takes it apart.

        Args:
            qkv: `(B, KV * (G+2) * d)`.
            cos: `(B, 1, G+2, d)`, see `decode_tables`.
            sin: like `cos`.

        Returns:
            Query `(B, KV, G, d)`, key and value `(B, KV, 1, d)`.
        """
        b, kv, g, d = qkv.shape[0], self.kv, self.groups, self.size
        halves = self.reshape(qkv, (b, kv, g + 2, 2, d // 2))                               # (B, KV, G+2, 2, d/2)
        halves = self.gather_halves(halves, self.half_order, 3)
        shape = (b, kv, g + 2, d)
        turned = self.mul(self.reshape(halves, shape), self.cast(sin, self.dtype))
        x = self.add(self.mul(self.reshape(qkv, shape), self.cast(cos, self.dtype)), turned)
        return (self.slice(x, (0, 0, 0, 0), (b, kv, g, d)), self.slice(x, (0, 0, g, 0), (b, kv, 1, d)),
                self.slice(x, (0, 0, g + 1, 0), (b, kv, 1, d)))

    def shard(self, tp: int, dp: int = 1) -> None:
        """Cuts key/value heads by `tp` and rows by `dp`."""
        heads = (dp, tp, 1, 1)
        self.gather_halves.shard(((dp, tp, 1, 1, 1), (1,)))
        self.slice.shard((heads,))
        self.mul.shard((heads, (dp, 1, 1, 1)))
        self.add.shard((heads, heads))


class PagedCache(nn.Cell):
    """One layer's keys and values in blocks, with Ascend's kernels: flash attention for prompts, paged for tokens.

    The cells are MindFormers' own, the ones its models use with `use_past`.

    Args:
        config: sizes and dtypes; float16 or bfloat16, which the kernels take.
        blocks: blocks of `config.block_size` positions, shared by the rows of a batch.
        mask: `compressed_causal_mask`; one tensor serves all layers.
    """

    def __init__(self, config: IXC25Config, blocks: int, mask: Tensor):
        super().__init__()
        self.heads, self.kv, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_size
        self.groups, self.dtype = config.query_groups, config.compute_dtype
        shape = (blocks, config.block_size, self.kv, self.size)
        # heads of a device: the parallel compiler cuts tensors, not these two numbers (MindFormers divides them too)
        tp = config.parallel_config.model_parallel if is_parallel() else 1
        self.manager = PagedAttentionMgr(self.heads // tp, self.size, self.kv // tp, shape, compute_dtype=self.dtype)
        self.keys, self.values = self.manager.key_cache, self.manager.value_cache
        # sparse_mode 2: causal, by a mask of one size for all lengths; BNSD is the layout the split gives
        self.flash = FlashAttention(self.heads, scale_value=self.size ** -0.5, next_tokens=0, input_layout="BNSD",
                                    sparse_mode=2)
        # of more positions over what the blocks hold: sparse_mode 0 takes the mask as it is, and in BSND neither the
        # product nor the blocks need be transposed
        self.flash_over = FlashAttention(self.heads, scale_value=self.size ** -0.5, input_layout="BSND", sparse_mode=0)
        self.mask = mask
        self.split, self.merge, self.token_heads = SplitHeads(config), MergeHeads(config), TokenHeads(config)
        self.split_in_order = SplitHeads(config, positions_first=True)
        self.block_size, self.gather = config.block_size, P.Gather()
        self.to_positions = P.Transpose()
        self.reshape = P.Reshape()
        if is_parallel():
            self.shard(config.parallel_config)

    def shard(self, parallel_config: TransformerOpParallelConfig) -> None:
        """Cuts key/value heads and with them the blocks; rows and positions are whole on every device."""
        tp = parallel_config.model_parallel
        heads, in_order = (1, tp, 1, 1), (1, 1, tp, 1)
        self.manager.shard(parallel_config)
        self.flash.flash_attention.shard((heads, heads, heads, (1, 1)))      # its own method wants masks by sample
        self.flash_over.flash_attention.shard((in_order, in_order, in_order, (1, 1, 1, 1)))
        self.gather.shard((in_order, (1,)))
        self.split.shard(1, tp)
        self.split_in_order.shard(1, tp)
        self.merge.shard(1, tp)
        self.token_heads.shard(tp)
        self.to_positions.shard((heads,))

    def prefill_mask(self, _):
        """What `prefill` of every layer takes as `mask`: the kernel's compressed causal mask, whatever the length."""
        return self.mask

    def decode_mask(self, *_):
        """No mask: paged attention goes by the lengths."""
        return None

    def prefill(self, qkv, cos, sin, mask, where, shape):
        """As `ContiguousCache.prefill`; `where` is the slot mapping, int32 `(B*L,)`, -1 for padding."""
        b, length = shape
        query, key, value = self.split(qkv, cos, sin, shape)
        query = self.reshape(query, (b, self.heads, length, self.size))                     # (B, H, L, d)
        rows = (b, length, self.kv * self.size)
        written = self.manager(self.reshape(self.to_positions(key, (0, 2, 1, 3)), rows),
                               self.reshape(self.to_positions(value, (0, 2, 1, 3)), rows), where)
        y = self.flash(F.depend(query, written), key, value, mask)                          # (B, H, L, d)
        return self.merge(self.reshape(y, (b, self.kv, self.groups, length, self.size)), shape)

    def decode(self, qkv, cos, sin, mask, slots, block_tables, lengths):
        """As `ContiguousCache.decode`, with other places.

        Args:
            qkv: `(B, KV * (G+2) * d)`.
            cos: `(B, 1, G+2, d)`.
            sin: like `cos`.
            mask: `None`.
            slots: int32 `(B,)`, slot of every new key.
            block_tables: int32 `(B, blocks)`, blocks of every row.
            lengths: int32 `(B,)`, positions of every row, the new one included.

        Returns:
            Tensor `(B, H*d)`.
        """
        b, width = qkv.shape[0], self.kv * self.size
        query, key, value = self.token_heads(qkv, cos, sin)
        written = self.manager(self.reshape(key, (b, 1, width)), self.reshape(value, (b, 1, width)), slots)
        query = F.depend(self.reshape(query, (b, 1, self.groups * width)), written)
        return self.reshape(self.manager.paged_attn(query, lengths, block_tables), (b, self.groups * width))

    def extend(self, qkv, cos, sin, mask, slots, blocks, rows):
        """Attention of R more positions of one row over those that its blocks hold, and over one another.

        Flash attention does not know blocks, so those of the row are put together for it.

        Args:
            qkv: `(R, KV * (G+2) * d)`.
            cos: `(1, R, 1, 1, d)`.
            sin: like `cos`.
            mask: uint8 `(1, 1, R, S)`, 1 on what a position does not see of the S positions of the blocks.
            slots: int32 `(R,)`, slot of every new key, -1 for padding.
            blocks: int32 `(S / block_size,)`, the blocks of the row in order; what is behind the new positions may be
                any blocks.
            rows: R, a compile-time constant.

        Returns:
            Tensor `(R, H*d)`.
        """
        width = self.kv * self.size
        query, key, value = self.split_in_order(qkv, cos, sin, (1, rows))
        written = self.manager(self.reshape(key, (1, rows, width)), self.reshape(value, (1, rows, width)), slots)
        seen = (1, blocks.shape[0] * self.block_size, self.kv, self.size)
        keys = self.reshape(self.gather(F.depend(self.keys, written), blocks, 0), seen)      # (1, S, KV, d)
        values = self.reshape(self.gather(F.depend(self.values, written), blocks, 0), seen)
        y = self.flash_over(self.reshape(query, (1, rows, self.heads, self.size)), keys, values, mask)
        return self.reshape(y, (rows, self.groups * width))

    def copy(self, block, slots):
        """Writes what a block, int32 `(1,)`, holds to the slots of another one, int32 `(block_size,)`."""
        shape = (1, self.block_size, self.kv * self.size)
        keys, values = self.gather(self.keys, block, 0), self.gather(self.values, block, 0)
        return self.manager(self.reshape(keys, shape), self.reshape(values, shape), slots)


def decode_tables(cos: np.ndarray, sin: np.ndarray, groups: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotary tables as the caches' `decode` takes them.

    Args:
        cos: float32 `(N, d)`, both halves of the last axis alike.
        sin: like `cos`.
        groups: G, query heads of a key/value head.
        scale: of the queries.

    Returns:
        Two float32 arrays `(N, G+2, d)`: rotation of G queries, scaled, rotation of the key, and 1 and 0 for the value.
        The sine's first half is negative: it multiplies the swapped halves.
    """
    size = cos.shape[-1]
    sin = np.concatenate((-sin[:, :size // 2], sin[:, size // 2:]), -1)
    factors = np.array([scale] * groups + [1.0, 1.0], np.float32)[None, :, None]            # (1, G+2, 1)
    cos, sin = cos[:, None] * factors, sin[:, None] * factors
    cos[:, -1], sin[:, -1] = 1.0, 0.0
    return cos, sin
