"""Kernels for training on the CPU, with their gradients, as operations of MindSpore's graphs.

Their products are those of the oneDNN that MindSpore brings; where it brings none (or no compiler is there, or the
graph is for Ascend or cut by the parallel compiler), cells are composed of MindSpore's own operations. Each function
here makes an operation, for the cell that uses it; one with other gradients has a name of its own, because MindSpore
keeps one gradient for each name. Gradients are operations of their own wherever MindSpore may leave one out, because
nothing trains that needs it.
"""
from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
from mindspore import ops
from mindspore.ops import functional as F

from mindformers_ixc.native import kernels, library
from mindformers_ixc.native.check import call

logger = logging.getLogger(__name__)


def available(*dtypes: mstype.Type) -> bool:
    """Whether the kernels can take the place of MindSpore's for training in `dtypes` on the current device."""
    return kernels.available(*dtypes) and has_product()


@functools.cache
def has_product() -> bool:
    """Whether MindSpore's oneDNN is found and multiplies as it should; the library is told where its product is."""
    path = library()
    found = sorted((Path(ms.__file__).parent / "lib").glob("libdnnl.so*"))
    if path is None or not found:
        return False
    try:
        functions, product = ctypes.CDLL(path), ctypes.CDLL(str(found[0])).dnnl_sgemm
    except (OSError, AttributeError):
        logger.info(f"{found[0]} has no product that training could take; MindSpore's own operations are used.")
        return False
    functions.use_product(ctypes.cast(product, ctypes.c_void_p))
    x = np.sin(np.arange(33 * 20, dtype=np.float32)).reshape(33, 20)
    weight, result = np.cos(np.arange(17 * 20, dtype=np.float32)).reshape(17, 20), np.zeros((33, 17), np.float32)
    failed = call(functions.train_linear, (x, weight, result))
    return not failed and np.allclose(result, x @ weight.T, rtol=1e-4, atol=1e-4)


def linear(has_bias: bool) -> ops.Custom:
    """`x W^T (+ b)` of x `(N, F)`, W `(O, F)` and b `(O,)`."""
    to_input = kernels.kernel("times_weight", lambda dy, weight: (dy[0], weight[1]))
    to_weight = kernels.kernel("weight_gradient", lambda dy, x: (dy[1], x[1]))
    to_bias = kernels.kernel("bias_gradient", lambda dy: (dy[1],))

    def plain(x, weight, out, dout):
        return to_input(dout, weight), to_weight(dout, x)

    def biased(x, weight, bias, out, dout):
        return to_input(dout, weight), to_weight(dout, x), to_bias(dout)

    name, bprop = ("train_linear_bias", biased) if has_bias else ("train_linear", plain)
    return kernels.kernel(name, lambda x, weight, *_: (x[0], weight[0]), bprop=bprop)


def partial_lora(drops: bool) -> ops.Custom:
    """`x W^T + (f * dropout(x) A^T) B^T` and what stands before B, `(N, r)`.

    The inputs are x, W, A, B and f `(N, 1)`; with dropout also what `SeededDropout.numbers` are, behind the noise.
    """
    to_input = kernels.kernel("partial_lora_back",
                              lambda dy, weight, first, *_: ((dy[0], weight[1]), (dy[0], first[0])), outputs=2)
    to_weight = kernels.kernel("weight_gradient", lambda dy, x: (dy[1], x[1]))
    to_pair = kernels.kernel("pair_gradient", lambda u, v, *_: (u[1], v[1]))

    def plain(x, weight, first, second, factor, out, dout):
        dx, side = to_input(dout[0], weight, first, second, factor)
        return (dx, to_weight(dout[0], x), to_pair(side, x, factor), to_pair(dout[0], out[1], factor),
                F.zeros_like(factor))

    def dropped(x, weight, first, second, factor, noise, columns, numbers, kept, out, dout):
        dx, side = to_input(dout[0], weight, first, second, factor, noise, columns, numbers, kept)
        return (dx, to_weight(dout[0], x), to_pair(side, x, factor, noise, columns, numbers, kept),
                to_pair(dout[0], out[1], factor), F.zeros_like(factor), F.zeros_like(noise), F.zeros_like(columns),
                F.zeros_like(numbers), F.zeros_like(kept))

    name, bprop = ("partial_lora_dropped", dropped) if drops else ("partial_lora", plain)
    return kernels.kernel(name, lambda x, weight, first, *_: ((x[0], weight[0]), (x[0], first[0])), 2, bprop)


def rms_norm() -> ops.Custom:
    """RMSNorm of x `(N, F)` with weight `(F,)` and eps `(1,)`, and the factor of each position."""
    back = kernels.kernel("train_rms_norm_back", lambda x, weight, *_: (x, weight), outputs=2)

    def bprop(x, weight, eps, out, dout):
        dx, d_weight = back(x, weight, out[1], dout[0])
        return dx, d_weight, F.zeros_like(eps)

    return kernels.kernel("train_rms_norm", lambda x, *_: (x, (x[0],)), 2, bprop)


def layer_norm() -> ops.Custom:
    """LayerNorm of x `(N, F)` with weight and bias `(F,)` and eps `(1,)`; mean and factor of each position."""
    back = kernels.kernel("train_layer_norm_back", lambda x, weight, *_: (x, weight, weight), outputs=3)

    def bprop(x, weight, bias, eps, out, dout):
        dx, d_weight, d_bias = back(x, weight, out[1], out[2], dout[0])
        return dx, d_weight, d_bias, F.zeros_like(eps)

    return kernels.kernel("train_layer_norm", lambda x, *_: (x, (x[0],), (x[0],)), 3, bprop)


def swiglu() -> ops.Custom:
    """`silu(gate) * x` of two `(N, F)`."""
    back = kernels.kernel("train_swiglu_back", lambda gate, x, _: (gate, x), outputs=2)

    def bprop(gate, x, out, dout):
        d_gate, dx = back(gate, x, dout)
        return d_gate, dx

    return kernels.kernel("train_swiglu", lambda gate, _: gate, bprop=bprop)


def quick_gelu() -> ops.Custom:
    """`x * sigmoid(1.702 x)` of `(N, F)`."""
    back = kernels.kernel("train_quick_gelu_back", lambda x, _: x)

    def bprop(x, out, dout):
        return (back(x, dout),)

    return kernels.kernel("train_quick_gelu", lambda x: x, bprop=bprop)


def tile_attention(heads: int, length: int) -> ops.Custom:
    """Attention of all positions of a tile to all: q, k and v `(N*L, H*d)` to y, and what its gradient needs."""
    back = kernels.kernel("tile_attention_back", lambda q, *_: (q, q, q), outputs=3)

    def bprop(query, key, value, out, dout):
        dq, dk, dv = back(query, key, value, out[0], out[1], dout[0])
        return dq, dk, dv

    return kernels.kernel("tile_attention", lambda q, *_: (q, (q[0] // length, heads, length)), 2, bprop)


def causal_attention(heads: int, groups: int) -> ops.Custom:
    """Rotary embedding and causal attention within segments, of `heads` key/value heads with `groups` queries each.

    The inputs are the product of `wqkv` `(B*L, KV * (G+2) * d)`, cosines and sines `(B or 1, L, 1, 1, d)`, and where
    segments end, int32 `(B or 1, S)`; the outputs y `(B*L, KV * G * d)` and what its gradient needs.
    """
    back = kernels.kernel("causal_attention_back", lambda qkv, *_: qkv)

    def bprop(qkv, cos, sin, ends, out, dout):
        return (back(qkv, cos, sin, ends, out[0], out[1], dout[0]), F.zeros_like(cos), F.zeros_like(sin),
                F.zeros_like(ends))

    def shapes(qkv, cos, *_):
        length, size = cos[1], cos[4]
        return (qkv[0], heads * groups * size), (qkv[0] // length, heads, groups, length)

    return kernels.kernel("causal_attention", shapes, 2, bprop)


def head_losses(trains: bool) -> ops.Custom:
    """Cross entropy of x `(N, D)`, the head's weight `(V, D)` and int32 labels `(N,)`, and what its gradient needs.

    Args:
        trains: whether the weight gets a gradient.
    """
    to_both = kernels.kernel("head_losses_back", lambda x, weight, *_: (x, weight), outputs=2)
    to_states = kernels.kernel("head_losses_frozen_back", lambda x, *_: x)

    def both(x, weight, labels, out, dout):
        dx, d_weight = to_both(x, weight, labels, out[1], dout[0])
        return dx, d_weight, F.zeros_like(labels)

    def states(x, weight, labels, out, dout):
        return to_states(x, weight, labels, out[1], dout[0]), F.zeros_like(weight), F.zeros_like(labels)

    name, bprop = ("head_losses", both) if trains else ("head_losses_frozen", states)
    return kernels.kernel(name, lambda x, *_: ((x[0],), (x[0],)), 2, bprop)


def gradient_norm() -> ops.Custom:
    """The norm of any number of gradients, `(1,)`, and 1 `(1,)` if all of them are finite, else 0."""
    return kernels.kernel("gradient_norm", lambda *_: ((1,), (1,)), outputs=2)


def adamw() -> ops.Custom:
    """Weight and both moments after a step of AdamW.

    The inputs are those three before it, the gradient, its factor `(1,)`, rate and decay of one number, the step's
    number int32 `(1,)`, and both betas and eps `(3,)`.
    """
    return kernels.kernel("adamw", lambda weight, *_: (weight, weight, weight), outputs=3)
