"""Preference pairs: a prompt with images, a chosen and a rejected answer.

A source (`mindformers_ixc.data.records`) has `{"id", "prompt", "image", "chosen", "rejected"}`, with the picture keys
of any sample; where they were computed before, `reference_logps: [chosen, rejected]` holds log-probabilities of the
reference model.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindformers_ixc.data.batch import ANSWER_COLUMNS, PIXEL_COLUMNS, REFERENCE_COLUMN
from mindformers_ixc.data.conversations import Conversation, Problems, make_conversation, tell_problems
from mindformers_ixc.data.forms import open_sample, read_pair
from mindformers_ixc.data.paths import check_root, search_folders, shown
from mindformers_ixc.data.records import open_records
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.processor import Processor


class PreferenceTable(ConversationTable):
    """Encoded pairs; see `ConversationTable`.

    Args:
        processor: encodes samples.
        chosen: conversations that end with the chosen answer.
        rejected: the same ones with the rejected answer.
        logps: reference log-probabilities of each pair, `None` where there are none.
        **options: of `ConversationTable`.
    """

    def __init__(self, processor: Processor, chosen: Sequence[Conversation], rejected: Sequence[Conversation],
                 logps: Sequence[tuple[float, float] | None], **options: Any):
        super().__init__(processor, list(chosen), **options)
        self.chosen, self.rejected, self.logps = list(chosen), list(rejected), list(logps)

    @property
    def needs(self) -> np.ndarray:
        """Positions of either answer's sequence and the tiles that both look at, int `(n, 3)`."""
        if self._needs is None:
            sides = [(self._measure(chosen), self._measure(rejected))
                     for chosen, rejected in zip(self.chosen, self.rejected)]
            self._needs = np.array([(chosen[0], *rejected) for chosen, rejected in sides], np.int32).reshape(-1, 3)
        return self._needs

    def _encode(self, index: int) -> dict[str, np.ndarray]:
        pair = (self.chosen[index], self.rejected[index])
        encoded_images = self.processor.image_processor.cut(list(pair[0].images), self.hd_num, training=True,
                                                            where=pair[0].where)
        padded = []
        for sample in pair:
            encoded = self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num,
                                                         encoded_images)
            # the answers are compared, not what ends every conversation alike
            padded.append(encoded.pad(self.seq_length, self.max_tiles, self.max_images, self.processor.pad_token_id))
        columns = {name: np.stack([row[name] for row in padded]) for name in ANSWER_COLUMNS}
        columns.update({name: padded[0][name] for name in PIXEL_COLUMNS})
        if REFERENCE_COLUMN in self.columns:
            columns[REFERENCE_COLUMN] = np.array(self.logps[index], np.float32)
        return columns

    def _join(self, members: list[tuple[int, Any]], place: int) -> dict[str, Any]:
        return members[0][1]         # pairs are not packed


def load_preferences(path: str | os.PathLike, image_folder: str | os.PathLike | None = None,
                     image_root: str | os.PathLike | None = None, ignore_keys: Sequence[str] = (),
                     problems: Problems | None = None) -> list[
        tuple[Conversation, Conversation, tuple[float, float] | None]]:
    """Reads the preference pairs of one source.

    Args:
        path: the file; `pkg:` paths work.
        image_folder: where relative paths of pictures and videos start.
        image_root: a folder that every picture and video must lie in, links followed.
        ignore_keys: keys of pairs that are not read.
        problems: as in `load_conversations`.

    Returns:
        (chosen, rejected, reference log-probabilities or `None`) of each pair.

    Raises:
        DataError: listing what is wrong with which samples.
        FileNotFoundError: when the file is missing.
    """
    records = open_records(path, "pair")
    folders, root = search_folders(records.path, image_folder), check_root(image_root)
    pairs: list[tuple[Conversation, Conversation, tuple[float, float] | None]] = []
    errors = Problems()
    for index, place in records:
        try:
            row, files = records.read(index, place)
            known, where = open_sample(row, records.where(index), ignore_keys, "pair")
            chosen, rejected = read_pair(known, where, ignore_keys)
            if chosen.turns[-1][1].strip() == rejected.turns[-1][1].strip():
                raise DataError(f"{where}: chosen equals rejected, so there is nothing to prefer; take the pair out.")
            logps = read_logps(known, where)
            sides = [make_conversation(form, str(path), index, row.get("id"), folders, root, files)
                     for form in (chosen, rejected)]
        except DataError as error:
            errors.append((index, str(error)))
        else:
            pairs.append((sides[0], sides[1], logps))
    tell_problems(errors, problems)
    return pairs


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
