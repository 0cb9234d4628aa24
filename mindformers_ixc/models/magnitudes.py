"""DoRA (arXiv 2402.09353): a low-rank pair turns the rows of a weight, and a number of each row scales them.

`W' = m * (W + s B A) / ||W + s B A||`, with the norm of each row. As in the paper (section 4.3) and in PEFT no gradient
goes through the norm, and dropout acts on the input of `W` too where it acts on the pair's.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.parameters import LEAST_NORM


class RowFactors(nn.Cell):
    """`m / ||W + s B A||` of each row; for one device.

    Args:
        scale: s.
    """

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.matmul, self.cast, self.reshape = P.MatMul(), P.Cast(), P.Reshape()
        self.square, self.sum, self.sqrt, self.at_least = P.Square(), P.ReduceSum(), P.Sqrt(), P.Maximum()

    def construct(self, magnitude, weight, first, second):
        """float32 `(1, O)` of m `(O,)`, W `(O, F)`, A `(r, F)` and B `(O, r)`, computed in float32."""
        delta = self.matmul(self.cast(second, mstype.float32), self.cast(first, mstype.float32))
        turned = self.cast(weight, mstype.float32) + delta * self.scale                # (O, F)
        norm = self.at_least(self.sqrt(self.sum(self.square(turned), 1)), LEAST_NORM)
        return self.reshape(self.cast(magnitude, mstype.float32) / F.stop_gradient(norm), (1, -1))
