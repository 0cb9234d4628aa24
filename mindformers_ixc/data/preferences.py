"""Preference pairs: a prompt with images, a chosen and a rejected answer.

A source is a JSON list of `{"id", "prompt", "image", "chosen", "rejected"}`; where they were computed before,
`reference_logps: [chosen, rejected]` holds log-probabilities of the reference model.
"""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mindformers_ixc.data.conversations import Conversation, parse_rows, raise_errors
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_json_list
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.resources import resolve_path

REFERENCE_COLUMN = "reference_logps"

# Columns that both answers have; the images are shared.
ANSWER_COLUMNS = ("input_ids", "labels", "vision_index", "image_mask")


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
        super().__init__(processor, chosen, **options)
        self.rejected, self.logps = list(rejected), list(logps)

    def _encode(self, index: int, place: int) -> tuple[np.ndarray, ...]:
        pair = (self.samples[index], self.rejected[index])
        encoded_images = self.processor.image_processor.preprocess(list(pair[0].images), self.hd_num, training=True,
                                                                   where=pair[0].where)
        padded = []
        for sample in pair:
            encoded = self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num,
                                                         encoded_images)
            # the answers are compared, not what ends every conversation alike
            padded.append(encoded.pad(self.seq_length, self.max_tiles, self.processor.pad_token_id))
        columns = {name: np.stack([row[name] for row in padded]) for name in ANSWER_COLUMNS}
        columns["pixel_values"] = padded[0]["pixel_values"]
        if REFERENCE_COLUMN in self.columns:
            columns[REFERENCE_COLUMN] = np.array(self.logps[index], np.float32)
        return tuple(columns[name] for name in self.columns)


def load_preferences(path: str | os.PathLike, image_folder: str | os.PathLike | None = None) -> list[
        tuple[Conversation, Conversation, tuple[float, float] | None]]:
    """Reads the preference pairs of one JSON file.

    Args:
        path: JSON file; `pkg:` paths work.
        image_folder: where relative image paths start.

    Returns:
        (chosen, rejected, reference log-probabilities or `None`) of each pair.

    Raises:
        DataError: listing what is wrong with which samples.
        FileNotFoundError: when the file is missing.
    """
    rows, file = read_json_list(path, "pair"), resolve_path(path)
    errors: list[str] = []
    sides: tuple[list[dict], list[dict]] = ([], [])
    for index, row in enumerate(rows):
        try:
            check_pair(row, f"{path}, sample {index}")
        except DataError as error:
            errors.append(str(error))
            continue
        for side, name in zip(sides, ("chosen", "rejected")):
            side.append({"id": row.get("id"), "image": row.get("image") or [], "conversations": [
                {"from": "human", "value": row["prompt"]}, {"from": "bot", "value": row[name]}]})
    raise_errors(errors)
    chosen, rejected = (parse_rows(side, str(path), file, image_folder) for side in sides)
    return list(zip(chosen, rejected, (row.get(REFERENCE_COLUMN) for row in rows)))


def check_pair(row: object, where: str) -> None:
    """Checks the fields of a pair.

    Raises:
        DataError: naming sample and field.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a pair must be a mapping, found {type(row).__name__}.")
    where += f" (id {row.get('id')!r})"
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"{where}, field {name}: must be a text that is not empty, found {row.get(name)!r:.60}.")
    if row["chosen"].strip() == row["rejected"].strip():
        raise DataError(f"{where}: chosen equals rejected, so there is nothing to prefer; take the pair out.")
    logps = row.get(REFERENCE_COLUMN)
    if logps is not None and not (isinstance(logps, list) and len(logps) == 2
                                  and all(isinstance(x, (int, float)) and math.isfinite(x) for x in logps)):
        raise DataError(f"{where}, field {REFERENCE_COLUMN}: must be two numbers (chosen, rejected), found "
                        f"{logps!r:.60}.")
