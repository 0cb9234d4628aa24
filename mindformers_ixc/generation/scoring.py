"""A reward model with its processor: finished conversations in, scores out."""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
from mindspore import nn

from mindformers_ixc.data.batch import full_batches
from mindformers_ixc.errors import ConfigError, GenerationError, PromptError
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.cells import ScoreHead, of_whole_batches
from mindformers_ixc.generation.engine import CachedDecoder, InferenceEngine, PrefillGraph, bucket
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.generation.slots import Slot
from mindformers_ixc.generation.store import Store
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.reward import IXC25RewardModel
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.judged import Turns, encode_judged, judged_turns
from mindformers_ixc.processing.pictures import ImageSource
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.sections import check_value, whole

# Conversations that are scored at once, unless somebody says otherwise.
SCORED_AT_ONCE = 4


class ScoreGraph(PrefillGraph):
    """Whole conversations to the values of all their positions, float32 `(B*L, 1)`."""

    def __init__(self, model: IXC25RewardModel, caches: nn.CellList, mode: str):
        super().__init__(model, caches, mode, ScoreHead(model))


class ScoringEngine(InferenceEngine):
    """The inference graphs of a reward model; there is no next token, so one graph over whole prompts is all."""

    def make_graphs(self, slot: Slot, mode: str) -> tuple[nn.Cell, nn.Cell]:
        """The graph over whole conversations, in both places."""
        graph = of_whole_batches(ScoreGraph(self.model, slot.caches, mode), self.config)
        return graph, graph

    def values(self, samples: list[EncodedSample], mode: str = "base") -> list[np.ndarray]:
        """float32 `(n,)` of each conversation, a value a position.

        Raises:
            GenerationError: when this machine has not the memory for so many of that length.
        """
        self._check_memory(len(samples), bucket(max(len(one.input_ids) for one in samples)))
        with TURNS:
            if self.reuse is not None:
                self.reuse.notice(self.model.get_parameters())
            with closing(ScoringPass(self, samples, 0, mode, 1)) as one:
                return one.values()


class ScoringPass(CachedDecoder):
    """One pass over a batch of conversations. What their pictures became is kept, keys and values are not."""

    def _begin_in_calls(self) -> np.ndarray | None:
        """Nothing, however large the model: every position's value is asked for."""
        return None

    def close(self) -> None:
        """Says that the pass is over; its cache's memory serves the next one."""
        self.closed = True

    def values(self) -> list[np.ndarray]:
        """float32 `(n,)` of each conversation, a value a position."""
        rows = self.prefill().reshape(self.batch, self.bucket)
        return [row[:length] for row, length in zip(rows, self.lengths)]


class Scorer:
    """Scores finished conversations about images.

    Args:
        model: a reward model; it is put in evaluation mode.
        processor: its processor.
        store: what pictures became, which other models may share; by default one of its own of `config.reuse_bytes`.

    Raises:
        ConfigError: when the tokenizer has more pieces than the model.
        GenerationError: for a model that writes.
    """

    def __init__(self, model: IXC25RewardModel, processor: Processor, store: Store | None = None):
        if model.config.reward_pooling is None:
            raise GenerationError("This model writes answers and has no score head, so it scores none; give a reward "
                                  "model (IXC25ForReward).")
        pieces = len(processor.tokenizer)
        if pieces > model.config.vocab_size:
            raise ConfigError(f"The tokenizer has {pieces} pieces, more than the model's vocab_size "
                              f"{model.config.vocab_size}; they do not belong together.")
        self.model, self.processor = model, processor
        with TURNS:
            model.set_train(False)
            self.engine = ScoringEngine(model, Store(model.config.reuse_bytes) if store is None else store)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike, image_options: dict | None = None,
                       **overrides: Any) -> Scorer:
        """Loads a reward model's directory; arguments as in `Assistant.from_directory`."""
        prepare_inference()
        model = load_model(directory, IXC25RewardModel, stored=True, **{"use_past": True, **overrides})
        return cls(model, Processor.from_directory(directory, **(image_options or {})))

    @property
    def longest(self) -> int:
        """Positions that a conversation may have, as `Assistant.longest`."""
        config = self.model.config
        return config.max_position_embeddings * (4 if config.rope_scaling else 1)

    def encode(self, turns: Turns, images: Sequence[ImageSource] = (), hd_num: int | None = None,
               max_length: int | None = None, where: str = "") -> EncodedSample:
        """A finished conversation as this model takes it.

        Args:
            turns: (role, text) from user and assistant in turn.
            images: in the order of their places.
            hd_num: tiles of each image at most; by default what the model was trained with, else 9.
            max_length: positions at most; by default those of the model.
            where: what the conversation belongs to, for messages.

        Raises:
            PromptError: when places and images differ in number, or a text is none.
            ImageError: for a picture that cannot be read.
            GenerationError: when it is too long, or for a number that is no whole number of at least 1.
        """
        for name, value in (("hd_num", hd_num), ("max_length", max_length)):
            if value is not None:
                check_value(name, value, whole(1), GenerationError)
        sample = encode_judged(self.processor, turns, images, self.model.config.hd_num if hd_num is None else hd_num,
                               where)
        most = self.longest if max_length is None else min(max_length, self.longest)
        if len(sample.input_ids) > most:
            prefix = f"{where}: " if where else ""
            raise GenerationError(f"{prefix}the conversation has {len(sample.input_ids)} positions, more than {most}. "
                                  "Shorten it, or lower hd_num or the number of pictures.")
        return sample

    def score_samples(self, samples: Sequence[EncodedSample], batch_size: int = SCORED_AT_ONCE,
                      mode: str = "base") -> list[float]:
        """Scores of encoded conversations, so many at once.

        Raises:
            GenerationError: for a score that is no finite number, or a batch of no whole number of at least 1.
        """
        check_value("batch_size", batch_size, whole(1), GenerationError)
        scores: list[float] = []
        for rows, real in full_batches(list(samples), min(batch_size, max(1, len(samples)))):
            scores += [self._pool(row) for row in self.engine.values(rows, mode)[:real]]
        odd = next((number for number, score in enumerate(scores) if not math.isfinite(score)), None)
        if odd is not None:
            which = f" of conversation {odd}" if len(scores) > 1 else ""
            raise GenerationError(f"The score{which} is {scores[odd]}, which is no finite number; the "
                                  "reward model's weights are damaged, or its numbers left the range of "
                                  f"{self.model.config.compute_dtype}.")
        return scores

    def _pool(self, values: np.ndarray) -> float:
        return float(values[-1] if self.model.config.reward_pooling == "last" else values.mean(dtype=np.float64))

    def scores(self, chats: Sequence, images: Sequence | None = None, max_length: int | None = None,
               hd_num: int | None = None, batch_size: int = SCORED_AT_ONCE) -> list[float]:
        """Scores of chats, as `IXC25ForReward.get_scores` has them.

        Raises:
            PromptError: naming the chat and what is wrong with it.
        """
        if not isinstance(chats, (list, tuple)) or not chats:
            raise PromptError(f"chats must be a list of at least one chat, found {type(chats).__name__} of "
                              f"{len(chats) if hasattr(chats, '__len__') else 0}.")
        images = [[] for _ in chats] if images is None else images
        if not isinstance(images, (list, tuple)) or len(images) != len(chats):
            found = len(images) if isinstance(images, (list, tuple)) else type(images).__name__
            raise PromptError(f"images must have one list for each of the {len(chats)} chats, an empty one for text "
                              f"alone; found {found}.")
        samples = []
        for number, (chat, own) in enumerate(zip(chats, images)):
            where = f"chat {number}" if len(chats) > 1 else ""
            try:
                turns, inside = judged_turns(chat)
            except PromptError as error:
                raise PromptError(f"chat {number}: {error}") from error
            own = [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]
            if inside and own:
                raise PromptError(f"chat {number} has pictures both in its messages and beside it; give them in one "
                                  "place.")
            samples.append(self.encode(turns, inside or own, hd_num, max_length, where))
        return self.score_samples(samples, batch_size)
