"""What is below a request: bytes that are none, connections that are too many, and the end of the server."""
from __future__ import annotations

import json
import logging
import socket
import threading
import time

import httpx
import pytest
from served import STARTER, WAIT, question, served
from standin_decoder import StandInDecoder

from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.serving import app as routes
from mindformers_ixc.serving import server as servers
from mindformers_ixc.serving.limits import Limits
from mindformers_ixc.serving.listening import listen

SHUT_DOWN = "The server has shut down before this answer was there; ask another one, or later."


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(STARTER)


@pytest.fixture(autouse=True)
def silence(caplog):
    """Whatever comes in, nobody's terminal gets a traceback or a warning for it."""
    yield
    assert [one.getMessage() for one in caplog.records if one.name.startswith(("asyncio", "uvicorn"))
            and one.levelno > logging.INFO] == []


def sent(server, *parts: bytes) -> bytes:
    """What comes back for bytes that are sent one part after the other, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.settimeout(WAIT)
        found = b""
        for number, part in enumerate(parts):
            wire.sendall(part)
            if number < len(parts) - 1:
                found += wire.recv(65536)
        while piece := wire.recv(65536):
            found += piece
        return found


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def test_what_is_no_request_is_refused_in_the_form_of_all_refusals_and_once(processor):
    with served(processor=processor) as server:
        for content in (b"hello\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"):
            head, _, body = sent(server, content).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ") and b"connection: close" in head.lower()
            assert json.loads(body)["error"]["code"] == "bad_request"
        # the answer has gone before what followed turned out to be wrong: there is no second one
        found = sent(server, GET + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 200 ") and found.endswith(b'{"status":"ok"}')
        found = sent(server, GET + b"Connection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 200 ")
        assert server.ask(**question()).status_code == 200


def wait_for_connections(server, count: int) -> None:
    """Returns when the server has so many."""
    server.until(lambda: len(server.server.server.server_state.connections) == count)


def test_a_connection_too_many_is_refused_with_a_sentence_and_logged(processor):
    with served(limits=Limits(running=4, positions=1024, connections=2), processor=processor) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        wait_for_connections(server, 2)
        answer = server.ask(**question())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"]["code"] == "too_many_connections" == server.chats(1)[0]["error"]
        for one in idle:
            one.close()
        wait_for_connections(server, 0)
        assert server.ask(**question()).status_code == 200


def test_what_nobody_foresaw_is_told_in_the_form_of_all_refusals_and_kept(processor, monkeypatch):
    monkeypatch.setattr(routes, "read_chat", lambda *_: 1 // 0)
    with served(processor=processor) as server:
        answer = server.ask(**question())
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "failed")
        assert answer.json()["error"]["message"] == "The server failed; its log has more."
        server.until(lambda: server.faults)         # it is kept when the answer has gone
        assert [type(one) for one in server.faults] == [ZeroDivisionError]


def answers_while_it_ends(server, *requests: dict) -> list[httpx.Response]:
    """What several requests, one begun after the other, get while the server is told to end."""
    found: dict[int, httpx.Response] = {}
    begun, scheduler = threading.Event(), server.service.scheduler

    def ask(place: int, request: dict) -> None:
        with server.client() as client, client.stream("POST", "/v1/chat/completions", json=request) as answer:
            begun.set()
            answer.read()
            found[place] = answer

    threads = []
    for place, more in enumerate(requests):
        threads.append(threading.Thread(target=ask, args=(place, question(max_tokens=900, **more))))
        threads[-1].start()
        server.until(lambda place=place: len(scheduler.writing) + scheduler.queued > place)
        if more.get("stream"):
            assert begun.wait(WAIT)
    server.server.end()
    for thread in threads:
        thread.join(2 * WAIT)
    return [found[place] for place in range(len(requests))]


def test_what_has_not_ended_in_time_is_told_so(processor):
    # an answer takes minutes: none ends by itself
    with served(StandInDecoder(most=2, piece=512, step_seconds=0.1), processor=processor, drain=0.2) as server:
        streamed, whole, waiting = answers_while_it_ends(server, {"stream": True}, {}, {"n": 2})
    for answer in (whole, waiting):
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, SHUT_DOWN)
    *_, last = [line for line in streamed.text.splitlines() if line]
    assert streamed.status_code == 200 and json.loads(last[6:])["error"]["message"] == SHUT_DOWN
    assert not server.decoder.rows and not server.faults


def test_a_step_without_end_does_not_keep_the_server_or_its_clients(processor, monkeypatch):
    decoder = StandInDecoder(most=2, step_seconds=0.02)
    with served(decoder, processor=processor, drain=0.1, left=0.2) as server:
        step = decoder.step
        monkeypatch.setattr(decoder, "step", lambda *rows: (time.sleep(3), step(*rows))[1])
        answer, = answers_while_it_ends(server, {})
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, SHUT_DOWN)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_left(processor, monkeypatch, stream):
    def with_small_buffers(*where) -> socket.socket:     # or the system takes the whole answer from the server
        listening = listen(*where)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listening

    monkeypatch.setattr("served.listen", with_small_buffers)
    monkeypatch.setattr(servers, "READ_SECONDS", 0.2)
    with served(processor=processor) as server, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(WAIT)
        wire.connect(("127.0.0.1", server.port))
        body = json.dumps(question(max_tokens=900, n=4, logprobs=True, top_logprobs=20, stream=stream)).encode()
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert server.chats(1)[0]["status"] == 200
        server.until(lambda: not server.server.server.server_state.connections)
        received = b"".join(iter(lambda: wire.recv(1 << 16), b""))
        assert b"HTTP/1.1 200" in received and len(received) < 100_000
        assert not server.faults and not server.decoder.rows
        assert server.ask(**question()).status_code == 200
