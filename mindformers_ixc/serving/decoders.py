"""What decodes for a server: rows in one batch where caches can be joined, else decoders that take turns."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mindformers_ixc.device import is_parallel
from mindformers_ixc.generation.ascend import check_blocks, check_paged_dtype
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.batching import BatchDecoder, Row
from mindformers_ixc.generation.engine import CachedDecoder
from mindformers_ixc.generation.extending import unavailable
from mindformers_ixc.generation.paged_batching import PagedBatchDecoder
from mindformers_ixc.generation.reuse import Prompt
from mindformers_ixc.generation.sharded_rows import ShardedRows
from mindformers_ixc.generation.slots import is_paged
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.serving.scheduling import Job, Refused, RowDecoder


class Whole:
    """Answers that are not made step by step (the `whole` of `scheduling.RowDecoder`).

    Args:
        assistant: makes them.
    """

    def __init__(self, assistant: Assistant):
        self.assistant = assistant

    def whole(self, prompt: Prompt, job: Job, between: Callable[[], None]) -> list[int]:
        """See `scheduling.RowDecoder`."""
        engine = self.assistant.engine
        before, engine.between_steps = engine.between_steps, between
        try:
            return self.assistant.generate([prompt.sample], job.details, job.mode)[0]
        finally:
            engine.between_steps = before


class Batched(Whole, BatchDecoder):
    """Rows in one batch.

    Args:
        assistant: whose model.
        rows: that are open at most.
        positions: of prompt and answer.
        piece: positions of a piece of a prompt.
    """

    def __init__(self, assistant: Assistant, rows: int, positions: int, piece: int):
        Whole.__init__(self, assistant)
        BatchDecoder.__init__(self, assistant.engine, rows, positions, piece)


class Paged(Whole, PagedBatchDecoder):
    """Rows in one batch over Ascend's paged cache; arguments as for `Batched`."""

    def __init__(self, assistant: Assistant, rows: int, positions: int, piece: int):
        Whole.__init__(self, assistant)
        PagedBatchDecoder.__init__(self, assistant.engine, rows, positions, piece)

    def open(self, prompt: Prompt, mode: str, new_tokens: int, answers: int = 1) -> Row:
        """See `scheduling.RowDecoder`.

        Raises:
            Refused: for more than there would be blocks for, were it alone.
        """
        if not self.ever_has_room(prompt, new_tokens, answers):
            raise Refused(f"{answers} answers to a prompt of {len(prompt)} positions with up to {new_tokens} new "
                          "tokens take more memory for keys and values than there is; ask for fewer answers or tokens.",
                          400, None)
        return super().open(prompt, mode, new_tokens, answers)


class Sharded(Whole, ShardedRows):
    """Rows of one cache that is cut over the devices of a layout.

    Args:
        assistant: whose model.
        rows: that are open at most.
        positions: of prompt and answer.
    """

    def __init__(self, assistant: Assistant, rows: int, positions: int):
        Whole.__init__(self, assistant)
        ShardedRows.__init__(self, assistant.engine, rows, positions)


class TurnRow:
    """A row that has a decoder of its own."""

    def __init__(self, prompt: Prompt, mode: str, new_tokens: int, decoder: CachedDecoder):
        self.prompt, self.mode, self.new_tokens, self.decoder = prompt, mode, new_tokens, decoder
        self.rest = len(prompt)


class InTurns(Whole):
    """Rows whose decoders take turns, where caches cannot be joined: Ascend's in a layout, or without `use_past`.

    A prompt is one piece.

    Args:
        assistant: whose model.
        rows: that are open at most.
    """

    def __init__(self, assistant: Assistant, rows: int):
        super().__init__(assistant)
        # in a layout there is memory for the keys of one batch, and all else would be computed anew at every turn
        self.most = 1 if is_parallel() else rows

    def prepare(self, sample: EncodedSample) -> Prompt:
        """See `scheduling.RowDecoder`."""
        return Prompt(sample, [])

    def has_room(self, prompt: Prompt, new_tokens: int, answers: int) -> bool:
        """See `scheduling.RowDecoder`; a decoder whose cache was taken away computes it anew."""
        return True

    def open(self, prompt: Prompt, mode: str, new_tokens: int, answers: int = 1) -> TurnRow:
        """See `scheduling.RowDecoder`."""
        return TurnRow(prompt, mode, new_tokens, self.assistant.engine.decoder([prompt.sample], new_tokens, mode))

    def advance(self, row: TurnRow) -> np.ndarray | None:
        """See `scheduling.RowDecoder`."""
        logits = row.decoder.prefill()[0]
        row.rest = 0
        return logits

    def rest(self, row: TurnRow) -> int:
        """See `scheduling.RowDecoder`."""
        return row.rest

    def known(self, row: TurnRow) -> int:
        """See `scheduling.RowDecoder`."""
        return 0

    def fork(self, row: TurnRow) -> TurnRow:
        """See `scheduling.RowDecoder`; its prompt is computed once more."""
        other = self.open(row.prompt, row.mode, row.new_tokens)
        self.advance(other)
        return other

    def step(self, rows: Sequence[TurnRow], tokens: Sequence[int]) -> list[np.ndarray | Exception]:
        """See `scheduling.RowDecoder`."""
        found: list[np.ndarray | Exception] = []
        for row, token in zip(rows, tokens):
            try:
                found.append(row.decoder.step(np.array([token], np.int32))[0])
            except Exception as error:
                found.append(error)
        return found

    def close(self, row: TurnRow) -> None:
        """See `scheduling.RowDecoder`."""
        row.decoder.close()


def gauges(decoder: RowDecoder) -> list[tuple[str, str, str, float]]:
    """What a decoder keeps, for `/metrics`: name, kind, meaning and value."""
    if not isinstance(decoder, BatchDecoder):
        return []
    found: list[tuple[str, str, str, float]] = [
        ("cache_bytes", "gauge", "bytes of keys and values of answers in the making", decoder.bytes)]
    if decoder.reuse is not None:
        store = decoder.reuse.store
        what = "bytes of pictures and prompts that are kept for later requests"
        found += [("store_bytes", "gauge", what, store.bytes),
                  ("store_limit_bytes", "gauge", "the most of it", store.limit)]
    if isinstance(decoder, PagedBatchDecoder):
        pool = decoder.pool
        found += [("cache_blocks", "gauge", "blocks of the paged cache", pool.count),
                  ("cache_blocks_used", "gauge", "those that answers have", pool.used),
                  ("cache_blocks_promised", "gauge", "those that further answers to a prompt will have", pool.promised)]
    return found


def make_decoder(assistant: Assistant, rows: int, positions: int, piece: int) -> RowDecoder:
    """What decodes best here.

    Raises:
        ConfigError: for what Ascend's paged cache does not take.
    """
    config = assistant.model.config
    if is_parallel() and not is_paged(config):
        return Sharded(assistant, rows, positions)
    if is_paged(config) and not is_parallel():
        check_paged_dtype(config)
        check_blocks(config)
        return Paged(assistant, rows, positions, piece)
    if unavailable():
        return InTurns(assistant, rows)
    return Batched(assistant, rows, positions, piece)

