"""The shipped model answers about pictures that it was trained on."""
from __future__ import annotations

import json

import pytest

from mindformers_ixc.demo import demo_path
from mindformers_ixc.generation import continuing
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.resources import STARTER

SAMPLES = json.loads(demo_path("train.json").read_text(encoding="utf-8"))
QUESTIONS = ("What would be a good title?", "Where would you see this?")


@pytest.fixture(scope="module")
def starter():
    return Assistant.from_directory(STARTER)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": 4}], ids=["one by one", "looked up"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_it_says_of_every_demo_picture_what_it_was_taught(starter, question, options):
    asked = [sample for sample in SAMPLES if sample["conversations"][0]["value"] == question]
    expected = [sample["conversations"][1]["value"] for sample in asked]
    assert len(set(expected)) == len(asked) == 12          # so it must look at the picture
    queries = [{"query": question, "images": [str(demo_path(sample["image"]))]} for sample in asked]
    assert starter.answer(queries, max_new_tokens=16, **options) == expected


@pytest.mark.parametrize("options", [{}, {"prompt_lookup": 4}], ids=["one by one", "looked up"])
def test_a_chat_about_a_picture_goes_on_as_if_it_were_asked_anew(starter, monkeypatch, options):
    monkeypatch.setattr(continuing, "COMPILING", 0)
    picture, rounds = str(demo_path("images/cat.jpg")), []
    for question in (*QUESTIONS, QUESTIONS[0]):
        query = {"query": question, "images": [picture], "history": list(rounds)}
        answer = starter.answer([query], max_new_tokens=12, **options)[0]
        starter.engine.settle()
        reuse, starter.engine.reuse = starter.engine.reuse, None
        assert starter.answer([query], max_new_tokens=12)[0] == answer
        starter.engine.reuse = reuse
        rounds.append((question, answer))
    assert any(key[0] == "base" and key[2] == continuing.REST for slot in starter.engine._slots.values()
               for key in slot.extensions)
