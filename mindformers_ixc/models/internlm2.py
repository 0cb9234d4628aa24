"""InternLM2: the language model of IXC2.5, with consolidated QKV, grouped queries and Partial LoRA on every linear."""
from __future__ import annotations

from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc import native
from mindformers_ixc.config import IXC25Config
from mindformers_ixc.models.layers import AttentionCore, PartialLoRALinear, RMSNorm

# Added to attention scores that must not be seen. Finite, so that a row with nothing to see is not NaN; exp() of it is
# exactly 0 in float32 beside any real score.
MASKED = -1e9


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
        self.expand = P.ExpandDims()
        self.select = P.Select()
        self.cast = P.Cast()

    def construct(self, ids):
        """Maps int32 `(B, L)` to `(B, L, D)` in the compute dtype."""
        x = self.gather(self.weight, ids, 0)                                          # (B, L, D)
        is_padding = self.expand(self.equal(ids, self.padding), 2)                    # (B, L, 1)
        return self.cast(F.select(is_padding, F.stop_gradient(x), x), self.dtype)

    def lookup(self, ids):
        """The same without regard for gradients: int32 of any shape to one axis more."""
        return self.cast(self.gather(self.weight, ids, 0), self.dtype)


class RotaryEmbedding(nn.Cell):
    """Rotates pairs of one head by the position's angle (halves convention)."""

    def __init__(self, head_size: int):
        super().__init__()
        self.size, self.half = head_size, head_size // 2
        self.slice = P.StridedSlice()
        self.neg = P.Neg()
        self.concat = P.Concat(-1)
        self.mul = P.Mul()
        self.add = P.Add()

    def construct(self, x, cos, sin):
        """Rotates `(B, L, KV, n, d)` by tables that broadcast to it, `(B or 1, L, 1, 1, d)`."""
        b, length, kv, n, _ = x.shape
        steps = (1, 1, 1, 1, 1)
        low = self.slice(x, (0, 0, 0, 0, 0), (b, length, kv, n, self.half), steps)
        high = self.slice(x, (0, 0, 0, 0, self.half), (b, length, kv, n, self.size), steps)
        return self.add(self.mul(x, cos), self.mul(self.concat((self.neg(high), low)), sin))


class SplitHeads(nn.Cell):
    """Rotated queries and keys, and values, from the consolidated product.

    The rows of `wqkv` are grouped by key/value head: for each of them its query heads, its key head, its value head.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.kv, self.groups, self.size = config.num_key_value_heads, config.query_groups, config.head_size
        self.rotary = RotaryEmbedding(self.size)
        self.dtype = config.compute_dtype
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.slice = P.StridedSlice()
        self.to_query = P.Transpose()
        self.to_heads = P.Transpose()

    def construct(self, qkv, cos, sin, shape):
        """Splits.

        Args:
            qkv: `(B*L, KV * (G+2) * d)`.
            cos: `(B or 1, L, 1, 1, d)`.
            sin: like `cos`.
            shape: `(B, L)`, a compile-time constant.

        Returns:
            Queries `(B, KV, G, L, d)`, keys and values `(B, KV, L, d)`.
        """
        b, length = shape
        kv, g, d = self.kv, self.groups, self.size
        qkv = self.reshape(qkv, (b, length, kv, g + 2, d))                                   # (B, L, KV, G+2, d)
        steps = (1, 1, 1, 1, 1)
        # queries and key of a group turn by the same angles: rotate them together
        qk = self.slice(qkv, (0, 0, 0, 0, 0), (b, length, kv, g + 1, d), steps)              # (B, L, KV, G+1, d)
        qk = self.rotary(qk, self.cast(cos, self.dtype), self.cast(sin, self.dtype))
        value = self.slice(qkv, (0, 0, 0, g + 1, 0), (b, length, kv, g + 2, d), steps)       # (B, L, KV, 1, d)
        query = self.slice(qk, (0, 0, 0, 0, 0), (b, length, kv, g, d), steps)                # (B, L, KV, G, d)
        key = self.slice(qk, (0, 0, 0, g, 0), (b, length, kv, g + 1, d), steps)              # (B, L, KV, 1, d)
        query = self.to_query(query, (0, 2, 3, 1, 4))                                        # (B, KV, G, L, d)
        key = self.to_heads(self.reshape(key, (b, length, kv, d)), (0, 2, 1, 3))             # (B, KV, L, d)
        value = self.to_heads(self.reshape(value, (b, length, kv, d)), (0, 2, 1, 3))         # (B, KV, L, d)
        return query, key, value


class MergeHeads(nn.Cell):
    """Attention output `(B, KV, G, L, d)` as `wo` takes it, `(B*L, H*d)`."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.width = config.num_attention_heads * config.head_size
        self.to_positions = P.Transpose()
        self.reshape = P.Reshape()

    def construct(self, y, shape):
        """Merges; `shape` is `(B, L)`, a compile-time constant."""
        y = self.to_positions(y, (0, 3, 1, 2, 4))                                            # (B, L, KV, G, d)
        return self.reshape(y, (shape[0] * shape[1], self.width))                            # (B*L, H*d)


class Attention(nn.Cell):
    """Grouped-query attention on the consolidated QKV."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        width = config.num_attention_heads * config.head_size
        self.wqkv = PartialLoRALinear(config.hidden_size, width + 2 * config.num_key_value_heads * config.head_size,
                                      config)
        self.wo = PartialLoRALinear(width, config.hidden_size, config)
        self.split = SplitHeads(config)
        self.core = AttentionCore(config.head_size, config.softmax_compute_type)
        self.merge = MergeHeads(config)

    def construct(self, x, image_mask, cos, sin, mask, adapters, shape):
        """Attends over the whole sequence; see `DecoderLayer.construct`."""
        query, key, value = self.split(self.wqkv(x, image_mask, adapters), cos, sin, shape)
        return self.wo(self.merge(self.core(query, key, value, mask), shape), image_mask, adapters)


class FeedForward(nn.Cell):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.w1 = PartialLoRALinear(config.hidden_size, config.intermediate_size, config)
        self.w3 = PartialLoRALinear(config.hidden_size, config.intermediate_size, config)
        self.w2 = PartialLoRALinear(config.intermediate_size, config.hidden_size, config)
        self.sigmoid = P.Sigmoid()
        self.silu = P.Mul()
        self.gate = P.Mul()
        self.is_native = native.available(config.compute_dtype)
        if self.is_native:
            self.swiglu = native.kernel("swiglu")

    def construct(self, x, image_mask, adapters):
        """Maps `(B*L, D)` to `(B*L, D)`."""
        y = self.w1(x, image_mask, adapters)
        y = self.gate(self.silu(y, self.sigmoid(y)), self.w3(x, image_mask, adapters))
        return self.w2(y, image_mask, adapters)

    def infer(self, x, image_mask, adapters):
        """The same without gradients."""
        if self.is_native:
            y = self.swiglu(self.w1.infer(x, image_mask, adapters), self.w3.infer(x, image_mask, adapters))
            return self.w2.infer(y, image_mask, adapters)
        return self.construct(x, image_mask, adapters)


class DecoderLayer(nn.Cell):
    """One pre-norm decoder layer."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps, config.param_init_type, config.layernorm_compute_type)
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(*norm)
        self.ffn_norm = RMSNorm(*norm)
        self.add = P.Add()

    def construct(self, x, image_mask, cos, sin, mask, adapters, shape):
        """Transforms flattened positions.

        Args:
            x: `(B*L, D)`.
            image_mask: `(B*L, 1)` in the compute dtype, 1 on image positions, or `None`.
            cos: `(B or 1, L, 1, 1, d)`.
            sin: like `cos`.
            mask: additive attention mask, broadcast to `(B, KV, G, L, L)`.
            adapters: names of the task LoRAs in use, a compile-time constant.
            shape: `(B, L)`, a compile-time constant.

        Returns:
            Tensor `(B*L, D)`.
        """
        x = self.add(x, self.attention(self.attention_norm(x), image_mask, cos, sin, mask, adapters, shape))
        return self.add(x, self.feed_forward(self.ffn_norm(x), image_mask, adapters))

    def project(self, x, image_mask, adapters):
        """Consolidated queries, keys and values `(B*L, KV * (G+2) * d)`, for attention with a cache."""
        return self.attention.wqkv.infer(self.attention_norm.infer(x), image_mask, adapters)

    def finish(self, x, y, image_mask, adapters):
        """The layer's output `(B*L, D)` from its input `x` and what attention gave for it, `y` `(B*L, H*d)`."""
        x = self.add(x, self.attention.wo.infer(y, image_mask, adapters))
        return self.add(x, self.feed_forward.infer(self.ffn_norm.infer(x), image_mask, adapters))


class CausalMask(nn.Cell):
    """Additive causal mask `(1, 1, 1, L, L)`, made inside the graph so that no L x L constant is stored."""

    def __init__(self, dtype):
        super().__init__()
        self.greater = P.Greater()
        self.cast = P.Cast()
        self.mul = P.Mul()
        self.reshape = P.Reshape()
        self.dtype = dtype

    def construct(self, length):
        """Builds the mask for `length` positions, a compile-time constant."""
        positions = F.arange(length)
        later = self.greater(self.reshape(positions, (1, length)), self.reshape(positions, (length, 1)))
        return self.reshape(self.mul(self.cast(later, self.dtype), MASKED), (1, 1, 1, length, length))


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
                            config.layernorm_compute_type)
        self.causal_mask = CausalMask(config.softmax_compute_type)

    def construct(self, x, image_mask, cos, sin, adapters, shape):
        """Runs the layers over embeddings; arguments as in `DecoderLayer.construct`, returns `(B*L, D)`."""
        mask = self.causal_mask(shape[1])
        for layer in self.layers:
            x = layer(x, image_mask, cos, sin, mask, adapters, shape)
        return self.norm(x)
