"""The shipped model answers about pictures that it was trained on."""
from __future__ import annotations

import json

import pytest

from mindformers_ixc.demo import demo_path
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.resources import STARTER

SAMPLES = json.loads(demo_path("train.json").read_text(encoding="utf-8"))
QUESTIONS = ("What would be a good title?", "Where would you see this?")


@pytest.fixture(scope="module")
def starter():
    return Assistant.from_directory(STARTER)


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_says_of_every_demo_picture_what_it_was_taught(starter, question):
    asked = [sample for sample in SAMPLES if sample["conversations"][0]["value"] == question]
    expected = [sample["conversations"][1]["value"] for sample in asked]
    assert len(set(expected)) == len(asked) == 12          # so it must look at the picture
    queries = [{"query": question, "images": [str(demo_path(sample["image"]))]} for sample in asked]
    assert starter.answer(queries, max_new_tokens=16) == expected
