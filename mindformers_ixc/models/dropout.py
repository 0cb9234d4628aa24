"""Dropout whose noise is a pure function of seeds, so that a run that resumes draws what it would have drawn.

A sample has a seed (`noise_seed` of a batch). `PositionNoise` makes one of it for each position, `InternLM2Model` one
for each layer, and `SeededDropout` one number for each feature, which decides whether that feature is kept. All of it
is arithmetic on 32-bit integers that wrap around, in operators that MindSpore has on every device.

The multipliers below are odd, so that a product by one of them maps no two integers to one. They have the digits of
well-known hash constants, some shortened so that they are positive as int32. They must stay what they are: a run
resumes exactly only with the multipliers it began with.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P

# Of a position: the first 7 hexadecimal digits of 2^32 / golden ratio, 0x9E3779B9 (Knuth's multiplicative hashing), and
# then FEATURE_MIX_FIRST rounded to 7 digits.
POSITION_STEP, POSITION_MIX = 0x9E3779B, 0x2C1B3C7

# Of a sample's seed: the first 7 digits of xxHash's second 32-bit prime, 0x85EBCA77, which are also what MurmurHash3's
# multiplier 0x85EBCA6B is rounded to.
SEED_MIX = 0x85EBCA7

# Of a decoder layer, to which its number is added twice: the last 6 digits of xxHash's first 32-bit prime, 0x9E3779B1.
LAYER_MIX = 0x3779B1

# Of a feature: both multipliers and the shift of the 32-bit hash "prospector" (github.com/skeeto/hash-prospector, where
# it is [15 2c1b3c6d 12 297a2d39 15]); of its three folds only one is done here, by its first shift.
FEATURE_MIX_FIRST, FEATURE_MIX_SECOND, FEATURE_SHIFT = 0x2C1B3C6D, 0x297A2D39, 15


class PositionNoise(nn.Cell):
    """Seeds of every position's dropout from one of each sample: hashes in 32-bit integers that wrap around.

    Args:
        length: positions L of a training sample.
    """

    def __init__(self, length: int):
        super().__init__()
        steps = (np.arange(length, dtype=np.int64) * POSITION_STEP + 1).astype(np.int32).astype(np.int64)
        self.offsets = Tensor((steps * POSITION_MIX).astype(np.int32)[None])          # (1, L)
        self.to_column = P.ExpandDims()
        self.mul_seed, self.mul_two = P.Mul(), P.Mul()
        self.add_offsets, self.add_one = P.Add(), P.Add()
        self.reshape = P.Reshape()

    def construct(self, noise_seed):
        """Maps int32 `(B,)` to int32 `(B*L, 1)`."""
        noise = self.mul_seed(self.to_column(noise_seed, 1), SEED_MIX)                # (B, 1)
        noise = self.add_offsets(noise, self.offsets)                                 # (B, L)
        return self.reshape(self.add_one(self.mul_two(noise, 2), 1), (-1, 1))

    def shard(self, dp: int) -> None:
        """Cuts samples by `dp`; a sample's positions are whole on every device."""
        self.to_column.shard(((dp,),))
        self.add_offsets.shard(((dp, 1), (1, 1)))
        for primitive in (self.mul_seed, self.mul_two, self.add_one):
            primitive.shard(((dp, 1), ()))


class FeatureHash(nn.Cell):
    """Hashes of positions' seeds and features: multiply, shift and fold, multiply 32-bit integers that wrap around.

    Args:
        features: width F.
        salt: number that sets these hashes apart from those of other cells with the same seeds.
    """

    def __init__(self, features: int, salt: int):
        super().__init__()
        columns = np.random.RandomState((features, salt)).randint(-2 ** 31, 2 ** 31 - 1, (1, features))
        self.columns = Tensor(columns, mstype.int32)                                     # (1, F)
        self.xor_columns, self.xor_shifted = P.BitwiseXor(), P.BitwiseXor()
        self.low_bits, self.below = P.BitwiseAnd(), Tensor([[2 ** FEATURE_SHIFT - 1]], mstype.int32)
        self.clear_low, self.move_down = P.Sub(), P.FloorDiv()
        self.mul_first, self.mul_second = P.Mul(), P.Mul()

    def construct(self, seeds):
        """Maps int32 `(N, 1)` to int32 `(N, F)`."""
        bits = self.mul_first(self.xor_columns(seeds, self.columns), FEATURE_MIX_FIRST)
        return self.mul_second(self.xor_shifted(bits, self.shifted(bits)), FEATURE_MIX_SECOND)

    def shifted(self, bits):
        """`bits >> FEATURE_SHIFT` of int32 `(N, F)`, with the sign.

        Without RightShift, which Ascend has no aclnn kernel for. The low bits go first: what is left is a multiple of
        the divisor with 16 significant bits, so the quotient is exact wherever it is computed, in float32 too.
        """
        return self.move_down(self.clear_low(bits, self.low_bits(bits, self.below)), 2 ** FEATURE_SHIFT)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions by `dp` and features by `tp`."""
        cut = (dp, tp)
        self.xor_columns.shard(((dp, 1), (1, tp)))
        self.low_bits.shard((cut, (1, 1)))
        for primitive in (self.xor_shifted, self.clear_low):
            primitive.shard((cut, cut))
        for primitive in (self.mul_first, self.move_down, self.mul_second):
            primitive.shard((cut, ()))


class SeededDropout(nn.Cell):
    """Dropout, with noise of the device's generator or from seeds.

    The generator's state is in no checkpoint, so a run that is to resume exactly gives seeds: what is dropped is then
    decided by `FeatureHash`.

    Args:
        p: share of the features that is zeroed.
        features: width F of the input.
        salt: number that sets this cell's noise apart from that of others with the same seeds.
    """

    def __init__(self, p: float, features: int, salt: int = 0):
        super().__init__()
        self.generated = nn.Dropout(p=p)
        self.hash = FeatureHash(features, salt)
        self.mul_kept, self.mul_factor = P.Mul(), P.Mul()
        self.greater_equal = P.GreaterEqual()
        self.cast = P.Cast()
        self.set_rate(p)

    def set_rate(self, p: float) -> None:
        """Changes the share; only before the graph is compiled."""
        self.rate = float(p)
        self.generated.p = self.rate
        self.generated.dropout.keep_prob = 1.0 - self.rate
        self.limit = int(self.rate * 2 ** 32) - 2 ** 31
        self.factor = 1.0 / (1.0 - self.rate)
        # what the kernels for training take: `native.training.partial_lora`
        self.numbers = (self.hash.columns, Tensor([FEATURE_MIX_FIRST, FEATURE_MIX_SECOND, self.limit], mstype.int32),
                        Tensor([self.factor], mstype.float32))

    def drops(self):
        """Whether anything is dropped in the graph that is being compiled."""
        return self.rate != 0.0 and self.training

    def construct(self, x, noise):
        """Drops features of `(N, F)`; `noise` is int32 `(N, 1)`, `None` for the device's generator."""
        if not self.drops():
            return x
        if noise is None:
            return self.generated(x)
        kept = self.cast(self.greater_equal(self.hash(noise), self.limit), x.dtype)           # (N, F)
        return self.mul_factor(self.mul_kept(x, kept), self.factor)

    def shard(self, dp: int, tp: int) -> None:
        """Cuts positions by `dp` and features by `tp`."""
        cut = (dp, tp)
        self.generated.dropout.shard((cut,))
        self.hash.shard(dp, tp)
        self.mul_kept.shard((cut, cut))
        for primitive in (self.greater_equal, self.mul_factor):
            primitive.shard((cut, ()))
