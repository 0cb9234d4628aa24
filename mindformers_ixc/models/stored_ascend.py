"""Linears whose weights stay whole numbers on Ascend, where one operator widens them while it multiplies.

`hold_on_ascend` turns cells of `layers` into these in place. `checkpoint.ascend_packing` says what the arrays of a
weight are. What the operator does not take has full weights: the embedding, which is looked up, and linears of more
than 65535 inputs or outputs (the head of a large vocabulary).
"""
from __future__ import annotations

from collections.abc import Mapping

import mindspore.common.dtype as mstype
from mindspore import Parameter, nn
from mindspore.common.initializer import initializer
from mindspore.ops.auto_generate import WeightQuantBatchMatmul

from mindformers_ixc.models.layers import Linear, PartialLoRALinear
from mindformers_ixc.models.stored import StoredLinear, StoredPartialLoRALinear
from mindformers_ixc.parameters import INT4_GROUP

# Inputs and outputs of a weight at most (documentation of aclnnWeightQuantBatchMatmulV2).
MOST_SIDE = 65535


def _parameter(shape: tuple[int, ...], dtype: mstype.Type, name: str) -> Parameter:
    """A parameter that waits for the arrays of a file."""
    return Parameter(initializer("zeros", shape, dtype), name=name, requires_grad=False)


class AscendInt4Weight(nn.Cell):
    """A weight `(O, F)` of four bits with a scale and an offset for every group of 128 along the input.

    Args:
        outputs: O, even.
        width: F.
        dtype: of what it is multiplied with, float16 or bfloat16.
    """

    def __init__(self, outputs: int, width: int, dtype: mstype.Type):
        super().__init__()
        groups = width // INT4_GROUP
        self.qweight = _parameter((width, outputs // 2), mstype.qint4x2, "qweight")      # two numbers a byte
        self.scales = _parameter((groups, outputs), dtype, "scales")
        self.offsets = _parameter((groups, outputs), dtype, "offsets")
        # a group must be smaller than the inputs; a single one is all of them, as where an output has one scale
        self.matmul = WeightQuantBatchMatmul(False, False, INT4_GROUP if groups > 1 else 0)

    def construct(self, x):
        """Maps `(N, F)` to `(N, O)`."""
        return self.matmul(x, self.qweight, self.scales, self.offsets, None, None, None)


class AscendInt8Weight(nn.Cell):
    """A weight `(O, F)` of eight bits with a scale for every output.

    Args:
        outputs: O.
        width: F.
        dtype: of what it is multiplied with, float16 or bfloat16.
    """

    def __init__(self, outputs: int, width: int, dtype: mstype.Type):
        super().__init__()
        self.qweight = _parameter((outputs, width), mstype.int8, "qweight")
        self.scales = _parameter((outputs,), dtype, "scales")
        self.matmul = WeightQuantBatchMatmul(False, True, 0)

    def construct(self, x):
        """Maps `(N, F)` to `(N, O)`."""
        return self.matmul(x, self.qweight, self.scales, None, None, None, None)


_HELD = {"int4": AscendInt4Weight, "int8": AscendInt8Weight}
_STORED = {Linear: StoredLinear, PartialLoRALinear: StoredPartialLoRALinear}


def hold_on_ascend(model: nn.Cell, kinds: Mapping[str, str], dtype: mstype.Type) -> dict[str, nn.Cell]:
    """Turns linears into ones whose weights are whole numbers; their parameters wait for the arrays of a file.

    Args:
        model: the model; it cannot be trained any more.
        kinds: of each weight that a file has so, by its name without `.weight`: `int4` or `int8`.
        dtype: of what is multiplied, float16 or bfloat16.

    Returns:
        What holds each weight, by its name; weights that the operator does not take are not among them, and stay.
    """
    found: dict[str, nn.Cell] = {}
    for _, cell in list(model.cells_and_names()):
        if type(cell) not in _STORED:
            continue
        name, (outputs, width) = cell.weight.name[:-len(".weight")], cell.weight.shape
        if name not in kinds or max(outputs, width) > MOST_SIDE or (kinds[name] == "int4" and outputs % 2):
            continue
        del cell.weight
        cell.held = found[name] = _HELD[kinds[name]](outputs, width, dtype)
        for part, parameter in cell.held.parameters_and_names():
            parameter.name = f"{name}.{part.rpartition('.')[2]}"
        cell.__class__ = _STORED[type(cell)]
    return found
