"""Log-probabilities of the reference model, computed once and kept with the preference pairs.

A run that reads them (column `reference_logps`) does not compute the reference in every step, and the reference may be
any model, not only the one that trains without its pair.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.quantised import refuse_quantised
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import default_max_images, read_fields
from mindformers_ixc.data.batch import BATCH_COLUMNS, REFERENCE_COLUMN, full_batches
from mindformers_ixc.data.conversations import Conversation, ReadingOptions, raise_errors
from mindformers_ixc.data.forms import FORMS, LISTS, MEDIA_KEYS, holds
from mindformers_ixc.data.index.building import PART
from mindformers_ixc.data.index.measuring import Measurer
from mindformers_ixc.data.preferences import PairReader, encode_side
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.files import whole_file
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
    refuse_quantised(open_source(model, verify=False), "reference")
    options = ReadingOptions(image_folder, image_root=image_root, ignore_keys=ignore_keys, kind="pair")
    reader = PairReader(pairs_file, options)
    processor = _processor(model, image_transform, image_options)
    processor.control_tokens = control_tokens
    hd_num = hd_num or _own_hd_num(model) or processor.image_processor.hd_num_training
    places, longest, tiles = _measured(reader, processor, hd_num)
    logps = _answer_logps(model, mode, processor, _answers(reader, places), len(places), hd_num, (longest, tiles),
                          batch_size)
    moved = Path(target).resolve().parent != resolve_path(pairs_file).resolve().parent
    with whole_file(target) as part, open(part, "w", encoding="utf-8") as out:
        for index, place in enumerate(map(Place._make, places.tolist())):
            row = _row(reader, index, place, moved)
            row[REFERENCE_COLUMN] = logps[index].tolist()
            out.write(("[\n" if not index else ",\n") + json.dumps(row, ensure_ascii=False))
        out.write("\n]\n")
    return len(places)


def _row(reader: PairReader, index: int, place: Place, moved: bool) -> dict:
    """A pair as it is written; `moved` to another folder it names its pictures by whole paths."""
    row = reader.record(index, place).row
    pair = reader.read(index, place) if moved else None
    if pair and pair.images and all(isinstance(image, Path) for image in pair.images):
        asked: dict[str, Any] = {"prompt": pair.turns[-2][1]}
        conversations = FORMS["conversations_a"][0]
        if any(holds(row.get(key)) for key in conversations):
            asked = {key: [{"from": role, "value": text} for role, text in side.turns]
                     for key, side in zip(conversations, pair.sides)}
        elif pair.turns[0][0] == "system":
            asked["system"] = pair.turns[0][1]
        row = {key: value for key, value in row.items() if key not in (*MEDIA_KEYS, *LISTS, "system")}
        row.update(asked, image=[os.path.realpath(str(image)) for image in pair.images])
    return row


def _measured(reader: PairReader, processor: Processor, hd_num: int) -> tuple[np.ndarray, int, int]:
    """Where all pairs lie, and the positions and tiles that the largest answers take; before the work, nothing of it.

    Raises:
        DataError: for pairs that cannot be used, and a source that has pictures inside, which JSON has no place for.
        ImageError: for a picture that cannot be cut into tiles.
    """
    longest, tiles, errors = 0, 0, list[str]()
    measurer, places = Measurer(reader, processor, hd_num), reader.records.places()
    for first in range(0, len(places), PART):
        block = places[first:first + PART]
        measured = measurer.measure(block, first)
        errors += [sentence for _, sentence in measured.errors]
        bad = {index for index, _ in measured.errors}
        for index, place in enumerate(map(Place._make, block.tolist()), first):
            if index not in bad and reader.record(index, place).files:
                raise DataError(f"{reader.records.where(index)}: its pictures lie inside of {reader.name}, and what is "
                                "written is JSON; write the pictures to files and the pairs to a JSON file that names "
                                "them.")
        if measured.unusable:
            raise ImageError(measured.unusable[0][1])
        longest, tiles = np.max([(longest, tiles, 0), *measured.needs], 0).tolist()[:2]
    raise_errors(errors)
    return places, longest, tiles


def _answers(reader: PairReader, places: np.ndarray) -> Iterator[Conversation]:
    """Both answers of every pair, read as they are asked for."""
    for index, place in enumerate(map(Place._make, places.tolist())):
        yield from reader.read(index, place).sides


def _processor(model: str, image_transform: str, image_options: dict | None = None) -> Processor:
    return Processor.from_directory(model, training_transform=image_transform, **(image_options or {}))


def _answer_logps(directory: str, mode: str, processor: Processor, answers: Iterable[Conversation], pairs: int,
                  hd_num: int, shape: tuple[int, int], batch_size: int) -> np.ndarray:
    """Log-probabilities of the answers of so many pairs, float32 `(pairs, 2)`; one shape for all, so one graph."""
    length, tiles = shape
    model = AnswerLogps(load_model(directory, adapter_mode=mode, seq_length=length, max_tiles=max(1, tiles)))
    found, done = np.zeros(2 * pairs, np.float32), 0
    rows = (encode_side(sample, processor, hd_num).pad(length, max(1, tiles), default_max_images(tiles),
                                                       processor.pad_token_id) for sample in answers)
    for batch, real in terminal.current.counted(full_batches(rows, batch_size), -(-len(found) // batch_size),
                                                "reference", "batch"):
        columns = [Tensor(np.stack([row[name] for row in batch])) for name in BATCH_COLUMNS]
        found[done:done + real] = model(*columns).asnumpy()[:real]
        done += real
    return found.reshape(-1, 2)


def _own_hd_num(directory: str) -> int | None:
    """Tiles the model was trained with, where its directory says so."""
    return read_fields(directory).get("hd_num")
