"""From the pixel columns of a batch to the tiles that the tower takes, and from its table to the positions of samples.

Both keep samples of one data-parallel share together, so neither needs communication.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
from mindspore import Layout, Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.ops.auto_generate import Embedding

from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.processing.image import pixel_scale


class TilePixels(nn.Cell):
    """Normalises tiles that travel as bytes and puts the global views, which travel normalised, into their slots.

    `where(view_index > 0, global_views[view_index - 1], pixel_values * scale + shift)`, as sums and products: global
    views come by a product with ones and zeros, in which every sum has one term, so it is exact; the parallel compiler
    wants one shape of all inputs of Select, and would cut a flat gather over samples of several devices wrongly.
    Tiles are normalised in float32, and everything after that is in the compute dtype: the largest array of float32 is
    one normalised copy.

    Args:
        dtype: the compute dtype.
    """

    def __init__(self, dtype: mstype.Type):
        super().__init__()
        scale, shift = pixel_scale()
        self.scale, self.shift = Tensor(scale.reshape(1, 1, 3)), Tensor(shift.reshape(1, 1, 3))
        self.dtype = dtype
        self.cast, self.reshape = P.Cast(), P.Reshape()
        self.to_float = P.Cast()
        self.local, self.to_column = P.Equal(), P.ExpandDims()
        self.mul_scale, self.mul_shift = P.Mul(), P.Mul()
        self.mul_pixels, self.add_shift = P.Mul(), P.Add()
        self.same, self.pick = P.Equal(), P.BatchMatMul()
        self.add_views = P.Add()

    def construct(self, pixel_values, global_views, view_index):
        """The tiles of a batch.

        Args:
            pixel_values: uint8 `(B, T, 3, P, P)`; or float32, normalised, then the other two are `None`.
            global_views: float32 `(B, I, 3, P, P)`.
            view_index: int32 `(B, T)`.

        Returns:
            Tensor `(B*T, 3, P, P)`, normalised, without gradient.

        Raises:
            ValueError: for uint8 without the other two, or anything else with them.
        """
        b, t, channels, side = pixel_values.shape[:4]
        tiles = (b * t, channels, side, side)
        if (pixel_values.dtype == mstype.uint8) != (global_views is not None and view_index is not None):
            raise ValueError("uint8 pixel_values need global_views and view_index, and normalised ones have neither; "
                             "see the columns in mindformers_ixc.data.batch.")
        if global_views is None:
            return self.reshape(pixel_values, tiles)
        area, views = side * side, global_views.shape[1]
        local = self.cast(self.local(view_index, 0), mstype.float32)                       # (B, T)
        local = self.to_column(local, 2)                                                   # (B, T, 1)
        scale = self.reshape(self.mul_scale(local, self.scale), (b, t * channels, 1))      # (B, T*3, 1)
        shift = self.reshape(self.mul_shift(local, self.shift), (b, t * channels, 1))
        x = self.to_float(self.reshape(pixel_values, (b, t * channels, area)), mstype.float32)
        x = self.cast(self.add_shift(self.mul_pixels(x, scale), shift), self.dtype)        # (B, T*3, P*P)
        numbers = self.cast(self.reshape(F.arange(1, views + 1), (1, 1, views)), mstype.int32)
        one_hot = self.cast(self.same(self.to_column(view_index, 2), numbers), self.dtype)  # (B, T, I)
        flat = self.cast(self.reshape(global_views, (b, views, channels * area)), self.dtype)
        y = self.reshape(self.pick(one_hot, flat), (b, t * channels, area))                # (B, T*3, P*P)
        return F.stop_gradient(self.reshape(self.add_views(x, y), tiles))

    def shard(self, dp: int) -> None:
        """Cuts samples by `dp`."""
        rows = (dp, 1, 1)
        self.to_float.shard((rows,))
        self.local.shard(((dp, 1), ()))
        self.to_column.shard(((dp, 1),))
        for primitive in (self.mul_scale, self.mul_shift, self.same):
            primitive.shard((rows, (1, 1, 1)))
        for primitive in (self.mul_pixels, self.add_shift, self.pick, self.add_views):
            primitive.shard((rows, rows))


class SampleRows(nn.Cell):
    """Rows of each sample's own table, by one flat gather over the tables of all samples of a device.

    Ascend has no kernel for a gather with a batch axis or for its gradient. The flat one is `Embedding` there, whose
    forward and gradient (`EmbeddingDenseBackward`) are kernels of CANN's operator library; elsewhere it is `Gather`.

    The parallel compiler would take a flat index for one over the tables of all devices. `Morph` is a function that is
    put in after the compiler has cut the graph, so there it sees the tables of one data-parallel share.
    """

    def __init__(self):
        super().__init__()
        self.fused = on_ascend()
        self.gather, self.embedding = P.Gather(), Embedding()
        self.reshape, self.cast = P.Reshape(), P.Cast()
        self.is_parallel = is_parallel()
        if self.is_parallel:
            self.share = P.Morph(self.take, self._shape, self._dtype).add_prim_attr("self_define_shard", True)

    def construct(self, table, index):
        """Takes `(B, R, D)` and int32 `(B, L)` to `(B, L, D)`."""
        if self.is_parallel:
            return self.share(table, index)
        return self.take(table, index)

    def take(self, table, index):
        """The same for the samples of one device."""
        b, rows, width = table.shape
        if b > 1:
            first = self.cast(self.reshape(F.arange(0, b * rows, rows), (b, 1)), mstype.int32)
            index = index + first
        table = self.reshape(table, (b * rows, width))
        if self.fused:
            return self.embedding(index, table)
        return self.gather(table, index, 0)

    @staticmethod
    def _shape(table, index):
        return [*index, table[2]]

    @staticmethod
    def _dtype(table, index):
        return table

    def shard(self, dp: int, tp: int) -> None:
        """Cuts samples by `dp`; the devices of a tensor-parallel group all take the same rows."""
        cut = Layout((dp, tp), ("dp", "tp"))       # `Morph` takes layouts only, which name all devices of a stage
        table = cut("dp", "None", "None")
        self.share.shard((table, cut("dp", "None")), (table,))
