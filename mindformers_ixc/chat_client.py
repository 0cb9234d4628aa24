"""A client of a server that speaks OpenAI's `/v1/chat/completions`, on the standard library alone.

What a server of this model adds to the protocol (`hd_num`, `num_beams`, `mode` and the like) are further fields of a
request; any other server will do as long as none of those are asked for.
"""
from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

from mindformers_ixc.errors import ServerError
from mindformers_ixc.sections import is_whole

# The variable that OpenAI's own client takes its key from.
KEY_VARIABLE = "OPENAI_API_KEY"

# The variable of this package's own server; unlike its command line other users of the machine cannot read it.
OWN_KEY_VARIABLE = "MINDFORMERS_IXC_API_KEY"

# Answers of a server that is busy or about to restart: the same request may succeed later.
BUSY = (429, 502, 503)

# An answer that was not there in time: the same request would take as long again, so it is not repeated.
LATE = 504

# Seconds before a request that met a busy server is sent again, one after the other, and what a server may ask for.
WAITS, LONGEST_WAIT = (1.0, 4.0, 16.0), 60.0

# Seconds without a byte after which a server is given up: a long answer comes whole at its end.
TIMEOUT = 1800.0

# Bytes of an answer that is no JSON which a message shows.
SHOWN = 120

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Answer:
    """What a server has answered.

    Attributes:
        text: of the first choice.
        finish_reason: why it ended, such as `stop` or `length`.
        usage: tokens of prompt and answer, as the server counts them.
    """

    text: str
    finish_reason: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)


class ChatClient:
    """Asks one server; may be used from several threads.

    Args:
        server: its address, with or without `/v1` at the end.
        api_key: what it asks for; by default the variable `variable`. It is sent to this server only.
        timeout: seconds without a byte after which it is given up.
        waits: seconds before a request that met a busy server is sent again.
        variable: of the environment.
        option: what else takes a key, for sentences; with ` or ` behind it.

    Raises:
        ServerError: when the address is none, or the key cannot be sent.
    """

    def __init__(self, server: str, api_key: str | None = None, timeout: float = TIMEOUT,
                 waits: Sequence[float] = WAITS, variable: str = KEY_VARIABLE, option: str = "--api_key or "):
        self.root, self.key_from = _root(server), f"{option}{variable}"
        self.api_key = ((os.environ.get(variable) if api_key is None else api_key) or "").strip()
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ServerError(f"The key of {self.key_from} has a character that no header of HTTP may have.")
        self.timeout, self.waits = timeout, tuple(waits)
        # a proxy of the environment cannot reach this machine's own ports
        local = urlsplit(self.root).hostname in _LOOPBACK
        handlers = [_NoRedirect(), *([urllib.request.ProxyHandler({})] if local else [])]
        self._opener = urllib.request.build_opener(*handlers)

    def models(self) -> list[dict]:
        """The models that the server has: `id`, the name, and what else the server says of each.

        Raises:
            ServerError: when it does not answer, or is no such server.
        """
        found = self._json("/v1/models").get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
            raise ServerError(f"{self.root}/v1/models lists no models; is this a server of OpenAI's protocol?")
        return found

    def health(self) -> dict:
        """What `/health` says; `{}` for a server that has no such page.

        Raises:
            ServerError: when the server does not answer.
        """
        try:
            return self._json("/health")
        except ServerError as error:
            if error.status is None or error.status in (*BUSY, LATE):
                raise
            return {}

    def complete(self, messages: Sequence[Mapping[str, Any]], model: str, **fields: Any) -> Answer:
        """The answer to a conversation.

        Args:
            messages: in OpenAI's form; `text_part` and `image_part` make the parts of a content.
            model: `id` of one of `models`.
            **fields: of the request: `max_tokens`, `temperature`, `stop`, and what a server of this model adds,
                `num_beams`, `hd_num`, `mode`, `repetition_penalty`, `meta_instruction`. One that is `None` is left out.

        Raises:
            ServerError: when the server does not answer, or refuses the request; `status` tells which.
        """
        found = self.ask(_request(messages, model, fields))
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self.root} has answered without a choice: {_cut(json.dumps(found))}") from error
        return Answer(text or "", choice.get("finish_reason") or "", found.get("usage") or {})

    def ask(self, request: Mapping[str, Any]) -> dict:
        """What the server answers to a request with all of its fields; errors as of `complete`."""
        return self._of_form(self._json("/v1/chat/completions", dict(request)))

    def stream(self, messages: Sequence[Mapping[str, Any]], model: str, **fields: Any) -> Iterator[str]:
        """The answer as it comes, piece by piece; arguments and errors as of `complete`.

        Who stops iterating and closes the iterator closes the connection, which ends the answer on the server.
        """
        with closing(self.events(_request(messages, model, fields))) as events:
            for event in events:
                for choice in event.get("choices") or ():
                    piece = (choice.get("delta") or {}).get("content")
                    if piece:
                        yield piece

    def events(self, request: Mapping[str, Any]) -> Generator[dict, None, None]:
        """The events of a streamed answer as they come; errors and what ends it as with `stream`.

        Args:
            request: all of its fields but `stream`.
        """
        with closing(self._open("/v1/chat/completions", {**request, "stream": True})) as reply:
            yield from self._events(reply)

    def _events(self, reply: http.client.HTTPResponse) -> Iterator[dict]:
        """The server-sent events of a stream up to its end."""
        try:
            for line in reply:
                if not line.startswith(b"data:"):       # empty lines, comments that keep a connection open
                    continue
                content = line[5:].strip()
                if content == b"[DONE]":
                    return
                event = self._parse(content)
                if "error" in event:
                    raise ServerError(_sentence(event) or f"{self.root} has ended the stream with an error.")
                yield self._of_form(event)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"{self.root} has stopped answering in the middle: {_reason(error)}.") from error
        raise ServerError(f"{self.root} has ended its answer before it was whole.")

    def _json(self, path: str, body: dict | None = None) -> dict:
        """The object that the server answers with."""
        for wait in (*self.waits, None):
            try:
                with closing(self._open(path, body)) as reply:
                    return self._parse(self._read(reply))
            except ServerError as error:
                if wait is None or error.status not in BUSY:
                    raise
                time.sleep(min(error.retry_after or wait, LONGEST_WAIT))
        raise AssertionError("the last try returns or raises")

    def _of_form(self, found: dict) -> dict:
        """An answer or an event, whose texts and counts are what callers take them for; what is not said may lack."""
        choices, usage = found.get("choices"), found.get("usage")
        if (choices is None or (isinstance(choices, list) and all(map(_is_choice, choices)))) and _is_usage(usage):
            return found
        raise ServerError(f"{self.root} has answered in another form than OpenAI's: {_cut(json.dumps(found))}")

    def _open(self, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json, text/event-stream"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.root}{path}", data, headers)
            return self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            with closing(error):
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{self.root} does not answer: {_reason(error)}. Is the server running, and is this its "
                              "address?") from error

    def _refusal(self, error: urllib.error.HTTPError) -> ServerError:
        """What is said of an answer that is none."""
        try:
            content = self._read(error)
        except ServerError:
            content = b""
        try:
            sentence = _sentence(json.loads(content))
        except ValueError:
            sentence = ""
        if error.code in (401, 403) and not self.api_key:
            sentence = f"{sentence or 'The server asks for a key.'} Give it by {self.key_from}."
        elif 300 <= error.code < 400:
            sentence = f"{self.root} sends elsewhere, to {error.headers.get('Location')}; give that address."
        elif not sentence:
            shown = _cut(content.decode("utf-8", "replace"))
            sentence = f"{self.root} answers {error.code} {error.reason}{': ' if shown else ''}{shown}."
        after = error.headers.get("Retry-After") or ""
        return ServerError(sentence, error.code, float(after) if after.isdigit() else None)

    def _read(self, reply: IO[bytes]) -> bytes:
        try:
            return reply.read()
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.root} has stopped answering in the middle: {_reason(error)}.") from error

    def _parse(self, content: bytes) -> dict:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"{self.root} answers with something else than JSON: "
                              f"{_cut(content.decode('utf-8', 'replace'))}. Is this a server of OpenAI's protocol?")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow a redirection to another server."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """See `urllib`; gives no request, which makes the redirection an error."""


def text_part(text: str) -> dict:
    """A text as a part of a message's content."""
    return {"type": "text", "text": text}


def image_part(content: bytes, kind: str = "image/png") -> dict:
    """A picture's file as a part of a message's content.

    Args:
        content: of the file.
        kind: its media type.
    """
    return {"type": "image_url", "image_url": {"url": file_url(content, kind)}}


def file_url(content: bytes, kind: str) -> str:
    """A file as a data URL; arguments as of `image_part`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _request(messages: Sequence[Mapping[str, Any]], model: str, fields: Mapping[str, Any]) -> dict:
    given = {name: value for name, value in fields.items() if value is not None}
    return {"model": model, "messages": list(messages), **given}


def _root(server: str) -> str:
    """An address without what stands behind the port, or in front of `/v1`."""
    try:
        parts = urlsplit(server.strip())
        is_one = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
        _ = parts.port      # a ValueError for what is none
    except ValueError:
        is_one = False
    if not is_one:
        raise ServerError(f"{server!r} is no address of a server; give one as http://127.0.0.1:8000.")
    return server.strip().rstrip("/").removesuffix("/v1").rstrip("/")


def _is_choice(choice: object) -> bool:
    if not isinstance(choice, dict):
        return False
    said = [choice.get(name) for name in ("delta", "message")]
    return all(one is None or (isinstance(one, dict) and isinstance(one.get("content"), (str, type(None))))
               for one in said)


def _is_usage(usage: object) -> bool:
    return usage is None or (isinstance(usage, dict) and all(
        usage.get(name) is None or is_whole(usage[name], 0) for name in ("prompt_tokens", "completion_tokens")))


def _sentence(body: Any) -> str:
    """What OpenAI's form of an error says, with the field that it is about."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return _plain(error)
    if not isinstance(error, dict) or not error.get("message"):
        return ""
    message, name = _plain(str(error["message"])), error.get("param")
    return message if not name or str(name) in message else f"{_plain(str(name))}: {message}"


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(error).__name__


def _cut(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _plain(text: str) -> str:
    """A server's text in one line, with nothing in it that moves a terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in " ".join(text.split()))
