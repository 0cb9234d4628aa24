"""Several answers at once over Ascend's paged cache: one cache for all rows, whose blocks come from a pool.

The steps are those of `batching`: pieces of prompts, graphs for 1, 2, 4, ... rows. What differs is where keys and
values are. Row i of a step has a line of the block tables, so a row that begins or ends moves nobody's keys, and an
answer takes the memory that it needs, not that of the longest one.

Paged attention takes one token a row. A piece of a prompt goes through flash attention, which does not know blocks:
those of its row are put together for it (`PagedCache.extend`), as many as the piece may see. As shapes are static, that
is one of a few numbers of blocks, each with a graph of its own.

An answer's pieces, and what is taken over from earlier prompts, whole pieces, depend on its prompt alone. What Ascend's
products make of a row in a step of 2 or 8 rows may still be rounded differently.
"""
from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import functional as F

from mindformers_ixc.generation.ascend import pool_blocks
from mindformers_ixc.generation.batching import BatchDecoder, Row
from mindformers_ixc.generation.blocks import NOBODYS, BlockPool, RowBlocks
from mindformers_ixc.generation.caches import PagedCache, decode_tables
from mindformers_ixc.generation.engine import DecodeGraph
from mindformers_ixc.generation.extending import ExtendGraph
from mindformers_ixc.generation.reuse import BLOCK, Prompt, Reuse
from mindformers_ixc.generation.slots import InferenceGraph
from mindformers_ixc.generation.store import Store
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.attention import compressed_causal_mask
from mindformers_ixc.models.rotary import rotary_rows

# What a piece sees is put together from the blocks of its row: all positions that a row may have, or a fourth of them,
# a sixteenth, ..., but no less than this many. 4096 of the 7B model are 0.5 GB in all layers, read and written once a
# piece; its weights are 17 GB. Reckoned, not measured.
SEEN = 4096


class CopyGraph(InferenceGraph):
    """Makes a block hold what another one does, in every layer."""

    def __init__(self, caches: nn.CellList):
        super().__init__()
        self.caches = caches

    def construct(self, block, slots):
        """Copies block int32 `(1,)` to int32 `(block_size,)` slots."""
        done = 0
        for cache in self.caches:
            done = F.depend(done, cache.copy(block, slots))
        return done


class PagedBatchDecoder(BatchDecoder):
    """`BatchDecoder` over one paged cache; arguments as there.

    Attributes:
        pool: the blocks.
        copy_graph: makes a block hold what another one does.
    """

    def _make_room(self) -> None:
        config, mask = self.config, compressed_causal_mask()
        weights = sum(parameter.size * parameter.itemsize for parameter in self.engine.model.get_parameters())
        blocks = pool_blocks(config, self.most, self.positions, weights)
        self.pool = BlockPool(blocks, config.block_size)
        self._caches = nn.CellList([PagedCache(config, blocks, mask) for _ in range(config.num_hidden_layers)])
        self._spare = RowBlocks(self.pool, 0)       # has nobody's block only
        self._rows: list[RowBlocks] = [self._spare]
        self.copy_graph = CopyGraph(self._caches)
        # the engine's is for caches on the host; pictures are kept there here too, keys and values in their blocks
        self.reuse = Reuse(Store(config.reuse_bytes), config)
        self._generation = self.engine.generation
        self._widths = [self.pool.blocks_of(self.positions)]
        while self._widths[0] * config.block_size >= 4 * SEEN:
            self._widths.insert(0, -(-self._widths[0] // 4))
        self.reaches = [width * config.block_size for width in self._widths]

    @property
    def at_once(self) -> int:
        """Rows of the largest step."""
        return self.most

    # ------------------------------------------------------------------ the rows

    def has_room(self, prompt: Prompt, new_tokens: int, answers: int) -> bool:
        """Whether there are blocks for so many answers to a prompt."""
        return self._needed(prompt, new_tokens, answers) <= self.pool.free

    def ever_has_room(self, prompt: Prompt, new_tokens: int, answers: int) -> bool:
        """Whether there would be, had nobody else any."""
        return self._needed(prompt, new_tokens, answers) < self.pool.count      # one is nobody's

    def _needed(self, prompt: Prompt, new_tokens: int, answers: int) -> int:
        return RowBlocks.needed(self.pool, len(prompt) + new_tokens, answers, len(prompt))

    def open(self, prompt: Prompt, mode: str, new_tokens: int, answers: int = 1) -> Row:
        """See `BatchDecoder.open`; the blocks of further answers are kept for `fork`.

        Raises:
            GenerationError: when there are too few blocks (`has_room`).
        """
        if self._generation != self.engine.generation:      # the weights may be others
            self._generation = self.engine.generation
            self.pool.forget()
            if self.reuse is not None:
                self.reuse.renew()
        total = len(prompt) + new_tokens
        row = Row(prompt, mode, total, RowBlocks(self.pool, total, answers - 1, len(prompt)))
        row.pieces = self._prompt(row)
        return row

    def close(self, row: Row) -> None:
        """Frees a row."""
        row.pieces = None
        if not row.contents.is_clean:
            for block in row.contents.own():
                self._copy_block(NOBODYS, block)
        row.contents.close()

    def fork(self, row: Row) -> Row:
        """See `BatchDecoder.fork`; whole blocks of the prompt are shared, the last one is copied."""
        blocks, size = row.contents.fork(row.at), self.pool.size
        if row.at % size:
            place = row.at // size
            self._copy_block(row.contents.table[place], blocks.table[place])
        return Row(row.prompt, row.mode, row.total, blocks, row.known, row.at)

    def _copy_block(self, source: int, target: int) -> None:
        slots = target * self.pool.size + np.arange(self.pool.size, dtype=np.int32)
        with TURNS:
            self.copy_graph(Tensor(np.array([source], np.int32)), Tensor(slots))

    def _attach(self, rows: Sequence[Row], count: int) -> None:
        self._rows = [row.contents for row in rows] + [self._spare] * (count - len(rows))

    def _decode(self, mode: str, ids: np.ndarray, at: np.ndarray, totals: np.ndarray) -> np.ndarray:
        graph = self.step_graph(mode, len(ids))
        cos, sin = rotary_rows(self.config, at, totals)
        cos, sin = decode_tables(cos, sin, self.config.query_groups, 1.0)       # paged attention scales by itself
        tables = np.stack([blocks.padded(self._widths[-1]) for blocks in self._rows])       # (n, blocks)
        blocks = tables[np.arange(len(at)), at // self.pool.size]
        slots = (blocks * self.pool.size + at % self.pool.size).astype(np.int32)
        logits = graph(*map(Tensor, (ids, cos[:, None], sin[:, None], slots, tables, (at + 1).astype(np.int32)))
                       ).asnumpy().copy()
        for row, scores in zip(self._rows, logits):
            self._look_at(row, scores)
        return logits

    def _look_at(self, blocks: RowBlocks, logits: np.ndarray) -> None:
        """Takes note of scores that are no numbers: a position whose keys are none makes all later ones so.

        A piece's flash attention is handed whole blocks, also what an earlier row has left behind its own positions.
        Hidden numbers count for nothing, but what is no number times 0 is none.
        """
        if blocks is not self._spare and not np.isfinite(logits).all():
            blocks.is_clean = False

    # ------------------------------------------------------------------ prompts

    def _run_piece(self, contents: RowBlocks, mode: str, ids: np.ndarray, at: int, real: int, total: int,
                   images: tuple[Tensor, np.ndarray] | None) -> Generator[None, None, np.ndarray]:
        logits = yield from super()._run_piece(contents, mode, ids, at, real, total, images)
        self._look_at(contents, logits)
        return logits

    def _hold(self, contents: RowBlocks) -> None:
        """Nothing is to be done: a piece is told its blocks."""

    def _held(self, contents: RowBlocks, end: int) -> tuple[np.ndarray, ...]:
        """The blocks that a piece which ends before position `end` sees."""
        width = next(width for width, reach in zip(self._widths, self.reaches) if reach >= end)
        return (contents.padded(width),)

    def _names(self, row: Row) -> list[bytes]:
        """Names of the whole blocks of a prompt."""
        keys, each = self._keys(row), self.pool.size // BLOCK
        return keys[each - 1::each] if each else []

    def _take_over(self, row: Row) -> list[bytes]:
        names = self._names(row)
        # whole blocks that end with a piece: what comes behind them is computed as it is without them
        each = math.lcm(self.piece, self.pool.size)
        most = (len(row.prompt) - 1) // each * each // self.pool.size
        found = self.pool.find(names, most)
        found = found[:len(found) * self.pool.size // each * each // self.pool.size]
        row.contents.begin_with(found)
        row.at = row.known = len(found) * self.pool.size
        return names

    def _keep(self, row: Row, keys: list[bytes]) -> None:
        """Names the blocks that are whole by now."""
        whole = row.at // self.pool.size if row.contents.is_clean else 0
        for block, name in zip(row.contents.table[:whole], keys):
            self.pool.name(block, name)

    # ------------------------------------------------------------------ graphs

    def piece_graphs(self, mode: str, size: int, has_images: bool) -> list[ExtendGraph]:
        """See `BatchDecoder.piece_graphs`; one, whose states stay on the device."""
        key = (mode, size, has_images)
        if key not in self._pieces:
            self._pieces[key] = [ExtendGraph(self.engine.model, self._caches, mode, size)]
        return self._pieces[key]

    def step_graph(self, mode: str, rows: int) -> InferenceGraph:
        """See `BatchDecoder.step_graph`."""
        if (mode, rows) not in self._steps:
            self._steps[mode, rows] = DecodeGraph(self.engine.model, self._caches, mode)
        return self._steps[mode, rows]

    def warm_up(self, mode: str) -> None:
        """See `BatchDecoder.warm_up`."""
        super().warm_up(mode)
        self._copy_block(NOBODYS, NOBODYS)

    @property
    def bytes(self) -> int:
        """Of keys and values of all rows."""
        return 2 * sum(cache.keys.size * cache.keys.itemsize for cache in self._caches)
