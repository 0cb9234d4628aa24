"""Rendering, splitting and labels."""
from __future__ import annotations

import numpy as np
import parity_host
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.prompt import (
    END_OF_TURN,
    START_OF_TURN,
    chat_text,
    mask_labels,
    shift_labels,
    split_at_placeholders,
    training_text,
)


def test_reference_labels(goldens):
    assert [row for row in parity_host.check_labels(goldens) if not row.passed] == []


def test_chat_text_opens_the_answer():
    text = chat_text("Why?", [("Hi", "Hello")], "Be brief.")
    assert text == (f"{START_OF_TURN}system\nBe brief.{END_OF_TURN}\n{START_OF_TURN}user\nHi{END_OF_TURN}\n"
                    f"{START_OF_TURN}assistant\nHello{END_OF_TURN}\n{START_OF_TURN}user\nWhy?{END_OF_TURN}\n"
                    f"{START_OF_TURN}assistant\n")


def test_reference_training_texts(goldens):
    reference = parity_host.read(goldens / "labels.json")["texts"]
    assert training_text([("user", "What is this?"), ("assistant", " A red car.\n")]) == reference["one turn"]
    assert training_text([("user", "x"), ("assistant", "")]) == reference["empty answer"]


@given(st.lists(st.text("ab <", max_size=6), min_size=1, max_size=5))
def test_parts_join_back_to_the_text(parts):
    text = "<ImageHere>".join(parts)
    found, in_front = split_at_placeholders(text, len(parts) - 1)
    assert "<ImageHere>".join(found) == text
    assert not in_front


def test_a_single_picture_needs_no_place():
    assert split_at_placeholders("text", 1) == (["text"], True)


@pytest.mark.parametrize(("text", "images"), [("<ImageHere>", 0), ("none", 2), ("<ImageHere>", 2),
                                              ("<ImageHere><ImageHere>", 1)])
def test_places_and_pictures_must_agree(text, images):
    with pytest.raises(PromptError) as error:
        split_at_placeholders(text, images, "a.json, sample 1")
    assert f"{text.count('<ImageHere>')} <ImageHere> for {images} pictures" in str(error.value)
    assert str(error.value).startswith("a.json, sample 1: ")


def test_shifting_moves_every_label_to_the_position_before():
    assert shift_labels(np.array([-100, 7, 8, 9])).tolist() == [7, 8, 9, -100]


def test_prefix_length_follows_the_tokenizer():
    ids = np.array([1, 50, 9, 60, 61, 70, 9, 2])   # end of turn 9, answer prefix of two tokens
    assert mask_labels(ids, 9, 2, prefix_length=2).tolist() == [-100] * 5 + [70, 9, 2]
