"""Pairs for a reward model: the public form of its data, and the column that says where scores are read."""
from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mindformers_ixc.data.batch import ANSWER_COLUMNS, BATCH_COLUMNS, SCORE_COLUMN
from mindformers_ixc.data.preferences import PreferenceTable, load_preferences
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.judged import encode_judged
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer

PROCESSOR = Processor(ImageProcessor(56, training_transform="inference"), Tokenizer(str(demo_path("tokenizer.model"))))
QUESTION = {"from": "human", "value": "What is shown?"}


def talk(*texts):
    return [{"from": ("human", "bot")[i % 2], "value": text} for i, text in enumerate(texts)]


PAIR = {"id": "a", "conversations_a": talk("What is shown?", "a red square"),
        "conversations_b": talk("What is shown?", "a dog"), "image": "red.png"}


@pytest.fixture
def source(tmp_path):
    Image.new("RGB", (90, 50), (200, 10, 10)).save(tmp_path / "red.png")
    rows = [PAIR, {"id": "b", "conversations_a": talk("Hello", "Hi", "How?", "Well."),
                   "conversations_b": talk("Hello", "Hi", "How?", "No idea at all."), "image": []},
            {"id": "c", "prompt": "say", "chosen": "yes", "rejected": "no"}]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_the_public_form_gives_both_conversations(source):
    first, second, third = load_preferences(source)
    assert first.turns == [("user", "What is shown?"), ("assistant", "a red square")]
    assert first.rejected == [("user", "What is shown?"), ("assistant", "a dog")]
    assert [path.name for path in first.images] == ["red.png"]
    assert [text for _, text in second.turns] == ["Hello", "Hi", "How?", "Well."] and not second.images
    assert third.turns[-1] == ("assistant", "yes")


def test_a_row_ends_in_the_reward_token_and_says_where_it_is(source):
    pairs = load_preferences(source)
    table = PreferenceTable(PROCESSOR, pairs, 96, 4, hd_num=2, columns=(*BATCH_COLUMNS, SCORE_COLUMN))
    for index, pair in enumerate(pairs):
        row = table._encode(index)
        for side, (ids, positions) in enumerate(zip(row["input_ids"], row[SCORE_COLUMN])):
            turns = (pair.turns, pair.rejected)[side]
            sample = encode_judged(PROCESSOR, turns, list(pair.images), 2)
            length = len(sample.input_ids)
            np.testing.assert_array_equal(ids[:length], sample.input_ids)
            np.testing.assert_array_equal(row["image_mask"][side][:length], sample.image_mask)
            assert positions.tolist() == [1] * (length - 1) + [2] + [0] * (96 - length)
            assert row["labels"][side][length - 1] == -100


def test_every_picture_of_a_pair_has_the_limit_of_tiles_as_where_it_is_scored(source):
    for name, size in (("wide.png", (240, 60)), ("tall.png", (60, 240))):
        Image.effect_noise(size, 80).convert("RGB").save(source.parent / name)
    question = "Both: <ImageHere> and <ImageHere>?"
    pair = {"conversations_a": talk(question, "alike"), "conversations_b": talk(question, "not at all"),
            "image": ["wide.png", "tall.png"]}
    source.write_text(json.dumps([{**PAIR, **pair}]), encoding="utf-8")
    pair, = load_preferences(source)
    row = PreferenceTable(PROCESSOR, [pair], 160, 12, hd_num=4, columns=(*BATCH_COLUMNS, SCORE_COLUMN))._encode(0)
    for side, turns in enumerate((pair.turns, pair.rejected)):
        sample = encode_judged(PROCESSOR, turns, list(pair.images), 4)
        wanted = sample.pad(160, 12, 6, PROCESSOR.pad_token_id)
        assert sample.tiles == 2 + 4 + 4           # two global views, and the four tiles that each may have
        for name in BATCH_COLUMNS:
            found = row[name][side] if name in ANSWER_COLUMNS else row[name]
            np.testing.assert_array_equal(found, wanted[name])


@pytest.mark.parametrize(("changes", "words"), [
    ({"conversations_b": talk("What else?", "a dog")}, "differs from conversations_a before the last answer"),
    ({"conversations_b": talk("What is shown?", "a red square")}, "conversations_a equals conversations_b"),
    ({"conversations_b": None}, "field conversations_b: must be a list of turns"),
    ({"conversations_a": talk("What is shown?")}, "field conversations_a: ends without an answer"),
    ({"conversations_a": talk("What is shown?", " ")}, "the answer is empty"),
    ({"prompt": "What?"}, "field prompt: is not read beside conversations_a"),
    ({"conversations_a": talk("<ImageHere> or <ImageHere>?", "a"),
      "conversations_b": talk("<ImageHere> or <ImageHere>?", "b")}, "2 <ImageHere> for 1 pictures"),
])
def test_a_bad_pair_is_named_with_its_field(source, changes, words):
    source.write_text(json.dumps([{**PAIR, **changes}]), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_preferences(source)


def test_the_shipped_pairs_can_be_told_apart_by_their_charts_only():
    rows = load_preferences("pkg:mindformers_ixc/demo/stages/reward_held_out.json")
    texts = [[pair.turns[-1][1], pair.rejected[-1][1]] for pair in rows]
    assert len(rows) == 96 and {good for good, _ in texts} == {bad for _, bad in texts}
