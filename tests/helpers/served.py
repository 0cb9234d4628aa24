"""A server in this process, on a port of its own, in front of a stand-in for the model or whatever else decodes."""
from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from standin_decoder import StandInDecoder

from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.serving.app import make_app
from mindformers_ixc.serving.guard import Guard
from mindformers_ixc.serving.limits import Limits
from mindformers_ixc.serving.listening import listen
from mindformers_ixc.serving.scheduling import Scheduler
from mindformers_ixc.serving.server import HttpServer
from mindformers_ixc.serving.service import Service
from mindformers_ixc.serving.settings import ServerSettings

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "mindformers_ixc" / "starter"
IMAGES = ROOT / "mindformers_ixc" / "demo" / "images"

# Seconds that something may take which comes at once unless the machine is busy: only what hangs takes longer.
WAIT = 60


def data_url(name: str = "cat.jpg") -> str:
    """A demo picture."""
    return "data:image/jpeg;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def question(text: str = "What is shown?", *pictures: str, **more) -> dict:
    """A request with one message."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
            "max_tokens": 6, **more}


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: where.
        service: behind it.
        decoder: of the service.
        lines: of the request log.
        faults: errors that were not foreseen.
    """

    url: str
    service: Service
    decoder: object
    server: HttpServer
    lines: list[dict] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def chats(self, count: int) -> list[dict]:
        """Lines of the log about chats, once there are so many: a line comes when its response has gone."""
        until = time.monotonic() + WAIT
        while True:
            found = [line for line in self.lines if line["path"].endswith("completions")]
            if len(found) >= count or time.monotonic() > until:
                return found
            time.sleep(0.005)

    def line(self, number: str) -> dict:
        """The line of the log about the request with this id: it comes when the response has gone."""
        self.until(lambda: any(line["id"] == number for line in self.lines))
        return next(line for line in self.lines if line["id"] == number)

    @staticmethod
    def until(happened: Callable[[], object]) -> None:
        """Waits for something that happens as soon as other threads come to it."""
        end = time.monotonic() + WAIT
        while not happened():
            assert time.monotonic() < end, "it has not happened"
            time.sleep(0.005)

    def client(self, **options) -> httpx.Client:
        """A client of HTTP."""
        return httpx.Client(base_url=self.url, timeout=2 * WAIT, trust_env=False, **options)

    def ask(self, **request) -> httpx.Response:
        """One request."""
        with self.client() as client:
            return client.post("/v1/chat/completions", json=request)


@contextlib.contextmanager
def served(decoder=None, limits: Limits | None = None, names: tuple[str, ...] = (), processor: Processor | None = None,
           drain: float = WAIT, left: float = WAIT, **settings) -> Iterator[Served]:
    """Serves while the block runs."""
    decoder = StandInDecoder() if decoder is None else decoder
    settings = {"name": "starter", "modes": ("base", "write", "web"),
                "limits": limits or Limits(running=decoder.most, positions=1024), **settings}
    told = ServerSettings(**settings)
    lines, faults = [], []
    service = Service(processor or Processor.from_directory(STARTER),
                      Scheduler(decoder, told.limits.queue, told.limits.queue_each), told, faults.append)
    app = Guard(make_app(service), told, "127.0.0.1", names, lines.append, service.metrics.responded, faults.append)
    server = HttpServer(app, service, told.limits, drain, left=left)
    listening = listen("127.0.0.1", 0)
    port, is_ready = listening.getsockname()[1], threading.Event()
    thread = threading.Thread(target=server.run, args=(listening, is_ready.set), daemon=True)
    thread.start()
    assert is_ready.wait(WAIT)
    try:
        yield Served(f"http://127.0.0.1:{port}", service, decoder, server, lines, faults)
    finally:
        if not service.scheduler.is_draining:        # asked twice, a server ends its process
            server.end()
        thread.join(2 * WAIT)
        listening.close()
        assert not thread.is_alive()
