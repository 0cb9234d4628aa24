"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of a sample while it trains.

Each of a sample's L positions and D features gets a number of its own from `(-1, 1)`, times `alpha / sqrt(L * D)`. As
in the paper's code L counts no padding, and the embeddings are those that enter the first layer: of the text and of
pictures. In a packed row L is the length of each conversation. The noise is a hash of the sample's seed
(`mindformers_ixc.models.dropout`), so a run that resumes, or another number of replicas, draws the same.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P

from mindformers_ixc.models.dropout import FeatureHash

# Sets this noise apart from that of dropouts, whose salts are small: the letters NE.
SALT = 0x4E45


class EmbeddingNoise(nn.Cell):
    """Adds the noise to embeddings; without effect unless the cell trains.

    Args:
        alpha: strength of the noise (the paper's 5, 10 or 15); 0 for none.
        features: width D.
    """

    def __init__(self, alpha: float, features: int):
        super().__init__()
        self.alpha, self.factor = alpha, alpha / features ** 0.5
        self.hash = FeatureHash(features, SALT)
        self.cast, self.reshape = P.Cast(), P.Reshape()
        self.mul_unit, self.mul_factor, self.mul_size = P.Mul(), P.Mul(), P.Mul()
        self.at_least, self.greater, self.rsqrt, self.mul_real = P.Maximum(), P.Greater(), P.Rsqrt(), P.Mul()
        self.add = P.Add()

    def construct(self, x, seeds, lengths):
        """Embeddings with noise, in their dtype.

        Args:
            x: embeddings `(B*L, D)`.
            seeds: int32 `(B*L, 1)`, of `PositionNoise`.
            lengths: int32 `(B, L)`, positions of the sample that each position is of; 0 in the padding.
        """
        if not self.training or self.alpha == 0.0:
            return x
        lengths = self.cast(self.reshape(lengths, (-1, 1)), mstype.float32)                  # (B*L, 1)
        real = self.cast(self.greater(lengths, 0.0), mstype.float32)
        size = self.mul_factor(self.mul_real(self.rsqrt(self.at_least(lengths, 1.0)), real), self.factor)
        unit = self.mul_unit(self.cast(self.hash(seeds), mstype.float32), 2.0 ** -31)        # (B*L, D), in [-1, 1]
        return self.add(x, self.cast(self.mul_size(unit, size), x.dtype))

    def shard(self, dp: int) -> None:
        """Cuts positions by `dp`; the width is whole on every device."""
        rows = (dp, 1)
        self.hash.shard(dp, 1)
        self.rsqrt.shard((rows,))
        for primitive in (self.mul_unit, self.mul_factor, self.at_least, self.greater):
            primitive.shard((rows, ()))
        for primitive in (self.mul_size, self.mul_real, self.add):
            primitive.shard((rows, rows))
