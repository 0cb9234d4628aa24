"""Inference graphs: one for tiles, one prefill graph per length bucket, one decode graph, sharing a key/value cache.

Everything whose shape depends on the request is padded on the host to a bucket, so a graph is compiled once and then
serves every request of that bucket. Partial LoRA is in the graphs of prompts only: every decoded position is text.
"""
from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.ascend import device_memory, devices, prepare_inference, prompt_bytes
from mindformers_ixc.generation.cache_pool import CachePool
from mindformers_ixc.generation.caches import check_held_dtype, decode_tables
from mindformers_ixc.generation.cells import (
    Embedding,
    Head,
    PassOn,
    PromptLayer,
    TokenLayer,
    VisionTable,
    of_whole_batches,
    stage_of,
    wrapped,
)
from mindformers_ixc.generation.continuing import Continuing
from mindformers_ixc.generation.extending import ExtendGraph, unavailable
from mindformers_ixc.generation.reuse import Prompt, Reuse
from mindformers_ixc.generation.slots import InferenceGraph, Slot, cache_bytes, make_slot
from mindformers_ixc.generation.store import Store
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.rotary import rotary_rows, rotary_tables
from mindformers_ixc.processing.encoded import EncodedSample

# The shortest bucket, in positions; a shorter one would save little and be compiled as slowly.
SHORTEST_BUCKET = 128

# The ViT graph takes as many tiles at once as have this many positions together, at least one and at most five; the
# last call is padded with empty tiles. Tiles of 560 pixels go alone: more at once are no faster and need more memory.
POSITIONS_PER_CALL, MOST_TILES = 2048, 5

# On Ascend, where attention is fused and holds no scores: a graph there is launched kernel by kernel, about 700 of them
# for the ViT whatever the number of tiles, which at some 10 microseconds each is as long as a tile of 560 pixels takes
# to compute (1.2 TFLOP). Eight at once make launching a small part, three calls do for a picture of 24, and the largest
# tensor of a layer is 105 MB. Reckoned, not measured.
ASCEND_TILES = 8


def bucket(length: int) -> int:
    """Positions that a prompt or a cache of `length` positions is padded to: 128, 192, 256, 384, 512, 768, ...

    Two buckets an octave: a chat that grows compiles a graph only now and then, and a third at most is padding.
    """
    size = SHORTEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class VisionGraph(InferenceGraph):
    """Tiles to the vision table, as one graph of a fixed number of tiles."""

    def __init__(self, model: IXC25Model):
        super().__init__()
        self.table = VisionTable(model)
        self.passing = PassOn(stage_of(model.model.norm))

    def construct(self, pixel_values):
        """Maps `(R, T, 3, P, P)`, R replicas, to their tables `(R, T*k*k + 2, D)`."""
        return self.passing(self.table(pixel_values))


class PrefillGraph(InferenceGraph):
    """Whole prompts: fills the caches and gives the logits after each prompt.

    Args:
        model: the network.
        caches: of every layer.
        mode: which task LoRAs are in use.
        head: what the states go through at the end, by default the model's head.
    """

    def __init__(self, model: IXC25Model, caches: nn.CellList, mode: str, head: nn.Cell | None = None):
        super().__init__()
        self.embed, self.caches = Embedding(model), caches
        self.layers = wrapped(PromptLayer, model, caches, mode)
        self.head = Head(model) if head is None else head
        self.dtype = model.config.compute_dtype
        self.reshape = P.Reshape()
        self.cast = P.Cast()

    def construct(self, input_ids, image_embeds, image_mask, cos, sin, where, last):
        """Runs prompts padded on the right.

        Args:
            input_ids: int32 `(B, L)`.
            image_embeds: `(B, L, D)`, vision-table rows at image positions.
            image_mask: int32 `(B, L)`.
            cos: float32 `(B, L, 1, 1, d)`.
            sin: like `cos`.
            where: places of the new keys, as the caches' `prefill` takes them.
            last: int32 `(B,)`, index of each prompt's last position among all `B * L`.

        Returns:
            float32 logits `(B, V)`.
        """
        b, length = input_ids.shape
        x = self.embed(input_ids, image_embeds, image_mask)                               # (B*L, D)
        image = self.reshape(self.cast(image_mask, self.dtype), (b * length, 1))          # (B*L, 1)
        mask = self.caches[0].prefill_mask(length)
        for layer in self.layers:
            x = layer(x, image, cos, sin, mask, where, (b, length))
        return self.head(x, last)


class DecodeGraph(InferenceGraph):
    """One more token a row, attending over the caches."""

    def __init__(self, model: IXC25Model, caches: nn.CellList, mode: str):
        super().__init__()
        self.embed, self.caches = Embedding(model), caches
        self.layers = wrapped(TokenLayer, model, caches, mode)
        self.head = Head(model)

    def construct(self, input_ids, cos, sin, *places):
        """Appends one token a row.

        Args:
            input_ids: int32 `(B, 1)`.
            cos: float32 `(B, 1, G+2, d)`.
            sin: like `cos`.
            *places: of the new keys, as the caches' `decode` takes them.

        Returns:
            float32 logits `(B, V)`.
        """
        x = self.embed(input_ids)                                                         # (B, D)
        mask = self.caches[0].decode_mask(*places)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, places)
        return self.head(x)


class InferenceEngine:
    """Owns the graphs and caches of a model and hands out decoders.

    Graphs are compiled once for their shapes and kept. Keys and values are a decoder's own and are kept within
    `caches.limit` bytes, the least recently used going first; a decoder that lost its own computes them anew. What
    runs on the device takes turns (`TURNS`), so decoders may be used in any order and from any thread.

    Args:
        model: `IXC25ForCausalLM` in evaluation mode.
        store: what requests take over from earlier ones; `None` for nothing.

    Attributes:
        between_steps: called before every pass of decoding; what it raises ends decoding.
        decoded: tokens appended so far, of the longest row of each batch.
        reuse: what is made of the store; `None` where it cannot be used (`extending.unavailable`).
        vision: graph of `tiles_per_call` tiles.
        caches: keys and values in memory.
        generation: grows with every `reset`; decoders of an earlier one are not continued.
        kept: batch sizes and positions whose caches and graphs stay in a parallel layout, where others make room.
    """

    def __init__(self, model: IXC25Model, store: Store | None = None):
        check_held_dtype(model.config)
        if model.config.use_past:
            prepare_inference(paged=True)
        self.model = model
        self.config: IXC25Config = model.config
        self.between_steps: Callable[[], None] = lambda: None
        self.replicas = self.config.parallel_config.data_parallel if is_parallel() else 1
        self.vision = of_whole_batches(VisionGraph(model), self.config)
        self.tiles_per_call = ASCEND_TILES if model.vit.vision_tower.vision_model.is_flash else \
            max(1, min(MOST_TILES, POSITIONS_PER_CALL // self.config.vision_config.positions))
        self._slots: dict[tuple[int, int], Slot] = {}
        self.kept: set[tuple[int, int]] = set()
        self.caches, self.generation = CachePool(), 0
        self.reuse = Reuse(store, self.config) if store is not None and store.limit and not unavailable() else None
        self._closed: deque[CachedDecoder] = deque()
        self.decoded = 0
        self._tables: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def _check_memory(self, rows: int, positions: int) -> None:
        needed, there, where = cache_bytes(self.config, rows, positions), _memory_bytes(), "this machine has"
        if on_ascend():
            memory = device_memory()
            if memory is None:
                return
            needed = needed // devices(self.config) + prompt_bytes(self.config, rows, positions)
            # weights are there already; what other answers left can go
            there = memory - ms.runtime.memory_allocated() + self.caches.bytes
            where = "beside the weights this device has"
        needed += 4 * rows * self.config.vocab_size      # scores
        if needed > there:
            raise GenerationError(f"{rows} rows (prompts x beams or samples) of {positions} positions need "
                                  f"{needed / 2**30:.0f} GiB for keys, values and scores; {where} "
                                  f"{there / 2**30:.0f} GiB. Ask for fewer beams, samples, prompts or new tokens.")

    def reset(self) -> None:
        """Frees all caches and graphs, for instance before the weights change; answers in the making end."""
        with TURNS:
            self.generation += 1
            self._closed.clear()
            if self.reuse is not None:
                self.reuse.renew()
            self.caches.clear()
            self._slots.clear()

    def encode_images(self, sample: EncodedSample) -> Tensor:
        """Image embeddings of a sample's image positions, `(N, D)`, in order of position."""
        calls = self.encoding(sample)
        while True:
            try:
                next(calls)
            except StopIteration as done:
                return done.value

    def encoding(self, sample: EncodedSample) -> Generator[None, None, Tensor]:
        """`encode_images` one call of the graph at a time."""
        pixels, tokens = sample.pixel_values, self.config.vision_config.tokens_per_tile
        count, at_once = len(pixels), self.tiles_per_call
        padded = -(-count // at_once) * at_once
        pieces: list[Tensor] = []
        for start in range(0, padded, at_once * self.replicas):
            tiles = np.zeros((self.replicas * at_once, *pixels.shape[1:]), np.float32)
            chunk = pixels[start:start + len(tiles)]
            tiles[:len(chunk)] = chunk
            tables = self.vision(Tensor(tiles.reshape(self.replicas, at_once, *pixels.shape[1:])))
            pieces += [tables[row] for row in range(self.replicas)]
            yield
        used = pieces[:padded // at_once]
        table = F.concat([piece[:at_once * tokens] for piece in used] + [pieces[0][-2:]], 0)
        index = sample.vision_index(padded)[sample.image_mask == 1]
        return F.gather(table, Tensor(index), 0)

    def image_rows(self, prompt: Prompt, start: int) -> np.ndarray:
        """Embeddings of a prompt's image positions from `start` on, `(N, D)`; those of known pictures are kept."""
        assert self.reuse is not None, "without it nothing is known of a prompt"
        return self.reuse.image_rows(prompt, start, lambda sample: self.encode_images(sample).asnumpy())

    def notice_weights(self) -> None:
        """Looks whether the weights have changed; then nothing is taken over of what was computed before."""
        if self.reuse is not None and self.reuse.notice(self.model.get_parameters()):
            self._closed.clear()

    def settle(self) -> None:
        """Keeps what answers that have ended left in their caches, before the memory serves others."""
        while self._closed:
            self._closed.popleft().keep()

    def ended(self, decoder: CachedDecoder) -> None:
        """Takes note of an answer that has ended, for `settle`: this may be said by any thread at any time."""
        if self.reuse is not None:
            self._closed.append(decoder)

    def extension(self, slot: Slot, mode: str, rows: int, purpose: str) -> ExtendGraph:
        """The graph that extends a slot's caches by some rows, made at first use."""
        key = (mode, rows, purpose)
        if key not in slot.extensions:
            slot.extensions[key] = ExtendGraph(self.model, slot.caches, mode, rows)
        return slot.extensions[key]

    def tables(self, length: int, total: int) -> tuple[np.ndarray, np.ndarray]:
        """Rotary tables of at least `length` positions whose base is that of a sequence of `total` positions."""
        if total > self.config.max_position_embeddings:
            return rotary_tables(self.config, length, total)       # hardly ever asked for twice
        base = self.config.rope_theta
        if base not in self._tables or len(self._tables[base][0]) < length:
            self._tables[base] = rotary_tables(self.config, length, total)
        return self._tables[base]

    def slot(self, batch: int, positions: int, mode: str) -> Slot:
        """Caches and graphs for a batch size, cache length and mode, made at first use."""
        self.settle()
        if (batch, positions) not in self._slots:
            if is_parallel():       # there caches and graphs cannot be parted, and memory has room for one of them
                self.caches.clear()
                self._slots = {shape: slot for shape, slot in self._slots.items() if shape in self.kept}
            self.caches.make_room(cache_bytes(self.config, batch, positions))
            self._slots[batch, positions] = make_slot(self.config, batch, positions)
        slot = self._slots[batch, positions]
        if mode not in slot.graphs:
            slot.graphs[mode] = self.make_graphs(slot, mode)
        return slot

    def make_graphs(self, slot: Slot, mode: str) -> tuple[nn.Cell, nn.Cell]:
        """The graph over whole prompts and the one over one more token a row."""
        return (of_whole_batches(PrefillGraph(self.model, slot.caches, mode), self.config),
                of_whole_batches(DecodeGraph(self.model, slot.caches, mode), self.config))

    def run_decode(self, slot: Slot, mode: str, tokens: np.ndarray, at: np.ndarray, totals: np.ndarray) -> Tensor:
        """Runs the decode graph over one token a row.

        Args:
            slot: attached to what is continued.
            mode: which task LoRAs are in use.
            tokens: int32 `(B,)`.
            at: `(B,)`, their positions.
            totals: `(B,)`, lengths that set their rotary bases.

        Returns:
            float32 logits `(B, V)`.
        """
        cos, sin = rotary_rows(self.config, at, totals)                                     # (B, d) each
        cos, sin = decode_tables(cos, sin, self.config.query_groups, slot.query_scale)
        inputs = (tokens[:, None], cos[:, None], sin[:, None], *slot.places(at))
        return slot.graphs[mode][1](*[Tensor(value) for value in inputs])

    def decoder(self, samples: list[EncodedSample], max_new_tokens: int, mode: str = "base",
                beams: int = 1) -> CachedDecoder:
        """A decoder over a batch of prompts, each repeated `beams` times side by side.

        Raises:
            GenerationError: when this machine has not the memory for so many rows of that length.
        """
        self._check_memory(len(samples) * beams, bucket(max(len(one.input_ids) for one in samples) + max_new_tokens))
        with TURNS:
            self.notice_weights()
            return CachedDecoder(self, samples, max_new_tokens, mode, beams)


def _memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class CachedDecoder(Continuing):
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
        self.engine, self.samples, self.beams, self.mode = engine, samples, beams, mode
        self.lengths = np.repeat([len(sample.input_ids) for sample in samples], beams).astype(np.int32)
        self.batch = len(self.lengths)
        longest = int(self.lengths.max())
        self.bucket = bucket(longest)
        capacity = bucket(longest + max_new_tokens)
        self.capacity = capacity
        self.closed, self._generation = False, engine.generation
        self.slot = engine.slot(self.batch, capacity, mode)
        # what came after the prompt, to be done again should the cache be taken away
        self._past: list[tuple[Callable[[Any, Any], Any], Any]] = []
        self.totals = self.lengths + max_new_tokens
        self.positions = self.lengths.copy()
        self.by_request = engine.config.dynamic_ntk == "request"
        self.prompts = [] if engine.reuse is None else [Prompt.of(sample) for sample in samples]
        self.fed = [[] for _ in range(self.batch)]

    def prefill(self) -> np.ndarray:
        """Logits `(B, V)` after each prompt.

        Raises:
            GenerationError: when the decoder was closed or the engine reset, here and below.
        """
        with self._turn():
            self._past = []
            return self._begin()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits `(B, V)` after appending one token to each row."""
        self.engine.between_steps()
        logits = self._continue(CachedDecoder._step, np.array(tokens, np.int32))
        self.engine.decoded += 1
        return logits

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i continue what row `rows[i]` held."""
        if not (rows == np.arange(self.batch)).all():
            self._continue(CachedDecoder._reorder, np.array(rows))

    def close(self) -> None:
        """Says that nothing will be continued; the cache's memory serves the next one."""
        if not self.closed:
            self.closed = True
            self.engine.ended(self)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with TURNS:
            self._check_alive()
            try:
                yield
            except BaseException:       # what the cache holds now is anyone's guess
                self.engine.caches.lose(self)
                raise

    def _begin(self) -> np.ndarray:
        """Logits after each prompt, from a cache that holds nothing else."""
        self.positions = self.lengths.copy()
        self.slot = self.engine.slot(self.batch, self.capacity, self.mode)
        self.engine.caches.begin(self.slot, self)
        self.fed, self._left_over = [[] for _ in range(self.batch)], False
        logits = self._begin_in_calls()
        return self._prefill() if logits is None else logits

    def _restore(self) -> None:
        """Makes the cache hold what it did, computed anew if it was taken away meanwhile."""
        if not self.engine.caches.resume(self):
            self._begin()
            for earlier, argument in self._past:
                earlier(self, argument)

    def _continue(self, action: Callable[[CachedDecoder, np.ndarray], Any], value: np.ndarray) -> Any:
        """Does something to the own cache."""
        with self._turn():
            self._restore()
            result = action(self, value)
            self._past.append((action, value))
            return result

    def _check_alive(self) -> None:
        if self.closed:
            raise GenerationError("This answer was ended and cannot go on; ask again.")
        if self._generation != self.engine.generation:
            raise GenerationError("The model's caches were reset while this answer was in the making; ask again.")

    def _prefill(self) -> np.ndarray:
        """Runs the prefill graph over the prompts."""
        config, shape = self.engine.config, (self.batch, self.bucket)
        ids = np.full(shape, config.pad_token_id, np.int32)
        image_mask = np.zeros(shape, np.int32)
        embeds = []
        for i, sample in enumerate(self.samples):
            rows = slice(i * self.beams, (i + 1) * self.beams)
            ids[rows, :len(sample.input_ids)] = sample.input_ids
            image_mask[rows, :len(sample.image_mask)] = sample.image_mask
            embeds += [self._image_embeds(i)] * self.beams
        totals = self._prompt_totals()
        tables = [self.engine.tables(self.bucket, int(total)) for total in totals[::self.beams]]
        cos, sin = (np.stack([pair[i][:self.bucket] for pair in tables]).repeat(self.beams, 0)[:, :, None, None, :]
                    for i in (0, 1))
        last = np.arange(self.batch, dtype=np.int32) * self.bucket + self.lengths - 1
        prefill_graph, _ = self.slot.graphs[self.mode]
        logits = prefill_graph(Tensor(ids), F.stack(embeds), Tensor(image_mask), Tensor(cos), Tensor(sin),
                               Tensor(self.slot.start(self.lengths, self.bucket)), Tensor(last))
        self.slot.prefilled.add((self.mode, self.bucket))
        return logits.asnumpy().copy()      # the device's memory is let go within this turn

    def _image_embeds(self, number: int) -> Tensor:
        """`(L, D)` with a sample's image rows at its image positions and zeros elsewhere."""
        config, sample = self.engine.config, self.samples[number]
        shape = (self.bucket, config.hidden_size)
        if not sample.image_mask.any() or self.prompts:
            embeds = np.zeros(shape, numpy_type(config.compute_dtype))
            if sample.image_mask.any():
                embeds[np.flatnonzero(sample.image_mask)] = self.engine.image_rows(self.prompts[number], 0)
            return Tensor(embeds)
        where = np.flatnonzero(sample.image_mask).astype(np.int32)[:, None]
        return P.ScatterNd()(Tensor(where), self.engine.encode_images(sample), shape)

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        """Runs the decode graph over one token a row, int32 `(B,)`."""
        # with prompt lookup a row that has ended may be at the end of its cache, while others go on
        at = np.minimum(self.positions, self.capacity - 1)
        logits = self.engine.run_decode(self.slot, self.mode, tokens, at, self.totals if self.by_request else at + 1)
        for row, token in enumerate(tokens):
            self.fed[row][at[row] - self.lengths[row]:] = [int(token)]
        self.positions = at + 1
        return logits.asnumpy().copy()      # the device's memory is let go within this turn

    def _reorder(self, rows: np.ndarray) -> None:
        """Runs the reorder graph."""
        self.slot.reorder(rows)
        self.positions = self.positions[rows]
        self.fed = [list(self.fed[row]) for row in rows]
