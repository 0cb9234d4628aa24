"""Leaf cells of IXC2.5: linear, normalisation, dropout, Partial LoRA.

This, `attention` and `cache` are the places that know about devices; the cells above them never choose. MindSpore has
no CPU kernel for the fused RMSNorm, for FlashAttention or for bfloat16 products, so these cells are composed of
primitive operations. On Ascend RMSNorm is the fused one. On the CPU, inference (the methods called `infer`) goes
through this package's own fused kernels where they are installed (`mindformers_ixc.native`), and training
(`construct`) through those with gradients (`native.training`); what both are composed of otherwise is in `composed`.
Every linear works on flattened positions `(N, F)`, because the CPU refuses a batched product with a broadcast
2-D right operand and because a 2-D product is what the parallel compiler cuts most simply.

Every cell has a method `shard(dp, tp)`: it tells MindSpore's parallel compiler how its operators are cut over `dp`
data-parallel and `tp` tensor-parallel devices. Positions are always cut by `dp`; what `tp` cuts is in `parallel.cuts`.
With sequence parallel (MindFormers' `use_seq_parallel`) whatever lies between the linears is cut by `dp * tp` along the
positions, so a linear cut by columns scatters its sums instead of keeping them whole on every device.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P

from mindformers_ixc.device import on_ascend
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.dropout import SeededDropout
from mindformers_ixc.models.magnitudes import RowFactors
from mindformers_ixc.native import kernels, training
from mindformers_ixc.parallel.cuts import COLUMNS, ROWS, product_strategy


class Linear(nn.Cell):
    """`y = x W^T (+ b)` on flattened positions.

    Args:
        in_features: width F of the input.
        out_features: width O of the output.
        has_bias: whether there is a bias.
        sigma: standard deviation of freshly drawn weights; 0 starts at zero.
        param_dtype: dtype the parameters are kept in.
        compute_dtype: dtype of the product and of the output.
        cut: axis of the weight that tensor parallel cuts (`parallel.cuts`), `None` if it is whole everywhere.
    """

    def __init__(self, in_features: int, out_features: int, has_bias: bool = False, sigma: float = 0.02,
                 param_dtype: mstype.Type = mstype.float32, compute_dtype: mstype.Type = mstype.float32,
                 cut: int | None = None):
        super().__init__()
        self.cut = cut
        start = Normal(sigma) if sigma else "zeros"
        self.weight = Parameter(initializer(start, (out_features, in_features), param_dtype), name="weight")
        self.has_bias = has_bias
        if has_bias:
            self.bias = Parameter(initializer("zeros", (out_features,), param_dtype), name="bias")
            self.bias_add = P.BiasAdd()
        self.matmul = P.MatMul(transpose_b=True)
        self.cast = P.Cast()
        self.dtype = compute_dtype
        self.is_native = kernels.available(param_dtype, compute_dtype)
        if self.is_native:
            self.native = kernels.kernel("linear", lambda x, weight: (x[0], weight[0]))
        self.trains_natively = training.available(param_dtype, compute_dtype)
        if self.trains_natively:
            self.train_linear = training.linear(has_bias)
            self.many = kernels.kernel("linear_many", lambda x, weight: (x[0], weight[0]))

    def construct(self, x):
        """Maps `(N, F)` to `(N, O)` in the compute dtype."""
        if not self.trains_natively:
            return self.composed(x)
        x = self.cast(x, self.dtype)
        return self.train_linear(x, self.weight, self.bias) if self.has_bias else self.train_linear(x, self.weight)

    def composed(self, x):
        """The same in MindSpore's operations."""
        y = self.product(x)
        if self.has_bias:
            y = self.bias_add(y, self.cast(self.bias, self.dtype))
        return y

    def infer(self, x):
        """The same without gradients (and, for few positions on the CPU, faster)."""
        if self.is_native and not self.has_bias and x.shape[0] <= kernels.FEW_ROWS:
            return self.native(x, self.weight)
        y = self.infer_product(x)
        return self.bias_add(y, self.cast(self.bias, self.dtype)) if self.has_bias else y

    def infer_product(self, x):
        """The same without the bias and without gradients."""
        return self.many(x, self.weight) if self.trains_natively else self.product(x)

    def product(self, x):
        """The same without the bias."""
        return self.matmul(self.cast(x, self.dtype), self.cast(self.weight, self.dtype))

    def shard(self, dp: int, tp: int, scatter: bool = False) -> None:
        """Cuts by rows, by columns or not at all; see the module.

        `scatter` leaves each device its share of the positions, summed, of a product cut by columns.
        """
        self.matmul.shard(product_strategy(self.cut, dp, tp), ((dp * tp, 1),) if scatter else None)
        if self.has_bias:
            features = tp if self.cut == ROWS else 1
            self.bias_add.shard(((dp, features), (features,)))


class RMSNorm(nn.Cell):
    """Root-mean-square normalisation of the last axis, as InternLM2 uses it (no mean, no bias).

    Args:
        size: width of the last axis.
        eps: added to the mean square (public field `rms_norm_eps`).
        param_dtype: dtype of the weight.
        norm_dtype: dtype of the computation; the output keeps the input's dtype.
        fused: take Ascend's fused operator, where there is one.
    """

    def __init__(self, size: int, eps: float, param_dtype: mstype.Type = mstype.float32,
                 norm_dtype: mstype.Type = mstype.float32, fused: bool = True):
        super().__init__()
        self.weight = Parameter(initializer("ones", (size,), param_dtype), name="weight")
        self.eps = eps
        self.dtype = norm_dtype
        self.cast = P.Cast()
        self.square = P.Square()
        self.mean = P.ReduceMean(keep_dims=True)
        self.add = P.Add()
        self.rsqrt = P.Rsqrt()
        self.mul = P.Mul()
        self.mul_weight = P.Mul()
        self.is_fused = fused and on_ascend()
        self.rms_norm = P.RmsNorm(eps)
        self.is_native = kernels.available(param_dtype, norm_dtype)
        if self.is_native:
            self.native, self.eps_value = kernels.kernel("rms_norm"), Tensor([eps], mstype.float32)
        self.trains_natively = training.available(param_dtype, norm_dtype)
        if self.trains_natively:
            self.train_norm = training.rms_norm()

    def construct(self, x):
        """Normalises the last axis of `(N, F)`."""
        if self.trains_natively and x.dtype == mstype.float32:
            return self.train_norm(x, self.weight, self.eps_value)[0]
        y = self.cast(x, self.dtype)
        if self.is_fused:
            return self.cast(self.rms_norm(y, self.cast(self.weight, self.dtype))[0], x.dtype)
        y = self.mul(y, self.rsqrt(self.add(self.mean(self.square(y), -1), self.eps)))
        return self.mul_weight(self.cast(y, x.dtype), self.cast(self.weight, x.dtype))

    def infer(self, x):
        """The same without gradients."""
        if self.is_native and x.dtype == mstype.float32:
            return self.native(x, self.weight, self.eps_value)
        return self.construct(x)

    def shard(self, dp: int) -> None:
        """Cuts positions; the width is whole on every device."""
        rows = (dp, 1)
        for primitive in (self.square, self.mean, self.rsqrt):
            primitive.shard((rows,))
        self.add.shard((rows, ()))
        self.mul.shard((rows, rows))
        self.mul_weight.shard((rows, (1,)))
        if self.is_fused:
            self.rms_norm.shard((rows, (1,)))


class LayerNorm(nn.Cell):
    """Layer normalisation whose parameters carry the public names `weight` and `bias`.

    Args:
        size: width of the last axis.
        eps: added to the variance (CLIP's 1e-5).
        param_dtype: dtype of the parameters.
        norm_dtype: dtype of the computation; the output keeps the input's dtype.
    """

    def __init__(self, size: int, eps: float, param_dtype: mstype.Type = mstype.float32,
                 norm_dtype: mstype.Type = mstype.float32):
        super().__init__()
        self.weight = Parameter(initializer("ones", (size,), param_dtype), name="weight")
        self.bias = Parameter(initializer("zeros", (size,), param_dtype), name="bias")
        self.layer_norm = P.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.cast = P.Cast()
        self.dtype = norm_dtype
        self.is_native = kernels.available(param_dtype, norm_dtype)
        if self.is_native:
            self.native, self.eps_value = kernels.kernel("layer_norm"), Tensor([eps], mstype.float32)
        self.trains_natively = training.available(param_dtype, norm_dtype)
        if self.trains_natively:
            self.train_norm = training.layer_norm()

    def construct(self, x):
        """Normalises the last axis of `x`."""
        if self.trains_natively and x.dtype == mstype.float32 and len(x.shape) == 2:
            return self.train_norm(x, self.weight, self.bias, self.eps_value)[0]
        y, _, _ = self.layer_norm(self.cast(x, self.dtype), self.cast(self.weight, self.dtype),
                                  self.cast(self.bias, self.dtype))
        return self.cast(y, x.dtype)

    def infer(self, x):
        """The same without gradients."""
        if self.is_native and x.dtype == mstype.float32:
            return self.native(x, self.weight, self.bias, self.eps_value)
        return self.construct(x)

    def shard(self, dp: int) -> None:
        """Cuts positions; the width is whole on every device."""
        self.layer_norm.shard(((dp, 1), (1,), (1,)))


class PartialLoRALinear(nn.Cell):
    """A bias-free linear with Partial LoRA on image positions and task LoRAs on all positions.

    `y = W x + B(m * s * A(dropout(x))) + sum over the task LoRAs in use of B_t(A_t(x))`, where m is 1 on image
    positions and 0 elsewhere and s = plora_alpha / plora_rank. The mask is multiplied in: no boolean indexing, so the
    shapes stay static.

    Args:
        in_features: width F of the input.
        out_features: width O of the output.
        config: ranks, scale, dropout and dtypes.
        cut: axis of the weight that tensor parallel cuts; the pairs are cut with it.
        salt: sets the dropout noise apart from that of the layer's other linears.
    """

    def __init__(self, in_features: int, out_features: int, config: IXC25Config, cut: int, salt: int = 0):
        super().__init__()
        self.cut, self.salt = cut, salt
        self.in_features, self.out_features = in_features, out_features
        self.dtypes = {"param_dtype": config.param_init_type, "compute_dtype": config.compute_dtype}
        self.sigma = config.initializer_range
        self.weight = Parameter(initializer(Normal(self.sigma), (out_features, in_features), config.param_init_type),
                                name="weight")
        self.has_plora = self.has_lora = self.has_dora = False
        if config.plora_rank:
            self.add_partial_lora(config.plora_rank, config.plora_scale, config.plora_dropout)
        for task, rank in config.task_lora_ranks.items():
            self.add_task_lora(task, rank)
        self.dtype = config.compute_dtype
        self.cast = P.Cast()
        self.matmul = P.MatMul(transpose_b=True)
        self.mul_mask = P.Mul()
        self.mul_scale = P.Mul()
        self.add = P.Add()
        self.is_native = kernels.available(*self.dtypes.values())
        if self.is_native:
            self.native = kernels.kernel("linear", lambda x, weight: (x[0], weight[0]))
        self.trains_natively = training.available(*self.dtypes.values())
        if self.trains_natively:
            self.train_linear, self.train_pair = training.linear(False), training.partial_lora(False)
            self.train_dropped = training.partial_lora(True)
            self.many = kernels.kernel("linear_many", lambda x, weight: (x[0], weight[0]))
            self.many_pair = kernels.kernel("linear_many_pair", lambda x, weight, *_: (x[0], weight[0]))

    def _pair(self, rank: int) -> tuple[Linear, Linear]:
        """The two sides of a low-rank pair that starts without effect, cut as the linear is."""
        first = Linear(self.in_features, rank, sigma=self.sigma, cut=COLUMNS if self.cut == COLUMNS else None,
                       **self.dtypes)
        return first, Linear(rank, self.out_features, sigma=0.0, cut=ROWS if self.cut == ROWS else None, **self.dtypes)

    def add_partial_lora(self, rank: int, scale: float, dropout: float) -> None:
        """Gives the linear its pair for image positions."""
        self.has_plora, self.plora_scale = True, scale
        self.Plora_A, self.Plora_B = self._pair(rank)
        self.plora_dropout = SeededDropout(dropout, self.in_features, self.salt)

    def add_task_lora(self, task: str, rank: int) -> None:
        """Gives the linear the pair of a task."""
        first, second = self._pair(rank)
        setattr(self, f"lora_{task}_A", first)
        setattr(self, f"lora_{task}_B", second)

    def add_lora(self, rank: int, scale: float, dropout: float, has_dora: bool = False) -> None:
        """Gives the linear an ordinary LoRA pair on all positions, as MindFormers' PET type `lora` has it.

        With DoRA also the magnitudes of the weight's rows, which `begin_magnitudes` measures once the weight is there.
        """
        self.has_lora, self.lora_scale, self.has_dora = True, scale, has_dora
        self.mindpet_delta_lora_a, self.mindpet_delta_lora_b = self._pair(rank)
        self.lora_dropout, self.mul_lora_scale = nn.Dropout(p=dropout), P.Mul()
        if has_dora:
            self.mindpet_delta_lora_magnitude = Parameter(
                initializer("ones", (self.out_features,), self.dtypes["param_dtype"]),
                name="mindpet_delta_lora_magnitude")
            self.row_factors = RowFactors(scale)

    def begin_magnitudes(self) -> None:
        """The magnitudes are the norms of the weight's rows: while B is zero the linear is what it was."""
        norms = np.linalg.norm(self.weight.asnumpy().astype(np.float64), axis=1)
        self.mindpet_delta_lora_magnitude.set_data(Tensor(norms, self.mindpet_delta_lora_magnitude.dtype))

    def infer(self, x, image_mask, adapters):
        """The same without gradients (and, for few positions on the CPU, faster)."""
        if self.is_native and image_mask is None and x.shape[0] <= kernels.FEW_ROWS:
            return self._with_adapters(x, self.native(x, self.weight), adapters)
        if not self.trains_natively:
            return self.composed(x, image_mask, adapters, None)
        if image_mask is None or not self.has_plora:
            return self._with_adapters(x, self.many(x, self.weight), adapters)
        y = self.many_pair(x, self.weight, self.Plora_A.weight, self.Plora_B.weight,
                           self.mul_scale(image_mask, self.plora_scale))
        return self._with_adapters(x, y, adapters)

    def product(self, x):
        """The product with the weight alone."""
        return self.matmul(x, self.cast(self.weight, self.dtype))

    def _with_adapters(self, x, y, adapters):
        """Adds what the task LoRAs in use and the ordinary one make of `x` to `y`."""
        for task in adapters:       # unrolled by the compiler
            y = self.add(y, getattr(self, "lora_" + task + "_B")(getattr(self, "lora_" + task + "_A")(x)))
        if self.has_lora:
            dropped = self.lora_dropout(x)
            side = self.mindpet_delta_lora_a(dropped)                                         # (N, r)
            change = self.mindpet_delta_lora_b(self.mul_lora_scale(side, self.lora_scale))
            if self.has_dora:
                factors = self.cast(self.row_factors(self.mindpet_delta_lora_magnitude, self.weight,
                                                     self.mindpet_delta_lora_a.weight,
                                                     self.mindpet_delta_lora_b.weight), y.dtype)
                # y has W x in it, with whatever the other pairs add
                change = change * factors + self.plain(dropped) * (factors - 1.0)
            y = self.add(y, change)
        return y

    def plain(self, x):
        """The product with the weight alone, with gradients."""
        return self.train_linear(x, self.weight) if self.trains_natively else self.product(x)

    def construct(self, x, image_mask, adapters, noise=None):
        """Maps `(N, F)` to `(N, O)`.

        Args:
            x: `(N, F)`.
            image_mask: `(N, 1)` in the compute dtype, 1 on image positions; `None` leaves Partial LoRA out of the
                graph (decoding, where every position is text).
            adapters: names of the task LoRAs in use, a compile-time constant.
            noise: int32 `(N, 1)`, seeds of the dropout; `None` for the device's generator.

        Returns:
            Tensor `(N, O)`.
        """
        drops = self.has_plora and self.plora_dropout.drops()
        if not self.trains_natively or (drops and noise is None):
            return self.composed(x, image_mask, adapters, noise)
        x = self.cast(x, self.dtype)
        if image_mask is None or not self.has_plora:
            return self._with_adapters(x, self.train_linear(x, self.weight), adapters)
        parts = (x, self.weight, self.Plora_A.weight, self.Plora_B.weight, self.mul_scale(image_mask, self.plora_scale))
        y, _ = self.train_dropped(*parts, noise, *self.plora_dropout.numbers) if drops else self.train_pair(*parts)
        return self._with_adapters(x, y, adapters)

    def composed(self, x, image_mask, adapters, noise):
        """The same in MindSpore's operations."""
        x = self.cast(x, self.dtype)
        y = self.product(x)
        if image_mask is not None and self.has_plora:
            # masked and scaled where it is narrowest: B has no bias, so B(m * s * a) = m * s * B(a)
            side = self.Plora_A(self.plora_dropout(x, noise))                                 # (N, r)
            side = self.mul_mask(side, self.mul_scale(image_mask, self.plora_scale))
            y = self.add(y, self.Plora_B(side))
        return self._with_adapters(x, y, adapters)

    def shard(self, dp: int, tp: int, sequence: bool = False) -> None:
        """Cuts the linear along its axis and each pair's outer side with it; sums over devices are `(N, r)`.

        With `sequence` parallel a linear cut by columns leaves every device its share of the positions.
        """
        scatter = sequence and self.cut == COLUMNS
        rows = dp * tp if scatter else dp
        self.matmul.shard(product_strategy(self.cut, dp, tp), ((rows, 1),) if scatter else None)
        if self.has_plora:
            self.plora_dropout.shard(dp, tp if self.cut == COLUMNS else 1)
        if self.has_lora:
            self.lora_dropout.dropout.shard(((dp, tp if self.cut == COLUMNS else 1),))
            self.mul_lora_scale.shard(((rows, 1), ()))
        self.mul_scale.shard(((rows, 1), ()))
        self.mul_mask.shard(((rows, 1), (rows, 1)))
        outputs = (rows, tp if self.cut == ROWS else 1)
        self.add.shard((outputs, outputs))
        for _, cell in self.cells_and_names():
            if not isinstance(cell, Linear):
                continue
            if scatter and cell.cut is None:
                cell.shard(rows, 1)                     # B of a pair, on the positions this device was left
            else:
                cell.shard(dp, tp, scatter)
