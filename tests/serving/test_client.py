"""OpenAI's own client against a server whose model is a stand-in: every field, streamed and not, many at once."""
from __future__ import annotations

import asyncio
import base64
import json
import random
import socket

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI
from served import STARTER, data_url, question, served
from standin_decoder import StandInDecoder, alone

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.serving import app
from mindformers_ixc.serving.limits import Limits


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(STARTER)


@pytest.fixture(scope="module")
def server(processor):
    limits = Limits(running=8, positions=1024, queue=400, queue_each=400)
    with served(StandInDecoder(most=8), limits, processor=processor) as running:
        yield running
        assert running.faults == []


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def text_of(processor, prompt: dict, count: int) -> str:
    """The answer of the stand-in without neighbours."""
    sample, tokenizer = processor.encode_chat(**prompt), processor.tokenizer
    ids = alone(sample.input_ids.tolist(), count)
    ends = [place for place, token in enumerate(ids) if token in (tokenizer.eos_token_id, processor.end_of_turn_id)]
    return tokenizer.decode(ids[:ends[0]] if ends else ids, skip_special_tokens=True).strip()


def joined(stream) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices).strip()


def test_the_example_of_the_docs(client, processor):
    answer = client.chat.completions.create(
        model="starter", max_tokens=7,
        messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": data_url()}},
            {"type": "text", "text": "What is shown in the picture?"}]}],
        extra_body={"hd_num": 3})
    assert answer.choices[0].message.content == text_of(
        processor, {"query": "<ImageHere>What is shown in the picture?", "images": [_bytes()], "hd_num": 3}, 7)
    assert answer.choices[0].finish_reason == "length"
    sample = processor.encode_chat("<ImageHere>What is shown in the picture?", [_bytes()], hd_num=3)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(sample.input_ids), 7)
    assert usage.total_tokens == usage.prompt_tokens + 7
    assert usage.prompt_tokens_details.image_tokens == sample.image_mask.sum() > 0


def _bytes(name: str = "cat.jpg") -> bytes:
    from served import IMAGES

    return (IMAGES / name).read_bytes()


def test_a_stream_is_the_same_answer_in_pieces_with_its_usage_last(client, processor):
    asked = {"model": "starter", "messages": [{"role": "user", "content": "Tell me"}], "max_completion_tokens": 12}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == whole.choices[0].message.content == text_of(processor, {"query": "Tell me"}, 12)
    assert len(chunks) > 6 and chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_rounds_system_and_several_pictures_stand_where_their_parts_stand(client, processor):
    answer = client.chat.completions.create(model="starter", max_tokens=5, messages=[
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "First "},
                                     {"type": "image_url", "image_url": {"url": data_url()}}]},
        {"role": "assistant", "content": "A cat.", "refusal": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url("rocket.jpg")}},
                                     {"type": "text", "text": "and this?"}]}])
    assert answer.choices[0].message.content == text_of(processor, {
        "query": "<ImageHere>and this?", "images": [_bytes(), _bytes("rocket.jpg")],
        "history": [("First <ImageHere>", "A cat.")], "meta_instruction": "Be short."}, 5)


def test_a_video_is_the_board_of_its_frames(processor, goldens):
    clip = goldens / "video_land.mp4"
    limits = Limits(positions=1 << 20, tiles=1 << 16, new_tokens=8)
    with served(StandInDecoder(piece=1 << 20), limits, processor=processor, image_root=goldens) as server:
        url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
        found = [server.ask(**{"max_tokens": 4, "messages": [{"role": "user", "content": [
            {"type": kind, kind: {"url": one}}, {"type": "text", "text": "What happens?"}]}]}).json()
            for kind, one in (("video_url", url), ("image_url", url), ("video_url", "video_land.mp4"))]
        wanted = text_of(processor, {"query": "<ImageHere>What happens?", "images": [str(clip)]}, 4)
        assert [answer["choices"][0]["message"]["content"] for answer in found] == [wanted] * 3
    with served(limits=Limits(tiles=3), processor=processor) as server:
        answer = server.ask(**{"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {
            "url": url}}]}]})
        assert answer.status_code == 413 and "tiles" in answer.json()["error"]["message"]


def test_meta_instruction_is_the_system_turn(client):
    with_field = client.chat.completions.create(
        model="starter", max_tokens=5, messages=[{"role": "user", "content": "Go"}],
        extra_body={"meta_instruction": "Be short."})
    with_message = client.chat.completions.create(model="starter", max_tokens=5, messages=[
        {"role": "developer", "content": "Be short."}, {"role": "user", "content": "Go"}])
    assert with_field.choices == with_message.choices


def test_sampling_with_a_seed_repeats_itself_and_answers_differ_from_one_another(client):
    def ask(**more):
        return [choice.message.content for choice in client.chat.completions.create(
            model="starter", max_tokens=8, messages=[{"role": "user", "content": "Say"}], **more).choices]

    three = ask(n=3, temperature=1.0, seed=7)
    assert ask(n=3, temperature=1.0, seed=7) == three and len(set(three)) == 3
    assert ask(temperature=1.0, seed=8) == three[1:2]           # answer i of n has seed + i
    assert ask(temperature=0) == ask() == ask(top_p=0.0, seed=3)
    assert ask(n=2) == ask() * 2


def test_streams_of_several_answers_are_told_apart_by_their_index(client):
    asked = {"model": "starter", "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 9,
             "messages": [{"role": "user", "content": "Say"}]}
    whole = client.chat.completions.create(**asked)
    texts, ends = [""] * 3, [None] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert [text.strip() for text in texts] == [choice.message.content for choice in whole.choices]
    assert ends == ["length"] * 3


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client):
    asked = {"model": "starter", "messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 20}
    text = client.chat.completions.create(**asked).choices[0].message.content
    stop = text[8:11]
    for answer in (client.chat.completions.create(**asked, stop=stop).choices[0],
                   client.chat.completions.create(**asked, stop=["never this", stop]).choices[0]):
        assert answer.message.content == text[:text.index(stop)].strip() and answer.finish_reason == "stop"
    assert joined(client.chat.completions.create(**asked, stop=stop, stream=True)) == text[:text.index(stop)].strip()


def test_the_end_of_a_turn_ends_an_answer(processor):
    end = processor.tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]")
    with served(StandInDecoder(ends=(end, 4)), processor=processor) as server:
        answer = server.ask(**question()).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 5
        assert "UNUSED" not in answer["choices"][0]["message"]["content"]


def test_logprobs_are_those_of_the_tokens(client):
    asked = {"model": "starter", "messages": [{"role": "user", "content": "Tell me"}], "max_tokens": 6,
             "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(whole) == 6
    for token in whole:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob < 0
        assert token.token == token.top_logprobs[0].token
    streamed = [token for chunk in client.chat.completions.create(**asked, stream=True)
                if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == whole


def test_beams_answer_whole(client, processor):
    answer = client.chat.completions.create(model="starter", messages=[{"role": "user", "content": "Go"}], max_tokens=5,
                                            extra_body={"num_beams": 3, "length_penalty": 0.5})
    assert answer.choices[0].message.content == text_of(processor, {"query": "Go"}, 5)


def test_models_are_the_modes(client, server):
    assert [model.id for model in client.models.list()] == ["starter", "starter:write", "starter:web"]
    assert client.models.retrieve("starter:web").mode == "web"
    for name, more in (("starter:web", {}), ("starter", {"extra_body": {"mode": "web"}})):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Go"}], max_tokens=2, **more,
                                       extra_headers={"X-Request-Id": f"web-{len(more)}"})
        assert server.line(f"web-{len(more)}")["mode"] == "web"


NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "tool_choice": "none", "logit_bias": {},
           "response_format": {"type": "text"}, "store": False, "user": "me", "functions": [], "metadata": {},
           "parallel_tool_calls": True, "service_tier": "auto", "reasoning_effort": None}


def test_what_asks_for_nothing_is_accepted(server):
    assert server.ask(**question(**NEUTRAL)).status_code == 200


@pytest.mark.parametrize(("more", "param"), [
    ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"presence_penalty": -1}, "presence_penalty"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"stream": True, "num_beams": 2}, "stream"),
    ({"num_beams": 2, "n": 2}, "n"), ({"num_beams": 2, "logprobs": True}, "logprobs"), ({"num_beams": 99}, "num_beams"),
    ({"temperature": 2.5}, "temperature"), ({"temperature": "1"}, "temperature"), ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"), ({"n": 9}, "n"), ({"n": True}, "n"), ({"seed": -1}, "seed"), ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": 3}, "stop"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10 ** 9}, "max_tokens"), ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options"), ({"hd_num": 0}, "hd_num"),
    ({"mode": "poem"}, "mode"), ({"model": "gpt-4o"}, "model"), ({"model": "starter:web", "mode": "write"}, "mode"),
    ({"temprature": 1}, "temprature"), ({"meta_instruction": 5}, "meta_instruction"), ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"), ({"repetition_penalty": 0}, "repetition_penalty")], ids=str)
def test_what_is_refused_names_the_field(server, more, param):
    answer = server.ask(**question(**more))
    assert answer.status_code in (400, 404)
    error = answer.json()["error"]
    assert error["param"] == param and param in error["message"] and error["type"] == "invalid_request_error"


def test_errors_are_those_of_the_client(client):
    with pytest.raises(BadRequestError, match="temperature is 3") as error:
        client.chat.completions.create(model="starter", messages=[{"role": "user", "content": "Go"}], temperature=3)
    assert error.value.param == "temperature"


class TestManyAtOnce:
    def test_200_requests_of_16_clients_get_the_answers_that_they_get_alone(self, server, processor):
        rng = random.Random(0)
        asked = [(f"Question {rng.randrange(40)} {'and so on ' * rng.randrange(12)}", rng.randrange(1, 25),
                  rng.random() < 0.5, rng.choice(["base", "write", "web"])) for _ in range(200)]

        async def one(client, text, count, stream, mode):
            answer = await client.chat.completions.create(
                model="starter", messages=[{"role": "user", "content": text}], max_tokens=count, stream=stream,
                extra_body={"mode": mode})
            if not stream:
                return answer.choices[0].message.content
            return "".join([chunk.choices[0].delta.content or "" async for chunk in answer]).strip()

        async def of_a_client(place):
            async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                return [await one(client, *request) for request in asked[place::16]]

        async def all_of_them():
            return await asyncio.gather(*map(of_a_client, range(16)))

        found = asyncio.run(all_of_them())
        wanted = [text_of(processor, {"query": text}, count) for text, count, *_ in asked]
        assert [found[place % 16][place // 16] for place in range(200)] == wanted
        assert 1 < max(server.decoder.steps) <= 8

    def test_a_client_that_goes_away_frees_its_row(self, processor):
        # an answer takes minutes: none ends before its client has gone
        with served(StandInDecoder(most=1, piece=512, step_seconds=0.2), processor=processor) as server:
            cancelled = server.service.scheduler.counts.requests
            for number, stream in enumerate((True, False), 1):
                body = json.dumps(question(max_tokens=900, stream=stream)).encode()
                with socket.create_connection(("127.0.0.1", server.port)) as wire:
                    wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
                                 b"Content-Type: application/json\r\n\r\n%b" % (len(body), body))
                    if stream:
                        assert wire.recv(4096).startswith(b"HTTP/1.1 200 ")
                    server.until(lambda: server.decoder.rows)
                server.until(lambda: cancelled["cancelled"] == number)      # noqa: B023 - it is called at once
                assert not server.decoder.rows
            server.decoder.step_seconds = 0.0
            assert server.ask(**question()).status_code == 200
            assert cancelled == {"done": 1, "cancelled": 2, "failed": 0, "late": 0, "refused": 0}


class TestTheEnd:
    def test_running_answers_end_and_new_ones_are_refused(self, processor):
        decoder = StandInDecoder()
        with served(decoder, processor=processor) as server, server.client() as client:
            with decoder.held(), client.stream(
                    "POST", "/v1/chat/completions", json=question(max_tokens=40, stream=True)) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.server.end()
                assert server.ask(**question()).status_code == 503
                with server.client() as other:
                    assert other.get("/health").json() == {"status": "draining"}
                decoder.go_on()
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"

    def test_full_queues_say_when_to_come_again(self, processor):
        limits = Limits(running=1, queue=1, positions=1024)
        decoder = StandInDecoder(most=1)
        with served(decoder, limits, processor=processor) as server, decoder.held():
            async def ask():
                async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=120) as client:
                    asked = [asyncio.ensure_future(client.post("/v1/chat/completions", json=question(max_tokens=20)))
                             for _ in range(6)]
                    while sum(one.done() for one in asked) < 4:         # one is answered and one waits
                        await asyncio.wait([one for one in asked if not one.done()], return_when="FIRST_COMPLETED")
                    decoder.go_on()
                    return await asyncio.gather(*asked)

            answers = asyncio.run(ask())
            refused = [answer for answer in answers if answer.status_code != 200]
            assert refused and {answer.status_code for answer in refused} <= {429, 503}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


class TestBeside:
    def test_pictures_are_let_go_once_they_have_been_read(self, processor, monkeypatch):
        requests = []
        read = app.read_chat
        monkeypatch.setattr(app, "read_chat", lambda *given: requests.append(read(*given)) or requests[-1])
        decoder = StandInDecoder()
        with served(decoder, processor=processor) as server, decoder.held(), server.client() as client, \
                client.stream("POST", "/v1/chat/completions",
                              json=question("What?", data_url(), max_tokens=40, stream=True)) as answer:
            next(answer.iter_lines())
            (job, _), = server.service.scheduler.writing
            assert requests[0].messages == [] and job.prompt is None

    def test_what_fails_while_an_answer_is_computed_is_the_servers_failure(self, processor):
        decoder = StandInDecoder()
        with served(decoder, processor=processor) as server:
            for error, sentence, foreseen in (
                    (GenerationError("The model's scores are no numbers."), "The model's scores are no numbers.", True),
                    (ValueError("a secret path"), "The server failed to answer this request", False)):
                decoder.fails = error
                answer = server.ask(**question())
                found = answer.json()["error"]
                assert (answer.status_code, found["code"], found["type"]) == (500, "failed", "server_error")
                assert found["message"].startswith(sentence) and "secret" not in answer.text
                assert (server.faults == []) is foreseen
                streamed = server.ask(**question(stream=True)).text.splitlines()
                assert '"code": "failed"' in streamed[-2] and sentence in streamed[-2]
            decoder.fails = None
            assert server.ask(**question()).status_code == 200 and not decoder.rows

    def test_metrics_are_what_has_happened(self, processor):
        with served(processor=processor) as server:
            server.ask(**question(max_tokens=3, n=2))
            with server.client() as client:
                text = client.get("/metrics").text
            values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
            assert values["mindformers_ixc_new_tokens_total"] == "6"
            assert values['mindformers_ixc_requests_total{end="done"}'] == "1"
            assert values["mindformers_ixc_time_to_first_token_seconds_count"] == "1"
            assert values["mindformers_ixc_queue"] == values["mindformers_ixc_running"] == "0"

    def test_tiles_are_what_the_model_sees(self, server):
        with server.client() as client:
            found = client.post("/v1/ixc/tiles", json={"image": data_url(), "hd_num": 4}).json()
            grid = found["grid"]
            assert len(found["tiles"]) == grid["rows"] * grid["columns"] <= 4
            assert found["whole"].startswith("data:image/jpeg;base64,") and found["tile_size"] == 112
            asked = server.ask(**question("", data_url(), hd_num=4)).json()
            assert asked["usage"]["prompt_tokens_details"]["image_tokens"] == found["positions"]
            assert client.post("/v1/ixc/tiles", json={"image": data_url(), "hdnum": 4}).status_code == 400

    def test_the_interface_is_described_and_every_field_with_it(self, server):
        with server.client() as client:
            document, page = client.get("/openapi.json").json(), client.get("/docs").text
        fields = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
            "schema"]["properties"]
        assert {"messages", "hd_num", "stream_options", "tools"} <= set(fields)
        assert all(f"<code>{name}</code>" in page for name in fields)
        assert "http://" not in page.replace("http://HOST:PORT", "") and "https://" not in page

    def test_the_log_has_no_contents_unless_it_is_asked_for(self, processor):
        for contents in (False, True):
            with served(processor=processor, log_contents=contents) as server:
                text = server.ask(**question("A secret?", data_url())).json()["choices"][0]["message"]["content"]
                line = json.dumps(server.chats(1)[0])
                assert ("A secret?" in line) is contents and data_url()[60:90] not in line
                assert (server.lines[0].get("answers") == [text]) is contents
                assert server.lines[0]["image_tokens"] > 0 and server.lines[0]["status"] == 200
                bare = question("A secret?")
                bare["messages"][0]["content"].append({"type": "image_url", "image_url": data_url()})
                assert server.ask(**bare).is_success and data_url()[60:90] not in json.dumps(server.chats(2)[1])
