"""The routes of the server."""
from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mindformers_ixc.serving import responses
from mindformers_ixc.serving.answering import Likelihood
from mindformers_ixc.serving.guard import FAILED, ClientGone, read_body, refuse
from mindformers_ixc.serving.openapi import document, page_of
from mindformers_ixc.serving.page import page
from mindformers_ixc.serving.service import Exchange, Service
from mindformers_ixc.serving.tiles import read_tiles
from mindformers_ixc.serving.wire import RequestError, read_chat, read_json_object

# Seconds of silence after which a stream says that it is still there, so that nothing between closes it.
HEARTBEAT = 10.0

# Where words stand in a message. What stands elsewhere may be a picture, also in a form that is refused, and is cut to
# so many characters in the log.
WORDS, LOGGED = ("text", "content"), 40

# Seconds after which an answer that nobody waits for is told again to end.
AGAIN = 0.1


def make_app(service: Service) -> Starlette:
    """The application, without the guard in front of it."""
    settings, created = service.settings, int(time.time())

    async def health(_: Request) -> Response:
        alive = service.worker.is_alive
        status = "draining" if service.scheduler.is_draining else "ok" if alive else "failed"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(_: Request) -> Response:
        return JSONResponse(responses.models(settings, service.processor.image_processor, created))

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in settings.models:
            raise RequestError(f"There is no model {name[:60]!r} here.", "model", 404, "model_not_found")
        return JSONResponse(responses.model(name, settings, service.processor.image_processor, created))

    async def tiles(request: Request) -> Response:
        body = read_json_object(await read_body(request.scope, request.receive, settings))
        return JSONResponse(await service.in_reader(read_tiles, body, service.processor, settings))

    async def chat(request: Request) -> Response:
        return Chat(service, await read_body(request.scope, request.receive, settings))

    async def openapi(_: Request) -> Response:
        return JSONResponse(document(settings))

    async def docs(_: Request) -> Response:
        return HTMLResponse(page_of(settings))

    routes = [Route("/", _front(service)), Route("/health", health), Route("/metrics", metrics),
              Route("/v1/models", models), Route("/v1/models/{name:path}", model),
              Route("/v1/chat/completions", chat, methods=["POST"]),
              Route("/v1/ixc/tiles", tiles, methods=["POST"]), Route("/openapi.json", openapi), Route("/docs", docs)]
    return Starlette(routes=routes, exception_handlers={404: _missing, 405: _missing, RequestError: _refused,
                                                        ClientGone: _gone, Exception: _failed})


def _front(service: Service) -> Callable[[Request], Awaitable[Response]]:
    """What `/` is: the page to chat, or a few words."""
    async def front(_: Request) -> Response:
        if service.settings.has_page:       # made anew, for each has a nonce of its own
            return HTMLResponse(page(), headers={"cache-control": "no-store"})
        return PlainTextResponse(f"mindformers_ixc serves {service.settings.name}: POST /v1/chat/completions, "
                                 "GET /v1/models, /health, /metrics, /docs.\n")
    return front


async def _missing(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        allowed = error.headers["Allow"]
        response = refuse(RequestError(f"{request.url.path[:100]} does not take {request.method[:20]}, only {allowed}.",
                                       None, 405, "method_not_allowed"))
        response.headers["Allow"] = allowed
        return response
    return refuse(RequestError(f"There is nothing at {request.url.path[:100]}; /docs says what there is.", None, 404,
                               "not_found"))


async def _refused(request: Request, error: Any) -> Response:
    line = request.scope["state"]["line"]
    line["error"] = error.code or error.param or "refused"
    return refuse(error)


async def _failed(_: Request, __: Any) -> Response:
    """What nobody foresaw; the guard, which the error comes to as well, keeps it."""
    return refuse(RequestError(FAILED, None, 500, "failed"))


async def _gone(_: Request, __: Any) -> Response:
    return Response(status_code=499)


class Chat(Response):
    """The response to a chat request, which is answered while it is sent.

    Args:
        service: answers.
        content: the request's body.
    """

    def __init__(self, service: Service, content: bytes):
        super().__init__()
        self.service, self.content = service, content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it; when the client goes away, the request is ended."""
        line = scope["state"]["line"]
        request = read_chat(read_json_object(self.content), self.service.settings)
        self.content = b""
        line.update(model=request.model, mode=request.mode, stream=request.stream, n=request.n)
        if self.service.settings.log_contents:
            line["messages"] = [without_pictures(message) for message in request.messages]
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        work = asyncio.ensure_future(self._answer(request, scope, receive, send, line))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                line["finish"] = "client gone"
                # before Python 3.12 `asyncio.wait_for` loses a cancellation that comes together with what it waits for
                while not work.done():
                    work.cancel()
                    await asyncio.wait((work,), timeout=AGAIN)
                with contextlib.suppress(asyncio.CancelledError):
                    work.result()
            else:
                work.result()
        finally:
            for task in (gone, work):
                task.cancel()

    async def _answer(self, request: Any, scope: Scope, receive: Receive, send: Send, line: dict) -> None:
        client = scope.get("client")
        exchange = await self.service.begin(request, client[0] if client else "")
        form = responses.Form(request.model, self.service.processor.tokenizer)
        try:
            if request.stream:
                await _stream(self.service, exchange, form, send, line)
            else:
                response = JSONResponse(await self._whole(exchange, form, line))
                await response(scope, receive, send)
        except RequestError as error:
            line["error"] = error.code or error.param or "failed"
            raise
        finally:
            self.service.leave(exchange)
            usage = exchange.usage
            line.update(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"],
                        image_tokens=usage["prompt_tokens_details"]["image_tokens"],
                        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
                        finish=line.get("finish") or ",".join(exchange.finished))
            if exchange.first is not None:
                line["first_token_seconds"] = round(exchange.first, 4)

    async def _whole(self, exchange: Exchange, form: responses.Form, line: dict) -> dict:
        texts = [""] * exchange.request.n
        wanted = exchange.request.likeliest is not None
        likelihoods: list[list[Likelihood] | None] = [[] if wanted else None for _ in texts]
        async for piece in self.service.pieces(exchange):
            if piece is not None:
                texts[piece.number] += piece.text
                shown = likelihoods[piece.number]
                if shown is not None:
                    shown += piece.likelihoods
        texts = [text.strip() for text in texts]
        if self.service.settings.log_contents:
            line["answers"] = texts
        return form.whole(texts, exchange.finished, likelihoods, exchange.usage)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(service: Service, exchange: Exchange, form: responses.Form, send: Send, line: dict) -> None:
    """Sends an answer as server-sent events."""
    request, texts = exchange.request, [""] * exchange.request.n
    pieces = service.pieces(exchange, HEARTBEAT)
    # the head waits for the first piece, so that what fails before has a status of its own
    first = await pieces.__anext__()
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
               (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        for number in range(request.n):
            await _say(send, responses.event(form.begin(number, request.include_usage)))
        async for piece in _from(first, pieces):
            if piece is None:
                await _say(send, b": still computing\n\n")
                continue
            texts[piece.number] += piece.text
            for chunk in form.chunk(piece, request.likeliest is not None, request.include_usage):
                await _say(send, responses.event(chunk))
        if request.include_usage:
            await _say(send, responses.event(form.last(exchange.usage)))
        await _say(send, responses.event(b"[DONE]"))
    except RequestError as error:
        line["error"] = error.code or error.param or "failed"
        await _say(send, responses.event(error.body))
    await _say(send, b"", False)
    if service.settings.log_contents:
        line["answers"] = texts


async def _from(first: Any, pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for piece in pieces:
        yield piece


async def _say(send: Send, content: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": more})


def without_pictures(message: Any, key: str = "") -> Any:
    """A message for the log: of texts that are no words, addresses of pictures for one, the beginnings."""
    if isinstance(message, dict):
        return {name[:LOGGED]: without_pictures(value, name) for name, value in message.items()}
    if isinstance(message, list):
        return [without_pictures(one) for one in message]
    if isinstance(message, str) and key not in WORDS and len(message) > LOGGED:
        return f"{message[:LOGGED]}..."
    return message
