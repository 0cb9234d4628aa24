"""Linears and embeddings whose weights stay as a file holds them: numbers of 4 and 8 bits with scales, and 16 bits.

For inference on the CPU. A weight's arrays are mapped parts of a file (`generation.stored_weights` puts them there),
and are widened while they are multiplied, by the kernels of `native/quantised.c`. Without those a weight is widened as
a whole by MindSpore's operations, every time it is used. `hold` turns cells of `layers` into these in place, so that
whatever refers to a cell still does. `checkpoint.packing` says what the arrays of a weight are; the letters are its.
"""
from __future__ import annotations

from collections.abc import Mapping

import mindspore.common.dtype as mstype
from mindspore import Parameter, nn
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P

from mindformers_ixc.models.internlm2 import TokenEmbedding
from mindformers_ixc.models.layers import Linear, PartialLoRALinear
from mindformers_ixc.native import kernels
from mindformers_ixc.parameters import INT4_GROUP


def _parameter(shape: tuple[int, ...], dtype: mstype.Type, name: str) -> Parameter:
    """A parameter without memory of its own: a file gives it."""
    return Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)


class Int4Weight(nn.Cell):
    """A weight `(O, F)` of four bits with a scale and a zero for every group of 128 along the input."""

    def __init__(self, outputs: int, width: int):
        super().__init__()
        self.outputs, self.width, self.groups = outputs, width, width // INT4_GROUP
        self.qweight = _parameter((outputs, width // 2), mstype.uint8, "qweight")
        self.scales = _parameter((outputs, self.groups), mstype.float16, "scales")
        self.qzeros = _parameter((outputs, self.groups), mstype.uint8, "qzeros")
        self.cast, self.reshape, self.matmul = P.Cast(), P.Reshape(), P.MatMul(transpose_b=True)
        self.mul, self.sub, self.floor = P.Mul(), P.Sub(), P.Floor()
        self.pair, self.transpose = P.Stack(2), P.Transpose()
        self.is_native = kernels.available()
        if self.is_native:
            self.native = kernels.kernel("linear_int4", lambda x, weight, *_: (x[0], weight[0]))

    def construct(self, x):
        """Maps float32 `(N, F)` to `(N, O)`."""
        if self.is_native:
            return self.native(x, self.qweight, self.scales, self.qzeros)
        return self.matmul(x, self.widened())

    def widened(self):
        """The weight in float32, `(O, F)`."""
        outputs, width, groups = self.outputs, self.width, self.groups
        both = self.cast(self.qweight, mstype.float32)                                # (O, F/2)
        high = self.floor(self.mul(both, 1 / 16))
        fours = self.pair((self.sub(both, self.mul(high, 16.0)), high))               # (O, F/2, 2)
        # the four numbers of a word are 16 weights apart
        fours = self.transpose(self.reshape(fours, (outputs * width // 64, 16, 4)), (0, 2, 1))
        numbers = self.reshape(fours, (outputs, groups, INT4_GROUP))                  # (O, G, 128)
        zeros = self.reshape(self.cast(self.qzeros, mstype.float32), (outputs, groups, 1))
        scales = self.reshape(self.cast(self.scales, mstype.float32), (outputs, groups, 1))
        return self.reshape(self.mul(self.sub(numbers, zeros), scales), (outputs, width))


class Int8Weight(nn.Cell):
    """A weight `(O, F)` of eight bits with a scale for every output."""

    def __init__(self, outputs: int, width: int):
        super().__init__()
        self.outputs, self.width = outputs, width
        self.qweight = _parameter((outputs, width), mstype.int8, "qweight")
        self.scales = _parameter((outputs,), mstype.float32, "scales")
        self.cast, self.reshape, self.matmul = P.Cast(), P.Reshape(), P.MatMul(transpose_b=True)
        self.mul, self.gather = P.Mul(), P.Gather()
        self.is_native = kernels.available()
        if self.is_native:
            self.native = kernels.kernel("linear_int8", lambda x, weight, _: (x[0], weight[0]))
            self.rows = kernels.kernel("embedding_int8", lambda ids, weight, _: (*ids, weight[1]))

    def construct(self, x):
        """Maps float32 `(N, F)` to `(N, O)`."""
        if self.is_native:
            return self.native(x, self.qweight, self.scales)
        y = self.matmul(x, self.cast(self.qweight, mstype.float32))
        return self.mul(y, self.reshape(self.scales, (1, self.outputs)))

    def lookup(self, ids):
        """Rows of the weight: int32 `(B, L)` to `(B, L, F)`."""
        if self.is_native:
            return self.rows(ids, self.qweight, self.scales)
        x = self.gather(self.cast(self.qweight, mstype.float32), ids, 0)
        return self.mul(x, self.reshape(self.gather(self.scales, ids, 0), (ids.shape[0], ids.shape[1], 1)))


class HalfWeight(nn.Cell):
    """A weight `(O, F)` of sixteen bits, which widening to float32 leaves as it is.

    Args:
        kind: `bf16` or `f16`.
        outputs: O.
        width: F.
    """

    def __init__(self, kind: str, outputs: int, width: int):
        super().__init__()
        self.weight = _parameter((outputs, width), mstype.bfloat16 if kind == "bf16" else mstype.float16, "weight")
        self.cast, self.matmul, self.gather = P.Cast(), P.MatMul(transpose_b=True), P.Gather()
        self.is_native = kernels.available()
        if self.is_native:
            self.native = kernels.kernel(f"linear_{kind}", lambda x, weight: (x[0], weight[0]))
            self.rows = kernels.kernel(f"embedding_{kind}", lambda ids, weight: (*ids, weight[1]))

    def construct(self, x):
        """Maps float32 `(N, F)` to `(N, O)`."""
        if self.is_native:
            return self.native(x, self.weight)
        return self.matmul(x, self.cast(self.weight, mstype.float32))

    def lookup(self, ids):
        """Rows of the weight: int32 `(B, L)` to `(B, L, F)`."""
        if self.is_native:
            return self.rows(ids, self.weight)
        return self.gather(self.cast(self.weight, mstype.float32), ids, 0)


def _held(kind: str, outputs: int, width: int) -> nn.Cell:
    if kind in ("bf16", "f16"):
        return HalfWeight(kind, outputs, width)
    return Int4Weight(outputs, width) if kind == "int4" else Int8Weight(outputs, width)


class StoredLinear(Linear):
    """A `Linear` whose weight is as stored."""

    def product(self, x):
        """The same without the bias."""
        return self.held(self.cast(x, self.dtype))

    def infer(self, x):
        """The same: there are no gradients anyway."""
        return self.construct(x)


class StoredPartialLoRALinear(PartialLoRALinear):
    """A `PartialLoRALinear` whose weight is as stored; its pairs are cells of their own."""

    def product(self, x):
        """The product with the weight alone."""
        return self.held(x)

    def infer(self, x, image_mask, adapters):
        """The same: there are no gradients anyway."""
        return self.construct(x, image_mask, adapters)


class StoredEmbedding(TokenEmbedding):
    """A `TokenEmbedding` whose table is as stored."""

    def construct(self, ids):
        """Maps int32 `(B, L)` to `(B, L, D)` in float32."""
        return self.held.lookup(ids)

    def lookup(self, ids):
        """The same."""
        return self.held.lookup(ids)


_STORED = {Linear: StoredLinear, PartialLoRALinear: StoredPartialLoRALinear, TokenEmbedding: StoredEmbedding}


def holdable(model: nn.Cell) -> set[str]:
    """Names of the weights, without `.weight`, that a model can hold as a file does."""
    return {cell.weight.name[:-len(".weight")] for _, cell in model.cells_and_names() if type(cell) in _STORED}


def hold(model: nn.Cell, kinds: Mapping[str, str]) -> None:
    """Turns cells into ones whose weights are as stored; their parameters wait for the arrays of a file.

    Args:
        model: the model, in float32; it cannot be trained any more.
        kinds: of each weight, by its name without `.weight`: `int4`, `int8`, `bf16` or `f16`.
    """
    for _, cell in list(model.cells_and_names()):
        if type(cell) not in _STORED:
            continue
        name = cell.weight.name[:-len(".weight")]
        if name not in kinds:
            continue
        outputs, width = cell.weight.shape
        del cell.weight
        cell.held = _held(kinds[name], outputs, width)
        cell.trains_natively = False                  # those kernels take a weight of float32
        for part, parameter in cell.held.parameters_and_names():
            parameter.name = f"{name}.{part.rpartition('.')[2]}"      # as in the file
        cell.__class__ = _STORED[type(cell)]
