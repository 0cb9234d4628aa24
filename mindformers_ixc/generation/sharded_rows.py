"""Several answers at once in a parallel layout: the rows of one cache that is cut over the devices.

`batching` gives every row caches of its own, which in a layout cannot be moved. Here there is one cache with a row for
each answer (`ShardedSlot`) and one graph that continues all of them; a row that has no part in a step, because it is
free or of another mode, gets no key and no value in it. A prompt is computed at once, as everywhere
(`engine.CachedDecoder`), in a cache of one row and as many positions, and what that holds is copied to the answer's
row: every device copies its own heads.

Every rank must be told the same in the same order (`mindformers_ixc.serving.ranks`), since each call computes with all.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from mindformers_ixc.generation.engine import InferenceEngine, bucket
from mindformers_ixc.generation.reuse import Prompt
from mindformers_ixc.generation.slots import ShardedSlot, cache_bytes
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Tiles
from mindformers_ixc.processing.prompt import IGNORE_INDEX


@dataclass(eq=False)
class SharedRow:
    """An answer in the making.

    Attributes:
        prompt: of the answer; `None` once it has been computed, for its pixels take memory.
        length: positions of the prompt.
        mode: which task LoRAs are in use.
        total: positions of prompt and answer at most.
        place: row of the cache.
        at: its next position; 0 until the prompt is computed.
    """

    prompt: Prompt | None
    length: int
    mode: str
    total: int
    place: int
    at: int = 0


class ShardedRows:
    """Continues rows of one cache that begin and end when they like (a `scheduling.RowDecoder`); for one thread.

    Args:
        engine: whose model it uses; in a layout without replicas.
        rows: that are open at most, all of which every step computes.
        positions: of prompt and answer; the cache has the next bucket's.

    Attributes:
        most: `rows`.
    """

    def __init__(self, engine: InferenceEngine, rows: int, positions: int):
        self.engine, self.config, self.most, self.positions = engine, engine.config, rows, bucket(positions)
        self.by_request = self.config.dynamic_ntk == "request"
        self.slot = ShardedSlot(self.config, rows, self.positions)
        self._free = list(range(rows))[::-1]
        engine.kept.add((1, self.positions))        # where prompts are computed; beam search needs other shapes

    def prepare(self, sample: EncodedSample) -> Prompt:
        """A sample as it is: nothing is taken over here, so its pictures need not be hashed."""
        return Prompt(sample, [])

    def has_room(self, prompt: Prompt, new_tokens: int, answers: int) -> bool:
        """Whether there is memory for more answers, where a row is free: every row has all its positions."""
        return True

    def open(self, prompt: Prompt, mode: str, new_tokens: int, answers: int = 1) -> SharedRow:
        """A row for a prompt and at most `new_tokens` more; further answers to it get theirs by `fork`."""
        return SharedRow(prompt, len(prompt), mode, len(prompt) + new_tokens, self._free.pop())

    def close(self, row: SharedRow) -> None:
        """Frees a row; the next prompt overwrites what it holds."""
        self._free.append(row.place)

    def rest(self, row: SharedRow) -> int:
        """Positions of a row's prompt that are still to be computed: all or none."""
        return 0 if row.at else row.length

    def known(self, row: SharedRow) -> int:
        """Positions that were taken over: none."""
        return 0

    def advance(self, row: SharedRow) -> np.ndarray:
        """Computes a row's prompt; logits `(V,)` of the next token."""
        assert row.prompt is not None, "a prompt is computed once"
        with TURNS:
            self._make_graphs(row.mode)
            logits = self._read(row.prompt.sample, row.mode, row.total, row.place)
        row.prompt, row.at = None, row.length
        return logits

    def fork(self, row: SharedRow) -> SharedRow:
        """Another row that goes on from the end of the same prompt, before `row` has gone on."""
        assert row.at == row.length, "what a row holds behind its prompt would be added to"
        other = SharedRow(None, row.length, row.mode, row.total, self._free.pop(), row.at)
        with TURNS:
            self.slot.take_row(other.place, self.slot, row.place)
        return other

    def step(self, rows: Sequence[SharedRow], tokens: Sequence[int]) -> list[np.ndarray | Exception]:
        """Logits `(V,)` after one more token of each row, all of one mode."""
        ids, at = np.zeros(self.most, np.int32), np.full(self.most, -1)
        totals = np.ones(self.most, np.int64)
        for row, token in zip(rows, tokens):
            ids[row.place], at[row.place] = token, row.at
            totals[row.place] = row.total if self.by_request else row.at + 1
        with TURNS:
            self._make_graphs(rows[0].mode)
            logits = self.engine.run_decode(self.slot, rows[0].mode, ids, at, totals).asnumpy().copy()
        for row in rows:
            row.at += 1
        return [logits[row.place] for row in rows]

    def warm_up(self, mode: str) -> None:
        """Compiles what a short question in a mode needs; longer prompts and pictures compile theirs when they come."""
        with TURNS:
            self._make_graphs(mode)
            self._read(self._nobodys(), mode, self.positions, None)

    @property
    def bytes(self) -> int:
        """Of keys and values of all rows and of the prompt in the making, on all devices."""
        return cache_bytes(self.config, self.most + 1, self.positions)

    def _read(self, sample: EncodedSample, mode: str, total: int, place: int | None) -> np.ndarray:
        """Computes a prompt, which a row then holds; logits `(V,)`."""
        room = self.positions - len(sample.input_ids)        # the same cache, however long prompt and answer are
        with closing(self.engine.decoder([sample], room, mode)) as decoder:
            decoder.totals = np.array([total])
            logits = decoder.prefill()[0]
            if place is not None:
                assert isinstance(decoder.slot, ShardedSlot), "a layout has no other"
                self.slot.take_row(place, decoder.slot, 0)
        return logits

    def _make_graphs(self, mode: str) -> None:
        """Compiles the step of a mode at its first use, by one of nobody's; the devices then have their caches, too."""
        if mode not in self.slot.graphs:
            self.slot.graphs[mode] = self.engine.make_graphs(self.slot, mode)
            nobody = np.zeros(self.most, np.int32)
            self.engine.run_decode(self.slot, mode, nobody, nobody - 1, nobody + 1)

    def _nobodys(self) -> EncodedSample:
        """The shortest prompt."""
        ids = np.array([self.config.bos_token_id], np.int32)
        vision = self.config.vision_config
        return EncodedSample(ids, np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids), [],
                             Tiles.none(vision.image_size), vision.tokens_per_side)
