"""A server of OpenAI's protocol without a model: what it answers is a function, and what it was asked is kept."""
from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """What a test sees of the server.

    Attributes:
        url: its address.
        asked: bodies of all requests for an answer, in the order in which they came.
        keys: what each had in `Authorization`.
        refusals: (status, body, headers) of the next requests for an answer, which get these instead.
        models: what `/v1/models` says.
        pieces: bytes of a stream.
        health: what `/health` says; `None`: there is no such page.
    """

    def __init__(self, answer: Callable[[dict], str]):
        self.answer, self.url = answer, ""
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.refusals: list[tuple[int, bytes, dict]] = []
        self.models = [{"id": "stand-in", "mode": "base"}, {"id": "stand-in:write", "mode": "write"}]
        self.health: dict | None = {"status": "ok"}
        self.pieces: list[bytes] | None = None


def _handler(state: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            if self.path == "/v1/models":
                self.reply(200, json.dumps({"data": state.models}).encode())
            elif self.path == "/health" and state.health is not None:
                self.reply(200, json.dumps(state.health).encode())
            else:
                self.reply(404, b"<html>nothing here</html>", "text/html")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            state.keys.append(self.headers.get("Authorization"))
            if state.refusals:
                status, content, headers = state.refusals.pop(0)
                self.reply(status, content, **headers)
            elif body.get("stream"):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for piece in state.pieces or ():
                    self.wfile.write(piece)
            else:
                self.reply(200, json.dumps({
                    "choices": [{"message": {"role": "assistant", "content": state.answer(body)},
                                 "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 3, "completion_tokens": 1}}).encode())

    return Handler


@contextmanager
def serving(answer: Callable[[dict], str] = lambda body: "yes") -> Iterator[StandIn]:
    """Runs one on a free port of this machine."""
    state = StandIn(answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
