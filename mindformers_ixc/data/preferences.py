"""Preference pairs: a prompt with pictures, a chosen and a rejected answer.

A source is a JSON list of `{"id", "prompt", "image", "chosen", "rejected"}`; where they were computed before,
`reference_logps: [chosen, rejected]` holds log-probabilities of the reference model.
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from mindformers.dataset.base_dataset import BaseDataset
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import Conversation, DataError, parse_rows, raise_errors, read_image_sizes
from mindformers_ixc.data.dataset import MAX_BAD_SHARE, ConversationTable, batched, fit_pairs, make_processor
from mindformers_ixc.data.mixture import make_plan
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.resources import resolve_path

REFERENCE_COLUMN = "reference_logps"

# Columns that both answers have; the pictures are shared.
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

    def __init__(self, processor, chosen: Sequence[Conversation], rejected: Sequence[Conversation],
                 logps: Sequence[tuple[float, float] | None], **options):
        super().__init__(processor, chosen, **options)
        self.rejected, self.logps = list(rejected), list(logps)

    def _encode(self, index: int, place: int) -> tuple[np.ndarray, ...]:
        pair = (self.samples[index], self.rejected[index])
        pictures = self.processor.image_processor.preprocess(list(pair[0].images), self.hd_num, training=True,
                                                             where=pair[0].where)
        padded = []
        for sample in pair:
            encoded = self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num,
                                                         pictures)
            # the answers are compared, not what ends every conversation alike
            padded.append(encoded.pad(self.seq_length, self.max_tiles, self.processor.pad_token_id))
        columns = {name: np.stack([row[name] for row in padded]) for name in ANSWER_COLUMNS}
        columns["pixel_values"] = padded[0]["pixel_values"]
        if REFERENCE_COLUMN in self.columns:
            columns[REFERENCE_COLUMN] = np.array(self.logps[index], np.float32)
        return tuple(columns[name] for name in self.columns)


def load_preferences(path, image_folder=None) -> list[tuple[Conversation, Conversation, tuple[float, float] | None]]:
    """Reads one source.

    Args:
        path: JSON file; `pkg:` paths work.
        image_folder: where relative picture paths start.

    Returns:
        (chosen, rejected, reference log-probabilities or `None`) of each pair.

    Raises:
        DataError: listing what is wrong with which samples.
        FileNotFoundError: when the file is missing.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The data file {path} does not exist.")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} must hold a JSON list with at least one pair.")
    errors, sides = [], ([], [])
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


def check_pair(row, where: str) -> None:
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


@MindFormerRegister.register(MindFormerModuleType.DATASET)
class IXC25PreferenceDataset(BaseDataset):
    """Preference pairs as MindFormers' `train_dataset_task` builds them; the section is that of `IXC25SFTDataset`."""

    def __new__(cls, dataset_config: dict | None = None, **kwargs):
        """Builds the dataset; see `IXC25SFTDataset`.

        Raises:
            DataError: for unusable data.
        """
        config = cls.check_dataset_config(dataset_config, locals())
        cls.init_dataset_config(config)
        loader, seed = config.data_loader, config.seed or 0
        files = loader.dataset_dir if isinstance(loader.dataset_dir, (list, tuple)) else [loader.dataset_dir]
        pairs = [pair for path in files for pair in load_preferences(path, loader.image_folder)]
        read_image_sizes([chosen for chosen, _, _ in pairs])
        columns = list(config.input_columns or BATCH_COLUMNS)
        if REFERENCE_COLUMN in columns and any(logps is None for _, _, logps in pairs):
            raise DataError(f"train_dataset.input_columns has {REFERENCE_COLUMN}, but not every pair has that field; "
                            "leave the column out, and the model without the pair is the reference.")
        processor, hd_num = make_processor(config), config.hd_num or HD_NUM_TRAINING
        pairs = [(chosen, replace(rejected, sizes=chosen.sizes), logps) for chosen, rejected, logps in pairs]
        shapes = (config.seq_length, config.max_tiles, hd_num)
        fitting = [pair for pair in pairs if all(fit_pairs(processor, side, *shapes)[0] for side in pair[:2])]
        if len(fitting) < len(pairs):
            longest = max(processor.conversation_length(side.turns, side.sizes, hd_num)[0]
                          for pair in pairs for side in pair[:2])
            message = (f"{len(pairs) - len(fitting)} of {len(pairs)} pairs do not fit seq_length {config.seq_length} "
                       f"and max_tiles {config.max_tiles} (the longest has {longest} positions)")
            if not fitting:
                raise DataError(f"{message}, so nothing is left to train on; raise them.")
            logger.warning(f"{message} and are left out.")
        chosen, rejected, logps = zip(*fitting)
        share = MAX_BAD_SHARE if config.max_bad_share is None else config.max_bad_share
        table = PreferenceTable(processor, chosen, rejected, logps, seq_length=config.seq_length,
                                max_tiles=config.max_tiles, hd_num=hd_num, max_bad_share=share, columns=columns,
                                seed=seed)
        multimodal = [table.is_multimodal(i) for i in range(len(table))]
        plan = make_plan([sample.source for sample in chosen], multimodal, table.source_names, None, seed,
                         loader.get("shuffle", True), config.get("drop_remainder", True))
        return batched(cls, table, plan, config)
