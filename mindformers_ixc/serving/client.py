"""A client of this package's own server: questions of a chat as requests."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mindformers_ixc.chat_client import OWN_KEY_VARIABLE, ChatClient, file_url, text_part
from mindformers_ixc.errors import ConfigError, GenerationError, PromptError, ServerError
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER
from mindformers_ixc.sections import is_whole
from mindformers_ixc.serving.responses import IMAGE_KEYS

# Seconds that a server may be silent; between the pieces of an answer it says that it is still there. One that comes
# whole, as with beams, has the time of `ChatClient`.
SILENCE = 120.0

# Types of data URLs by endings of videos' names, where they are not `video/ENDING`.
_VIDEO_TYPES = {"mov": "quicktime", "avi": "x-msvideo", "mkv": "x-matroska", "mpg": "mpeg", "ogv": "ogg",
                "flv": "x-flv", "wmv": "x-ms-wmv", "ts": "mp2t", "3gp": "3gpp"}

# What is to be done where a server says other things of its models than this release knows.
_OTHER_RELEASE = "it is of another release of this package perhaps; use the same one here."


class Client:
    """Asks a server of this package.

    Args:
        address: such as `http://127.0.0.1:8000`, with or without `/v1`.
        key: that the server wants; by default the variable `MINDFORMERS_IXC_API_KEY`, empty for none.

    Raises:
        ConfigError: for what is no address.
    """

    def __init__(self, address: str, key: str | None = None):
        try:
            make = partial(ChatClient, address if "://" in address else f"http://{address}", key,
                           variable=OWN_KEY_VARIABLE, option="")
            self._client, self._patient = make(timeout=SILENCE), make()
        except ServerError as error:
            raise ConfigError(f"--server: {error}") from error

    def models(self) -> list[dict]:
        """What the server has.

        Raises:
            ConfigError: when it cannot be asked, or is none of this package's.
            GenerationError: with its sentence, when it refuses.
        """
        with _as_errors():
            models = self._client.models()
        if not models or "images" not in models[0]:
            raise ConfigError(f"{self._client.root} answers, but is no server of this package; start one by "
                              "`mindformers serve`.")
        if not all(isinstance(one.get("mode"), str) for one in models):
            raise ConfigError(f"{self._client.root} does not say the mode of each of its models; {_OTHER_RELEASE}")
        return models

    def chat(self, request: Mapping[str, Any]) -> Generator[dict, None, None]:
        """The events of a streamed answer; of one that is not, the answer itself. Who stops iterating ends it.

        Raises:
            ConfigError: when the server cannot be asked.
            GenerationError: with the server's sentence, when it refuses or fails.
        """
        with _as_errors():
            if request.get("stream"):
                yield from self._client.events(request)
            else:
                yield self._patient.ask(request)


def images_of(model: Mapping[str, Any]) -> ImageProcessor:
    """How a server cuts pictures, by what it says of a model; what a newer one says beside that is left out.

    Raises:
        ConfigError: when it cannot be understood.
    """
    said = model["images"]
    try:
        given = {name: said[name] for name in IMAGE_KEYS if name in said}
        if not all(isinstance(value, str) or is_whole(value, 1) for value in given.values()):
            raise TypeError(f"images is {said}")
        return ImageProcessor(**given)
    except (PromptError, TypeError) as error:
        raise ConfigError(f"The server does not say how it cuts pictures in a form that is known here; "
                          f"{_OTHER_RELEASE}") from error


@contextlib.contextmanager
def _as_errors() -> Iterator[None]:
    """What a server says as the errors of this package's commands."""
    try:
        yield
    except ServerError as error:
        raise (ConfigError if error.status is None else GenerationError)(str(error)) from error


def data_url(source: bytes | str | os.PathLike) -> str:
    """A picture's bytes, or a video's file, as a data URL."""
    if isinstance(source, bytes):
        # what it is shows in its bytes; the name of the type is for form
        return file_url(source, "image/png")
    ending = Path(source).suffix[1:].lower()
    return file_url(Path(source).read_bytes(), f"video/{_VIDEO_TYPES.get(ending, ending)}")


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
    return [text_part(text)] if text else []


def _picture(source: bytes | str | os.PathLike) -> dict:
    url = data_url(source)
    kind = "video_url" if url.startswith("data:video/") else "image_url"
    return {"type": kind, kind: {"url": url}}


def decoding_fields(options: Mapping[str, Any]) -> dict:
    """Decoding options of this package as fields of a request.

    Raises:
        GenerationError: for one that a server does not have.
    """
    if options.get("prompt_lookup"):
        raise GenerationError("prompt_lookup is not something that a server does; set it to 0.")
    found = {name: options[name] for name in ("repetition_penalty", "seed") if options.get(name) is not None}
    found["max_completion_tokens"] = options["max_new_tokens"]
    if options.get("num_beams", 1) > 1:
        found["num_beams"] = options["num_beams"]
    if options.get("do_sample"):
        found["temperature"] = options.get("temperature", 1.0)
        found.update({name: options[name] for name in ("top_p", "top_k") if options.get(name) is not None})
    return found
