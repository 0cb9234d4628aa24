"""The vision side: CLIP tower over tiles, 2 x 2 merge, separators and projector, ending in the vision table.

The device never sees an image's size. It turns `max_tiles` tiles into a table of rows; the host has already decided
which row each image position of the sequence takes (`mindformers_ixc.processing`).
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P

from mindformers_ixc.config import VisionConfig
from mindformers_ixc.device import on_ascend
from mindformers_ixc.models.attention import (
    GIVEN,
    NOTHING,
    AttentionCore,
    FlashAttention,
    padding_mask,
    uses_flash_attention,
)
from mindformers_ixc.models.configuration import IXC25Config, IXC25VisionConfig
from mindformers_ixc.models.layers import LayerNorm, Linear
from mindformers_ixc.native import kernels, training
from mindformers_ixc.parallel.cuts import CUTS, ROWS


class VisionEmbeddings(nn.Cell):
    """Patches to vectors: bias-free patch convolution, class token, learned positions.

    The convolution's stride equals its kernel, so it is one product over unfolded patches.
    """

    def __init__(self, config: VisionConfig, param_dtype: mstype.Type, compute_dtype: mstype.Type):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.grid, self.patch, self.width = config.patches_per_side, patch, width
        self.class_embedding = Parameter(initializer(Normal(0.02), (width,), param_dtype), name="class_embedding")
        self.patch_embedding = PatchConvolution(width, patch, param_dtype)
        self.position_embedding = PositionTable(config.positions, width, param_dtype)
        self.dtype = compute_dtype
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.to_patches = P.Transpose()
        self.strided_slice, self.equal = P.StridedSlice(), P.Equal()
        self.one_kernel = Tensor(np.ones((1, 1, 1, 1, 1)), compute_dtype)
        self.mul_kernel, self.mul_class = P.Mul(), P.Mul()
        self.matmul = P.MatMul(transpose_b=True)
        self.expand_dims = P.ExpandDims()
        self.concat = P.Concat(1)
        self.add = P.Add()

    def construct(self, pixels):
        """Maps `(N, 3, P, P)` normalised pixels to `(N, 1 + g*g, C)`."""
        n, g, p = pixels.shape[0], self.grid, self.patch
        x = self.reshape(pixels, (n, 3, g, p, g, p))                                  # (N, 3, g, p, g, p)
        x = self.to_patches(x, (0, 2, 4, 1, 3, 5))                                    # (N, g, g, 3, p, p)
        # 1 for each tile, made of the tiles: the compiler's accumulation looks for the micro batch at the first
        # operator with a parameter, which is the class token's
        ones = self.strided_slice(x, (0, 0, 0, 0, 0, 0), (n, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1))
        ones = self.reshape(self.cast(self.equal(ones, ones), self.dtype), (n, 1, 1))
        first = self.mul_class(ones, self.cast(self.class_embedding, self.dtype))     # (N, 1, C)
        x = self.cast(self.reshape(x, (n * g * g, 3 * p * p)), self.dtype)            # (N*g*g, 3*p*p)
        # a parameter goes through an operator with a strategy before it is reshaped; with Reshape alone the parallel
        # compiler chooses a cut itself, with Transpose it forgets to sum the gradient over the copies. Here that is
        # a product with 1, of one axis more so that it is not left out: two reshapes in a row in a gradient (ExpandDims
        # has one) hide the end of the backward pass from the compiler's pipeline
        kernel = self.cast(self.patch_embedding.weight, self.dtype)                   # (C, 3, p, p)
        kernel = self.mul_kernel(self.one_kernel, kernel)                             # (1, C, 3, p, p)
        x = self.matmul(x, self.reshape(kernel, (self.width, 3 * p * p)))             # (N*g*g, C)
        x = self.reshape(x, (n, g * g, self.width))                                   # (N, g*g, C)
        positions = self.cast(self.position_embedding.weight, self.dtype)             # (1 + g*g, C)
        positions = self.expand_dims(positions, 0)                                    # (1, 1 + g*g, C)
        return self.add(self.concat((first, x)), positions)

    def shard(self, dp: int) -> None:
        """Cuts tiles: the patch convolution is too small to cut its width."""
        rows = (dp, 1, 1)
        self.to_patches.shard(((dp, 1, 1, 1, 1, 1),))
        self.mul_kernel.shard(((1, 1, 1, 1, 1), (1, 1, 1, 1)))
        pixels = (dp, 1, 1, 1, 1, 1)
        self.strided_slice.shard((pixels,))
        self.equal.shard((pixels, pixels))
        self.mul_class.shard((rows, (1,)))
        self.expand_dims.shard(((1, 1),))
        self.matmul.shard(((dp, 1), (1, 1)))
        self.concat.shard((rows, rows))
        self.add.shard((rows, (1, 1, 1)))


class PatchConvolution(nn.Cell):
    """Holds the kernel of the patch convolution, `(C, 3, p, p)`; `VisionEmbeddings` computes with it."""

    def __init__(self, width: int, patch: int, param_dtype: mstype.Type):
        super().__init__()
        self.weight = Parameter(initializer(Normal(0.02), (width, 3, patch, patch), param_dtype), name="weight")


class PositionTable(nn.Cell):
    """Holds the learned positions, `(1 + g*g, C)`; `VisionEmbeddings` adds them."""

    def __init__(self, positions: int, width: int, param_dtype: mstype.Type):
        super().__init__()
        self.weight = Parameter(initializer(Normal(0.02), (positions, width), param_dtype), name="weight")


class VisionAttention(nn.Cell):
    """Multi-head attention of CLIP, with biases, over all positions of a tile.

    Args:
        config: sizes.
        dtypes: of parameters and products.
        softmax_dtype: of the softmax.
        flash: take Ascend's fused kernel; positions are then padded to `padded_positions`.
    """

    def __init__(self, config: VisionConfig, dtypes: dict, softmax_dtype: mstype.Type, flash: bool):
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_size = config.num_attention_heads, width // config.num_attention_heads
        self.k_proj = Linear(width, width, has_bias=True, cut=CUTS["k_proj"], **dtypes)
        self.v_proj = Linear(width, width, has_bias=True, cut=CUTS["v_proj"], **dtypes)
        self.q_proj = Linear(width, width, has_bias=True, cut=CUTS["q_proj"], **dtypes)
        self.out_proj = Linear(width, width, has_bias=True, cut=CUTS["out_proj"], **dtypes)
        if flash:
            hides = GIVEN if config.padded_positions > config.positions else NOTHING
            self.core = FlashAttention(self.heads, self.head_size, hides)
        else:
            self.core = AttentionCore(self.head_size, softmax_dtype)
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.to_positions = P.Transpose()
        self.scale, self.one = Tensor([self.head_size ** -0.5], mstype.float32), Tensor([1.0], mstype.float32)
        if kernels.available():
            heads, length, size = self.heads, config.positions, self.head_size
            self.to_heads = kernels.kernel("bias_heads", lambda x, *_: (x[0] // length, heads, length, size))
            self.attention = kernels.kernel("whole_attention", lambda q, *_: (q[0] * q[2], q[1] * q[3]))
        self.trains_natively = not flash and training.available(softmax_dtype, *dtypes.values())
        if self.trains_natively:
            self.train_attention = training.tile_attention(self.heads, config.positions)

    def construct(self, x, n, length, mask):
        """Maps `(N*L, C)` to `(N*L, C)`; `n` tiles of `length` positions, `mask` as the core takes it."""
        if self.trains_natively:
            y, _ = self.train_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))
            return self.out_proj(y)
        heads = (n, length, self.heads, self.head_size)
        q = self.transpose(self.reshape(self.q_proj(x), heads), (0, 2, 1, 3))         # (N, H, L, d)
        k = self.transpose(self.reshape(self.k_proj(x), heads), (0, 2, 1, 3))         # (N, H, L, d)
        v = self.transpose(self.reshape(self.v_proj(x), heads), (0, 2, 1, 3))         # (N, H, L, d)
        q = self.reshape(q, (n, self.heads, 1, length, self.head_size))               # (N, H, 1, L, d)
        y = self.reshape(self.core(q, k, v, mask), (n, self.heads, length, self.head_size))
        y = self.reshape(self.to_positions(y, (0, 2, 1, 3)), (n * length, self.heads * self.head_size))  # (N*L, C)
        return self.out_proj(y)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts tiles by `dp` and heads by `tp`."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            linear.shard(dp, tp)
        # two places, two layouts: positions first on the way in, heads first on the way out
        self.transpose.shard(((dp, 1, tp, 1),))
        self.to_positions.shard(((dp, tp, 1, 1),))
        self.core.shard(dp, tp)

    def infer(self, x, n, length):
        """The same with the fused kernels, without the output's bias."""
        q = self.to_heads(self.q_proj.infer_product(x), self.q_proj.bias, self.scale)      # (N, H, L, d)
        k = self.to_heads(self.k_proj.infer_product(x), self.k_proj.bias, self.one)
        v = self.to_heads(self.v_proj.infer_product(x), self.v_proj.bias, self.one)
        if self.trains_natively:
            return self.out_proj.infer_product(self.attention(q, k, v))
        y = self.core.weighted_sum(self.core.softmax(self.core.scores(q, k)), v)      # (N, H, L, d)
        y = self.reshape(self.to_positions(y, (0, 2, 1, 3)), (n * length, self.heads * self.head_size))  # (N*L, C)
        return self.out_proj.infer_product(y)


class VisionMLP(nn.Cell):
    """Two linears around CLIP's quick GELU, `x * sigmoid(1.702 x)`."""

    def __init__(self, config: VisionConfig, dtypes: dict):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, has_bias=True, cut=CUTS["fc1"], **dtypes)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, has_bias=True, cut=CUTS["fc2"], **dtypes)
        self.sigmoid = P.Sigmoid()
        self.mul_slope = P.Mul()
        self.mul_gate = P.Mul()
        self.trains_natively = training.available(*dtypes.values())
        if self.trains_natively:
            self.quick_gelu = training.quick_gelu()

    def construct(self, x):
        """Maps `(N*L, C)` to `(N*L, C)`."""
        y = self.fc1(x)
        if self.trains_natively:
            return self.fc2(self.quick_gelu(y))
        return self.fc2(self.mul_gate(y, self.sigmoid(self.mul_slope(y, 1.702))))

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions and the inner width."""
        self.fc1.shard(dp, tp)
        self.fc2.shard(dp, tp)
        self.mul_slope.shard(((dp, tp), ()))
        self.sigmoid.shard(((dp, tp),))
        self.mul_gate.shard(((dp, tp), (dp, tp)))


class VisionLayer(nn.Cell):
    """One pre-norm encoder layer of CLIP."""

    def __init__(self, config: VisionConfig, dtypes: dict, norm_dtype: mstype.Type, softmax_dtype: mstype.Type,
                 flash: bool):
        super().__init__()
        norm = (config.hidden_size, config.layer_norm_eps, dtypes["param_dtype"], norm_dtype)
        self.self_attn = VisionAttention(config, dtypes, softmax_dtype, flash)
        self.layer_norm1 = LayerNorm(*norm)
        self.mlp = VisionMLP(config, dtypes)
        self.layer_norm2 = LayerNorm(*norm)
        self.add = P.Add()
        self.is_native = kernels.available(norm_dtype, softmax_dtype, *dtypes.values())
        if self.is_native:
            self.quick_gelu, self.bias_residual = kernels.kernel("bias_quick_gelu"), kernels.kernel("bias_residual")

    def construct(self, x, n, length, mask):
        """Maps `(N*L, C)` to `(N*L, C)`; arguments as in `VisionAttention.construct`."""
        x = self.add(x, self.self_attn(self.layer_norm1(x), n, length, mask))
        return self.add(x, self.mlp(self.layer_norm2(x)))

    def infer(self, x, n, length, mask):
        """The same without gradients."""
        if not self.is_native:
            return self.construct(x, n, length, mask)
        y = self.self_attn.infer(self.layer_norm1.infer(x), n, length)
        x = self.bias_residual(y, self.self_attn.out_proj.bias, x)
        y = self.quick_gelu(self.mlp.fc1.infer_product(self.layer_norm2.infer(x)), self.mlp.fc1.bias)
        return self.bias_residual(self.mlp.fc2.infer_product(y), self.mlp.fc2.bias, x)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions; inside attention and MLP, heads and width as well."""
        self.self_attn.shard(dp, tp)
        self.mlp.shard(dp, tp)
        self.layer_norm1.shard(dp)
        self.layer_norm2.shard(dp)
        self.add.shard(((dp, 1), (dp, 1)))


def _infers_on_ascend(config: IXC25Config | IXC25VisionConfig) -> bool:
    """Whether a tower is for inference with Ascend's kernels, whatever training takes: those hold no scores."""
    return (bool(getattr(config, "use_past", False)) and on_ascend()
            and getattr(config, "compute_dtype", None) in (mstype.float16, mstype.bfloat16))


class VisionEncoder(nn.Cell):
    """The stack of encoder layers."""

    def __init__(self, config: VisionConfig, dtypes: dict, norm_dtype: mstype.Type, softmax_dtype: mstype.Type,
                 flash: bool):
        super().__init__()
        self.layers = nn.CellList(
            [VisionLayer(config, dtypes, norm_dtype, softmax_dtype, flash) for _ in range(config.num_hidden_layers)])

    def construct(self, x, n, length, mask, infer=False):
        """Maps `(N*L, C)` to `(N*L, C)`; arguments as in `VisionAttention.construct`."""
        for layer in self.layers:
            x = layer.infer(x, n, length, mask) if infer else layer(x, n, length, mask)
        return x


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class IXC25VisionModel(PreTrainedModel):
    """CLIP ViT over tiles: features of the last encoder layer, before `post_layernorm`, class token dropped.

    `post_layernorm` is carried only so that a checkpoint goes in and out whole; it is never computed and never trained.

    Args:
        config: sizes of the tower, or the whole model's configuration (then its dtypes are used too).
    """

    config_class = IXC25VisionConfig
    base_model_prefix = "vision_model"

    def __init__(self, config: IXC25VisionConfig | IXC25Config):
        super().__init__(config, auto_prefix=True)
        vision = config.vision_config if isinstance(config, IXC25Config) else config
        param_dtype = getattr(config, "param_init_type", mstype.float32)
        dtypes = {"param_dtype": param_dtype, "compute_dtype": getattr(config, "compute_dtype", mstype.float32)}
        norm_dtype = getattr(config, "layernorm_compute_type", mstype.float32)
        softmax_dtype = getattr(config, "softmax_compute_type", mstype.float32)
        norm = (vision.hidden_size, vision.layer_norm_eps, param_dtype, norm_dtype)
        self.embeddings = VisionEmbeddings(vision, param_dtype, dtypes["compute_dtype"])
        self.pre_layrnorm = LayerNorm(*norm)          # the public name is misspelt so
        self.is_flash = uses_flash_attention(config) or _infers_on_ascend(config)
        self.encoder = VisionEncoder(vision, dtypes, norm_dtype, softmax_dtype, self.is_flash)
        self.post_layernorm = LayerNorm(*norm)
        for parameter in self.post_layernorm.get_parameters():
            parameter.requires_grad = False
        self.positions, self.width = vision.positions, vision.hidden_size
        self.padded, self.mask = self.positions, None
        if self.is_flash:
            self.padded, self.mask = vision.padded_positions, padding_mask(vision)
        if self.padded > self.positions:
            self.zeros = Tensor(np.zeros((1, self.padded - self.positions, self.width)), dtypes["compute_dtype"])
        self.tile_zeros, self.concat_zeros = P.Tile(), P.Concat(1)
        self.reshape = P.Reshape()
        self.strided_slice = P.StridedSlice()

    def construct(self, pixels, infer=False):
        """Features of the patches of each tile.

        Args:
            pixels: `(N, 3, P, P)` normalised tiles.
            infer: leave gradients out; a compile-time constant.

        Returns:
            Tensor `(N, g*g, C)` in the compute dtype.
        """
        n, length, width = pixels.shape[0], self.padded, self.width
        x = self.embeddings(pixels)                                                   # (N, 1 + g*g, C)
        if length > self.positions:
            x = self.concat_zeros((x, self.tile_zeros(self.zeros, (n, 1, 1))))        # (N, L, C)
        x = self.reshape(x, (n * length, width))                                      # (N*L, C)
        x = self.encoder(self.pre_layrnorm(x), n, length, self.mask, infer)
        x = self.reshape(x, (n, length, width))                                       # (N, L, C)
        end = (n, self.positions, width)
        return self.strided_slice(x, (0, 1, 0), end, (1, 1, 1))                       # (N, g*g, C)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts every operator; see `mindformers_ixc.models.layers`."""
        self.embeddings.shard(dp)
        self.pre_layrnorm.shard(dp)
        for layer in self.encoder.layers:
            layer.shard(dp, tp)
        rows = (dp, 1, 1)
        self.strided_slice.shard((rows,))
        self.tile_zeros.shard(((1, 1, 1),))
        self.concat_zeros.shard((rows, rows))


class VisionTower(nn.Cell):
    """Nests the ViT as `vision_tower.vision_model`, the way the public checkpoint names it below `vit`."""

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.vision_tower = nn.Cell()
        self.vision_tower.vision_model = IXC25VisionModel(config)

    def construct(self, pixels, infer=False):
        """Maps `(N, 3, P, P)` to `(N, g*g, C)`."""
        return self.vision_tower.vision_model(pixels, infer)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts every operator; see `mindformers_ixc.models.layers`."""
        self.vision_tower.vision_model.shard(dp, tp)


class ExactGELU(nn.Cell):
    """`x / 2 * (1 + erf(x / sqrt 2))`; MindSpore's own cell gives the parallel compiler no handle on its operators."""

    def __init__(self):
        super().__init__()
        self.mul_scale, self.erf, self.add_one, self.mul_x, self.mul_half = P.Mul(), P.Erf(), P.Add(), P.Mul(), P.Mul()

    def construct(self, x):
        """Maps `(N, C)` to `(N, C)`."""
        return self.mul_half(self.mul_x(x, self.add_one(self.erf(self.mul_scale(x, 0.5 ** 0.5)), 1.0)), 0.5)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions and width."""
        self.erf.shard(((dp, tp),))
        self.mul_x.shard(((dp, tp), (dp, tp)))
        for primitive in (self.mul_scale, self.add_one, self.mul_half):
            primitive.shard(((dp, tp), ()))


class VisionProjector(nn.SequentialCell):
    """Linear - GELU (exact) - Linear from 4C to D; its parameters are named `0` and `2` as in the public checkpoint.

    Args:
        config: the whole model's configuration.
    """

    def __init__(self, config: IXC25Config):
        options = {"has_bias": True, "sigma": config.initializer_range, "param_dtype": config.param_init_type,
                   "compute_dtype": config.compute_dtype}
        super().__init__(
            Linear(4 * config.vision_config.hidden_size, config.hidden_size, cut=CUTS["vision_proj.0"], **options),
            ExactGELU(), Linear(config.hidden_size, config.hidden_size, cut=CUTS["vision_proj.2"], **options))

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions and the inner width."""
        first, gelu, second = self.cell_list
        first.shard(dp, tp)
        gelu.shard(dp, tp if first.cut == ROWS else 1)
        second.shard(dp, tp)


class VisionMerge(nn.Cell):
    """Patch features to the rows of the vision table, before the projector.

    A tile's patches are merged 2 x 2 (row, then column, channels last); the two separators, which live in the
    pre-projector space, end the table.

    Args:
        config: the whole model's configuration.
    """

    def __init__(self, config: IXC25Config):
        super().__init__()
        self.side, self.width = config.vision_config.tokens_per_side, config.vision_config.hidden_size
        self.dtype = config.compute_dtype
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.to_merged = P.Transpose()
        self.tile_separator = P.Tile()
        self.concat = P.Concat(1)

    def construct(self, features, sub_gn, glb_gn, batch):
        """Merges patches 2 x 2 and puts the separators behind the tiles of each sample.

        Args:
            features: `(B*T, g*g, C)` of all tiles.
            sub_gn: `(1, 1, 1, 4C)`, ends a row of tokens.
            glb_gn: `(1, 1, 4C)`, stands between global and local view.
            batch: B, a compile-time constant.

        Returns:
            Tensor `(B, T*k*k + 2, 4C)`; the last two rows are sub_GN and glb_GN.
        """
        side, merged = self.side, 4 * self.width
        x = self.reshape(features, (-1, side, 2, side, 2, self.width))                # (B*T, k, 2, k, 2, C)
        x = self.reshape(self.to_merged(x, (0, 1, 3, 2, 4, 5)), (batch, -1, merged))  # (B, T*k*k, 4C)
        sub = self.tile_separator(self.reshape(self.cast(sub_gn, self.dtype), (1, 1, merged)), (batch, 1, 1))
        glb = self.tile_separator(self.reshape(self.cast(glb_gn, self.dtype), (1, 1, merged)), (batch, 1, 1))
        return self.concat((x, sub, glb))                                             # (B, T*k*k + 2, 4C)

    def shard(self, dp: int) -> None:
        """Cuts samples and their tiles."""
        rows = (dp, 1, 1)
        self.to_merged.shard(((dp, 1, 1, 1, 1, 1),))
        self.tile_separator.shard(((1, 1, 1),))
        self.concat.shard((rows, rows, rows))
