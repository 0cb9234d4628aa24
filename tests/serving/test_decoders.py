"""What decodes for a server, with the starter: answers through the scheduler are the assistant's own."""
from __future__ import annotations

import itertools
import json
import socket
import threading

import pytest
from mindspore import nn
from paged_operators import stand_in
from random_model import SIZES
from served import IMAGES, WAIT, question, served

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.device import assume_device
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.serving import decoders
from mindformers_ixc.serving.answering import AnswerWriter
from mindformers_ixc.serving.decoders import Batched, InTurns, Paged, gauges, make_decoder
from mindformers_ixc.serving.limits import Limits
from mindformers_ixc.serving.scheduling import Job, Refused, Scheduler

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


def test_a_client_whose_connection_breaks_frees_its_row(assistant, decoder, monkeypatch):
    step, steps, over = decoder.step, itertools.count(), threading.Event()

    def held(rows, tokens):
        """After a few tokens the answer waits until nobody wants it any more."""
        if next(steps) >= 8 and not over.is_set():
            server.until(lambda: all(job.is_cancelled for job, _ in server.service.scheduler.writing))
        return step(rows, tokens)

    monkeypatch.setattr(decoder, "step", held)
    limits = Limits(running=decoder.most, positions=512, new_tokens=400)
    body = json.dumps(question(stream=True, max_tokens=400)).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode()
    with served(decoder, limits, processor=assistant.processor) as server, server.client() as client:
        stops, server.service.stop_token_ids = server.service.stop_token_ids, ()       # it does not end by itself
        wire, got = socket.create_connection(("127.0.0.1", server.port), WAIT), b""
        wire.sendall(head + body)
        while got.count(b"data: ") < 4:
            more = wire.recv(4096)
            assert more, got
            got += more
        assert server.service.scheduler.open_rows == 1
        wire.close()
        server.until(lambda: "mindformers_ixc_running 0" in client.get("/metrics").text)
        server.until(lambda: server.service.scheduler.is_idle)
        over.set()
        assert server.service.scheduler.open_rows == 0
        assert server.service.scheduler.counts.requests == {
            "done": 0, "cancelled": 1, "failed": 0, "late": 0, "refused": 0}
        server.service.stop_token_ids = stops
        assert server.ask(**question()).status_code == 200
        if isinstance(decoder, Batched):
            assert len(decoder._free) == decoder.most


def test_where_caches_cannot_be_joined_decoders_take_turns(assistant, monkeypatch):
    assert isinstance(make_decoder(assistant, 2, 256, 64), Batched)
    monkeypatch.setattr(decoders, "unavailable", lambda: "a reason")
    assert isinstance(make_decoder(assistant, 2, 256, 64), InTurns)


class TestPaged:
    """Ascend's operators, composed for the CPU; what they give is in tests/generation/test_paged_batching."""

    @pytest.fixture(scope="class")
    def paged(self, assistant):
        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch)
            return Paged(assistant, 3, 256, 64)

    def test_it_is_ascends_and_takes_16_bits(self, assistant):
        with assume_device("Ascend"), pytest.raises(ConfigError, match="compute_dtype is float32"):
            make_decoder(assistant, 2, 256, 64)
        with assume_device("Ascend"), nn.no_init_parameters():
            half = Assistant(IXC25ForCausalLM(IXC25Config(**SIZES, compute_dtype="bfloat16", use_past=True)), None)
            decoder = make_decoder(half, 2, 256, 64)
        assert isinstance(decoder, Paged)
        assert decoder.pool.count == 2 * 256 // 128 + 1

    def test_answers_are_the_assistants_and_requests_wait_for_blocks(self, assistant, paged):
        others = paged.pool.count - 1 - 3       # somebody else's: what is left is enough for one request
        paged.pool.promise(others)
        questions = [QUESTIONS[1], QUESTIONS[4], ("Hello again", None)]        # without pictures: one graph less
        answers = [Answer(assistant, paged, *question, str(number)) for number, question in enumerate(questions)]
        scheduler = Scheduler(paged)
        for answer in answers:
            scheduler.submit(answer.job)
        most = 0
        while scheduler.tick():
            most = max(most, paged.pool.used)
        paged.pool.promise(-others)
        assert most <= 3 and paged.pool.used == paged.pool.promised == 0
        for answer in answers:
            assert answer.ends == [None]
            assert answer.text == assistant.answer([answer.question], max_new_tokens=12)[0]

    def test_a_client_that_goes_away_gives_its_blocks_back(self, assistant, paged):
        scheduler = Scheduler(paged)
        answers = [Answer(assistant, paged, *question, "a") for question in QUESTIONS[:3]]
        for answer in answers:
            scheduler.submit(answer.job)
        scheduler.tick()
        assert paged.pool.used
        assert {name: value for name, _, _, value in gauges(paged)}["cache_blocks_used"] == paged.pool.used
        for answer in answers:
            scheduler.cancel(answer.job)
        scheduler.tick()
        assert scheduler.is_idle and paged.pool.used == 0

    def test_what_would_never_find_room_is_refused(self, assistant, paged):
        answer = Answer(assistant, paged, *QUESTIONS[1], "a", max_new_tokens=1000)
        scheduler = Scheduler(paged)
        scheduler.submit(answer.job)
        scheduler.tick()
        (end,) = answer.ends
        assert isinstance(end, Refused) and (end.status, end.retry_after) == (400, None)
        assert "take more memory for keys and values" in str(end)
