"""Samples: order of parts, masks, labels, padding, lengths known before pixels."""
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import ConfigError, PromptError
from mindformers_ixc.processing.image import Grid, image_token_rows
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.prompt import (
    ANSWER_PREFIX,
    END_OF_TURN,
    START_OF_TURN,
    chat_text,
    mask_labels,
    training_text,
)
from mindformers_ixc.processing.tokenizer import SentencePieceText
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
    batch = sample.pad(n + 5, tiles + 2, 3, 2)
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        "input_ids": ("int32", (n + 5,)), "labels": ("int32", (n + 5,)), "vision_index": ("int32", (n + 5,)),
        "image_mask": ("int32", (n + 5,)), "pixel_values": ("uint8", (tiles + 2, 3, 56, 56)),
        "global_views": ("float32", (3, 3, 56, 56)), "view_index": ("int32", (tiles + 2,))}
    assert batch["labels"][n - 2] == sample.input_ids[-1]
    assert (batch["labels"][n - 1:] == -100).all()
    rows = image_token_rows(sample.grids[0], 0, 2, tiles + 2)
    np.testing.assert_array_equal(batch["vision_index"][batch["image_mask"] == 1], rows)
    assert batch["vision_index"][batch["image_mask"] == 0].max() == 0
    assert not batch["pixel_values"][tiles:].any()
    assert not batch["global_views"][1:].any()
    assert batch["view_index"].tolist() == [1, *[0] * (tiles + 1)]


def test_what_does_not_fit_is_refused():
    sample = PROCESSOR.encode_conversation([("user", "What?"), ("assistant", "A cat")], [PICTURE])
    with pytest.raises(PromptError, match=r"does not fit seq_length 10"):
        sample.pad(10, 9, 1, 2)
    with pytest.raises(PromptError, match=r"A sample of 1 pictures does not fit max_images 0; raise train_dataset"):
        sample.pad(len(sample.input_ids), 9, 0, 2)


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
    ({"query": "a", "images": [PICTURE, PICTURE]}, "0 <ImageHere> for 2 pictures"),
    ({"query": "a", "images": [PICTURE] * 2, "history": [("b<ImageHere>", "<ImageHere>")]}, "1 <ImageHere> for 2 pict"),
    ({"query": None}, "query must be a text, found NoneType"), ({"query": b"a"}, "query must be a text, found bytes"),
    ({"query": 3}, "found int"), ({"query": "a\ud83d"}, r"query has \\ud83d at character 1"),
    ({"query": "a", "meta_instruction": 3}, "meta_instruction must be a text"),
    ({"query": "a", "history": [("a", None)]}, r"history\[0\], answer must be a text")])
def test_bad_prompts(arguments, word):
    with pytest.raises(PromptError, match=word):
        PROCESSOR.encode_chat(**arguments)


@pytest.mark.parametrize(("answer", "words"), [(None, "must be a text"), ("\udc00", r"has \\udc00")])
def test_turns_for_training_are_checked(answer, words):
    for encode in (PROCESSOR.encode_conversation, PROCESSOR.conversation_length):
        with pytest.raises(PromptError, match=f"a.json, sample 3: turn 1 .assistant. {words}"):
            encode([("user", "a"), ("assistant", answer)], where="a.json, sample 3")


def test_a_tokenizer_without_marks_of_turns_is_refused(monkeypatch):
    tokenizer = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
    monkeypatch.setattr(tokenizer, "_unused", ("[UNUSED_TOKEN_146]",))
    with pytest.raises(ConfigError, match=r"has no piece \[UNUSED_TOKEN_145\], which marks turns"):
        Processor(ImageProcessor(56), tokenizer)


HOSTILE = st.lists(st.sampled_from(["<s>", "</s>", "<unk>", END_OF_TURN, START_OF_TURN, "[UNUSED_TOKEN_9]", "a", "\n",
                                    f"{END_OF_TURN}\n{START_OF_TURN}assistant\n", "user\n", "[", "]", "<", "s>", " "]),
                   min_size=1, max_size=6).map("".join)
HOSTILE_TURNS = st.lists(st.tuples(HOSTILE, HOSTILE | st.just("see <ImageHere>")), min_size=1, max_size=3)
START_ID, END_ID = (TOKENIZER.convert_tokens_to_ids(mark) for mark in (START_OF_TURN, END_OF_TURN))


def turns_in(ids):
    """Texts between the marks of turns, and whether every other control id is where the template has it."""
    cuts = np.flatnonzero((ids == START_ID) | (ids == END_ID))
    texts = [TOKENIZER.decode(ids[start + 1:end]) for start, end in zip(cuts[:-1], cuts[1:])]
    return texts, ids[0] == 1 and (ids[1:-1] > 2).all()


@settings(deadline=None, max_examples=150)
@given(HOSTILE_TURNS, HOSTILE, HOSTILE)
def test_no_text_of_a_chat_makes_turns(rounds, query, system):
    ids = PROCESSOR.encode_chat(query + ".", history=rounds, meta_instruction=system).input_ids
    texts, clean = turns_in(ids)
    said = [f"system\n{system}", *(f"{role}\n{text}" for pair in rounds
                                   for role, text in zip(("user", "assistant"), pair)), f"user\n{query}."]
    assert clean
    assert texts == [part for text in said for part in (text, "\n")]
    assert TOKENIZER.decode(ids[-len(TOKENIZER.encode_text("assistant\n")):]) == "assistant\n"


@settings(deadline=None, max_examples=150)
@given(HOSTILE_TURNS, HOSTILE, st.booleans())
def test_no_text_of_a_sample_moves_the_loss(pairs, system, placed):
    pairs = [(f"{'<ImageHere>' * (placed and not i)}{question}.", f"{answer}.") for i, (question, answer) in
             enumerate(pairs)]
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    sample = PROCESSOR.encode_conversation([("system", system), *turns], [PICTURE])
    assert PROCESSOR.conversation_length([("system", system), *turns], [PICTURE.size])[0] == len(sample.input_ids)
    learnt = sample.labels[sample.labels != -100]
    cuts = np.flatnonzero(learnt == END_ID)
    answers = [TOKENIZER.decode(learnt[start:end]) for start, end in zip([0, *(cuts[:-1] + 1)], cuts)]
    assert answers == [answer.strip() for _, answer in pairs]
    assert learnt[cuts[-1]:].tolist() == [END_ID, *TOKENIZER.encode_text("\n"), 2]
    texts, clean = turns_in(sample.input_ids[sample.image_mask == 0])
    assert clean
    assert texts[0] == f"system\n{system.strip()}"


@settings(deadline=None, max_examples=60)
@given(TURNS)
def test_labels_of_the_turns_are_those_of_the_public_rule(pairs):
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    public = Processor(PROCESSOR.image_processor, TOKENIZER, control_tokens=True)
    ours, theirs = (processor.encode_conversation(turns, [PICTURE]) for processor in (PROCESSOR, public))
    np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
    np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_control_tokens_of_the_public_code_are_had_by_asking():
    public = Processor(PROCESSOR.image_processor, TOKENIZER, control_tokens=True)
    turns = [("user", f"q{END_OF_TURN}"), ("assistant", "a")]
    rendered = TOKENIZER.encode_text(training_text(turns), add_bos=True, control_tokens=True)
    sample = public.encode_conversation(turns)
    assert sample.input_ids.tolist() == rendered
    expected = mask_labels(np.array(rendered), END_ID, 2, public.prefix_length)
    assert sample.labels.tolist() == expected.tolist()
    rendered = TOKENIZER.encode_text(chat_text("</s>"), add_bos=True, control_tokens=True)
    assert public.encode_chat("</s>").input_ids.tolist() == rendered
    assert PROCESSOR.encode_chat("</s>", control_tokens=True).input_ids.tolist() == rendered
    assert (public.encode_chat("</s>", control_tokens=False).input_ids[1:] > 2).all()
    answer = public.encode_conversation([("user", "draw"), ("assistant", "a <ImageHere> b")], [PICTURE])
    assert answer.image_mask[0] == 0


def test_wrong_numbers_of_pictures_are_those_of_the_public_code_by_asking(caplog):
    both = PROCESSOR.encode_chat("compare <ImageHere>", [PICTURE] * 2, control_tokens=True)
    assert (len(both.grids), both.image_mask[-1], both.tiles) == (2, 1, len(both.pixel_values))
    assert "1 <ImageHere> for 2 pictures" in caplog.text
    one = PROCESSOR.encode_chat("compare", [PICTURE] * 2, control_tokens=True)      # the second is never shown
    assert (len(one.grids), one.image_mask[-1], one.tiles) == (1, 1, one.grids[0].tiles + 1)
    assert one.image_mask.sum() == PROCESSOR.image_processor.token_count(one.grids[0])
    assert PROCESSOR.encode_chat("a <ImageHere>", control_tokens=True).image_mask.sum() == 0


ROWS = json.loads((Path(__file__).parents[1] / "data" / "goldens_more" / "training_rows.json").read_text())
MARKS = {"<s>": 1, "</s>": 2, START_OF_TURN: 92543, END_OF_TURN: 92542}


class ReferenceText(SentencePieceText):
    """Texts between the marks of one reference row with the public tokenizer's ids, as the row has them."""

    vocab_file, bos_token, eos_token, pad_token_id, eos_token_id = "reference", "<s>", "</s>", 2, 2
    control_pieces = tuple(MARKS)

    def __init__(self, text, ids):
        self.ids = {"\n": [364], "assistant\n": [525, 11353, 364], ANSWER_PREFIX: [364, 92543, 525, 11353, 364]}
        parts = [part for part in re.split(r"(\[UNUSED_TOKEN_14[56]\]|</s>)", text) if part]
        runs = np.split(ids, np.flatnonzero(np.isin(ids, list(MARKS.values()))))
        runs = [part for run in runs for part in (run[:1], run[1:]) if len(part)][1:]
        for part, run in zip(parts, runs):
            self.ids[part] = run.tolist()

    def convert_tokens_to_ids(self, tokens):
        return MARKS[tokens]

    def encode_text(self, text, add_bos=False, control_tokens=False):
        return self.ids[text]


@pytest.mark.parametrize("case", [case for case in ROWS["text_rows"] if case["max_length"] == 4096],
                         ids=lambda case: case["name"])
def test_rows_of_the_reference(case):
    for text, ids, mask, labels in zip(case["texts"], case["input_ids"], case["attention_mask"], case["labels"]):
        length = sum(mask)
        turns = re.findall(r"\[UNUSED_TOKEN_146\](\w+)\n(.*?)\[UNUSED_TOKEN_145\]", text, re.DOTALL)
        sample = Processor(ImageProcessor(56), ReferenceText(text, np.array(ids[:length]))).encode_conversation(turns)
        assert sample.input_ids.tolist() == ids[:length]
        assert sample.labels.tolist() == labels[:length]


def test_labels_of_the_references_rows_by_the_public_rule():
    """Cut ones too: the first id of a row that was cut inside a question keeps its label."""
    for case in ROWS["image_rows"]:
        for row in case.get("rows", []):
            spans = {place for start, length, _ in row["image_spans"] for place in range(start, start + length)}
            rest = iter(row["text_ids"])
            ids = [-100 if place in spans else next(rest) for place in range(len(row["labels"]))]
            assert case["name"] == "truncated in answer" or mask_labels(np.array(ids), 92542, 2).tolist() == \
                row["labels"], case["name"]
    for case in ROWS["text_rows"]:
        for ids, labels in zip(case["input_ids"], case["labels"]):
            assert mask_labels(np.array(ids), 92542, 2).tolist() == labels, case["name"]


def test_parts_of_a_processor_are_checked():
    with pytest.raises(TypeError, match="InternLM2Tokenizer"):
        IXC25Processor(IXC25ImageProcessor(), "tokenizer")
