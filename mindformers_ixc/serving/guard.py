"""What every request passes before anything is done for it: host, origin, key, type and size; and the request log."""
from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mindformers_ixc.serving.limits import LOOPBACK, is_loopback
from mindformers_ixc.serving.responses import new_id
from mindformers_ixc.serving.settings import ServerSettings
from mindformers_ixc.serving.wire import RequestError

# Paths that are served without a key: they hold nothing of anybody's.
OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")

# Sent with every response: nothing here is for frames, other sites or guesses of a type.
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"),
           (b"x-frame-options", b"DENY"), (b"cross-origin-resource-policy", b"same-origin")]

# Bytes that the head of a request may have.
HEAD_BYTES = 32 << 10

# Characters of a request's id that a client may give.
LONGEST_ID = 64

# What a client gets to know of an error that nobody foresaw.
FAILED = "The server failed; its log has more."

# Where a request's scope says that too many connections are open.
CROWDED = "crowded"

# Headers that pages of other sites may send in any case, and what they may read of an answer's.
ALWAYS_SENT, READABLE = ("authorization", "content-type"), b"retry-after, x-request-id"


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value; of several the first one."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def host_of(value: str) -> str:
    """The name in a Host header, without port and brackets."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]*))(?::\d*)?", value.strip().lower())
    return value if match is None else match[1] or match[2] or ""


class Guard:
    """The outermost application.

    Args:
        app: what is guarded.
        settings: of the server.
        host: that is listened on; on loopback, requests for other names are refused, since a page in a browser could
            have made a name of its own lead here.
        names: further names in the Host header that are served then.
        log: gets one object a request.
        responded: told every status.
        failed: told errors that were not foreseen.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, host: str, names: tuple[str, ...] = (),
                 log: Callable[[dict], None] = lambda line: None,
                 responded: Callable[[int], None] = lambda status: None,
                 failed: Callable[[BaseException], None] = lambda error: None):
        self.app, self.settings, self.log, self.responded, self.failed = app, settings, log, responded, failed
        self.names = {*LOOPBACK, host.lower(), *map(str.lower, names)} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            else:
                await self.app(scope, receive, send)
            return
        start, state = time.monotonic(), {"status": 0}
        client = scope.get("client")
        line: dict[str, Any] = {"time": time.time(), "id": self._id(scope), "client": client[0] if client else "",
                                "method": scope["method"], "path": scope["path"][:200]}
        scope.setdefault("state", {})["line"] = line
        origin = self._named_origin(scope)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                more = [(b"x-request-id", line["id"].encode())]
                if origin:
                    more += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"),
                             (b"access-control-expose-headers", READABLE)]
                message = {**message, "headers": [*message.get("headers", []), *HEADERS, *more]}
            await send(message)

        try:
            await self._pass(scope, receive, answer)
        except RequestError as error:
            line["error"] = error.message if self.settings.log_contents else error.code or error.param or "refused"
            if not state["status"]:
                await refuse(error)(scope, receive, answer)
        except asyncio.CancelledError:      # the server ends, and a step takes so long that nobody could be told
            line["error"] = "shutting_down"
            if not state["status"]:
                await refuse(RequestError("The server has shut down before this answer was there; ask another one, or "
                                          "later.", None, 503, "shutting_down", 5))(scope, receive, answer)
        except Exception as error:      # none is foreseen; a client gets no more than that
            self.failed(error)
            line["error"] = type(error).__name__
            if not state["status"]:
                await refuse(RequestError(FAILED, None, 500, "failed"))(scope, receive, answer)
        finally:
            line["status"], line["seconds"] = state["status"] or 499, round(time.monotonic() - start, 4)
            self.responded(line["status"])
            self.log(line)

    async def _pass(self, scope: Scope, receive: Receive, answer: Send) -> None:
        """Lets a request through to the application.

        Raises:
            RequestError: when it is not let through.
        """
        if scope["state"].get(CROWDED):
            raise RequestError("More connections are open than this server keeps; close some, or try again later.",
                               None, 503, "too_many_connections", 2)
        host = header(scope, b"host")
        size = len(scope.get("raw_path") or b"") + sum(len(key) + len(value) for key, value in scope["headers"])
        if size > HEAD_BYTES:
            raise RequestError(f"The head of the request has more than {HEAD_BYTES} bytes.", None, 431, "too_large")
        if sum(key == b"host" for key, _ in scope["headers"]) > 1:
            raise RequestError("The request has several Host headers.", None, 400, "bad_request")
        if self.names is not None and host_of(host or "") not in self.names:
            named = f"under the name {host_of(host)[:80]!r}; --allow_host serves it" if host else \
                "without a Host header, which says under which name"
            raise RequestError(f"This server listens on this machine only and was asked for {named}.", None, 403,
                               "wrong_host")
        self._check_origin(scope, host)
        if scope["method"] == "OPTIONS" and self._named_origin(scope):
            await answer({"type": "http.response.start", "status": 204, "headers": [
                (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
                (b"access-control-allow-headers", _sendable(scope))]})
            await answer({"type": "http.response.body", "body": b""})
            return
        if scope["path"] not in OPEN_PATHS:
            self._check_key(scope)
        await self.app(scope, receive, answer)

    def _id(self, scope: Scope) -> str:
        given = header(scope, b"x-request-id") or ""
        return given if given.replace("-", "").replace("_", "").isalnum() and given.isascii() \
            and len(given) <= LONGEST_ID else new_id().replace("chatcmpl", "req")

    def _named_origin(self, scope: Scope) -> str | None:
        origin = header(scope, b"origin")
        return origin if origin is not None and origin in self.settings.origins else None

    def _check_origin(self, scope: Scope, host: str | None) -> None:
        """Refuses what a page of another site sends; a page of this one names it as its origin."""
        origin = header(scope, b"origin")
        if origin is None or scope["method"] in ("GET", "HEAD") or self._named_origin(scope):
            return
        if origin.lower() not in (f"http://{(host or '').lower()}", f"https://{(host or '').lower()}"):
            raise RequestError(f"Pages of {origin[:100]} may not ask here; --allow_origin allows one.", None, 403,
                               "wrong_origin")

    def _check_key(self, scope: Scope) -> None:
        key = self.settings.api_key
        if not key:
            return
        kind, _, given = (header(scope, b"authorization") or "").partition(" ")
        # compared in whole, so that the time tells nothing of how much is right
        if not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) or kind.lower() != "bearer":
            raise RequestError("The key is missing or wrong; send the header Authorization: Bearer KEY.", None, 401,
                               "invalid_api_key")


def _sendable(scope: Scope) -> bytes:
    """Headers that a page of an allowed origin may send: those that it asks for, as OpenAI's client has its own."""
    asked = (header(scope, b"access-control-request-headers") or "").lower().replace(" ", "").split(",")
    return ", ".join(dict.fromkeys([*ALWAYS_SENT, *(name for name in asked if re.fullmatch(r"[a-z0-9-]{1,64}", name))])
                     ).encode()


def refuse(error: RequestError) -> JSONResponse:
    """The response of a refusal."""
    # what was refused unread may still be coming
    close = error.status in (401, 403, 408, 413, 415) or error.code == "too_many_connections"
    headers = {"Connection": "close"} if close else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, min(error.status, 599), headers)


async def read_body(scope: Scope, receive: Receive, settings: ServerSettings) -> bytes:
    """The body of a JSON request.

    Raises:
        RequestError: when it is of another type, too large, or too slow.
        ClientGone: when the client went away.
    """
    kind = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # what a page of another site could send without asking first has another type
        raise RequestError(f"Content-Type is {kind[:60]!r}; it must be application/json.", None, 415, "wrong_type")
    if header(scope, b"content-encoding") not in (None, "identity"):
        raise RequestError("Content-Encoding is not read; send the body as it is.", None, 415, "wrong_encoding")
    limits = settings.limits
    too_large = RequestError(f"The body has more than {limits.body} bytes, the most that is taken.", None, 413,
                             "too_large")
    length = header(scope, b"content-length") or "0"
    if not length.isdigit() or len(length) > 18 or int(length) > limits.body:
        raise too_large
    try:
        return await asyncio.wait_for(_all_of(receive, limits.body, too_large), limits.body_seconds)
    except asyncio.TimeoutError as error:
        raise RequestError(f"The body was not there within {limits.body_seconds:g} s.", None, 408,
                           "too_slow") from error


async def _all_of(receive: Receive, most: int, too_large: RequestError) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        content += message.get("body", b"")
        if len(content) > most:
            raise too_large
        if not message.get("more_body", False):
            return bytes(content)


class ClientGone(Exception):
    """The client went away before its request was there."""
