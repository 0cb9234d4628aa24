"""A contiguous key/value cache that tensor parallel cuts by key/value heads, and data parallel by rows."""
from __future__ import annotations

from mindspore import Parameter, nn
from mindspore.common.initializer import initializer
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.generation.caches import TokenHeads
from mindformers_ixc.models.attention import BlockMasks, BlockwiseAttention
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.internlm2 import MergeHeads, SplitHeads


class ShardedCache(nn.Cell):
    """One layer's keys and values, `(B, KV, S, d)` each, for graphs that the parallel compiler cuts.

    The same as `mindformers_ixc.generation.caches.ContiguousCache`, of operators that can be cut over heads. A scatter
    cannot be: new keys and values are multiplied by one-hot positions, which the host makes, and added.

    Args:
        config: sizes and dtypes, and the data- and tensor-parallel degrees.
        batch: rows B, a multiple of the data-parallel degree.
        positions: positions S of each.
    """

    def __init__(self, config: IXC25Config, batch: int, positions: int):
        super().__init__()
        self.batch, self.positions = batch, positions
        self.kv, self.groups, self.size = config.num_key_value_heads, config.query_groups, config.head_size
        self.dtype, self.softmax_dtype = config.compute_dtype, config.softmax_compute_type
        # initializers, so that a device makes its slice of its own stage's only; each has its own, which is used up
        keys, values = (initializer("zeros", (batch, self.kv, positions, self.size), config.compute_dtype)
                        for _ in range(2))
        # beside a training step whose parameters are cut over the replicas as well, these are not
        self.keys = Parameter(keys, name="key_cache", requires_grad=False, parallel_optimizer=False)
        self.values = Parameter(values, name="value_cache", requires_grad=False, parallel_optimizer=False)
        self.split, self.merge, self.token_heads = SplitHeads(config), MergeHeads(config), TokenHeads(config)
        self.core = BlockwiseAttention(self.size, config.softmax_compute_type)
        self.block_masks = BlockMasks(config.softmax_compute_type)
        self.mul_real, self.mul_place = P.Mul(), P.Mul()
        self.concat = P.Concat(2)
        self.assign = P.Assign()
        self.assign_add = P.AssignAdd()
        self.add_mask = P.Add()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.scores = P.BatchMatMul(transpose_b=True)
        self.softmax = P.Softmax(-1)
        self.weighted_sum = P.BatchMatMul()
        self.shard(config.parallel_config.data_parallel, config.parallel_config.model_parallel)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts rows and key/value heads; positions are whole on every device."""
        heads, rows = (dp, tp, 1, 1), (dp, 1, 1, 1)
        self.split.shard(dp, tp)
        self.split.rotary.shard(dp, tp, packed=True)       # every row has tables of its own here
        self.merge.shard(dp, tp)
        self.core.shard(dp, tp)
        self.block_masks.shard(dp)
        self.token_heads.shard(tp, dp)
        self.softmax.shard((heads,))
        self.mul_place.shard((rows, heads))
        for primitive in (self.mul_real, self.add_mask):
            primitive.shard((heads, rows))
        for primitive in (self.concat, self.assign, self.assign_add, self.scores, self.weighted_sum):
            primitive.shard((heads, heads))

    def prefill_mask(self, length):
        """As `ContiguousCache.prefill_mask`."""
        return self.block_masks(length)

    def decode_mask(self, _, mask):
        """As `ContiguousCache.decode_mask`; the host made it."""
        return mask

    def prefill(self, qkv, cos, sin, mask, where, shape):
        """As `ContiguousCache.prefill`, over key/value heads of which a device has its share."""
        query, key, value = self.split(qkv, cos, sin, shape)
        real = self.cast(where, self.dtype)
        key = F.depend(key, self._fill(self.keys, self.mul_real(key, real), shape[1]))
        value = F.depend(value, self._fill(self.values, self.mul_real(value, real), shape[1]))
        return self.merge(self.core(query, key, value, mask), shape)

    def _fill(self, cache, new, length):
        """Makes a cache hold `(B, KV, L, d)` and zeros after it."""
        if length < self.positions:
            rest = F.zeros((self.batch, self.kv, self.positions - length, self.size), self.dtype)
            new = self.concat((new, rest))                                                  # (B, KV, S, d)
        return self.assign(cache, new)

    def decode(self, qkv, cos, sin, mask, where, _):
        """As `ContiguousCache.decode`, with other places.

        Args:
            qkv: `(B, KV * (G+2) * d)`.
            cos: `(B, 1, G+2, d)`, see `mindformers_ixc.generation.caches.decode_tables`.
            sin: like `cos`.
            mask: additive, float32 `(B, 1, 1, S)`.
            where: float32 `(B, 1, S, 1)`, 1 on the position of every row's new key.
            _: the mask again, which is also a place.

        Returns:
            Tensor `(B, H*d)`.
        """
        query, key, value = self.token_heads(qkv, cos, sin)
        where = self.cast(where, self.dtype)
        keys = self.assign_add(self.keys, self.mul_place(where, key))                       # (B, KV, S, d)
        values = self.assign_add(self.values, self.mul_place(where, value))
        scores = self.add_mask(self.cast(self.scores(query, keys), self.softmax_dtype),
                               self.cast(mask, self.softmax_dtype))                         # (B, KV, G, S)
        weights = self.cast(self.softmax(scores), self.dtype)
        return self.reshape(self.weighted_sum(weights, values), (self.batch, self.kv * self.groups * self.size))
