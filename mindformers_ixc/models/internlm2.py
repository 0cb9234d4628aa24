"""InternLM2: the language model of IXC2.5, with consolidated QKV, grouped queries and Partial LoRA on every linear."""
from __future__ import annotations

import functools
import logging

from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.ops.primitive import Primitive

from mindformers_ixc.device import on_ascend
from mindformers_ixc.models.attention import attends_natively, decoder_attention, decoder_mask
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.dropout import LAYER_MIX
from mindformers_ixc.models.layers import PartialLoRALinear, RMSNorm
from mindformers_ixc.native import kernels, training
from mindformers_ixc.parallel.cuts import CUTS

try:       # deprecated, and announced to go after MindSpore 2.9
    from mindspore.ops.auto_generate import RotaryPositionEmbedding
except ImportError:
    RotaryPositionEmbedding = None

logger = logging.getLogger(__name__)


class Choose(nn.Cell):
    """`where(condition, x, y)` of embeddings by position.

    A product and a sum, exact because the factors are 0 and 1: the parallel compiler wants all inputs of Select in one
    shape, and a condition repeated D times would be the largest tensor here.
    """

    def __init__(self):
        super().__init__()
        self.expand_dims = P.ExpandDims()
        self.cast = P.Cast()
        self.mul_x, self.mul_y = P.Mul(), P.Mul()
        self.add = P.Add()
        self.sub_from_one = P.Sub()

    def construct(self, condition, x, y):
        """Takes bool `(B, L)` and two `(B, L, D)`."""
        keep = self.cast(self.expand_dims(condition, 2), x.dtype)                     # (B, L, 1)
        return self.add(self.mul_x(x, keep), self.mul_y(y, self.sub_from_one(1.0, keep)))

    def shard(self, dp: int) -> None:
        """Cuts samples by `dp`; their positions and the width are whole on every device."""
        rows = (dp, 1, 1)
        self.expand_dims.shard(((dp, 1),))
        self.sub_from_one.shard(((), rows))
        for primitive in (self.mul_x, self.mul_y, self.add):
            primitive.shard((rows, rows))


class TokenEmbedding(nn.Cell):
    """Token ids to vectors. The row of the padding id gets no gradient, as in the public model (`padding_idx`)."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.weight = Parameter(initializer(Normal(config.initializer_range), (config.vocab_size, config.hidden_size),
                                            config.param_init_type), name="weight")
        self.padding = config.pad_token_id
        self.dtype = config.compute_dtype
        self.gather = P.Gather()
        self.equal = P.Equal()
        self.cast = P.Cast()
        self.choose = Choose()

    def construct(self, ids):
        """Maps int32 `(B, L)` to `(B, L, D)` in the compute dtype."""
        x = self.gather(self.weight, ids, 0)                                          # (B, L, D)
        return self.cast(self.choose(self.equal(ids, self.padding), F.stop_gradient(x), x), self.dtype)

    def lookup(self, ids):
        """The same without regard for gradients: int32 of any shape to one axis more."""
        return self.cast(self.gather(self.weight, ids, 0), self.dtype)

    def shard(self, dp: int, tp: int, whole: bool) -> None:
        """Cuts samples, and the vocabulary unless the table is to be `whole` (MindFormers' `vocab_emb_dp`)."""
        if whole:
            self.gather.shard(((1, 1), (dp, 1)))
        else:       # said, because the compiler would otherwise scatter the sums over samples and gather them again
            self.gather.shard(((tp, 1), (dp, 1)), ((dp, 1, 1),))
        self.equal.shard(((dp, 1), ()))
        self.choose.shard(dp)


@functools.cache
def _warn_of_missing_rotary() -> None:
    """Says once, not in every layer, that the rotary embedding is composed."""
    logger.warning("apply_rope_fusion is True, but this MindSpore has no RotaryPositionEmbedding any more; the rotary "
                   "embedding is composed of other operators. Set apply_rope_fusion to False.")


class RotaryEmbedding(nn.Cell):
    """Rotates pairs of one head by the position's angle (halves convention).

    Args:
        config: head size, and whether Ascend's fused operator is to be taken (`apply_rope_fusion`) where there is one.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.size, self.half = config.head_size, config.head_size // 2
        self.is_fused = config.apply_rope_fusion and on_ascend()
        if self.is_fused and RotaryPositionEmbedding is None:
            _warn_of_missing_rotary()
            self.is_fused = False
        if self.is_fused:
            self.rotate = RotaryPositionEmbedding()
        self.reshape = P.Reshape()
        self.strided_slice = P.StridedSlice()
        self.neg = P.Neg()
        self.concat = P.Concat(-1)
        self.mul = P.Mul()
        self.add = P.Add()

    def construct(self, x, cos, sin):
        """Rotates `(B, L, KV, G+1, d)` by tables that broadcast to it, `(B or 1, L, 1, 1, d)`."""
        b, length, kv, heads, d = x.shape
        if self.is_fused:
            angles = (cos.shape[0], length, 1, d)
            y = self.rotate(self.reshape(x, (b, length, kv * heads, d)), self.reshape(cos, angles),
                            self.reshape(sin, angles), 0)                                    # (B, L, KV*(G+1), d)
            return self.reshape(y, (b, length, kv, heads, d))
        steps = (1, 1, 1, 1, 1)
        low = self.strided_slice(x, (0, 0, 0, 0, 0), (b, length, kv, heads, self.half), steps)
        high = self.strided_slice(x, (0, 0, 0, 0, self.half), (b, length, kv, heads, self.size), steps)
        return self.add(self.mul(x, cos), self.mul(self.concat((self.neg(high), low)), sin))

    def shard(self, dp: int, tp: int, packed: bool = False) -> None:
        """Cuts samples and key/value groups; the tables are one for all samples unless those are packed."""
        heads, samples = (dp, 1, tp, 1, 1), dp if packed else 1
        if self.is_fused:
            self.rotate.shard(((dp, 1, tp, 1), (samples, 1, 1, 1), (samples, 1, 1, 1)))
        self.strided_slice.shard((heads,))
        self.neg.shard((heads,))
        self.concat.shard((heads, heads))
        self.mul.shard((heads, (samples, 1, 1, 1, 1)))
        self.add.shard((heads, heads))


class SplitHeads(nn.Cell):
    """Rotated queries and keys, and values, from the consolidated product.

    The rows of `wqkv` are grouped by key/value head: for each of them its query heads, its key head, its value head.

    Args:
        config: sizes and dtype.
        positions_first: leave positions in front of heads, as the product has them; otherwise heads come first.
    """

    def __init__(self, config: IXC25Config, positions_first: bool = False):
        super().__init__()
        self.positions_first = positions_first
        self.kv, self.groups, self.size = config.num_key_value_heads, config.query_groups, config.head_size
        self.rotary = RotaryEmbedding(config)
        self.packed = config.packing
        self.dtype = config.compute_dtype
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.strided_slice = P.StridedSlice()
        self.to_query = P.Transpose()
        self.to_heads = P.Transpose()

    def construct(self, qkv, cos, sin, shape):
        """Takes the product of `wqkv` apart and rotates queries and keys.

        Args:
            qkv: `(B*L, KV * (G+2) * d)`.
            cos: `(B or 1, L, 1, 1, d)`.
            sin: like `cos`.
            shape: `(B, L)`, a compile-time constant.

        Returns:
            Queries `(B, KV, G, L, d)`, keys and values `(B, KV, L, d)`; with positions first `(B*L, KV*G, d)` and
            `(B*L, KV, d)`.
        """
        b, length = shape
        kv, g, d = self.kv, self.groups, self.size
        qkv = self.reshape(qkv, (b, length, kv, g + 2, d))                                   # (B, L, KV, G+2, d)
        steps = (1, 1, 1, 1, 1)
        # queries and key of a group turn by the same angles: rotate them together
        qk = self.strided_slice(qkv, (0, 0, 0, 0, 0), (b, length, kv, g + 1, d), steps)      # (B, L, KV, G+1, d)
        qk = self.rotary(qk, self.cast(cos, self.dtype), self.cast(sin, self.dtype))
        value = self.strided_slice(qkv, (0, 0, 0, g + 1, 0), (b, length, kv, g + 2, d), steps)
        query = self.strided_slice(qk, (0, 0, 0, 0, 0), (b, length, kv, g, d), steps)        # (B, L, KV, G, d)
        key = self.strided_slice(qk, (0, 0, 0, g, 0), (b, length, kv, g + 1, d), steps)      # (B, L, KV, 1, d)
        if self.positions_first:
            keys = (b * length, kv, d)
            return self.reshape(query, (b * length, kv * g, d)), self.reshape(key, keys), self.reshape(value, keys)
        query = self.to_query(query, (0, 2, 3, 1, 4))                                        # (B, KV, G, L, d)
        key = self.to_heads(self.reshape(key, (b, length, kv, d)), (0, 2, 1, 3))             # (B, KV, L, d)
        value = self.to_heads(self.reshape(value, (b, length, kv, d)), (0, 2, 1, 3))
        return query, key, value

    def shard(self, dp: int, tp: int) -> None:
        """Cuts samples and key/value groups."""
        self.rotary.shard(dp, tp, self.packed)
        self.strided_slice.shard(((dp, 1, tp, 1, 1),))
        self.to_query.shard(((dp, 1, tp, 1, 1),))
        self.to_heads.shard(((dp, 1, tp, 1),))


class MergeHeads(nn.Cell):
    """Attention output, `(B, KV, G, L, d)` or with positions first `(B*L, H, d)`, as `wo` takes it, `(B*L, H*d)`.

    Args:
        config: sizes.
        positions_first: as in `SplitHeads`.
    """

    def __init__(self, config: IXC25Config, positions_first: bool = False):
        super().__init__()
        self.positions_first = positions_first
        self.width = config.num_attention_heads * config.head_size
        self.to_positions = P.Transpose()
        self.reshape = P.Reshape()

    def construct(self, y, shape):
        """Brings heads together again; `shape` is `(B, L)`, a compile-time constant."""
        if not self.positions_first:
            y = self.to_positions(y, (0, 3, 1, 2, 4))                                        # (B, L, KV, G, d)
        return self.reshape(y, (shape[0] * shape[1], self.width))                            # (B*L, H*d)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts samples and key/value groups."""
        self.to_positions.shard(((dp, tp, 1, 1, 1),))


class Attention(nn.Cell):
    """Grouped-query attention on the consolidated QKV."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        width = config.num_attention_heads * config.head_size
        self.wqkv = PartialLoRALinear(config.hidden_size, width + 2 * config.num_key_value_heads * config.head_size,
                                      config, CUTS["wqkv"], salt=0)
        self.wo = PartialLoRALinear(width, config.hidden_size, config, CUTS["wo"], salt=1)
        self.core = decoder_attention(config)
        self.split = SplitHeads(config, self.core.positions_first)
        self.merge = MergeHeads(config, self.core.positions_first)
        self.is_native = attends_natively(config)
        if self.is_native:
            self.native = training.causal_attention(config.num_key_value_heads, config.query_groups)

    def construct(self, x, image_mask, cos, sin, mask, adapters, shape, noise=None):
        """Attention over the whole sequence; arguments as in `DecoderLayer.construct`."""
        qkv = self.wqkv(x, image_mask, adapters, noise)
        if self.is_native:
            y, _ = self.native(qkv, cos, sin, mask)
        else:
            query, key, value = self.split(qkv, cos, sin, shape)
            y = self.merge(self.core(query, key, value, mask), shape)
        return self.wo(y, image_mask, adapters, noise)

    def shard(self, dp: int, tp: int, sequence: bool) -> None:
        """Cuts samples and key/value groups."""
        self.core.shard(dp, tp)
        for cell in (self.split, self.merge):
            cell.shard(dp, tp)
        for linear in (self.wqkv, self.wo):
            linear.shard(dp, tp, sequence)


class FeedForward(nn.Cell):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.w1 = PartialLoRALinear(config.hidden_size, config.intermediate_size, config, CUTS["w1"], salt=2)
        self.w3 = PartialLoRALinear(config.hidden_size, config.intermediate_size, config, CUTS["w3"], salt=3)
        self.w2 = PartialLoRALinear(config.intermediate_size, config.hidden_size, config, CUTS["w2"], salt=4)
        self.sigmoid = P.Sigmoid()
        self.mul_sigmoid = P.Mul()
        self.mul_gate = P.Mul()
        self.is_native = kernels.available(config.compute_dtype)
        if self.is_native:
            self.swiglu = kernels.kernel("swiglu")
        self.trains_natively = training.available(config.compute_dtype)
        if self.trains_natively:
            self.train_swiglu = training.swiglu()

    def construct(self, x, image_mask, adapters, noise=None):
        """Maps `(B*L, D)` to `(B*L, D)`."""
        y = self.w1(x, image_mask, adapters, noise)
        if self.trains_natively:
            y = self.train_swiglu(y, self.w3(x, image_mask, adapters, noise))
        else:
            y = self.mul_gate(self.mul_sigmoid(y, self.sigmoid(y)), self.w3(x, image_mask, adapters, noise))
        return self.w2(y, image_mask, adapters, noise)

    def gates(self) -> tuple[Primitive, ...]:
        """The operations between the linears."""
        return (self.train_swiglu,) if self.trains_natively else (self.sigmoid, self.mul_sigmoid, self.mul_gate)

    def infer(self, x, image_mask, adapters):
        """The same without gradients."""
        if self.is_native:
            y = self.swiglu(self.w1.infer(x, image_mask, adapters), self.w3.infer(x, image_mask, adapters))
            return self.w2.infer(y, image_mask, adapters)
        return self.construct(x, image_mask, adapters)

    def shard(self, dp: int, tp: int, sequence: bool) -> None:
        """Cuts positions and the inner width."""
        for linear in (self.w1, self.w3, self.w2):
            linear.shard(dp, tp, sequence)
        inner = (dp, tp)
        self.sigmoid.shard((inner,))
        self.mul_sigmoid.shard((inner, inner))
        self.mul_gate.shard((inner, inner))


class DecoderLayer(nn.Cell):
    """One pre-norm decoder layer."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps, config.param_init_type, config.layernorm_compute_type,
                config.fused_norm)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(*norm)
        self.ffn_norm = RMSNorm(*norm)
        self.add = P.Add()
        # with sequence parallel, where positions come together again: once for all that take them
        self.add_zero = P.Add().add_prim_attr("keep_alive", True)
        self.sequence = False

    def construct(self, x, image_mask, cos, sin, mask, adapters, shape, noise=None):
        """Attention and feed-forward, each normalised before and added to its input.

        Args:
            x: `(B*L, D)`.
            image_mask: `(B*L, 1)` in the compute dtype, 1 on image positions, or `None`.
            cos: `(B or 1, L, 1, 1, d)`.
            sin: like `cos`.
            mask: what `attention.decoder_mask` made.
            adapters: names of the task LoRAs in use, a compile-time constant.
            shape: `(B, L)`, a compile-time constant.
            noise: int32 `(B*L, 1)`, seeds of the dropout; `None` for the device's generator.

        Returns:
            Tensor `(B*L, D)`.
        """
        y = self.gathered(self.attention_norm(x))
        x = self.add(x, self.attention(y, image_mask, cos, sin, mask, adapters, shape, noise))
        return self.add(x, self.feed_forward(self.gathered(self.ffn_norm(x)), image_mask, adapters, noise))

    def gathered(self, x):
        """`x` with all positions of a data-parallel share on every device."""
        return self.add_zero(x, 0) if self.sequence else x

    def project(self, x, image_mask, adapters):
        """Consolidated queries, keys and values `(B*L, KV * (G+2) * d)`, for attention with a cache."""
        return self.attention.wqkv.infer(self.attention_norm.infer(x), image_mask, adapters)

    def finish(self, x, y, image_mask, adapters):
        """The layer's output `(B*L, D)` from its input `x` and what attention gave for it, `y` `(B*L, H*d)`."""
        x = self.add(x, self.attention.wo.infer(y, image_mask, adapters))
        return self.add(x, self.feed_forward.infer(self.ffn_norm.infer(x), image_mask, adapters))

    def shard(self, dp: int, tp: int, sequence: bool) -> None:
        """Cuts positions (finer with `sequence` parallel); inside attention and feed-forward, heads and width."""
        self.attention.shard(dp, tp, sequence)
        self.feed_forward.shard(dp, tp, sequence)
        self.sequence = sequence
        self.add_zero.shard(((dp, 1), ()))
        rows = dp * tp if sequence else dp
        self.attention_norm.shard(rows)
        self.ffn_norm.shard(rows)
        self.add.shard(((rows, 1), (rows, 1)))


class InternLM2Model(nn.Cell):
    """Embedding, decoder layers and final norm.

    Args:
        config: all sizes.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.tok_embeddings = TokenEmbedding(config)
        self.layers = nn.CellList([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.param_init_type,
                            config.layernorm_compute_type, config.fused_norm)
        self.mask = decoder_mask(config)
        self.mul_noise = P.Mul()

    def construct(self, x, image_mask, cos, sin, adapters, shape, segment_ends=None, noise=None):
        """Runs the layers over embeddings.

        Args:
            segment_ends: int32 `(B, S)`, where the segments of packed rows end.
            noise: int32 `(B*L, 1)`, seed of each position's dropout.
            x, image_mask, cos, sin, adapters, shape: as in `DecoderLayer.construct`.

        Returns:
            Tensor `(B*L, D)`.
        """
        mask = self.mask(shape[1], segment_ends)
        for number, layer in enumerate(self.layers):
            seeds = None
            if noise is not None:   # every layer has noise of its own
                seeds = self.mul_noise(noise, 2 * number + LAYER_MIX)
            x = layer(x, image_mask, cos, sin, mask, adapters, shape, seeds)
        return self.norm(x)

    def shard(self, dp: int, tp: int, whole_vocabulary: bool, sequence: bool) -> None:
        """Cuts every operator; see `mindformers_ixc.models.layers`."""
        self.tok_embeddings.shard(dp, tp, whole_vocabulary)
        for layer in self.layers:
            layer.shard(dp, tp, sequence)
        self.norm.shard(dp * tp if sequence else dp)
        self.mask.shard(dp)
        self.mul_noise.shard(((dp, 1), ()))
