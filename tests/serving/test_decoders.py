"""What decodes for a server, with the starter: answers through the scheduler are the assistant's own."""
from __future__ import annotations

import pytest
from served import IMAGES

from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.serving import decoders
from mindformers_ixc.serving.answering import AnswerWriter
from mindformers_ixc.serving.decoders import Batched, InTurns, make_decoder
from mindformers_ixc.serving.scheduling import Job, Scheduler

QUESTIONS = [("What is shown in the picture?", "cat.jpg"), ("Hello", None), ("Which colour is it?", "coffee.jpg"),
             ("What is shown in the picture?", "rocket.jpg"), ("Say more. " * 20, None)]


@pytest.fixture(scope="module")
def assistant():
    return Assistant.from_directory("starter")


@pytest.fixture(scope="module", params=["batched", "in turns"])
def decoder(request, assistant):
    return Batched(assistant, 3, 512, 64) if request.param == "batched" else InTurns(assistant, 3)


class Answer:
    """A request of the scheduler and what came of it."""

    def __init__(self, assistant, decoder, text, picture, client, **options):
        self.question = {"query": text, "images": [str(IMAGES / picture)] if picture else []}
        self.options = GenerationOptions(**{"max_new_tokens": 12, "top_k": 0, **options,
                                            "stop_token_ids": assistant.stop_token_ids})
        self.pieces, self.ends = [], []
        writer = AnswerWriter(0, self.options, assistant.processor.tokenizer, self.pieces.append)
        self.job = Job(decoder.prepare(assistant.encode(self.question)), "base", self.options.max_new_tokens, [writer],
                       client, self.ends.append, self.options.num_beams > 1, None, self.options)

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces).strip()


def run(scheduler, answers):
    for answer in answers:
        scheduler.submit(answer.job)
        scheduler.tick()
    while scheduler.tick():
        pass
    assert [answer.ends for answer in answers] == [[None]] * len(answers)


def test_answers_are_the_assistants(assistant, decoder):
    answers = [Answer(assistant, decoder, *question, str(number)) for number, question in enumerate(QUESTIONS)]
    run(Scheduler(decoder), answers)
    for answer in answers:
        assert answer.text == assistant.answer([answer.question], max_new_tokens=12)[0]
    assert answers[0].text and "cat" in answers[0].text.lower()


def test_samples_with_a_seed_do_not_depend_on_neighbours(assistant, decoder):
    options = {"do_sample": True, "temperature": 1.2, "seed": 5}
    alone = Answer(assistant, decoder, *QUESTIONS[3], "a", **options)
    run(Scheduler(decoder), [alone])
    among = [Answer(assistant, decoder, *question, "a", **options) for question in QUESTIONS]
    run(Scheduler(decoder), among)
    assert among[3].text == alone.text != among[0].text


def test_beams_are_the_assistants_and_others_go_on_meanwhile(assistant, decoder):
    beams = Answer(assistant, decoder, *QUESTIONS[0], "a", num_beams=3)
    other = Answer(assistant, decoder, *QUESTIONS[4], "b")
    run(Scheduler(decoder), [beams, other])
    assert beams.text == assistant.answer([beams.question], max_new_tokens=12, num_beams=3)[0]
    assert other.text == assistant.answer([other.question], max_new_tokens=12)[0]


def test_rows_are_free_again(assistant, decoder):
    answers = [Answer(assistant, decoder, *question, "a") for question in QUESTIONS]
    scheduler = Scheduler(decoder)
    for answer in answers:
        scheduler.submit(answer.job)
    for _ in range(4):
        scheduler.tick()
    for answer in answers:
        scheduler.cancel(answer.job)
    scheduler.tick()
    assert scheduler.is_idle
    if isinstance(decoder, Batched):
        assert len(decoder._free) == decoder.most


def test_where_caches_cannot_be_joined_decoders_take_turns(assistant, monkeypatch):
    assert isinstance(make_decoder(assistant, 2, 256, 64), Batched)
    monkeypatch.setattr(decoders, "unavailable", lambda: "a reason")
    assert isinstance(make_decoder(assistant, 2, 256, 64), InTurns)
