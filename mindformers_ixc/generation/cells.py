"""Cells that the inference graphs are made of.

Each is a cell of its own because a pipeline stage is given to a cell: what a graph computes between them would belong
to none. None of them owns parameters; all wrap the model's.
"""
from __future__ import annotations

from typing import Union

import mindspore.common.dtype as mstype
from mindspore import nn
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell
from mindspore.ops import operations as P

from mindformers_ixc.device import is_parallel
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.generation.caches import ContiguousCache, NativeCache, PagedCache
from mindformers_ixc.generation.sharded_cache import ShardedCache
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.internlm2 import DecoderLayer
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.layers import PartialLoRALinear
from mindformers_ixc.models.reward import IXC25RewardModel
from mindformers_ixc.native import kernels

# The caches of a layer, all with the same methods.
Cache = Union[ContiguousCache, PagedCache, ShardedCache]


def stage_of(cell: nn.Cell) -> int | None:
    """Pipeline stage of a cell, `None` without a pipeline."""
    return getattr(cell, "pipeline_stage", None)       # MindSpore has no default for it


def row_parts(config: IXC25Config) -> int:
    """What the rows of a batch must divide by in a parallel layout: the devices that share decoded positions."""
    layout = config.parallel_config
    return layout.data_parallel * (layout.model_parallel if layout.use_seq_parallel else 1)


def of_whole_batches(graph: nn.Cell, config: IXC25Config) -> nn.Cell:
    """A graph that takes whole batches on every device; where there are replicas, the compiler gives each its share.

    Without replicas no input is cut, and nothing is to be done.
    """
    return _VirtualDatasetCell(graph) if is_parallel() and config.parallel_config.data_parallel > 1 else graph


class StageCell(nn.Cell):
    """A cell of a pipeline stage.

    Args:
        stage: its number; `None` without a pipeline.
    """

    def __init__(self, stage: int | None):
        super().__init__(auto_prefix=False)
        if stage is not None:
            self.pipeline_stage = stage


class VisionTable(StageCell):
    """Tiles to the vision table."""

    def __init__(self, model: IXC25Model):
        super().__init__(stage_of(model.vit))
        self.model = model

    def construct(self, pixel_values):
        """Maps `(1, T, 3, P, P)` to `(1, T*k*k + 2, D)`."""
        return self.model.vision_table(pixel_values, infer=True)


class Hop(StageCell):
    """Hands a tensor on: a stage must compute something to be part of a pipeline, and not end with a reshape."""

    def __init__(self, stage: int):
        super().__init__(stage)
        # an addition of 0, which must stay
        self.add = P.Add().add_prim_attr("keep_alive", True)
        self.add.shard(((1, 1, 1), ()))

    def construct(self, x):
        """Gives `x`, `(B, T*k*k + 2, D)`, back."""
        return self.add(x, 0)


class PassOn(nn.Cell):
    """Carries what the first stage computed to the last, whose results all ranks get.

    Args:
        last: number of the last stage; `None` without a pipeline.
    """

    def __init__(self, last: int | None):
        super().__init__(auto_prefix=False)
        self.hops = nn.CellList([Hop(stage) for stage in range(0 if last is None else last + 1)], auto_prefix=False)

    def construct(self, x):
        """Gives `x`, `(B, T*k*k + 2, D)`, back."""
        for hop in self.hops:
            x = hop(x)
        return x


class Embedding(StageCell):
    """Token ids to flattened positions, image positions replaced."""

    def __init__(self, model: IXC25Model):
        super().__init__(stage_of(model.model.tok_embeddings))
        self.tokens, self.choose, self.not_equal = model.model.tok_embeddings, model.choose, model.not_equal
        self.dtype = model.config.compute_dtype
        self.cast = P.Cast()
        self.reshape = P.Reshape()

    def construct(self, input_ids, image_embeds=None, image_mask=None):
        """Maps int32 `(B, L)`, embeddings `(B, L, D)` and mask int32 `(B, L)` of image positions to `(B*L, D)`."""
        x = self.tokens.lookup(input_ids)
        if image_mask is not None:
            x = self.choose(self.not_equal(image_mask, 0), self.cast(image_embeds, self.dtype), x)
        return self.reshape(x, (input_ids.shape[0] * input_ids.shape[1], -1))


class PromptLayer(StageCell):
    """A decoder layer over whole prompts, which fills its cache."""

    def __init__(self, layer: DecoderLayer, cache: Cache, mode: str):
        super().__init__(stage_of(layer))
        self.layer, self.cache, self.adapters = layer, cache, MODE_ADAPTERS[mode]

    def construct(self, x, image, cos, sin, mask, where, shape):
        """Maps `(B*L, D)` to `(B*L, D)`; arguments as in the caches' `prefill`, `image` as the decoder layer has it."""
        qkv = self.layer.project(x, image, self.adapters)
        y = self.cache.prefill(qkv, cos, sin, mask, where, shape)                          # (B*L, H*d)
        return self.layer.finish(x, y, image, self.adapters)


def is_one_kernel(layer: DecoderLayer, rows: int, mode: str) -> bool:
    """Whether one kernel takes the place of a layer over few positions.

    Its weights must be float32, and it has no pairs beside them that act on text.

    Args:
        layer: the layer.
        rows: positions.
        mode: which task LoRAs are in use.
    """
    linears = (layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w1, layer.feed_forward.w3,
               layer.feed_forward.w2)
    return (rows <= kernels.FEW_ROWS and not MODE_ADAPTERS[mode]
            and all(type(linear) is PartialLoRALinear and linear.is_native and not linear.has_lora
                    for linear in linears)
            and layer.attention_norm.is_native and layer.ffn_norm.is_native)


class WholeLayer(nn.Cell):
    """A decoder layer over few positions, as one kernel: a step then costs little more than reading the weights.

    Args:
        layer: see `is_one_kernel`.
        cache: of the layer; its keys and values are written in place.
        name: of the kernel, which says what the tables and places are: `decode_layer` or `extend_layer`.
    """

    def __init__(self, layer: DecoderLayer, cache: NativeCache, name: str):
        super().__init__(auto_prefix=False)
        self.attention, self.feed_forward = layer.attention, layer.feed_forward
        self.attention_norm, self.ffn_norm, self.cache = layer.attention_norm, layer.ffn_norm, cache
        self.kernel = kernels.kernel(name)

    def construct(self, x, cos, sin, places):
        """Maps `(N, D)` to `(N, D)`."""
        return self.kernel(x, self.attention_norm.weight, self.ffn_norm.weight, self.attention_norm.eps_value,
                           self.attention.wqkv.weight, cos, sin, places, self.cache.keys, self.cache.values,
                           self.attention.wo.weight, self.feed_forward.w1.weight, self.feed_forward.w3.weight,
                           self.feed_forward.w2.weight)


class TokenLayer(StageCell):
    """A decoder layer over one more token a row, which attends over its cache."""

    def __init__(self, layer: DecoderLayer, cache: Cache, mode: str):
        super().__init__(stage_of(layer))
        self.layer, self.cache, self.adapters = layer, cache, MODE_ADAPTERS[mode]
        self.is_whole = isinstance(cache, NativeCache) and is_one_kernel(layer, cache.batch, mode)
        if self.is_whole:
            self.whole = WholeLayer(layer, cache, "decode_layer")

    def construct(self, x, cos, sin, mask, places):
        """Maps `(B, D)` to `(B, D)`; arguments as in the caches' `decode`."""
        if self.is_whole:
            return self.whole(x, cos, sin, places[0])
        y = self.cache.decode(self.layer.project(x, None, self.adapters), cos, sin, mask, *places)   # (B, H*d)
        return self.layer.finish(x, y, None, self.adapters)


class Head(StageCell):
    """Final norm and head."""

    def __init__(self, model: IXC25Model):
        super().__init__(stage_of(model.model.norm))
        self.norm, self.output = model.model.norm, model.output
        self.gather = P.Gather()
        self.gather.shard(((1, 1), (1,)))
        self.cast = P.Cast()

    def construct(self, x, rows=None):
        """Maps `(N, D)`, or the int32 `(B,)` rows of it, to float32 logits `(N or B, V)`."""
        if rows is not None:
            x = self.gather(x, rows, 0)                                                    # (B, D)
        return self.cast(self.output.infer(self.norm.infer(x)), mstype.float32)


class ScoreHead(StageCell):
    """Final norm and score head of a reward model."""

    def __init__(self, model: IXC25RewardModel):
        super().__init__(stage_of(model.model.norm))
        self.norm, self.v_head = model.model.norm, model.v_head
        self.cast = P.Cast()

    def construct(self, x, rows=None):
        """Maps `(N, D)` to float32 values `(N, 1)`; all positions, whichever `rows` are asked for."""
        return self.cast(self.v_head.infer(self.norm.infer(x)), mstype.float32)


def wrapped(cell: type[PromptLayer] | type[TokenLayer], model: IXC25Model, caches: nn.CellList,
            mode: str) -> nn.CellList:
    """The model's decoder layers with their caches, each in a `PromptLayer` or `TokenLayer`."""
    return nn.CellList([cell(layer, cache, mode) for layer, cache in zip(model.model.layers, caches)],
                       auto_prefix=False)      # or their parameters would be renamed
