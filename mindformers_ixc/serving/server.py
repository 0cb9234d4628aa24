"""The process of a server: its socket, its signals, its end."""
from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mindformers_ixc.serving.guard import CROWDED, HEAD_BYTES
from mindformers_ixc.serving.limits import Limits
from mindformers_ixc.serving.listening import BACKLOG
from mindformers_ixc.serving.service import Service
from mindformers_ixc.serving.wire import RequestError

# Seconds in which the head of a request must have come, and that an idle connection is kept.
HEAD_SECONDS, KEPT_SECONDS = 10.0, 15

# Seconds in which a client must have read so many bytes of what waits for it: less than a byte a millisecond is nobody
# who reads, but somebody who holds the connection and its answer.
READ_SECONDS, LEAST_READ = 30.0, 16 << 10

# Seconds that the step which is being computed has to end when the time to drain is over, and requests to be told so.
LEFT_SECONDS = 5

NO_HTTP = RequestError("What came is no request of HTTP/1.1 that can be read; the connection is closed.", None, 400,
                       "bad_request")


class TimedProtocol(H11Protocol):
    """Closes connections whose request does not come, or whose answer is not read: uvicorn waits for both for ever."""

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None
    _unread = 0         # bytes that waited for the client when it was looked last; 0 also when it has read since

    def connection_made(self, transport: asyncio.Transport) -> None:     # type: ignore[override]
        """As asyncio has it."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_without_head)
        self._read_timer = self.loop.call_later(READ_SECONDS, self._break_unread)

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_without_head)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        """As asyncio has it."""
        self._unread = 0
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless the answer is already on its way, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(NO_HTTP.body).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))),
                       ("connection", "close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body),
                          h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _break_unread(self) -> None:
        """Breaks the connection to a client that does not read; looks again later otherwise."""
        left = self.transport.get_write_buffer_size()
        nothing_comes = self.flow.write_paused or (self.cycle is not None and self.cycle.response_complete)
        if left and nothing_comes and 0 < self._unread < left + LEAST_READ:
            self.transport.abort()
            return
        self._unread = left if nothing_comes else 0
        self._read_timer = self.loop.call_later(READ_SECONDS, self._break_unread)

    def _close_without_head(self) -> None:
        self._head_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server without handlers of signals: MindSpore puts its own in their place when a graph runs."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Does nothing."""
        yield

    def install_signal_handlers(self) -> None:
        """As older releases call it."""


class HttpServer:
    """Serves an application until it is told to end.

    Args:
        app: what is served.
        service: behind it.
        limits: of connections.
        drain: seconds that running answers have to end.
        say: shows a sentence.
        left: seconds that the step in progress has then.
    """

    def __init__(self, app: ASGIApp, service: Service, limits: Limits, drain: float,
                 say: Callable[[str], None] = lambda text: None, left: float = LEFT_SECONDS):
        self.app, self.service, self.limits, self.drain, self.say = app, service, limits, drain, say
        self.left = left
        # uvicorn warns whoever serves of requests that are none, or ask for web sockets; and has a traceback for each
        # that it ends with the server. `Guard` keeps the errors that matter
        self.server = _Server(uvicorn.Config(
            self._counted, interface="asgi3", http=TimedProtocol, ws="none", lifespan="off", log_config=None,
            log_level="critical", access_log=False, server_header=False, proxy_headers=False, backlog=BACKLOG,
            timeout_keep_alive=KEPT_SECONDS, h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=left))      # type: ignore[arg-type]  # asyncio takes parts of a second too
        self._asked = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, told of a request that comes over one connection too many: it refuses and logs it."""
        scope.setdefault("state", {})[CROWDED] = len(self.server.server_state.connections) > self.limits.connections
        await self.app(scope, receive, send)

    def run(self, listening: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Serves on a socket; returns when all has ended.

        Args:
            listening: see `listen`.
            ready: called when requests are taken.
        """
        asyncio.run(self._serve(listening, ready))

    async def _serve(self, listening: socket.socket, ready: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.service.worker.start(self._loop)
        serving = asyncio.ensure_future(self.server.serve(sockets=[listening]))
        ending = asyncio.ensure_future(self._drained())
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready()
        await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        self.server.should_exit = True
        await serving
        ending.cancel()
        self.service.close()
        await asyncio.get_running_loop().run_in_executor(None, self.service.worker.stop, 5.0)

    async def _drained(self) -> None:
        """Waits until the end was asked for and running answers have come to theirs, or their time is over."""
        while not self._asked.is_set():
            await asyncio.sleep(0.05)
        if not await self._idle_within(self.drain):
            self.say(f"Not all was answered within {self.drain:g} s; the rest is refused.")
            self.service.scheduler.give_up()
            await self._idle_within(self.left)
        await asyncio.sleep(0.1)        # what is done is on its way to the clients

    async def _idle_within(self, seconds: float) -> bool:
        """Waits until nothing is going on; whether it was so within this time."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while not self.service.scheduler.is_idle and loop.time() < until:
            await asyncio.sleep(0.05)
        return self.service.scheduler.is_idle

    def end(self) -> None:
        """Takes no more requests, lets those that run come to their end; for any thread. Asked again: ends at once."""
        if self._asked.is_set():
            os._exit(1)
        self.say(f"No new requests are taken; those that run have {self.drain:g} s to end. A second signal ends the "
                 "server at once.")
        self.service.scheduler.is_draining = True
        self._asked.set()
