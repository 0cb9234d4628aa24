"""Questions of a conversation file, and what shuffling their pictures does."""
from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.data.conversations import Conversation, ConversationReader, ReadingOptions
from mindformers_ixc.data.questions import SourceQuestions, as_typed, other_pictures, questions_of
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.stored import StoredFile


def conversation(*texts, images=(), system=None):
    roles = ("user", "assistant")
    turns = [("system", system)] if system else []
    return Conversation("x.json", 0, "a", turns + [(roles[i % 2], text) for i, text in enumerate(texts)], list(images))


def test_rounds_before_a_question_are_its_history():
    questions = questions_of([conversation("q1", "a1", "q2", "a2", images=["p"], system="s")])
    assert [(q.query, q.history, q.images, q.expected, q.system) for q in questions] == [
        ("q1", [], ["p"], "a1", "s"), ("q2", [("q1", "a1")], ["p"], "a2", "s")]


def test_a_question_has_the_pictures_up_to_its_round():
    questions = questions_of([conversation("q1", "a", "<ImageHere>q2", "b", "<ImageHere>q3", "c", images=["p", "r"])])
    assert [q.images for q in questions] == [[], ["p"], ["p", "r"]]


def test_an_example_can_be_typed_in_a_shell():
    asked = conversation("<ImageHere>\nWhat's\nthis?", "a", images=["my pictures/größe.png"])
    samples = [conversation("q", "a"), asked]
    image, question = as_typed(samples)
    assert shlex.split(f"{image} {question}") == ["my pictures/größe.png", "What's this?"]
    assert as_typed([conversation("Is <ImageHere> $5?", "a", images=["a.png"])]) == ("a.png", "'Is <ImageHere> $5?'")
    assert as_typed([conversation("<ImageHere>", "a cat", images=["a.png"])])[1] == "'What is shown in the picture?'"
    inside = StoredFile("data.tar, a.png", bytes)
    assert as_typed([conversation("Is it?", "a", images=[inside])]) == ("PICTURE", "'Is it?'")
    assert as_typed(samples[:1]) == as_typed([]) == ("PICTURE", "QUESTION")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_shuffling_gives_other_pictures_of_the_same_number(shapes):
    counts = np.array([count for count, _ in shapes], np.int64)
    marks = np.array([10 * count + picture for count, picture in shapes], np.int64)
    for number, other in enumerate(other_pictures(counts, marks)):
        later = [*range(number + 1, len(shapes)), *range(number)]
        fitting = [one for one in later if counts[one] == counts[number] and marks[one] != marks[number]]
        assert other == (fitting[0] if counts[number] and fitting else number)


def source(folder):
    for name in "abc":
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    turns = [{"from": "user", "value": "<ImageHere>one?"}, {"from": "assistant", "value": "1"},
             {"from": "user", "value": "<ImageHere>two?"}, {"from": "assistant", "value": "2"}]
    rows = [{"id": "a", "image": "a.png", "conversations": turns[:2]},
            {"id": "b", "image": ["b.png", "c.png"], "conversations": turns}, {"id": "c", "conversations": [
                {"from": "user", "value": "none?"}, {"from": "assistant", "value": "0"}]}]
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return ConversationReader(path, ReadingOptions())


def names(questions):
    return [(one.sample, one.query, [image.name for image in one.images]) for one in questions]


def test_questions_of_a_source_are_those_of_its_samples(tmp_path):
    reader = source(tmp_path)
    asked = SourceQuestions(reader)
    assert len(asked) == 4
    assert names(asked) == names(asked) == names(questions_of(reader.load()))


def test_questions_with_the_pictures_of_others(tmp_path):
    asked = SourceQuestions(source(tmp_path), shuffle_images=True)
    assert [pictures for _, _, pictures in names(asked)] == [["b.png"], ["a.png"], ["b.png", "c.png"], []]


def test_all_bad_samples_are_named_before_a_question_is_asked(tmp_path):
    reader = source(tmp_path)
    reader.records.path.write_text('{"id": 1}\n{"id": 2}\n')
    with pytest.raises(DataError, match=r"(?s)sample 0 \(id 1\).*sample 1 \(id 2\)"):
        SourceQuestions(reader)
