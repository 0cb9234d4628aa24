"""The client of OpenAI's protocol against a server that is a stand-in."""
from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from standin_server import serving

from mindformers_ixc import chat_client
from mindformers_ixc.chat_client import ChatClient, image_part, text_part
from mindformers_ixc.errors import ServerError

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda body: f"{body['messages'][-1]['content']}!") as state:
        yield state


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(text: str | None) -> bytes:
    return event(choices=[{"delta": {} if text is None else {"content": text}}])


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_an_answer_with_all_fields_that_were_given(server, tail):
    client = ChatClient(server.url + tail)
    assert [one["id"] for one in client.models()] == ["stand-in", "stand-in:write"]
    answer = client.complete(HELLO, "stand-in", max_tokens=5, num_beams=3, hd_num=None)
    assert (answer.text, answer.finish_reason, answer.usage["prompt_tokens"]) == ("Hello!", "stop", 3)
    assert server.asked == [{"model": "stand-in", "messages": HELLO, "max_tokens": 5, "num_beams": 3}]
    assert server.keys == [None]


def test_the_key_is_that_of_the_option_or_else_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    ChatClient(server.url).complete(HELLO, "m")
    ChatClient(server.url, "given\n").complete(HELLO, "m")
    assert server.keys == ["Bearer from-the-environment", "Bearer given"]
    with pytest.raises(ServerError, match="no header of HTTP may have") as caught:
        ChatClient(server.url, "se\ncret")
    assert "cret" not in str(caught.value)


def test_a_picture_is_a_data_address():
    assert image_part(b"abc") == {"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}}
    assert text_part("a") == {"type": "text", "text": "a"}


def test_a_busy_server_is_asked_again(server, monkeypatch):
    slept = []
    monkeypatch.setattr(chat_client, "time", SimpleNamespace(sleep=slept.append))     # other threads sleep too
    busy = json.dumps({"error": {"message": "The queue is full."}}).encode()
    server.refusals = [(429, busy, {"Retry-After": "2"}), (503, busy, {})]
    assert ChatClient(server.url).complete(HELLO, "m").text == "Hello!"
    assert slept == [2.0, 4.0] and len(server.asked) == 3
    server.refusals = [(503, busy, {})] * 4
    with pytest.raises(ServerError, match="The queue is full") as caught:
        ChatClient(server.url).complete(HELLO, "m")
    assert caught.value.status == 503 and len(server.asked) == 7


def test_what_was_not_there_in_time_is_not_asked_again(server, monkeypatch):
    monkeypatch.setattr(chat_client, "time", None)
    late = json.dumps({"error": {"message": "The answer was not there within 600 s."}}).encode()
    server.refusals = [(504, late, {"Retry-After": "1"})]
    with pytest.raises(ServerError, match=r"^The answer was not there within 600 s\.$") as caught:
        ChatClient(server.url).complete(HELLO, "m")
    assert caught.value.status == 504 and len(server.asked) == 1


@pytest.mark.parametrize(("status", "body", "words"), [
    (400, {"error": {"message": "must be at least 1", "param": "num_beams"}}, "^num_beams: must be at least 1$"),
    (400, {"error": {"message": "num_beams is 0", "param": "num_beams"}}, "^num_beams is 0$"),
    (401, {"error": {"message": "A key is needed."}}, "A key is needed. Give it by --api_key or OPENAI_API_KEY"),
    (400, {"error": {"message": "a\x1b[2Jb\nc"}}, r"^a\\x1b\[2Jb c$"), (400, {"error": "plain"}, "^plain$"),
    (500, "<h1>no</h1>", "answers 500 Internal Server Error: .*no"),
    (404, "", "answers 404 Not Found.$")])
def test_a_refusal_is_the_servers_own_sentence(server, status, body, words):
    server.refusals = [(status, json.dumps(body).encode() if body else b"", {})]
    with pytest.raises(ServerError, match=words) as caught:
        ChatClient(server.url).complete(HELLO, "m")
    assert caught.value.status == status


def test_a_key_does_not_follow_a_redirection(server):
    with serving() as other:
        server.refusals = [(307, b"", {"Location": f"{other.url}/v1/chat/completions"})]
        with pytest.raises(ServerError, match=f"sends elsewhere, to {other.url}"):
            ChatClient(server.url, "secret").complete(HELLO, "m")
        assert other.asked == []


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "", "ftp://host", "http://", "http://host?x=1"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ServerError, match="no address of a server"):
        ChatClient(address)


def test_a_server_that_is_not_there():
    with serving() as gone:
        url = gone.url
    with pytest.raises(ServerError, match=r"does not answer: .*Is the server running") as caught:
        ChatClient(url).models()
    assert caught.value.status is None
    with pytest.raises(ServerError, match=r"does not answer"):
        ChatClient(url).health()


def test_other_servers_of_the_protocol_will_do(server):
    server.health, server.answer = None, lambda body: None
    assert ChatClient(server.url).health() == {}
    assert ChatClient(server.url).complete(HELLO, "m").text == ""
    server.models = []
    assert ChatClient(server.url).models() == []


def test_a_stream_comes_piece_by_piece(server):
    server.pieces = [b": a comment\n\n", delta(None), delta("One "), delta("two"), event(choices=[], usage={}),
                     b"data: [DONE]\n\n"]
    stream = ChatClient(server.url).stream(HELLO, "m", temperature=0)
    assert list(stream) == ["One ", "two"]
    assert server.asked == [{"model": "m", "messages": HELLO, "temperature": 0, "stream": True}]


@pytest.mark.parametrize(("last", "words"), [
    ([], "ended its answer before it was whole"), ([event(error={"message": "Out of memory."})], "Out of memory"),
    ([b"data: {\n\n"], "something else than JSON")])
def test_a_stream_that_breaks_off_is_an_error(server, last, words):
    server.pieces = [delta("One "), *last]
    stream = ChatClient(server.url).stream(HELLO, "m")
    assert next(stream) == "One "
    with pytest.raises(ServerError, match=words):
        next(stream)
