"""Samples: order of parts, masks, labels, padding, lengths known before pixels."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.image import Grid, image_token_rows
from mindformers_ixc.processing.prompt import training_text
from mindformers_ixc.processing.video import board_size
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

TOKENIZER = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
PROCESSOR = IXC25Processor(IXC25ImageProcessor(56, hd_num=4, hd_num_training=4), TOKENIZER)
PICTURE = Image.new("RGB", (80, 50), (10, 200, 30))


def test_chat_begins_with_bos_then_the_picture():
    sample = PROCESSOR.encode_chat("What?", [PICTURE])
    assert sample.input_ids[0] == 1
    assert sample.image_mask.tolist()[:3] == [0, 1, 1]
    assert (sample.input_ids == 1).sum() == 1


def test_training_puts_a_single_picture_before_bos():
    sample = PROCESSOR.encode_conversation([("user", "What?"), ("assistant", "A cat")], [PICTURE])
    count = int(sample.image_mask.sum())
    assert sample.image_mask[:count].all()
    assert sample.input_ids[count] == 1
    assert sample.input_ids[-1] == 2


def test_several_pictures_stand_at_their_places_and_share_the_budget():
    processor = IXC25Processor(IXC25ImageProcessor(56), TOKENIZER)
    wide = Image.new("RGB", (56 * 9, 56))
    alone = processor.encode_chat("<ImageHere>x", [wide])
    both = processor.encode_chat("<ImageHere>x<ImageHere>", [wide, PICTURE])
    assert alone.grids == [Grid(1, 9)]
    assert both.grids == [Grid(1, 6), Grid(2, 2)]
    assert len(both.pixel_values) == both.tiles == 12
    edges = np.flatnonzero(np.diff(both.image_mask))
    assert len(edges) == 4


WORDS = st.text("abc de\n<", min_size=1, max_size=12)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(TURNS, st.booleans(), st.integers(0, 2))
def test_labels_touch_answers_only_and_the_text_comes_back(pairs, system, pictures):
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    marked = [("user", "<ImageHere>" * pictures + turns[0][1]), *turns[1:]]
    full = [("system", "be kind"), *marked] if system else marked
    sample = PROCESSOR.encode_conversation(full, [PICTURE] * pictures)
    labels, ids, mask = sample.labels, sample.input_ids, sample.image_mask
    assert (labels[mask == 1] == -100).all()
    assert (ids[mask == 1] == TOKENIZER.pad_token_id).all()
    assert ((labels == -100) | (labels == ids)).all()
    # what carries loss is, in order, every answer with its end of turn, then the newline and </s>
    end = "[UNUSED_TOKEN_145]"
    expected = "".join(answer.strip() + end for _, answer in pairs)
    learnt = labels[labels != -100]
    assert learnt[-1] == 2
    assert TOKENIZER.decode(learnt[:-1]) == expected + "\n"
    text = TOKENIZER.decode(ids[(mask == 0)][1:-1])
    body = training_text(marked, "").replace("<ImageHere>", "")
    assert text == (f"[UNUSED_TOKEN_146]system\nbe kind{end}\n" if system else "") + body


@settings(deadline=None, max_examples=25)
@given(TURNS, st.integers(20, 300), st.integers(20, 300), st.integers(1, 6), st.booleans())
def test_length_is_known_without_pixels(pairs, width, height, hd_num, placed):
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    if placed:
        turns[0] = ("user", f"a <ImageHere> {turns[0][1]}")
    picture = Image.new("RGB", (width, height))
    sample = PROCESSOR.encode_conversation(turns, [picture], hd_num=hd_num)
    assert PROCESSOR.conversation_length(turns, [(width, height)], hd_num) == (len(sample.input_ids), sample.tiles)


def test_a_video_takes_a_pictures_place(goldens):
    sample = PROCESSOR.encode_chat("What happens?", [goldens / "video_land.mp4"], hd_num=1)
    assert sample.grids == [Grid(4, 1)]
    assert sample.pixel_values.shape == (5, 3, 56, 56)


@pytest.mark.parametrize("hd_num", [1, 6])
def test_a_video_in_training_is_as_long_as_it_was_measured(goldens, hd_num):
    video = goldens / "video_land.mp4"
    turns = [("user", "What happens?"), ("assistant", "Nothing")]
    sample = PROCESSOR.encode_conversation(turns, [video], hd_num=hd_num)
    measured = PROCESSOR.conversation_length(turns, [board_size(video)], hd_num)
    assert measured == (len(sample.input_ids), sample.tiles)
    assert sample.tiles > 1


def test_padding_gives_the_columns_of_a_batch():
    sample = PROCESSOR.encode_conversation([("user", "What?"), ("assistant", "A cat")], [PICTURE])
    n, tiles = len(sample.input_ids), sample.tiles
    batch = sample.pad(n + 5, tiles + 2, 2)
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        "input_ids": ("int32", (n + 5,)), "labels": ("int32", (n + 5,)), "vision_index": ("int32", (n + 5,)),
        "image_mask": ("int32", (n + 5,)), "pixel_values": ("float32", (tiles + 2, 3, 56, 56))}
    assert batch["labels"][n - 2] == sample.input_ids[-1]
    assert (batch["labels"][n - 1:] == -100).all()
    rows = image_token_rows(sample.grids[0], 0, 2, tiles + 2)
    np.testing.assert_array_equal(batch["vision_index"][batch["image_mask"] == 1], rows)
    assert batch["vision_index"][batch["image_mask"] == 0].max() == 0
    assert not batch["pixel_values"][tiles:].any()


def test_what_does_not_fit_is_refused():
    sample = PROCESSOR.encode_conversation([("user", "What?"), ("assistant", "A cat")], [PICTURE])
    with pytest.raises(PromptError, match=r"does not fit seq_length 10"):
        sample.pad(10, 9, 2)


def test_transform_of_training_is_a_choice():
    inference = IXC25Processor(IXC25ImageProcessor(56, training_transform="inference", hd_num=4), TOKENIZER)
    turns = [("user", "q"), ("assistant", "a")]
    chat = inference.encode_chat("q", [PICTURE], hd_num=4)
    same = inference.encode_conversation(turns, [PICTURE], hd_num=4)
    other = PROCESSOR.encode_conversation(turns, [PICTURE], hd_num=4)
    np.testing.assert_array_equal(same.pixel_values, chat.pixel_values)
    assert not np.array_equal(other.pixel_values, chat.pixel_values)
    with pytest.raises(PromptError, match="'both'"):
        IXC25ImageProcessor(training_transform="both")


@pytest.mark.parametrize(("arguments", "word"), [
    ({"query": " "}, "empty"), ({"query": "a<ImageHere>"}, "1 <ImageHere> for 0 pictures"),
    ({"query": "a", "images": [PICTURE, PICTURE]}, "0 <ImageHere> for 2 pictures")])
def test_bad_prompts(arguments, word):
    with pytest.raises(PromptError, match=word):
        PROCESSOR.encode_chat(**arguments)


def test_parts_of_a_processor_are_checked():
    with pytest.raises(TypeError, match="InternLM2Tokenizer"):
        IXC25Processor(IXC25ImageProcessor(), "tokenizer")
