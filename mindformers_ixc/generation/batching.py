"""Several answers at once that begin and end at different times: a cache for each row, graphs for 1, 2, 4, ... rows.

`CachedDecoder` keeps a batch that begins and ends together. Here every row has caches of its own, of S positions, which
graphs take as they come: what is attached to a graph's caches is a pointer (`Slot.attach`), so a row that begins or
ends moves nobody's keys. Prompts are computed in pieces of a fixed number of positions, some layers of a piece at a
time; their bounds depend on the prompt alone. So does all else that has a part in an answer's numbers: a row's product
with a weight, its attention, and what is taken over from earlier prompts, whole pieces that were computed by the same
graphs. An answer is bit by bit what it is alone, as far as the kernels of `mindformers_ixc.native` compute it.
MindSpore's first run of a graph rounds otherwise than all later ones, so that one is for nobody.

For contiguous caches, so for the CPU in one process; `paged_batching` is the same over Ascend's.
"""
from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.generation.caches import ContiguousCache, NativeCache, decode_tables
from mindformers_ixc.generation.cells import Embedding, Head, StageCell, stage_of
from mindformers_ixc.generation.engine import InferenceEngine
from mindformers_ixc.generation.extending import ExtendGraph
from mindformers_ixc.generation.reuse import BLOCK, Prompt, without_others
from mindformers_ixc.generation.slots import Contents, ContiguousSlot, InferenceGraph
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.internlm2 import DecoderLayer
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.rotary import rotary_base, rotary_rows
from mindformers_ixc.native import kernels
from mindformers_ixc.processing.processor import EncodedSample

# A piece is computed some layers at a time, so that others wait for a part of it only: in two parts, and in more where
# each has so many layers (a graph of fewer is not worth its compiling).
PART_LAYERS = 8

# Positions of the last piece of a prompt where what is left is no more: a product of few rows is sooner done.
LAST = 64


class Memory(Contents):
    """Contents in memory of NumPy's, which can be written to while graphs have it.

    What nobody has written yet takes no memory.

    Args:
        slot: of whose shape they are.
    """

    def __init__(self, slot: ContiguousSlot):
        self.arrays = [np.zeros(shape, dtype) for shape, dtype in slot.layout]
        # attention that is composed of MindSpore's operations counts on zeros behind what is held
        self._clears = not isinstance(slot.caches[0], NativeCache)
        super().__init__(slot, [Tensor.from_numpy(array) for array in self.arrays])

    def begin(self, halves: Sequence[np.ndarray]) -> None:
        """Makes them begin with positions `(KV, n, d)` of every layer's keys and values in turn."""
        for array, half in zip(self.arrays, halves):
            array[:, :half.shape[1]] = half
            if self._clears:
                array[:, half.shape[1]:] = 0


class RowsLayer(StageCell):
    """A decoder layer over one more token of each of n rows, each with a cache of its own."""

    def __init__(self, layer: DecoderLayer, caches: Sequence[ContiguousCache], mode: str):
        super().__init__(stage_of(layer))
        self.layer, self.adapters = layer, MODE_ADAPTERS[mode]
        self.caches = nn.CellList(list(caches), auto_prefix=False)
        self.rows = len(caches)
        self.split, self.concat = P.Split(0, self.rows), P.Concat(0)

    def construct(self, x, cos, sin, masks, where, at):
        """Maps `(n, D)` to `(n, D)`; the others are tuples of what the caches' `decode` takes, one a row."""
        qkv = self.layer.project(x, None, self.adapters)
        parts = self.split(qkv) if self.rows > 1 else (qkv,)
        found = ()
        for row in range(self.rows):        # unrolled by the compiler
            found = (*found, self.caches[row].decode(parts[row], cos[row], sin[row], masks[row], where[row], at[row]))
        y = self.concat(found) if self.rows > 1 else found[0]
        return self.layer.finish(x, y, None, self.adapters)


class RowsGraph(InferenceGraph):
    """One more token of each of n rows.

    Args:
        model: whose layers it has.
        slots: one a row.
        mode: which task LoRAs are in use.
    """

    def __init__(self, model: IXC25Model, slots: Sequence[ContiguousSlot], mode: str):
        super().__init__()
        self.embed, self.head, self.rows = Embedding(model), Head(model), len(slots)
        self.first = slots[0].caches[0]
        self.layers = nn.CellList([RowsLayer(layer, [slot.caches[number] for slot in slots], mode)
                                   for number, layer in enumerate(model.model.layers)], auto_prefix=False)
        self.split = P.Split(0, self.rows)

    def construct(self, input_ids, cos, sin, where, at):
        """Appends one token a row.

        Args:
            input_ids: int32 `(n, 1)`.
            cos: float32 `(n, 1, G+2, d)`.
            sin: like `cos`.
            where: int32 `(n*KV, 2)`, see `ContiguousCache.decode`.
            at: int32 `(n*KV, 1, 1)`.

        Returns:
            float32 logits `(n, V)`.
        """
        x = self.embed(input_ids)                                                           # (n, D)
        if self.rows > 1:
            cos, sin, where, at = self.split(cos), self.split(sin), self.split(where), self.split(at)
        else:
            cos, sin, where, at = (cos,), (sin,), (where,), (at,)
        masks = ()
        for row in range(self.rows):
            masks = (*masks, self.first.decode_mask(where[row], at[row]))
        for layer in self.layers:
            x = layer(x, cos, sin, masks, where, at)
        return self.head(x)


@dataclass(eq=False)
class Row:
    """An answer in the making.

    Attributes:
        prompt: with its pictures hashed; without their pixels once it is computed.
        mode: which task LoRAs are in use.
        total: positions of prompt and answer at most.
        contents: where its keys and values are: `Memory`, or blocks of a paged cache.
        known: positions that were taken over.
        at: its next position.
        pieces: computes the prompt.
    """

    prompt: Prompt
    mode: str
    total: int
    contents: Any
    known: int = 0
    at: int = 0
    pieces: Generator[None, None, np.ndarray] | None = None


class BatchDecoder:
    """Continues rows that begin and end when they like; for one thread.

    Args:
        engine: whose model, pictures and store it uses.
        rows: that are open at most.
        positions: S, of prompt and answer.
        piece: positions of a piece of a prompt.

    Attributes:
        most: `rows`.
        reuse: what is taken over from earlier prompts; `None` where nothing is.
        reaches: positions up to which a piece sees what its row holds, each with a graph of its own.
    """

    reaches: Sequence[int] = (1,)       # all, by one graph

    def __init__(self, engine: InferenceEngine, rows: int, positions: int, piece: int = 64):
        self.engine, self.config, self.most, self.positions, self.piece = engine, engine.config, rows, positions, piece
        self.reuse = engine.reuse
        self._make_room()
        self._pieces: dict[tuple[str, int, bool], list[ExtendGraph]] = {}
        self._steps: dict[tuple[str, int], InferenceGraph] = {}
        self._has_tried_vision = False

    def _make_room(self) -> None:
        """Makes what keys and values are kept in."""
        rows, positions = self.most, self.positions
        self._reading = ContiguousSlot(self.config, 1, positions)
        # more at once would be another product, which rounds otherwise: they are computed one part after the other
        self._writing = [ContiguousSlot(self.config, 1, positions) for _ in range(min(rows, kernels.FEW_ROWS))]
        self._free = [Memory(self._reading) for _ in range(rows)]
        self._spare: Any = Memory(self._reading)    # what rows that are only there to fill a graph write to
        for slot in (self._reading, *self._writing):
            slot.attach(self._spare)                # the memory that they were built with is given back

    @property
    def at_once(self) -> int:
        """Rows of the largest graph."""
        return len(self._writing)

    # ------------------------------------------------------------------ the rows

    def prepare(self, sample: EncodedSample) -> Prompt:
        """A sample with its pictures hashed, which takes a while; for any thread."""
        return Prompt.of(sample)

    def has_room(self, prompt: Prompt, new_tokens: int, answers: int) -> bool:
        """Whether there is memory for so many answers to a prompt; a row has its own from the start."""
        return True

    def open(self, prompt: Prompt, mode: str, new_tokens: int, answers: int = 1) -> Row:
        """A row for a prompt and at most `new_tokens` more, of which `fork` makes further answers."""
        with TURNS:
            self.engine.notice_weights()
        row = Row(prompt, mode, len(prompt) + new_tokens, self._free.pop())
        row.pieces = self._prompt(row)
        return row

    def close(self, row: Row) -> None:
        """Frees a row."""
        row.pieces = None
        self._free.append(row.contents)

    def rest(self, row: Row) -> int:
        """Positions of a row's prompt that are still to be computed."""
        return max(0, len(row.prompt) - row.at)

    def known(self, row: Row) -> int:
        """Positions of a row's prompt that were taken over."""
        return row.known

    def advance(self, row: Row) -> np.ndarray | None:
        """Computes some tiles of a picture of a row's prompt, or some layers of a piece of it.

        Returns:
            At the end of the prompt the logits `(V,)` of the next token.
        """
        assert row.pieces is not None, "a closed row is not continued"
        with TURNS:
            try:
                next(row.pieces)
            except StopIteration as done:
                row.pieces, row.prompt = None, row.prompt.without_pixels()
                return done.value
        return None

    def fork(self, row: Row) -> Row:
        """Another row that goes on from the end of the same prompt."""
        other = Row(row.prompt, row.mode, row.total, self._free.pop(), row.known, row.at)
        other.contents.begin([array[:, :row.at] for array in row.contents.arrays])
        return other

    def step(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[np.ndarray | Exception]:
        """Logits `(V,)` after one more token of each row, all of one mode."""
        found: list[np.ndarray | Exception] = []
        for start in range(0, len(rows), self.at_once):
            end = start + self.at_once
            found += self._step(rows[start:end], tokens[start:end])
        return found

    def _step(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[np.ndarray]:
        count = next(size for size in self.sizes if size >= len(rows))
        at = np.zeros(count, np.int64)
        at[:len(rows)] = [row.at for row in rows]
        ids = np.zeros((count, 1), np.int32)
        ids[:len(rows), 0] = tokens
        with TURNS:
            if (rows[0].mode, count) not in self._steps:
                self._try_step(rows[0].mode, count)
            self._attach(rows, count)
            totals = at + 1
            if self.config.dynamic_ntk == "request":
                totals[:len(rows)] = [row.total for row in rows]
            logits = self._decode(rows[0].mode, ids, at, totals)
        for row in rows:
            row.at += 1
        return list(logits[:len(rows)])

    @property
    def sizes(self) -> list[int]:
        """Rows of the decoding graphs."""
        found = [1]
        while found[-1] < self.at_once:
            found.append(min(2 * found[-1], self.at_once))
        return found

    def _attach(self, rows: Sequence[Row], count: int) -> None:
        for place in range(count):
            self._writing[place].attach(rows[place].contents if place < len(rows) else self._spare)

    def _decode(self, mode: str, ids: np.ndarray, at: np.ndarray, totals: np.ndarray) -> np.ndarray:
        graph, first = self.step_graph(mode, len(ids)), self._writing[0]
        cos, sin = rotary_rows(self.config, at, totals)
        cos, sin = decode_tables(cos, sin, self.config.query_groups, first.query_scale)
        places = [first.places(at[row:row + 1]) for row in range(len(ids))]
        where, positions = (np.concatenate([place[half] for place in places]) for half in (0, 1))
        return graph(Tensor(ids), Tensor(cos[:, None]), Tensor(sin[:, None]), Tensor(where),
                     Tensor(positions)).asnumpy().copy()

    # ------------------------------------------------------------------ prompts

    def _prompt(self, row: Row) -> Generator[None, None, np.ndarray]:
        """Computes a row's prompt piece by piece."""
        sample, length = row.prompt.sample, len(row.prompt)
        keys = self._take_over(row)
        images = yield from self._images(row)
        total = row.total if self.config.dynamic_ntk == "request" else length
        logits = np.zeros(0)
        while row.at < length:
            size = self._size(sample.image_mask[row.at:])
            real = min(size, length - row.at)
            part = slice(row.at, row.at + real)
            mask = np.zeros((1, size), np.int32)
            mask[0, :real] = sample.image_mask[part]
            embeds = np.zeros((1, size, self.config.hidden_size), numpy_type(self.config.compute_dtype))
            before = int(sample.image_mask[:row.at].sum())
            embeds[0, mask[0] == 1] = images[before:before + int(mask.sum())]
            ids = np.full((1, size), self.config.pad_token_id, np.int32)
            ids[0, :real] = sample.input_ids[part]
            given = (Tensor(embeds), mask) if mask.any() else None
            if (row.mode, size, given is not None) not in self._pieces:
                self._try_piece(row.mode, size, given is not None)
            logits = yield from self._run_piece(row.contents, row.mode, ids, row.at, real, total, given)
            row.at += real
            if real == self.piece and keys:
                self._keep(row, keys)
            if row.at < length:
                yield
        return logits

    def _size(self, images: np.ndarray) -> int:
        """Positions of the next piece, of a rest with these image positions; the last piece, of text, is smaller."""
        return LAST if len(images) <= LAST and not images.any() else self.piece

    def _run_piece(self, contents: Any, mode: str, ids: np.ndarray, at: int, real: int, total: int,
                   images: tuple[Tensor, np.ndarray] | None) -> Generator[None, None, np.ndarray]:
        """Logits `(V,)` after the last real position of a piece; others may be computed after each of its parts."""
        size = ids.shape[1]
        cos, sin = rotary_rows(self.config, np.arange(at, at + size), total)
        # where there are no pictures, Partial LoRA is left out
        graphs = self.piece_graphs(mode, size, images is not None)
        x, *given = graphs[0].inputs(ids, (cos[None], sin[None]), np.array([at]), np.array([real]), images,
                                     np.array([max(real - 1, 0)]), self._held(contents, at + real))
        found = np.zeros(0)
        for number, graph in enumerate(graphs):
            if number:
                yield
            self._hold(contents)
            found = graph(x, *given).asnumpy().copy()
            x = Tensor(found)
        return found[0]

    def _hold(self, contents: Any) -> None:
        """Makes the next part of a piece one of a row."""
        self._reading.attach(contents)

    def _held(self, contents: Any, end: int) -> tuple[np.ndarray, ...]:
        """What a piece that ends before position `end` must be told of what its row holds."""
        return ()

    def _images(self, row: Row) -> Generator[None, None, np.ndarray]:
        """Embeddings of a prompt's image positions `(N, D)`, of the pictures that are needed and not known.

        Each picture is encoded by itself: what comes of it depends on it alone.
        """
        prompt, reuse = row.prompt, self.reuse
        before = int(prompt.sample.image_mask[:row.at].sum())
        found: list[np.ndarray] = []
        for number, picture in enumerate(prompt.pictures):
            count = picture.rows[1] - picture.rows[0]
            if picture.rows[1] <= before:       # taken over; only its place counts
                found.append(np.zeros((count, self.config.hidden_size), numpy_type(self.config.compute_dtype)))
                continue
            rows = None if reuse is None else reuse.picture(picture)
            if rows is None:
                self._try_vision()
                alone = without_others(prompt.sample, [number], prompt.pictures)
                rows = (yield from self.engine.encoding(alone)).asnumpy().copy()
                if reuse is not None:
                    reuse.keep_picture(picture, rows)
            found.append(rows)
        return np.concatenate(found) if found else np.zeros((0, self.config.hidden_size), np.float32)

    # ------------------------------------------------------------------ what is taken over

    def _keys(self, row: Row) -> list[bytes]:
        """Keys of the whole blocks of a prompt; they say by which pieces it was computed."""
        reuse = self.reuse
        if reuse is None or not reuse.store.limit:
            return []
        total = row.total if self.config.dynamic_ntk == "request" else len(row.prompt)
        return reuse.keys(row.prompt, f"{row.mode} in pieces of {self.piece}", rotary_base(self.config, total))

    def _take_over(self, row: Row) -> list[bytes]:
        """Makes a row begin behind the whole pieces that are known; the keys of all its blocks."""
        keys, each = self._keys(row), self.piece // BLOCK
        whole = (len(row.prompt) - 1) // self.piece
        reuse = self.reuse
        if keys and reuse is not None:
            blocks = reuse.store.longest(keys[:whole * each])
            blocks = blocks[:len(blocks) // each * each]
            if blocks:
                row.contents.begin([np.concatenate([block[number] for block in blocks], 1)
                                    for number in range(len(row.contents.arrays))])
                row.at = row.known = len(blocks) * BLOCK
        return keys

    def _keep(self, row: Row, keys: list[bytes]) -> None:
        """Gives the piece that was just computed to the store."""
        reuse = self.reuse
        assert reuse is not None, "without it there are no keys"
        first, end = (row.at - self.piece) // BLOCK, row.at // BLOCK
        if all(key in reuse.store for key in keys[first:end]):
            return
        halves = [array[:, row.at - self.piece:row.at] for array in row.contents.arrays]
        new = [np.stack([half[:, BLOCK * number:BLOCK * number + BLOCK] for half in halves])
               for number in range(end - first)]
        reuse.store.put_chain(keys[:end], [None] * first + new)

    # ------------------------------------------------------------------ graphs

    def piece_graphs(self, mode: str, size: int, has_images: bool) -> list[ExtendGraph]:
        """The graphs that compute a piece one after the other, each some layers."""
        key, count = (mode, size, has_images), self.config.num_hidden_layers
        if key not in self._pieces:
            parts = min(count, max(2, count // PART_LAYERS))
            bounds = [count * number // parts for number in range(parts + 1)]
            self._pieces[key] = [ExtendGraph(self.engine.model, self._reading.caches, mode, size, range(*part))
                                 for part in zip(bounds, bounds[1:])]
        return self._pieces[key]

    def step_graph(self, mode: str, rows: int) -> InferenceGraph:
        """The graph of one more token of so many rows, made at first use."""
        if (mode, rows) not in self._steps:
            self._steps[mode, rows] = RowsGraph(self.engine.model, self._writing[:rows], mode)
        return self._steps[mode, rows]

    def warm_up(self, mode: str) -> None:
        """Compiles the graphs of a mode, so that no request waits for a compiler."""
        with TURNS:
            for size, has_images in dict.fromkeys([(self.piece, True), (self.piece, False), (LAST, False)]):
                self._try_piece(mode, size, has_images)
            for count in self.sizes:
                self._try_step(mode, count)
            self._try_vision()

    def _try_step(self, mode: str, count: int) -> None:
        """Runs a step of nobody's answers."""
        self._attach([], count)
        self._decode(mode, np.zeros((count, 1), np.int32), np.zeros(count, np.int64), np.ones(count, np.int64))

    def _try_vision(self) -> None:
        """Runs the graph of tiles over nobody's, once."""
        if not self._has_tried_vision:
            side = self.config.vision_config.image_size
            self.engine.vision(Tensor(np.zeros((1, self.engine.tiles_per_call, 3, side, side), np.float32)))
            self._has_tried_vision = True

    def _try_piece(self, mode: str, size: int, has_images: bool) -> float:
        """Runs pieces of nobody's prompt, one up to each of `reaches`; seconds of the longest part."""
        embeds = np.zeros((1, size, self.config.hidden_size), numpy_type(self.config.compute_dtype))
        images = (Tensor(embeds), np.zeros((1, size), np.int32)) if has_images else None
        longest = 0.0
        for end in self.reaches:
            nobodys = self._run_piece(self._spare, mode, np.zeros((1, size), np.int32), end - 1, 1, end, images)
            goes_on = True
            while goes_on:
                begun = time.perf_counter()
                goes_on = next(nobodys, nobodys) is None
                longest = max(longest, time.perf_counter() - begun)
        return longest

    def choose_piece(self, sizes: Sequence[int], seconds: float) -> float:
        """Makes pieces of prompts the largest of some sizes whose parts take so many seconds at most, or the least.

        Returns:
            Seconds that the longest part takes.
        """
        taken = 0.0
        for size in sorted(sizes, reverse=True):
            self.piece = size
            with TURNS:
                self._try_piece("base", size, True)      # compiles it
                taken = self._try_piece("base", size, True)
            if taken <= seconds:
                break
        return taken

    @property
    def bytes(self) -> int:
        """Of keys and values of all rows."""
        return (self.most + 1) * self._reading.bytes
