"""Log-probabilities of the reference model, computed once and kept with the preference pairs.

A run that reads them (column `reference_logps`) does not compute the reference in every step, and the reference may be
any model, not only the one that trains without its pair.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.quantised import refuse_quantised
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import default_max_images, read_fields
from mindformers_ixc.data.batch import BATCH_COLUMNS, REFERENCE_COLUMN, full_batches
from mindformers_ixc.data.conversations import Conversation, read_image_sizes
from mindformers_ixc.data.forms import LISTS, MEDIA_KEYS
from mindformers_ixc.data.preferences import load_preferences
from mindformers_ixc.data.records import open_records
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import write_whole
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.resources import resolve_path


class AnswerLogps(nn.Cell):
    """Summed log-probability of the labelled positions of each sample.

    Args:
        model: `IXC25Model`.
    """

    def __init__(self, model: IXC25Model):
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, input_ids, labels, pixel_values, global_views, view_index, vision_index, image_mask):
        """float32 `(B,)` of the columns of a batch."""
        x = self.model.states(input_ids, pixel_values, global_views, view_index, vision_index, image_mask)   # (B*L, D)
        return -self.model.head_losses(x, labels).sum(axis=1)


def add_reference_logps(pairs_file: str, target: str, model: str, mode: str = "write", hd_num: int | None = None,
                        image_transform: str = "training", image_folder: str | None = None,
                        batch_size: int = 4, image_root: str | None = None, ignore_keys: Sequence[str] = (),
                        control_tokens: bool = False, image_options: dict | None = None) -> int:
    """Writes a preference file again with `reference_logps` in every pair.

    Args:
        pairs_file: preference pairs, see `mindformers_ixc.data.preferences`.
        target: file to write; in another folder than the pairs', its image paths are absolute.
        model: model directory of the reference.
        mode: its task LoRAs in use; `write` is what a dpo run starts from, whose pair does nothing yet.
        hd_num: tiles of an image at most, as in the run to come; by default the model directory's, else 18.
        image_transform: `training` or `inference`, as in the run to come.
        image_folder: where relative image paths start.
        batch_size: answers at once.
        image_root: a folder that every picture and video must lie in.
        ignore_keys: keys of pairs that are not read.
        control_tokens: as in the run to come, see `Processor`.
        image_options: arguments of `ImageProcessor`, as in the run to come: `transparency`, `exif`.

    Returns:
        Number of pairs.

    Raises:
        DataError: for unusable pairs.
    """
    pairs = load_preferences(pairs_file, image_folder, image_root, ignore_keys)
    rows = _rows(pairs_file)             # before the work, whose result they are to take
    processor = _processor(model, image_transform, image_options)
    processor.control_tokens = control_tokens
    read_image_sizes([chosen for chosen, _, _ in pairs], processor.image_processor.exif)
    answers = [answer for chosen, rejected, _ in pairs for answer in (chosen, replace(rejected, sizes=chosen.sizes))]
    logps = _answer_logps(model, mode, processor, answers, hd_num, batch_size).reshape(-1, 2)
    moved = Path(target).resolve().parent != resolve_path(pairs_file).resolve().parent
    for row, values, (chosen, _, _) in zip(rows, logps, pairs):
        row[REFERENCE_COLUMN] = [float(value) for value in values]
        if moved and chosen.images and all(isinstance(image, Path) for image in chosen.images):
            for key in (*MEDIA_KEYS, *LISTS):
                row.pop(key, None)
            row["prompt"] = chosen.turns[-2][1]
            row["image"] = [os.path.realpath(str(image)) for image in chosen.images]
    write_whole(target, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    return len(rows)


def _rows(pairs_file: str) -> list[dict]:
    """The pairs as they are written.

    Raises:
        DataError: for a source that has pictures inside, which JSON has no place for.
    """
    records, rows = open_records(pairs_file, "pair"), list[dict]()
    for index, place in records:
        row, files = records.read(index, place)
        if files:
            raise DataError(f"{records.where(index)}: its pictures lie inside of {pairs_file}, and what is written is "
                            "JSON; write the pictures to files and the pairs to a JSON file that names them.")
        rows.append(row)
    return rows


def _processor(model: str, image_transform: str, image_options: dict | None = None) -> Processor:
    return Processor.from_directory(model, training_transform=image_transform, **(image_options or {}))


def _answer_logps(directory: str, mode: str, processor: Processor, answers: Sequence[Conversation],
                  hd_num: int | None, batch_size: int) -> np.ndarray:
    """Log-probability of each answer, float32 `(len(answers),)`; one shape for all, so one graph."""
    hd_num = hd_num or _own_hd_num(directory) or processor.image_processor.hd_num_training
    sizes = [processor.conversation_length(answer.turns, answer.sizes, hd_num, answer.where, answer.images)
             for answer in answers]
    length, tiles = (max(size[i] for size in sizes) for i in (0, 1))
    refuse_quantised(open_source(directory, verify=False), "reference")
    model = AnswerLogps(load_model(directory, adapter_mode=mode, seq_length=length, max_tiles=max(1, tiles)))
    found: list[float] = []
    rows = (processor.encode_conversation(sample.turns, sample.images, sample.where, hd_num)
            .pad(length, max(1, tiles), default_max_images(tiles), processor.pad_token_id) for sample in answers)
    for batch, real in terminal.current.counted(full_batches(rows, batch_size), -(-len(answers) // batch_size),
                                                "reference", "batch"):
        columns = [Tensor(np.stack([row[name] for row in batch])) for name in BATCH_COLUMNS]
        found += model(*columns).asnumpy()[:real].tolist()
    return np.array(found, np.float32)


def _own_hd_num(directory: str) -> int | None:
    """Tiles the model was trained with, where its directory says so."""
    return read_fields(directory).get("hd_num")
