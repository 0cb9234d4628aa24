"""Several more positions a row at once over caches that are filled already: the rest of a prompt whose beginning is
known, and tokens that were proposed and are to be verified.

What is made for whole batches of prompts is for contiguous caches, so for the CPU in one process; `unavailable` is the
only place that says so. Over Ascend's paged cache it is one row at a time (`paged_batching`). A graph has a fixed
number R of rows, of which each prompt fills as many as it needs. Positions that are found to be wrong are not taken out
of a cache: what comes next overwrites them.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.generation.caches import ContiguousCache, NativeCache, PagedCache, decode_tables
from mindformers_ixc.generation.cells import Embedding, Head, StageCell, WholeLayer, is_one_kernel, stage_of
from mindformers_ixc.generation.slots import InferenceGraph
from mindformers_ixc.models.attention import MASKED
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.internlm2 import DecoderLayer
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.native import kernels, training
from mindformers_ixc.parameters import linear_shapes

# Rows of the graphs that take the rest of a prompt, one call after the other: few graphs serve every length.
FEW_POSITIONS, MANY_POSITIONS = 64, 256

# Operations for each layer that must have been missed before a graph is compiled that only saves them. Compiling a
# layer takes about as long.
COMPILING = 1e10

# What a call takes beside its rows, in rows: a product of few rows is as long in reading its weights.
CALL = 32


def unavailable() -> str:
    """Why caches cannot be extended on the device that graphs are made for; empty where they can."""
    if on_ascend():
        return "it is for the CPU: Ascend's paged cache takes one token a row at a time"
    if is_parallel():
        return "it is for a single process: caches that are cut over devices take one token a row at a time"
    return ""


def calls(rest: int, images: np.ndarray, by_any: bool = False) -> list[int]:
    """Rows of each call that the rest of a prompt takes.

    Args:
        rest: positions of the rest.
        images: where among them there are image positions.
        by_any: whether both graphs take these, and not the larger one only (`takes_images`).
    """
    sizes: list[int] = []
    while sum(sizes) < rest:
        done = sum(sizes)
        shown = not by_any and bool(((images >= done) & (images < done + MANY_POSITIONS)).any())
        many = rest - done > 3 * FEW_POSITIONS or shown
        sizes.append(MANY_POSITIONS if many else FEW_POSITIONS)
    return sizes


def saved_operations(config: IXC25Config, positions: int) -> float:
    """Operations of the layers' products over so many positions."""
    return 2.0 * config.num_hidden_layers * positions * sum(map(math.prod, linear_shapes(config).values()))


def is_large(config: IXC25Config) -> bool:
    """Whether a model is so large that prompts always go in calls, whatever is known of them.

    A graph of a whole prompt has the length of its bucket, of which up to a third is padding, and tensors as long. What
    that costs is more than compiling the graphs of calls takes, which the next question needs anyway.
    """
    return saved_operations(config, MANY_POSITIONS) >= COMPILING * config.num_hidden_layers


def takes_images(config: IXC25Config, rows: int) -> bool:
    """Whether the graph of so many rows of a prompt has Partial LoRA.

    Of a large model both have it: a picture's last positions in a graph of 256 would cost more than pairs that add
    nothing.
    """
    return rows == MANY_POSITIONS or is_large(config)


def pays(sizes: list[int], whole: int) -> bool:
    """Whether calls of these rows are less work than one of `whole` positions."""
    return sum(size + CALL for size in sizes) < whole + CALL


class Extension(nn.Cell):
    """Attention of R more positions a row over what a layer's cache holds, and over one another; they are added to it.

    Args:
        cache: of the layer.
    """

    def __init__(self, cache: ContiguousCache):
        super().__init__(auto_prefix=False)
        self.cache, self.batch = cache, cache.batch
        self.place = P.BatchMatMul()
        self.mul, self.add = P.Mul(), P.Add()
        self.assign, self.reshape, self.cast = P.Assign(), P.Reshape(), P.Cast()

    def angles(self, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables `(B, R, d)` as `construct` takes them."""
        return cos[:, :, None, None], sin[:, :, None, None]

    def places(self, at: np.ndarray, real: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
        """What `construct` takes to know where the new positions go.

        Args:
            at: `(B,)`, a row's first new position.
            real: `(B,)`, how many of its R are real.
            rows: R.

        Returns:
            In the compute dtype `(B*KV, S, R)`, 1 where a new position goes, and `(B*KV, S, 1)`, 1 on those that stay;
            the additive mask, `(B, 1, 1, R, S)`.
        """
        positions, kv = np.arange(self.cache.positions), self.cache.kv
        new = at[:, None] + np.arange(rows)                                                 # (B, R)
        goes = (positions[None, :, None] == new[:, None]) & (np.arange(rows) < real[:, None])[:, None]
        stays = positions[None, :, None] < at[:, None, None]                                # (B, S, 1)
        later = (positions > new[:, :, None]) * np.float32(MASKED)                          # (B, R, S)
        dtype = numpy_type(self.cache.dtype)
        return (goes.repeat(kv, 0).astype(dtype), stays.repeat(kv, 0).astype(dtype),
                later[:, None, None].astype(numpy_type(self.cache.softmax_dtype)))

    def construct(self, qkv, cos, sin, places, shape):
        """Adds keys and values to the cache and attends.

        Args:
            qkv: `(B*R, KV * (G+2) * d)`.
            cos: see `angles`.
            sin: see `angles`.
            places: see `places`.
            shape: `(B, R)`, a compile-time constant.

        Returns:
            Tensor `(B*R, H*d)`.
        """
        query, key, value = self.cache.split(qkv, cos, sin, shape)
        goes, stays, mask = places
        keys = self.extended(self.cache.keys, key, goes, stays)
        values = self.extended(self.cache.values, value, goes, stays)
        query = self.mul(query, self.cache.core.scale)
        return self.cache.merge(self.cache.core.attend(query, keys, values, mask), shape)

    def extended(self, held, new, goes, stays):
        """The cache `(B, KV, S, d)` with `(B, KV, R, d)` put in; zeros behind, which decoding counts on."""
        b, kv, rows, d = new.shape
        # exact: every sum has one term that is not 0
        put = self.place(goes, self.reshape(new, (b * kv, rows, d)))                        # (B*KV, S, d)
        return self.reshape(self.assign(held, self.add(self.mul(held, stays), put)), (b, kv, -1, d))


class NativeExtension(Extension):
    """The same with the fused CPU kernels of `mindformers_ixc.native`."""

    def __init__(self, cache: NativeCache):
        super().__init__(cache)
        kv, g, d = cache.kv, cache.groups, cache.size
        self.has_attention = training.has_product()
        self.many = kernels.kernel("extend_many", lambda qkv, *_: (qkv[0], kv * g * d))
        self.split_and_fill = kernels.kernel("extend_heads", lambda _, cos, *__: (cos[0], kv, g, cos[1], d))
        self.softmax = kernels.kernel("extend_softmax")
        self.scores, self.weighted_sum = P.BatchMatMul(transpose_b=True), P.BatchMatMul()

    def places(self, at: np.ndarray, real: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
        """int32 `(B, 2)`: `at` and `real`."""
        return (np.stack((at, real), -1).astype(np.int32),)

    def construct(self, qkv, cos, sin, places, shape):
        """As `Extension.construct`."""
        cache, (where,) = self.cache, places
        if self.has_attention:
            return self.many(qkv, cos, sin, where, cache.query_scale, cache.keys, cache.values)
        # the kernel writes the caches in place, before anything that takes its queries reads them
        query = self.split_and_fill(qkv, cos, sin, where, cache.query_scale, cache.keys, cache.values)
        b, kv, g, rows, d = query.shape
        query = self.reshape(query, (b * kv, g * rows, d))
        scores = self.scores(query, F.depend(cache.keys, query))                            # (B*KV, G*R, S)
        scores = self.reshape(scores, (b, kv, g, rows, cache.positions))
        weights = self.reshape(self.softmax(scores, where), (b * kv, g * rows, cache.positions))
        y = self.weighted_sum(weights, F.depend(cache.values, query))                       # (B*KV, G*R, d)
        return cache.merge(self.reshape(y, (b, kv, g, rows, d)), shape)


class FewExtension(NativeExtension):
    """The same for few rows, by one kernel, with the bits that decoding them one after the other gives."""

    def __init__(self, cache: NativeCache):
        super().__init__(cache)
        width = cache.kv * cache.groups * cache.size
        self.attention = kernels.kernel("extend_attention", lambda qkv, *_: (qkv[0], width))

    def angles(self, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables `(B, R, d)` as decoding takes them."""
        batch, rows, size = cos.shape
        tables = decode_tables(cos.reshape(-1, size), sin.reshape(-1, size), self.cache.groups, size ** -0.5)
        return tables[0].reshape(batch, rows, -1, size), tables[1].reshape(batch, rows, -1, size)

    def construct(self, qkv, cos, sin, places, shape):
        """As `Extension.construct`."""
        return self.attention(qkv, cos, sin, places[0], self.cache.keys, self.cache.values)


class PagedExtension(Extension):
    """The same over the blocks of one row of Ascend's cache.

    Args:
        cache: of the layer.
    """

    def __init__(self, cache: PagedCache):
        nn.Cell.__init__(self, auto_prefix=False)
        self.cache, self.batch = cache, 1

    def places(self, at: np.ndarray, real: np.ndarray, rows: int,
               blocks: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """As `PagedCache.extend` takes them: the mask, the slots, the blocks.

        Args:
            at: `(1,)`, the row's first new position.
            real: `(1,)`, how many of R are real.
            rows: R.
            blocks: int32, the row's blocks in order.
        """
        assert blocks is not None and len(at) == 1, "blocks are those of one row"
        size, new = self.cache.block_size, at[0] + np.arange(rows)
        is_real = np.arange(rows) < real[0]
        slots = np.full(rows, -1, np.int32)
        slots[is_real] = blocks[new[is_real] // size] * size + new[is_real] % size
        later = np.arange(len(blocks) * size) > new[:, None]                                # (R, S)
        return later.astype(np.uint8)[None, None], slots, blocks

    def construct(self, qkv, cos, sin, places, shape):
        """As `Extension.construct`."""
        mask, slots, blocks = places
        return self.cache.extend(qkv, cos, sin, mask, slots, blocks, shape[1])


def extension_of(cache: ContiguousCache | PagedCache, rows: int) -> Extension:
    """What extends a cache by `rows` positions a row; for a `NativeCache` its kernels."""
    if isinstance(cache, PagedCache):
        return PagedExtension(cache)
    if not isinstance(cache, NativeCache):
        return Extension(cache)
    return FewExtension(cache) if rows <= kernels.FEW_ROWS else NativeExtension(cache)


class ExtensionLayer(StageCell):
    """A decoder layer over more positions of each row."""

    def __init__(self, layer: DecoderLayer, extension: Extension, mode: str, rows: int):
        super().__init__(stage_of(layer))
        self.layer, self.extension, self.adapters = layer, extension, MODE_ADAPTERS[mode]
        self.is_whole = isinstance(extension, FewExtension) and is_one_kernel(layer, extension.cache.batch * rows, mode)
        if self.is_whole:
            self.whole = WholeLayer(layer, extension.cache, "extend_layer")

    def construct(self, x, image, cos, sin, places, shape):
        """Maps `(B*R, D)` to `(B*R, D)`; arguments as in `Extension.construct`, `image` as the decoder layer has it."""
        if self.is_whole and image is None:
            return self.whole(x, cos, sin, places[0])
        qkv = self.layer.project(x, image, self.adapters)
        y = self.extension(qkv, cos, sin, places, shape)                                    # (B*R, H*d)
        return self.layer.finish(x, y, image, self.adapters)


class ExtendGraph(InferenceGraph):
    """R more positions a row: extends the caches, gives logits.

    Args:
        model: whose layers it has.
        caches: one a layer.
        mode: which task LoRAs are in use.
        rows: R.
        part: numbers of the layers that it has, when several graphs do it one after the other; `None` for all.
    """

    def __init__(self, model: IXC25Model, caches: nn.CellList, mode: str, rows: int, part: range | None = None):
        super().__init__()
        part = range(len(caches)) if part is None else part
        extensions = [extension_of(caches[number], rows) for number in part]
        self.embed, self.head, self.rows, self.shape = Embedding(model), Head(model), rows, (extensions[0].batch, rows)
        self.begins, self.ends = part[0] == 0, part[-1] == len(caches) - 1
        self.first = extensions[0]
        self.layers = nn.CellList([ExtensionLayer(model.model.layers[number], extension, mode, rows)
                                   for number, extension in zip(part, extensions)], auto_prefix=False)
        self.dtype = model.config.compute_dtype
        self.reshape, self.cast = P.Reshape(), P.Cast()

    def construct(self, input_ids, cos, sin, image_embeds, image_mask, last, *places):
        """Runs more positions.

        Args:
            input_ids: int32 `(B, R)`; where the first layer is none of these, what those before made of them,
                `(B*R, D)`.
            cos: see `Extension.angles`.
            sin: like `cos`.
            image_embeds: `(B, R, D)`, vision-table rows at image positions; `None` where there are none.
            image_mask: int32 `(B, R)`, or `None`.
            last: int32 `(B,)`, the one position of each row whose logits are wanted, among all `B * R`; `None` for all.
            *places: see `Extension.places`.

        Returns:
            float32 logits `(B, V)`, or `(B*R, V)` of all; where the last layer is none of these, `(B*R, D)`.
        """
        x, image = input_ids, None
        if self.begins:
            x = self.embed(input_ids, image_embeds, image_mask)                             # (B*R, D)
        if image_mask is not None:
            image = self.reshape(self.cast(image_mask, self.dtype), (-1, 1))
        for layer in self.layers:
            x = layer(x, image, cos, sin, places, self.shape)
        if self.ends:
            x = self.head(x, last)
        return x

    def inputs(self, ids: np.ndarray, angles: tuple[np.ndarray, np.ndarray], at: np.ndarray, real: np.ndarray,
               images: tuple[Tensor, np.ndarray] | None = None, last: np.ndarray | None = None,
               held: Sequence[np.ndarray] = ()) -> list[Tensor | None]:
        """Arguments of `construct`.

        Args:
            ids: `(B, R)`.
            angles: rotary tables `(B, R, d)`.
            at: see `Extension.places`.
            real: see `Extension.places`.
            images: `image_embeds` and `image_mask`.
            last: as in `construct`.
            held: what `Extension.places` takes beside these.
        """
        cos, sin = self.first.angles(*angles)
        places = self.first.places(at, real, self.rows, *held)
        embeds, mask = (None, None) if images is None else (images[0], Tensor(images[1], mstype.int32))
        return [Tensor(ids, mstype.int32), Tensor(cos), Tensor(sin), embeds, mask,
                None if last is None else Tensor(last, mstype.int32), *map(Tensor, places)]
