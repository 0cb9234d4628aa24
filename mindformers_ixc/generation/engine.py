"""Inference graphs: one for tiles, one prefill graph per length bucket, one decode graph, sharing a key/value cache.

Everything whose shape depends on the request is padded on the host to a bucket, so a graph is compiled once and then
serves every request of that bucket. Partial LoRA is in the prefill graph only: every decoded position is text.
"""
from __future__ import annotations

import mindspore.common.dtype as mstype
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.config import MODE_ADAPTERS
from mindformers_ixc.models.internlm2 import MASKED
from mindformers_ixc.models.rotary import rotary_base, rotary_tables
from mindformers_ixc.processing.processor import EncodedSample

# The shortest bucket, in positions; a shorter one would save little and be compiled as slowly.
SHORTEST_BUCKET = 128

# Tiles the ViT graph takes at once; the last call is padded with empty tiles.
TILES_PER_CALL = 5


def bucket(length: int) -> int:
    """Positions that a prompt or a cache of `length` positions is padded to: 128, 192, 256, 384, 512, 768, ...

    Two buckets an octave: a chat that grows compiles a graph only now and then, and a third at most is padding.
    """
    size = SHORTEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class VisionGraph(nn.Cell):
    """Tiles to the vision table, as one graph of a fixed number of tiles."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, pixel_values):
        """Maps `(1, T, 3, S, S)` to the table `(1, T * tokens + 2, D)`."""
        return self.model.vision_table(pixel_values)


class CacheCell(nn.Cell):
    """Key/value caches shared by a prefill and a decode graph: per layer two Parameters `(B*KV*S, d)`."""

    def __init__(self, config, batch: int, positions: int):
        super().__init__(auto_prefix=False)
        shape = (batch * config.num_key_value_heads * positions, config.head_size)
        dtype = mstype.dtype_to_nptype(config.compute_dtype)
        self.keys = self._parameters("key", config.num_hidden_layers, shape, dtype)
        self.values = self._parameters("value", config.num_hidden_layers, shape, dtype)

    @staticmethod
    def _parameters(kind: str, layers: int, shape: tuple, dtype) -> ParameterTuple:
        return ParameterTuple([Parameter(Tensor(np.zeros(shape, dtype)), name=f"{kind}_cache.{i}", requires_grad=False)
                               for i in range(layers)])


class PrefillGraph(nn.Cell):
    """Whole prompts: fills the cache and gives the logits after each prompt."""

    def __init__(self, model, cache: CacheCell, mode: str, batch: int, positions: int):
        super().__init__(auto_prefix=False)
        self.model, self.keys, self.values = model, cache.keys, cache.values
        self.adapters, self.dtype = MODE_ADAPTERS[mode], model.config.compute_dtype
        self.kv, self.positions = model.config.num_key_value_heads, positions
        self.first_row = Tensor(np.arange(batch * self.kv, dtype=np.int32)[:, None] * positions)   # (B*KV, 1)
        self.row_of = Tensor(np.arange(batch, dtype=np.int32))
        self.gather = P.Gather()
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, input_ids, image_embeds, image_mask, cos, sin, last):
        """Runs prompts padded on the right.

        Args:
            input_ids: int32 `(B, L)`.
            image_embeds: `(B, L, D)`, vision-table rows at image positions.
            image_mask: int32 `(B, L)`.
            cos: float32 `(B, L, 1, 1, d)`.
            sin: like `cos`.
            last: int32 `(B,)`, index of each prompt's last position.

        Returns:
            float32 logits `(B, V)`.
        """
        b, length = input_ids.shape
        tokens = self.model.model.tok_embeddings(input_ids)
        x = F.select(F.expand_dims(F.not_equal(image_mask, 0), 2), self.cast(image_embeds, self.dtype), tokens)
        x = self.reshape(x, (b * length, -1))                                             # (B*L, D)
        image = self.reshape(self.cast(image_mask, self.dtype), (b * length, 1))          # (B*L, 1)
        rows = self.reshape(self.first_row + F.arange(length).astype(mstype.int32), (-1,))  # (B*KV*L,)
        mask = self.model.model.causal_mask(length)
        x = self.model.model.cached(x, image, cos, sin, mask, self.adapters, (b, length), self.keys, self.values, rows)
        x = self.gather(x, self.row_of * length + last, 0)                                # (B, D)
        return self.cast(self.model.output(x), mstype.float32)


class DecodeGraph(nn.Cell):
    """One more token a row, attending over the cache."""

    def __init__(self, model, cache: CacheCell, mode: str, batch: int, positions: int):
        super().__init__(auto_prefix=False)
        self.model, self.keys, self.values = model, cache.keys, cache.values
        self.adapters, self.dtype = MODE_ADAPTERS[mode], model.config.softmax_compute_type
        self.kv = model.config.num_key_value_heads
        self.first_row = Tensor(np.arange(batch * self.kv, dtype=np.int32).reshape(batch, self.kv) * positions)
        self.all_positions = Tensor(np.arange(positions, dtype=np.int32)[None, None, None, None, :])
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, input_ids, positions, cos, sin):
        """Appends one token a row.

        Args:
            input_ids: int32 `(B, 1)`.
            positions: int32 `(B, 1)`, position of each token.
            cos: float32 `(B, 1, 1, 1, d)`.
            sin: like `cos`.

        Returns:
            float32 logits `(B, V)`.
        """
        b = input_ids.shape[0]
        x = self.reshape(self.model.model.tok_embeddings(input_ids), (b, -1))             # (B, D)
        rows = self.reshape(self.first_row + positions, (-1,))                            # (B*KV,)
        later = F.greater(self.all_positions, self.reshape(positions, (b, 1, 1, 1, 1)))   # (B, 1, 1, 1, S)
        mask = self.cast(later, self.dtype) * MASKED
        x = self.model.model.cached(x, None, cos, sin, mask, self.adapters, (b, 1), self.keys, self.values, rows)
        return self.cast(self.model.output(x), mstype.float32)


class ReorderGraph(nn.Cell):
    """Makes row i of every cache continue what row `rows[i]` held (beam search)."""

    def __init__(self, cache: CacheCell, batch: int):
        super().__init__(auto_prefix=False)
        self.keys, self.values, self.batch = cache.keys, cache.values, batch
        self.gather = P.Gather()
        self.reshape = P.Reshape()
        self.assign = P.Assign()

    def construct(self, rows):
        """Reorders by int32 `(B,)`."""
        done = 0
        for cache in self.keys + self.values:
            taken = self.gather(self.reshape(cache, (self.batch, -1)), rows, 0)
            done = F.depend(done, self.assign(cache, self.reshape(taken, cache.shape)))
        return done


class InferenceEngine:
    """Owns the graphs and caches of a model and hands out decoders.

    Args:
        model: `IXC25ForCausalLM` in evaluation mode.
    """

    def __init__(self, model):
        self.model, self.config = model, model.config
        self._vision = VisionGraph(model)
        self._slots: dict = {}
        self._tables: dict = {}

    def encode_images(self, sample: EncodedSample) -> Tensor:
        """Image embeddings of a sample's image positions, `(n_image, D)`, in order of position."""
        pixels, tokens = sample.pixel_values, self.config.vision_config.tokens_per_tile
        count = len(pixels)
        padded = -(-count // TILES_PER_CALL) * TILES_PER_CALL
        pieces = []
        for start in range(0, padded, TILES_PER_CALL):
            tiles = np.zeros((1, TILES_PER_CALL, *pixels.shape[1:]), np.float32)
            chunk = pixels[start:start + TILES_PER_CALL]
            tiles[0, :len(chunk)] = chunk
            pieces.append(self._vision(Tensor(tiles))[0])
        table = F.concat([piece[:TILES_PER_CALL * tokens] for piece in pieces] + [pieces[0][-2:]], 0)
        index = sample.vision_index(padded)[sample.image_mask == 1]
        return F.gather(table, Tensor(index), 0)

    def tables(self, length: int, total: int) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables of at least `length` positions for a request of `total` positions in all."""
        base = rotary_base(self.config, total)
        if base not in self._tables or len(self._tables[base][0]) < length:
            self._tables[base] = rotary_tables(self.config, length, total)
        return self._tables[base]

    def slot(self, batch: int, positions: int, mode: str):
        """Cache and graphs for a batch size, cache length and mode, made at first use."""
        if (batch, positions) not in self._slots:
            # one cache at a time: after the weights it is the largest thing, and of no use to another shape
            self._slots = {(batch, positions): (CacheCell(self.config, batch, positions), {})}
        cache, graphs = self._slots[batch, positions]
        if mode not in graphs:
            shape = (batch, positions)
            graphs[mode] = (PrefillGraph(self.model, cache, mode, *shape), DecodeGraph(self.model, cache, mode, *shape),
                            ReorderGraph(cache, batch))
        return graphs[mode]

    def decoder(self, samples: list[EncodedSample], max_new_tokens: int, mode: str = "base",
                beams: int = 1) -> CachedDecoder:
        """A decoder over a batch of prompts, each repeated `beams` times side by side."""
        return CachedDecoder(self, samples, max_new_tokens, mode, beams)


class CachedDecoder:
    """Continues a batch of prompts token by token (the `Decoder` of `mindformers_ixc.generation.search`).

    Args:
        engine: owner of graphs and caches.
        samples: prompts.
        max_new_tokens: tokens at most to be appended to each.
        mode: which task LoRAs are in use.
        beams: rows a prompt.
    """

    def __init__(self, engine: InferenceEngine, samples: list[EncodedSample], max_new_tokens: int, mode: str,
                 beams: int):
        self.engine, self.samples, self.beams = engine, samples, beams
        self.lengths = np.repeat([len(sample.input_ids) for sample in samples], beams).astype(np.int32)
        self.batch = len(self.lengths)
        longest = int(self.lengths.max())
        self.bucket = bucket(longest)
        capacity = bucket(longest + max_new_tokens)
        self.graphs = engine.slot(self.batch, capacity, mode)
        pairs = [engine.tables(capacity, int(length) + max_new_tokens) for length in self.lengths]
        self.cos, self.sin = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.positions = self.lengths.copy()

    def prefill(self) -> np.ndarray:
        """Logits `(B, V)` after each prompt."""
        config, shape = self.engine.config, (self.batch, self.bucket)
        ids = np.full(shape, config.pad_token_id, np.int32)
        image_mask = np.zeros(shape, np.int32)
        embeds = []
        for i, sample in enumerate(self.samples):
            rows = slice(i * self.beams, (i + 1) * self.beams)
            ids[rows, :len(sample.input_ids)] = sample.input_ids
            image_mask[rows, :len(sample.image_mask)] = sample.image_mask
            embeds += [self._image_embeds(sample)] * self.beams
        cos = np.stack([table[:self.bucket] for table in self.cos])[:, :, None, None, :]
        sin = np.stack([table[:self.bucket] for table in self.sin])[:, :, None, None, :]
        logits = self.graphs[0](Tensor(ids), F.stack(embeds), Tensor(image_mask), Tensor(cos), Tensor(sin),
                                Tensor(self.lengths - 1))
        return logits.asnumpy()

    def _image_embeds(self, sample: EncodedSample) -> Tensor:
        """`(L, D)` with the sample's image rows at its image positions and zeros elsewhere."""
        config = self.engine.config
        shape = (self.bucket, config.hidden_size)
        if not sample.grids:
            return Tensor(np.zeros(shape, mstype.dtype_to_nptype(config.compute_dtype)))
        rows = self.engine.encode_images(sample)
        where = np.flatnonzero(sample.image_mask).astype(np.int32)[:, None]
        return P.ScatterNd()(Tensor(where), rows, shape)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits `(B, V)` after appending one token to each row."""
        at = self.positions
        cos = np.stack([table[p] for table, p in zip(self.cos, at)])[:, None, None, None, :]
        sin = np.stack([table[p] for table, p in zip(self.sin, at)])[:, None, None, None, :]
        ids = np.ascontiguousarray(tokens, np.int32).reshape(self.batch, 1)
        logits = self.graphs[1](Tensor(ids), Tensor(at[:, None].astype(np.int32)), Tensor(cos), Tensor(sin))
        self.positions = at + 1
        return logits.asnumpy()

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i continue what row `rows[i]` held."""
        if (rows == np.arange(self.batch)).all():
            return
        self.graphs[2](Tensor(np.ascontiguousarray(rows, np.int32)))
        self.positions = self.positions[rows]
