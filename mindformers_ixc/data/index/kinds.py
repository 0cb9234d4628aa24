"""What the samples of a source may be: what reads one, and what the index keeps of what it needs."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mindformers_ixc.data.conversations import Conversation, ConversationReader, ReadingOptions
from mindformers_ixc.data.fitting import first_pairs, pair_count
from mindformers_ixc.data.preferences import Pair, PairReader


class Kind(NamedTuple):
    """A kind of samples.

    Attributes:
        reader: reads single ones.
        parts: conversations of a sample that are measured; the index has a row of needs for each.
        together: parts that a row of training data has side by side. Of conversations it has one part: the longest that
            fits, since each has the one before it in it.
        used: a sample, and how much of it: so many times `together` parts.
    """

    reader: type[ConversationReader]
    parts: Callable[[Any], Sequence[Conversation]]
    together: int
    used: Callable[[Any, int], Conversation]


def _rounds(sample: Conversation) -> list[Conversation]:
    """The first round of a conversation, the first two, and so on."""
    return [first_pairs(sample, count) for count in range(1, pair_count(sample) + 1)]


def _sides(pair: Pair) -> tuple[Conversation, ...]:
    return pair.sides


def _whole(pair: Pair, count: int) -> Pair:
    return pair


KINDS = {"sample": Kind(ConversationReader, _rounds, 1, first_pairs), "pair": Kind(PairReader, _sides, 2, _whole)}


def open_reader(path: str | os.PathLike, options: ReadingOptions) -> ConversationReader:
    """What reads the samples of a source, by the kind that the options name; errors as of `ConversationReader`."""
    return KINDS[options.kind].reader(path, options)
