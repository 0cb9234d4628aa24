"""Streams of text: pieces join to the whole, no character is split, stop strings never show."""
from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.demo import demo_path
from mindformers_ixc.generation.text import UNFINISHED, TextStream
from mindformers_ixc.registration import InternLM2Tokenizer

TOKENIZER = InternLM2Tokenizer(str(demo_path("tokenizer.model")))
# the demo tokenizer knows few characters: all others are bytes of their own, the hard case of a stream; special tokens
# written out (they begin with <) are skipped when text is shown
TEXT = st.text(st.characters(exclude_categories=("Cs", "Co"), exclude_characters="\0\u2581\ufffd<"), max_size=25)


def pieces(text: str, **options) -> list[str]:
    stream = TextStream(TOKENIZER, (2,), **options)
    return [stream.push(token) for token in TOKENIZER.encode_text(text)] + [stream.push(2), stream.flush()]


@settings(deadline=None, max_examples=150)
@given(TEXT)
def test_pieces_join_to_the_text_and_hold_whole_characters(text):
    parts = pieces(text)
    assert "".join(parts) == text.lstrip()
    assert all(UNFINISHED not in part for part in parts)


@settings(deadline=None, max_examples=150)
@given(TEXT, st.text("ab", min_size=1, max_size=3), TEXT)
def test_a_stop_string_ends_the_text_before_itself(before, stop, after):
    whole = (before + stop + after).lstrip()
    assert "".join(pieces(before + stop + after, stop_strings=[stop])) == whole[:whole.index(stop)]


def test_a_beginning_of_a_stop_string_is_shown_once_it_is_none():
    parts = pieces("xy<br", stop_strings=["<body"])
    assert "".join(parts) == "xy<br"
    assert parts[-2] == "" or "<" not in "".join(parts[:1])


def test_text_comes_before_its_end():
    parts = pieces("a cup of coffee on a table")
    assert sum(bool(part) for part in parts[:-2]) > 3
