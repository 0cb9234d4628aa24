"""Dropout whose noise is a pure function of seeds, so that a run that resumes draws what it would have drawn.

A sample has a seed (`noise_seed` of a batch). `PositionNoise` makes one of it for each position, `InternLM2Model` one
for each layer, and `SeededDropout` one number for each feature, which decides whether that feature is kept. All of it
is arithmetic on 32-bit integers that wrap around, in operators that MindSpore has on every device.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P


class PositionNoise(nn.Cell):
    """Seeds of every position's dropout from one of each sample: hashes in 32-bit integers that wrap around.

    Args:
        length: positions L of a training sample.
    """

    def __init__(self, length: int):
        super().__init__()
        steps = (np.arange(length, dtype=np.int64) * 0x9E3779B + 1).astype(np.int32).astype(np.int64) * 0x2C1B3C7
        self.steps = Tensor(steps.astype(np.int32)[None])                             # (1, L)
        self.column = P.ExpandDims()
        self.scatter, self.twice = P.Mul(), P.Mul()
        self.spread, self.odd = P.Add(), P.Add()
        self.reshape = P.Reshape()

    def construct(self, noise_seed):
        """Maps int32 `(B,)` to int32 `(B*L, 1)`."""
        noise = self.spread(self.scatter(self.column(noise_seed, 1), 0x85EBCA7), self.steps)   # (B, L)
        return self.reshape(self.odd(self.twice(noise, 2), 1), (-1, 1))

    def shard(self, dp: int) -> None:
        """Cuts samples."""
        self.column.shard(((dp,),))
        self.spread.shard(((dp, 1), (1, 1)))
        for primitive in (self.scatter, self.twice, self.odd):
            primitive.shard(((dp, 1), ()))


class SeededDropout(nn.Cell):
    """Dropout, with noise of the device's generator or from seeds.

    The generator's state is in no checkpoint, so a run that is to resume exactly gives seeds: the noise is then a hash
    of a position's seed and the feature, in 32-bit integers that wrap around (multiply, shift and fold, multiply).

    Args:
        p: share of the features that is zeroed.
        features: width of the input.
        salt: number that sets this cell's noise apart from that of others with the same seeds.
    """

    def __init__(self, p: float, features: int, salt: int = 0):
        super().__init__()
        self.generated = nn.Dropout(p=p)
        columns = np.random.RandomState((features, salt)).randint(-2 ** 31, 2 ** 31 - 1, (1, features))
        self.columns = Tensor(columns, mstype.int32)                                    # (1, F)
        self.spread, self.fold = P.BitwiseXor(), P.BitwiseXor()
        self.shift, self.half = P.RightShift(), Tensor([[15]], mstype.int32)
        self.mix, self.mix_again, self.keep, self.scale = P.Mul(), P.Mul(), P.Mul(), P.Mul()
        self.compare = P.GreaterEqual()
        self.cast = P.Cast()
        self.set_rate(p)

    def set_rate(self, p: float) -> None:
        """Changes the share; only before the graph is compiled."""
        self.rate = float(p)
        self.generated.p = self.rate
        self.generated.dropout.keep_prob = 1.0 - self.rate
        self.limit = int(self.rate * 2 ** 32) - 2 ** 31
        self.factor = 1.0 / (1.0 - self.rate)

    def construct(self, x, noise):
        """Drops features of `(N, F)`; `noise` is int32 `(N, 1)`, `None` for the device's generator."""
        if self.rate == 0.0 or not self.training:
            return x
        if noise is None:
            return self.generated(x)
        bits = self.mix(self.spread(noise, self.columns), 0x2C1B3C6D)                   # (N, F)
        bits = self.mix_again(self.fold(bits, self.shift(bits, self.half)), 0x297A2D39)
        kept = self.cast(self.compare(bits, self.limit), x.dtype)
        return self.scale(self.keep(x, kept), self.factor)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions by `dp` and features by `tp`."""
        cut = (dp, tp)
        self.generated.dropout.shard((cut,))
        self.spread.shard(((dp, 1), (1, tp)))
        self.shift.shard((cut, (1, 1)))
        for primitive in (self.fold, self.keep):
            primitive.shard((cut, cut))
        for primitive in (self.mix, self.mix_again, self.compare, self.scale):
            primitive.shard((cut, ()))
