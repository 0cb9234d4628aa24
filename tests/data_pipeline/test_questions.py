"""Questions of a conversation file, and what shuffling their pictures does."""
from __future__ import annotations

import shlex

from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.questions import Question, as_typed, questions_of, shuffle_images
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
    questions = [Question(str(i), "q", [], [f"{picture}-{j}" for j in range(count)], "a")
                 for i, (count, picture) in enumerate(shapes)]
    before = [list(q.images) for q in questions]
    shuffle_images(questions)
    for question, own in zip(questions, before):
        assert len(question.images) == len(own)
        others = [images for images in before if len(images) == len(own) and images != own]
        if own and others:
            assert question.images in others
        else:
            assert question.images == own
