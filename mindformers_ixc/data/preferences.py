"""Preference pairs: a prompt with images, a chosen and a rejected answer.

A source (`mindformers_ixc.data.records`) has `{"id", "prompt", "image", "chosen", "rejected"}`, with the picture keys
of any sample, or, in the public form of reward models' data, `{"id", "conversations_a", "conversations_b", "image"}`,
two conversations that differ in the last answer. Where they were computed before, `reference_logps: [chosen, rejected]`
holds log-probabilities of the reference model.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mindformers_ixc.data.batch import ANSWER_COLUMNS, PIXEL_COLUMNS, REFERENCE_COLUMN, SCORE_COLUMN
from mindformers_ixc.data.conversations import Conversation, ConversationReader, ReadingOptions, make_conversation
from mindformers_ixc.data.forms import FORMS, holds, open_sample, read_pair
from mindformers_ixc.data.learning import LAST, with_loss_on
from mindformers_ixc.data.paths import shown
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Grid, Tiles
from mindformers_ixc.processing.judged import with_reward_token
from mindformers_ixc.processing.processor import Processor


@dataclass
class Pair(Conversation):
    """A preference pair: the conversation with the chosen answer, and what the other one has instead.

    Attributes:
        rejected: turns of the conversation with the rejected answer; its pictures are the same.
        logps: log-probabilities of both answers by the reference model, if the pair has them.
    """

    rejected: list[tuple[str, str]] = field(default_factory=list)
    logps: tuple[float, float] | None = None

    @property
    def sides(self) -> tuple[Conversation, Conversation]:
        """The conversations with the chosen and with the rejected answer."""
        return self, Conversation(self.source, self.index, self.id, self.rejected, self.images, self.sizes)


class PairReader(ConversationReader):
    """Reads single preference pairs of a source; see `ConversationReader`."""

    def read(self, index: int, place: Place) -> Pair:
        """A pair whose files are found; arguments and errors as of `ConversationReader.read`."""
        record, options = self.record(index, place), self.options
        row, where = open_sample(record.row, self.records.where(index), options.ignore_keys, "pair")
        chosen, rejected = read_pair(row, where, options.ignore_keys)
        if chosen.turns[-1][1].strip() == rejected.turns[-1][1].strip():
            names = next(FORMS[form][0][-2:] for form in ("conversations_a", "prompt")
                         if any(holds(row.get(key)) for key in FORMS[form][0]))
            raise DataError(f"{where}: {' equals '.join(names)}, so there is nothing to prefer; take the pair out.")
        logps = read_logps(row, where)
        found = make_conversation(chosen, self.name, index, record.row.get("id"), self.folders, self.root,
                                  record.files, options.fetch)
        return Pair(**vars(found), rejected=rejected.turns, logps=logps)


class PreferenceTable(ConversationTable):
    """Encoded pairs: a row is one pair, both its answers. Its samples are `Pair`s; see `ConversationTable`."""

    @property
    def needs(self) -> np.ndarray:
        """Positions of either answer's sequence and the tiles that both look at, int `(n, 3)`."""
        if self._needs is None:
            pairs: list[Any] = [self.samples[index] for index in range(len(self))]
            sides = [list(map(self._measure, pair.sides)) for pair in pairs]
            self._needs = np.array([(chosen[0], *rejected) for chosen, rejected in sides], np.int32).reshape(-1, 3)
        return self._needs

    def _encode(self, index: int) -> dict[str, np.ndarray]:
        pair: Any = self.samples[index]
        scored = SCORE_COLUMN in self.columns
        encoded = encode_pair(pair, self.processor, self.hd_num, scored)
        found = (*(len(one.input_ids) - scored for one in encoded), encoded[0].tiles)
        if self._needs is not None and found != tuple(self._needs[index].tolist()):
            raise ImageError(f"{pair.where}: its pictures have other sizes than when the data were measured; its "
                             f"answers take {found[0]} and {found[1]} positions and {found[2]} tiles now.")
        columns = pair_columns(encoded, self.seq_length, self.max_tiles, self.max_images, self.processor.pad_token_id)
        if REFERENCE_COLUMN in self.columns:
            columns[REFERENCE_COLUMN] = np.array(pair.logps, np.float32)
        return columns

    def _join(self, members: list[tuple[int, Any]], place: int) -> dict[str, Any]:
        return members[0][1]         # pairs are not packed


def encode_pair(pair: Pair, processor: Processor, hd_num: int, scored: bool) -> list[EncodedSample]:
    """The two conversations of a pair, which look at the same tiles.

    Args:
        pair: whose pictures are read.
        processor: of the model.
        hd_num: tiles of an image at most.
        scored: whether they end with the reward token, as a reward model reads them.

    Raises:
        ImageError: for a damaged picture; VideoError for a video.
    """
    cut = processor.image_processor.cut(list(pair.images), hd_num, training=True, where=pair.where)
    encoded = [encode_side(side, processor, hd_num, cut) for side in pair.sides]
    # the answers are compared, not what ends every conversation alike
    return [with_reward_token(one, processor) for one in encoded] if scored else encoded


def encode_side(side: Conversation, processor: Processor, hd_num: int | None,
                cut: tuple[Tiles, list[Grid]] | None = None) -> EncodedSample:
    """A conversation of a pair, of which the last answer alone is learnt: those before it are the same on both sides.

    They would cancel out of a difference of log-probabilities, and not out of what is counted a token.

    Args:
        side: of `Pair.sides`.
        processor: of the model.
        hd_num: tiles of an image at most.
        cut: what `ImageProcessor.cut` gave for its pictures, if that was asked before.
    """
    encoded = processor.encode_conversation(side.turns, side.images, side.where, hd_num, cut)
    answers = sum(role == "assistant" for role, _ in side.turns)
    return with_loss_on(encoded, LAST) if answers > 1 else encoded


def pair_columns(encoded: list[EncodedSample], seq_length: int, max_tiles: int, max_images: int,
                 pad_token_id: int) -> dict[str, np.ndarray]:
    """Columns of a pair (`mindformers_ixc.data.batch`) from its two conversations; lengths as in `EncodedSample.pad`.

    Where a score is read is the last position of each.
    """
    padded = [one.pad(seq_length, max_tiles, max_images, pad_token_id) for one in encoded]
    columns = {name: np.stack([row[name] for row in padded]) for name in ANSWER_COLUMNS}
    columns.update({name: padded[0][name] for name in PIXEL_COLUMNS})
    columns[SCORE_COLUMN] = np.stack([score_positions(len(one.input_ids), seq_length) for one in encoded])
    return columns


def score_positions(length: int, seq_length: int) -> np.ndarray:
    """The column of one sequence that has so many positions."""
    column = np.zeros(seq_length, np.int32)
    column[:length] = 1
    column[length - 1] = 2
    return column


def load_preferences(path: str | os.PathLike, image_folder: str | os.PathLike | None = None,
                     image_root: str | os.PathLike | None = None, ignore_keys: Sequence[str] = ()) -> list[Pair]:
    """Reads the preference pairs of one source, all of them; for files that are small.

    Args:
        path: the file; `pkg:` paths work.
        image_folder: where relative paths of pictures and videos start.
        image_root: a folder that every picture and video must lie in, links followed.
        ignore_keys: keys of pairs that are not read.

    Raises:
        DataError: listing what is wrong with which samples.
        FileNotFoundError: when the file is missing.
    """
    options = ReadingOptions(image_folder, image_root=image_root, ignore_keys=ignore_keys, kind="pair")
    return PairReader(path, options).load()


def read_logps(row: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """Reference log-probabilities of a pair, if it has them.

    Raises:
        DataError: naming sample and field.
    """
    logps: Any = row.get(REFERENCE_COLUMN)
    if logps is None:
        return None
    if not isinstance(logps, list) or len(logps) != 2 or not all(map(_is_logp, logps)):
        raise DataError(f"{where}, field {REFERENCE_COLUMN}: must be two numbers (chosen, rejected), found "
                        f"{shown(logps)}.")
    return logps[0], logps[1]


def _is_logp(value: object) -> bool:
    # a whole number too large for a float overflows where it is asked whether it is finite
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
