"""Pictures of a training row: what travels, how much of it, and rows with more pictures than there is room for."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.data.sections import check_dataset_section
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer

SECTION = {"data_loader": {"dataset_dir": "a.json"}, "tokenizer": {"type": "InternLM2Tokenizer"}, "seq_length": 64,
           "max_tiles": 4, "batch_size": 1}


def processor(side: int) -> Processor:
    return Processor(ImageProcessor(side), Tokenizer(str(demo_path("tokenizer.model"))))


def conversation(index: int, images: list) -> Conversation:
    turns = [("user", "<ImageHere> " * len(images) + "What?"), ("assistant", "A cat")]
    return Conversation("data.json", index, str(index), turns, images, [(60, 40)] * len(images))


def test_a_row_of_18_tiles_and_a_view_is_21_megabytes(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6 * 560, 3 * 560, 3), np.uint8)).save(
        tmp_path / "a.bmp")
    table = ConversationTable(processor(560), [conversation(0, [str(tmp_path / "a.bmp")])], 8192, 19, 18, max_images=1)
    row = dict(zip(BATCH_COLUMNS, table[0]))
    assert row["pixel_values"].dtype == np.uint8
    assert row["view_index"].tolist() == [1, *[0] * 18]
    assert sum(column.nbytes for column in row.values()) < 22e6          # 71.6e6 as float32
    assert row["pixel_values"][1:].any(axis=(1, 2, 3)).all()


def test_a_sample_with_more_pictures_than_views_is_named():
    samples = [conversation(0, ["a.png"]), conversation(1, ["a.png", "b.png"])]
    with pytest.raises(DataError, match=r"^data\.json, sample 1.*: its 2 pictures do not fit "
                                        r"train_dataset\.max_images 1; raise that and model\.model_config\.max_images, "
                                        r"or leave the sample out"):
        ConversationTable(processor(56), samples, 96, 8, 1, max_images=1)
    assert ConversationTable(processor(56), samples, 96, 8, 1).max_images == 4


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_room_for_no_picture_is_refused(value):
    check_dataset_section({**SECTION, "max_images": 1})
    with pytest.raises(DataError, match=r"train_dataset\.max_images is .*; it must be a whole number of at least 1"):
        check_dataset_section({**SECTION, "max_images": value})


@pytest.mark.parametrize("column", ["global_views", "view_index"])
def test_the_columns_of_pictures_belong_together(column):
    columns = [name for name in BATCH_COLUMNS if name != column]
    with pytest.raises(DataError, match=f"input_columns lacks {column}; it needs input_ids, labels, pixel_values, "
                                        "global_views, view_index"):
        check_dataset_section({**SECTION, "input_columns": columns})
