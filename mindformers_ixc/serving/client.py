"""A client of a server's own: the standard library and nothing else."""
from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mindformers_ixc.errors import ConfigError, GenerationError
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER

# Seconds that a server may be silent; between the pieces of an answer it says that it is still there.
SILENCE = 120.0

# Types of data URLs by endings of videos' names, where they are not `video/ENDING`.
_VIDEO_TYPES = {"mov": "quicktime", "avi": "x-msvideo", "mkv": "x-matroska", "mpg": "mpeg", "ogv": "ogg",
                "flv": "x-flv", "wmv": "x-ms-wmv", "ts": "mp2t", "3gp": "3gpp"}


class Client:
    """Asks a server.

    Args:
        address: such as `http://127.0.0.1:8000`, with or without `/v1`.
        key: that the server wants; empty for none.

    Raises:
        ConfigError: for what is no address.
    """

    def __init__(self, address: str, key: str = ""):
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            self.port = parts.port
        except ValueError as error:
            raise ConfigError(f"--server {address} is no address; write one like http://127.0.0.1:8000.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"--server {address} is no address; write one like http://127.0.0.1:8000.")
        self.address, self.key, self.scheme, self.host = address, key, parts.scheme, parts.hostname
        path = parts.path.rstrip("/")
        self.base = path[:-3] if path.endswith("/v1") else path

    def models(self) -> list[dict]:
        """What the server has.

        Raises:
            ConfigError: when it cannot be asked, or is none of this package's.
        """
        with self._connection() as connection:
            found = json.loads(self._ask(connection, "GET", "/v1/models").read())
        models = found.get("data") if isinstance(found, dict) else None
        if not isinstance(models, list) or not models or "images" not in models[0]:
            raise ConfigError(f"{self.address} answers, but is no server of this package; start one by `mindformers "
                              "serve`.")
        return models

    def chat(self, request: Mapping[str, Any]) -> Generator[dict, None, None]:
        """The events of a streamed answer; of one that is not, the answer itself. Who stops iterating ends it.

        Raises:
            GenerationError: with the server's sentence, when it refuses or fails.
        """
        with self._connection() as connection:
            answer = self._ask(connection, "POST", "/v1/chat/completions", json.dumps(request).encode())
            if not request.get("stream"):
                yield json.loads(answer.read())
                return
            while line := answer.readline():
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise GenerationError(str(event["error"]["message"]))
                yield event

    def _connection(self) -> _Closing:
        if self.scheme == "https":
            return _Closing(http.client.HTTPSConnection(self.host, self.port, timeout=SILENCE,
                                                        context=ssl.create_default_context()))
        return _Closing(http.client.HTTPConnection(self.host, self.port, timeout=SILENCE))

    def _ask(self, connection: http.client.HTTPConnection, method: str, path: str,
             body: bytes | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, self.base + path, body, headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise ConfigError(f"The server {self.address} does not answer ({reason}); see whether `mindformers serve` "
                              "runs there.") from error
        if answer.status != 200:
            raise GenerationError(f"The server {self.address} says: {_sentence(answer)}")
        return answer


class _Closing:
    """Closes a connection at the end of a block."""

    def __init__(self, connection: http.client.HTTPConnection):
        self.connection = connection

    def __enter__(self) -> http.client.HTTPConnection:
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def _sentence(answer: http.client.HTTPResponse) -> str:
    """What a server says of a refusal."""
    try:
        return str(json.loads(answer.read(1 << 16))["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}."


def data_url(source: bytes | str | os.PathLike) -> str:
    """A picture's bytes, or a video's file, as a data URL."""
    if isinstance(source, bytes):
        # what it is shows in its bytes; the name of the type is for form
        return "data:image/png;base64," + base64.b64encode(source).decode()
    ending = Path(source).suffix[1:].lower()
    return (f"data:video/{_VIDEO_TYPES.get(ending, ending)};base64,"
            + base64.b64encode(Path(source).read_bytes()).decode())


def messages_of(query: Mapping[str, Any]) -> list[dict]:
    """Arguments of `Processor.encode_chat` as messages.

    Raises:
        GenerationError: when places and pictures differ in number.
    """
    pictures = list(query.get("images") or [])
    turns: list[tuple[str, str]] = []
    for asked, answered in query.get("history") or ():
        turns += [("user", asked), ("assistant", answered)]
    turns.append(("user", query["query"]))
    places = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "user")
    if places == 0 and len(pictures) == 1:          # a single picture may go without a place
        turns[-1] = ("user", IMAGE_PLACEHOLDER + turns[-1][1])
    elif places != len(pictures):
        raise GenerationError(f"The questions have {places} {IMAGE_PLACEHOLDER} for {len(pictures)} pictures; give "
                              "every picture its place.")
    found: list[dict] = [{"role": "system", "content": query["meta_instruction"]}] \
        if query.get("meta_instruction") else []
    for role, text in turns:
        if role == "assistant" or IMAGE_PLACEHOLDER not in text:
            found.append({"role": role, "content": text})
            continue
        parts = text.split(IMAGE_PLACEHOLDER)
        content = _text(parts[0])
        for part in parts[1:]:
            content += [_picture(pictures.pop(0)), *_text(part)]
        found.append({"role": role, "content": content})
    return found


def _text(text: str) -> list[dict]:
    return [{"type": "text", "text": text}] if text else []


def _picture(source: bytes | str | os.PathLike) -> dict:
    url = data_url(source)
    kind = "video_url" if url.startswith("data:video/") else "image_url"
    return {"type": kind, kind: {"url": url}}


def decoding_fields(options: Mapping[str, Any], known: Sequence[str] = ("repetition_penalty", "seed")) -> dict:
    """Decoding options of this package as fields of a request.

    Raises:
        GenerationError: for one that a server does not have.
    """
    if options.get("prompt_lookup"):
        raise GenerationError("prompt_lookup is not something that a server does; set it to 0.")
    found = {name: options[name] for name in known if options.get(name) is not None}
    found["max_completion_tokens"] = options["max_new_tokens"]
    if options.get("num_beams", 1) > 1:
        found["num_beams"] = options["num_beams"]
    if options.get("do_sample"):
        found["temperature"] = options.get("temperature", 1.0)
        found.update({name: options[name] for name in ("top_p", "top_k") if options.get(name) is not None})
    return found
