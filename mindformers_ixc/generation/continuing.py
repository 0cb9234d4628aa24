"""A cached decoder's part of what takes several positions at once: prompts whose beginning is known, and proposals."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Tensor

from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.generation.caches import NativeCache
from mindformers_ixc.generation.extending import (
    COMPILING,
    ExtendGraph,
    calls,
    is_large,
    pays,
    saved_operations,
    takes_images,
)
from mindformers_ixc.generation.reuse import BLOCK, Prompt
from mindformers_ixc.generation.slots import ContiguousSlot, Slot
from mindformers_ixc.models.rotary import rotary_rows
from mindformers_ixc.processing.encoded import EncodedSample

if TYPE_CHECKING:
    from mindformers_ixc.generation.engine import InferenceEngine

# What an extending graph is for: one position of each row is wanted, or all.
REST, VERIFY = "rest", "verify"


class Continuing:
    """Methods of `CachedDecoder`, whose attributes these are.

    Attributes:
        fed: token ids of each row that the cache holds behind the prompt.
        prompts: the samples with their pictures hashed; none where nothing is reused.
    """

    engine: InferenceEngine
    samples: list[EncodedSample]
    slot: Slot
    mode: str
    beams: int
    batch: int
    bucket: int
    capacity: int
    lengths: np.ndarray
    totals: np.ndarray
    positions: np.ndarray
    by_request: bool
    fed: list[list[int]]
    prompts: list[Prompt]
    closed: bool
    _past: list[tuple[Callable[[Any, Any], Any], Any]]
    _left_over: bool = False

    def _turn(self) -> AbstractContextManager[None]:
        """One thread at a time."""
        raise NotImplementedError

    def _restore(self) -> None:
        """Makes the cache hold what it did, computed anew if it was taken away meanwhile."""
        raise NotImplementedError

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of each row's prompt, -1 in the place of a picture."""
        found = []
        for sample in self.samples:
            ids = np.where(sample.image_mask == 1, -1, sample.input_ids)
            once = np.append(True, (ids[1:] >= 0) | (ids[:-1] >= 0))        # a picture's positions but its first go
            found += [ids[once].tolist()] * self.beams
        return found

    @property
    def may_step(self) -> bool:
        """Whether a step may follow: composed caches add a new key to zeros, which tokens not accepted have spoilt."""
        return not self._left_over or isinstance(self.slot.caches[0], NativeCache)

    def _prompt_totals(self) -> np.ndarray:
        """Length that sets the rotary base of each row's prompt, `(B,)`."""
        return self.totals if self.by_request else self.lengths

    def _known(self) -> list[list[np.ndarray]]:
        """For each row the blocks of the cache with which its prompt begins."""
        if self.engine.reuse is None:
            return [[] for _ in range(self.batch)]
        totals = self._prompt_totals()[::self.beams]
        return [blocks for prompt, total in zip(self.prompts, totals)
                for blocks in [self.engine.reuse.beginning(prompt, self.mode, int(total))] * self.beams]

    def _begin_in_calls(self) -> np.ndarray | None:
        """Logits after each prompt, if enough is known of their beginnings or the model is large; else `None`."""
        known = self._known()
        at = np.array([len(blocks) * BLOCK for blocks in known])
        large = isinstance(self.slot.caches[0], NativeCache) and is_large(self.engine.config)
        if not at.any() and not large:
            return None
        images = [np.flatnonzero(self.samples[row // self.beams].image_mask) - start for row, start in enumerate(at)]
        sizes = calls(int((self.lengths - at).max()), np.concatenate(images), by_any=large)
        if not large and (not pays(sizes, self.bucket) or not self._worth_compiling(sizes, int(at.sum()))):
            return None
        if at.any():
            contents = self.engine.caches.contents_of(self)
            assert contents is not None and isinstance(self.slot, ContiguousSlot), "something is known, so it has begun"
            self.slot.hold(contents, known)
        return self._rest(at, sizes)

    def _worth_compiling(self, sizes: Sequence[int], known: int) -> bool:
        """Whether the graphs for calls of these sizes are there, or are to be made.

        A second question must not wait for a compiler that it would do better without. So where the graph of whole
        prompts is there, others are made once what they would have saved is as much as compiling them takes.
        """
        slot = self.slot
        missing = [size for size in set(sizes) if (self.mode, size, REST) not in slot.extensions]
        if not missing or (self.mode, self.bucket) not in slot.prefilled:
            return True
        slot.missed += saved_operations(self.engine.config, known)
        return slot.missed >= COMPILING * self.engine.config.num_hidden_layers * len(missing)

    def _rest(self, start: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """Runs the rest of each prompt, from the positions `start` `(B,)` on, in calls of these sizes."""
        config, at = self.engine.config, start.copy()
        table = int(at.max()) + sum(sizes)
        tables = [self.engine.tables(table, int(total)) for total in self._prompt_totals()]
        logits = np.zeros((self.batch, config.vocab_size), np.float32)
        rows = self._image_rows(start)
        for size in sizes:
            real = np.clip(self.lengths - at, 0, size)
            ids = np.full((self.batch, size), config.pad_token_id, np.int32)
            images = np.zeros((self.batch, size), np.int32)
            embeds = np.zeros((self.batch, size, config.hidden_size), numpy_type(config.compute_dtype))
            for row, (first, count) in enumerate(zip(at, real)):
                sample, part = self.samples[row // self.beams], slice(first, first + count)
                ids[row, :count], images[row, :count] = sample.input_ids[part], sample.image_mask[part]
                before = int(sample.image_mask[start[row]:first].sum())
                embeds[row, images[row] == 1] = rows[row][before:before + images[row].sum()]
            angles = tuple(np.stack([pair[half][first:first + size] for pair, first in zip(tables, at)])
                           for half in (0, 1))
            graph = self.engine.extension(self.slot, self.mode, size, REST)
            shown = (Tensor(embeds), images) if takes_images(config, size) else None
            found = graph(*graph.inputs(ids, angles, at, real, shown,
                                        np.arange(self.batch) * size + np.maximum(real - 1, 0))).asnumpy()
            at = at + real
            ends = (real > 0) & (at == self.lengths)
            logits[ends] = found[ends]
        return logits

    def _image_rows(self, start: np.ndarray) -> list[np.ndarray]:
        """Embeddings of each row's image positions from `start` `(B,)` on."""
        none = np.zeros((0, self.engine.config.hidden_size), numpy_type(self.engine.config.compute_dtype))
        found = []
        for row in range(0, self.batch, self.beams):
            sample, first = self.samples[row // self.beams], int(start[row])
            if not sample.image_mask[first:].any():
                own = none
            elif self.prompts:
                own = self.engine.image_rows(self.prompts[row // self.beams], first)
            else:                                       # nothing is known, so all of it is asked for
                own = self.engine.encode_images(sample).asnumpy()
            found += [own] * self.beams
        return found

    def verify(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Logits `(B, R, V)` after each of some more tokens of every row, which are not appended yet.

        Args:
            tokens: int32 `(B, R)`.
            real: `(B,)`, how many of them each row has.
        """
        self.engine.between_steps()
        with self._turn():
            self._restore()
            return self._verify(tokens, real)

    def accept(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Appends the first `counts` `(B,)` of the tokens that were verified last."""
        self._past.append((type(self)._verify_again, (tokens, counts)))
        self._appended(tokens, counts)
        self.engine.decoded += int(counts.max())

    def _appended(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        for row, count in enumerate(counts):
            self.fed[row] += tokens[row, :count].tolist()
        self.positions = self.positions + counts.astype(np.int32)
        self._left_over = True

    def _verify_again(self, argument: tuple[np.ndarray, np.ndarray]) -> None:
        self._verify(*argument)
        self._appended(*argument)

    def _verify(self, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Runs the graph that extends the cache by more tokens, int32 `(B, R)`."""
        config, (batch, rows) = self.engine.config, tokens.shape
        at = self.positions[:, None] + np.arange(rows)                                      # (B, R)
        totals = np.broadcast_to(self.totals[:, None], at.shape) if self.by_request else at + 1
        cos, sin = (half.reshape(batch, rows, -1) for half in rotary_rows(config, at.ravel(), totals.ravel()))
        graph: ExtendGraph = self.engine.extension(self.slot, self.mode, rows, VERIFY)
        logits = graph(*graph.inputs(tokens, (cos, sin), self.positions, real)).asnumpy()
        return logits.reshape(batch, rows, -1).copy()

    def keep(self) -> None:
        """Gives what the cache holds to the store, if it is still there."""
        reuse, contents = self.engine.reuse, self.engine.caches.contents_of(self)
        if reuse is None or contents is None or not reuse.store.limit:
            return
        kv = self.engine.config.num_key_value_heads
        for number, prompt in enumerate(self.prompts):
            row = number * self.beams
            more = self.fed[row]
            totals = [int(self._prompt_totals()[row])]
            totals += [int(self.totals[row]) if self.by_request else len(prompt) + place + 1
                       for place in range(len(more))]
            reuse.keep(prompt, self.mode, totals, more,
                       (half[row * kv:row * kv + kv] for half in self.slot.halves(contents)))
