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
    PICTURE,
    START_OF_TURN,
    chat_pieces,
    chat_text,
    chat_turns,
    check_places,
    check_text,
    mask_labels,
    placed_by_public_rule,
    public_pieces,
    shift_labels,
    training_pieces,
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


def rendered(pieces):
    return "".join("<ImageHere>" if piece is PICTURE else piece.text for piece in pieces)


TEXT = st.text("ab <\n", max_size=6)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), max_size=3)


@given(ROUNDS, TEXT, TEXT)
def test_pieces_of_a_chat_join_to_the_public_text(rounds, system, query):
    assert rendered(chat_pieces(chat_turns(query, rounds, system))) == chat_text(query, rounds, system)


@given(st.lists(TEXT, min_size=1, max_size=4), TEXT)
def test_pieces_of_a_conversation_join_to_the_public_text(parts, answer):
    turns = [("system", "s "), ("user", "<ImageHere>".join(parts)), ("assistant", answer)]
    pieces = training_pieces(turns, "</s>")
    assert rendered(pieces) == training_text(turns) == rendered(public_pieces(training_text(turns)))
    assert pieces.count(PICTURE) == len(parts) - 1


def test_what_is_learnt_follows_from_the_turns():
    pieces = training_pieces([("system", "s"), ("user", "<ImageHere>q"), ("assistant", " a<ImageHere> "),
                              ("user", "r"), ("assistant", "b")], "</s>")
    assert [(piece.kind, piece.text, piece.header) for piece in pieces if piece.learnt] == [
        ("text", "assistant\na<ImageHere>", "assistant\n"), ("mark", END_OF_TURN, ""),
        ("text", "assistant\nb", "assistant\n"), ("mark", END_OF_TURN, ""), ("text", "\n", ""), ("mark", "</s>", "")]
    assert pieces.count(PICTURE) == 1


def test_a_single_picture_needs_no_place():
    assert check_places(0, 1)
    assert not check_places(2, 2)
    assert not check_places(0, 0)


@pytest.mark.parametrize(("places", "images"), [(1, 0), (0, 2), (1, 2), (2, 1)])
def test_places_and_pictures_must_agree(places, images):
    with pytest.raises(PromptError, match=rf"^a.json, sample 1: .* {places} <ImageHere> for {images} pictures"):
        check_places(places, images, "a.json, sample 1")


@pytest.mark.parametrize(("query", "images", "expected"), [
    ("a <ImageHere> b <ImageHere> c", 1, ["a ", PICTURE, " b ", " c"]), ("see <ImageHere> here", 0, ["see ", " here"]),
    ("compare", 2, ["compare", PICTURE]), ("a <ImageHere>", 2, ["a ", PICTURE, "", PICTURE]),
    ("<ImageHere>a", 1, ["", PICTURE, "a"])])
def test_wrong_numbers_of_pictures_by_the_public_rule(query, images, expected):
    pieces = placed_by_public_rule(public_pieces(query), images)
    assert [piece if piece is PICTURE else piece.text for piece in pieces] == expected


@pytest.mark.parametrize(("value", "words"), [
    (None, "query must be a text, found NoneType"), (b"x", "found bytes"), (1.5, "found float"),
    ("ab\udc00", r"\\udc00 at character 2 .*half of a surrogate pair"), ("\udce9", "stands for the byte 0xE9")])
def test_what_is_no_text_is_refused(value, words):
    with pytest.raises(PromptError, match=words):
        check_text(value, "query")
    assert check_text("\U0001f600", "query") == "\U0001f600"


def test_shifting_moves_every_label_to_the_position_before():
    assert shift_labels(np.array([-100, 7, 8, 9])).tolist() == [7, 8, 9, -100]


def test_prefix_length_follows_the_tokenizer():
    ids = np.array([1, 50, 9, 60, 61, 70, 9, 2])   # end of turn 9, answer prefix of two tokens
    assert mask_labels(ids, 9, 2, prefix_length=2).tolist() == [-100] * 5 + [70, 9, 2]
